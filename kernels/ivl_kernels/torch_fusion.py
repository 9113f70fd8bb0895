"""The torch backend of the solvers: what the CPU runs, and the reference that the kernel is tested against.

Row by row, with the passes over columns in torch and the rest in Python's floats, and no more iterations than needed.
Each row is tried with the plain sums of `ivl_kernels.torch_moments` first; what these cannot tell is solved here, with
sums of second order as in `ivl_kernels.fusion`.
"""

import math

import torch

from ivl_kernels.fusion import ITERATIONS, LARGEST_DIFFERENCE, LAST_MOVE, LAST_STEP
from ivl_kernels.torch_moments import moments
from ivl_kernels.value_add import steered_rows

# exp() of more than this comes near float32's end when thousands of columns are added up.
LARGEST_EXPONENT = 60.0


@torch.no_grad()
def solve_torch(
    base: torch.Tensor,
    plus: torch.Tensor,
    minus: torch.Tensor | None,
    limits: torch.Tensor,
    targets: torch.Tensor | None,
    row_index: torch.Tensor | None,
    vocab_map: torch.Tensor | None,
) -> torch.Tensor:
    """Solve every row; see `ivl_kernels.fusion_weights` for the arguments, which were checked.

    Args:
        base: `[rows, V_base]`.
        plus: `[n, V_value]`.
        minus: `[n, V_value]`, or None.
        limits: `[n]` float32; the sign is the direction, the size the largest weight.
        targets: `[n]` float32, or None for the divergence of `plus` from `minus`.
        row_index: `[n]` or None.
        vocab_map: `[V_base]` or None.

    Returns:
        `[3, n]` float32: weights, divergences, targets.
    """
    rows, sources, chosen = steered_rows(base, limits, row_index)
    if not rows or 0 in (base.shape[1], plus.shape[1]):
        return torch.zeros(3, plus.shape[0], device=base.device, dtype=torch.float32)
    columns = None
    if vocab_map is not None:
        columns = vocab_map + 1  # a column of zeros stands in front: -1 points to it
    wanted = None if targets is None else targets.tolist()
    quick = moments(base.shape[1], plus.shape[1], base.device)
    results = [[0.0] * plus.shape[0] for _ in range(3)]
    for row, source, bound in zip(rows, sources, chosen, strict=True):
        value = plus[source].float()
        anti = None if minus is None else minus[source].float()
        delta = value if anti is None else torch.sub(value, anti, out=quick.delta)
        low, high = (end.item() for end in torch.aminmax(delta))
        target = None
        if not max(-low, high) <= LARGEST_DIFFERENCE:  # True for NaN too
            delta = clean_difference(delta)
            low, high = -LARGEST_DIFFERENCE, LARGEST_DIFFERENCE
        elif wanted is None:
            target = quick.target(anti, delta, low, high)
        if wanted is not None:
            target = max(0.0, wanted[source])  # 0 for NaN too
        elif target is None:
            if not math.isfinite(value.sum().item()):
                anti = torch.where(value.isfinite(), anti, float("-inf"))
            target = Curve(anti, delta).evaluate(1.0)[0]
        delta = align(delta, base.shape[1], columns)
        low, high = min(low, 0.0), max(high, 0.0)  # columns without a partner
        if bound < 0:
            delta, low, high = -delta, -high, -low
        logits = base[row].float()
        solved = quick.find(logits, delta, low, high, abs(bound), target)
        if solved is None:
            solved = find(Curve(logits, delta), abs(bound), target, wants_largest=wanted is not None)
        for result, number in zip(results, (math.copysign(solved[0], bound), solved[1], target), strict=True):
            result[source] = number
    return torch.tensor(results, device=base.device, dtype=torch.float32)


def clean_difference(delta: torch.Tensor) -> torch.Tensor:
    """Set what is not finite to 0 and cut what is too large."""
    delta = torch.where(delta.isfinite(), delta, 0.0)
    return delta.clamp(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE)


def align(delta: torch.Tensor, width: int, columns: torch.Tensor | None) -> torch.Tensor:
    """Bring differences to the base's columns, 0 where there is no partner."""
    if columns is not None:
        return torch.nn.functional.pad(delta, (1, 0)).index_select(0, columns)
    if delta.shape[0] < width:
        return torch.nn.functional.pad(delta, (0, width - delta.shape[0]))
    return delta if delta.shape[0] == width else delta[:width]


