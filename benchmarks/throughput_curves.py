"""How the cost of one output token scales with concurrency, size of the value network, vocabulary and context."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from throughput_bound import bound, loads
from throughput_cases import CASES
from throughput_check import check
from throughput_models import Scale, Shape
from throughput_serving import Setup
from throughput_worker import Request, Worker, workers

OUTPUT_LEN = 16
CHECKED = [case for case in CASES if case.name in ("plain", "all")]


@dataclass(frozen=True)
class Point:
    """What is measured: decoding, all requests steered.

    Args:
        curve: What is varied.
        label: Its value.
        base: The base model.
        value: The value network.
        concurrency: Requests at once.
        context: Tokens of every prompt.
    """

    curve: str
    label: str
    base: Shape
    value: Shape
    concurrency: int = 16
    context: int = 64


def points(scale: Scale) -> list[Point]:
    """All points, those that share engines next to each other."""
    base, value = scale.base, scale.value
    many = scale.prompts >= 64
    found = [
        Point("concurrency", str(count), base, value, count, 16) for count in ((1, 4, 16, 64, 256) if many else (1, 4))
    ]
    lengths = (64, 256, 1024, 2048) if many else (64, 128)
    found += [Point("context length", f"{length:,}", base, value, 4, length) for length in lengths]
    sizes = [base]
    if many:
        sizes = [
            Shape(64, 1, 1, 1, 128, base.vocabulary, base.architecture, tied=True),
            Shape(128, 4, 2, 1, 384, base.vocabulary, base.architecture),
            Shape(384, 6, 6, 2, 768, base.vocabulary, base.architecture),
            base,
        ]
    for shape in sizes:
        found.append(Point("value network over base", f"1/{base.parameters / shape.parameters:.0f}", base, shape))
    for vocabulary in (32_000, 64_000, 152_000) if many else (4_000,):
        shapes = (replace(shape, vocabulary=vocabulary) for shape in (base, value))
        found.append(Point("vocabulary", f"{vocabulary:,}", *shapes))
    return found


def measure(
    setup: Setup, rounds: int, seed: int, say: Callable[[str], None], save: Callable[[dict[str, Any]], None]
) -> None:
    """Plain vLLM and ours at every point, in turns.

    Args:
        setup: Gives dtype, threads and device.
        rounds: At each point, after one that warms up.
        seed: Of the prompts.
        say: Told about the progress.
        save: Given the report, after every pair of engines.
    """
    chosen = points(setup.scale)
    longest = max(point.context for point in chosen) + OUTPUT_LEN
    most = max(point.concurrency for point in chosen)
    rates = setup.rates()
    by_shapes: dict[tuple[Shape, Shape], list[Point]] = {}
    for point in chosen:
        by_shapes.setdefault((point.base, point.value), []).append(point)
    curves: dict[str, list[dict[str, Any]]] = {point.curve: [] for point in chosen}
    checked: dict[str, Any] = {"checked": False, "why": "vLLM's dummy weights are in no folder for a reference to read"}
    for (base, value), together in by_shapes.items():
        scale = replace(setup.scale, base=base, value=value, prompts=most, input_len=(1, longest), output_len=(1, 1))
        # On a GPU, shapes of 7 B in every variation would fill the disk: there the other parts' checks have to do.
        here = setup.like(replace(scale, random_weights=setup.device == "cpu"))
        with workers({name: here.engine(name) for name in ("plain", "ours")}) as engines:
            for engine in engines.values():
                engine.answer()
            if here.scale.random_weights:
                with workers({"reference": here.reference()}) as started:
                    started["reference"].answer()
                    checked = check(here, engines, CHECKED, started["reference"])
            for point in together:
                found = _measure_point(point, engines, rounds, seed, scale.itemsize, rates)
                curves[point.curve].append(found)
                say(f"{point.curve} {point.label}: cost {found['cost']:.3f}, bound {found['cost_bound']:.3f}")
        measured = {name: points for name, points in curves.items() if points}
        report = {"check": checked, "rates": rates, "rounds": rounds, "curves": measured, "output_len": OUTPUT_LEN}
        save(report | {"points": sum(map(len, measured.values())), "points_wanted": len(chosen)})


def _measure_point(
    point: Point, engines: dict[str, Worker], rounds: int, seed: int, itemsize: int, rates: dict[str, float]
) -> dict[str, Any]:
    rng = random.Random(seed)
    requests = [
        Request([rng.randrange(1, point.value.vocabulary) for _ in range(point.context)], OUTPUT_LEN, 1.0)
        for _ in range(point.concurrency)
    ]
    plain, steered, run = [], [], None
    for number in range(rounds + 1):
        for name, found in (("plain", plain), ("ours", steered)):
            run = engines[name].call("run", requests if number else requests[:4])
            steps = [step.seconds / step.rows for step in run.steps if not step.prefill]
            if number:
                found.append(1000 * statistics.median(steps))
    ratios = [mine / theirs for mine, theirs in zip(steered, plain, strict=True)]
    steps = loads(requests, run)["decode"]
    limit = bound(steps, point.base, [(point.value, steps)], False, itemsize, rates)
    alone = bound(steps, point.base, [], False, itemsize, rates)
    return {
        "label": point.label,
        "concurrency": point.concurrency,
        "context": point.context,
        "base_parameters": point.base.parameters,
        "value_parameters": point.value.parameters,
        "plain_ms": statistics.median(plain),
        "steered_ms": statistics.median(steered),
        "bound_ms": 1000 * limit["seconds"] / sum(load.tokens for load in steps),
        "cost": statistics.median(ratios),
        "cost_spread": [min(ratios), max(ratios)],
        "cost_bound": limit["seconds"] / alone["seconds"],
        "share_bound_by_flops": limit["share_bound_by_flops"],
    }
