"""Searching the settings of training: one at a time, to either side, for as long as the validation loss falls."""

from collections.abc import Callable, Mapping, Sequence

Point = dict[str, float]


def search(
    loss: Callable[[Point], float], grid: Mapping[str, Sequence[float]], start: Point, rounds: int = 2
) -> tuple[Point, list[tuple[Point, float]]]:
    """Coordinate search on a grid.

    Along each axis in turn it goes to the better neighbour until neither is better, so the value that it ends at has a
    worse one on either side, unless it lies on the edge.

    Args:
        loss: Of a point; asked once for each.
        grid: Axis → its values in order.
        start: A point of the grid.
        rounds: Most times that each axis gets its turn; fewer where a round changed nothing.

    Returns:
        The best point, and every point that was tried with its loss, in order.
    """
    tried: dict[tuple[float, ...], float] = {}

    def measured(point: Point) -> float:
        key = tuple(point[axis] for axis in grid)
        if key not in tried:
            tried[key] = loss(point)
        return tried[key]

    best = dict(start)
    for _ in range(rounds):
        before = best
        for axis, values in grid.items():
            best = _climb(measured, best, axis, values)
        if best == before:
            break
    measured(best)  # where no axis has a choice
    return best, [(dict(zip(grid, key, strict=True)), found) for key, found in tried.items()]


def _climb(measured: Callable[[Point], float], point: Point, axis: str, values: Sequence[float]) -> Point:
    while True:
        place = values.index(point[axis])
        around = [{**point, axis: value} for value in values[max(0, place - 1) : place + 2]]
        better = min(around, key=measured)
        if measured(better) >= measured(point):
            return point
        point = better


def edges(chosen: Mapping[str, float], grid: Mapping[str, Sequence[float]]) -> list[str]:
    """The axes on whose edge a choice lies; an axis of one value is no choice."""
    return [axis for axis, values in grid.items() if len(values) > 1 and chosen[axis] in (min(values), max(values))]