class Curve:
    """The divergence along a direction.

    Attributes:
        spread: Largest less smallest difference over the columns that the logits allow; not above 0: no weight changes
            anything.
        variance: Of the differences, at weight 0.
    """

    def __init__(self, logits: torch.Tensor, delta: torch.Tensor):
        """Take `logits` and `delta`, float32 `[V]`; `delta` is finite."""
        if not math.isfinite(logits.sum().item()):
            # Columns that are not allowed might as well not be there.
            allowed = logits.isfinite()
            logits, delta = logits[allowed], delta[allowed]
        self.spread = 0.0
        if not len(logits):
            return
        self.logits = logits
        self.shares = logits.softmax(0)
        low, high = (bound.item() for bound in torch.aminmax(delta))
        centre = torch.dot(self.shares, delta).item()
        self.spread, self.largest = high - low, high - centre
        self.centred = delta - centre
        self.first = self.shares * self.centred
        self.offset = self.first.sum().item()  # 0 up to rounding
        self.variance = torch.dot(self.first, self.centred).item()

    def evaluate(self, weight: float) -> tuple[float, float]:
        """Give the divergence at a weight, and the variance of `weight · delta` there."""
        if self.spread <= 0:
            return 0.0, 0.0
        sums = self.near_sums(weight) if weight * self.largest <= LARGEST_EXPONENT else self.far_sums(weight)
        if not sums[0] > -1.0:  # rounding, where differences hardly differ
            sums = self.far_sums(weight, shifts=True)
        growth, mean, second = sums
        total = 1.0 + growth
        mean /= total
        return max(0.0, mean - math.log1p(growth)), max(0.0, second / total - mean * mean)

    def near_sums(self, weight: float) -> tuple[float, float, float]:
        """Sums of `shares` times `expm1(e)`, `e · exp(e)` and `e² · exp(e)` with `e = weight · u`."""
        gains = (self.centred * weight).expm1_()
        growth = torch.dot(self.shares, gains).item()
        pull = torch.mul(self.first, gains)
        mean = weight * (pull.sum().item() + self.offset)
        return growth, mean, weight * weight * (torch.dot(pull, self.centred).item() + self.variance)

    def far_sums(self, weight: float, shifts: bool = False) -> tuple[float, float, float]:
        """The same sums where exp() might overflow: exponents are shifted by their largest, where that is large."""
        exponents, logs = self.centred * weight, self.logits.log_softmax(0)
        top = (logs + exponents).max().item()
        shifts = shifts or top > 1.0
        if shifts:
            exponents = exponents - top
        moved = torch.exp(logs + exponents)
        gains = torch.where(exponents.abs() < 0.5, self.shares * exponents.expm1(), moved - self.shares)
        # Where nothing is shifted, the sum of shares · exponents is 0 up to rounding: apart, it keeps small sums exact.
        mean = torch.dot(moved, exponents) if shifts else gains.dot(exponents) + self.shares.dot(exponents)
        return gains.sum().item(), mean.item(), torch.dot(moved * exponents, exponents).item()


def find(curve: Curve, limit: float, target: float, wants_largest: bool) -> tuple[float, float]:
    """Find the weight in `[0, limit]` where a curve meets `target`.

    Args:
        curve: The divergence along the direction.
        limit: Largest weight, above 0.
        target: Divergence wanted; may be infinite.
        wants_largest: Give `limit` where the curve is flat, else 0; it is also where the search begins.

    Returns:
        The weight, and the divergence there.
    """
    if target <= 0:
        return 0.0, 0.0
    if curve.spread <= 0:
        return (limit if wants_largest else 0.0), 0.0
    low, high, is_open = 0.0, limit, True
    # For small weights the divergence is weight² · variance / 2: a bound for a direction so steep that it saturates.
    weight = min(limit, math.inf if wants_largest else 1.0, 2.0 * math.sqrt(2.0 * target / max(curve.variance, 1e-30)))
    best, best_divergence, moved = 0.0, 0.0, 2.0 * limit
    for _ in range(ITERATIONS):  # ends early; between the plateaus of a direction that saturates it takes most
        divergence, variance = curve.evaluate(weight)
        below = divergence <= target
        if below:
            if weight >= limit:
                return limit, divergence
            low = weight
        else:
            high, is_open = weight, False
        if abs(divergence - target) <= abs(best_divergence - target):
            best, best_divergence = weight, divergence
        step = math.inf
        if variance > 0.0 and target < math.inf:
            step = -2.0 * weight * (divergence - math.sqrt(divergence * target)) / variance
        newton = weight + step
        if abs(step) <= LAST_STEP and abs(step) * curve.spread <= LAST_MOVE:
            newton = min(max(newton, 0.0), limit)
            return newton, divergence + variance / weight * (newton - weight)
        moves_less = abs(step) <= 0.5 * moved
        following = newton if low <= newton <= high and moves_less else limit if is_open else 0.5 * (low + high)
        moved, weight = abs(following - weight), following
    return best, best_divergence
