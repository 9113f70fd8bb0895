"""The torch backend of the solvers: what the CPU runs.

Row by row, with no more iterations than needed. On a CPU a row is solved by `ivl_kernels.fused_rows` where numba is
installed; elsewhere, where exponents are too large for that, and where many threads share wide rows, with torch's
passes over columns.
"""

import math

import torch

from ivl_kernels.checks import load_compiled
from ivl_kernels.fusion import LARGEST_DIFFERENCE
from ivl_kernels.value_add import steered_rows
from ivl_kernels.weight_search import LARGEST_EXPONENT, find

fused_rows = load_compiled("fused_rows")
# Torch shares the columns of wider rows among threads; with this many (an estimate) it overtakes the one of numba.
SHARED_WIDTH, MANY_THREADS = 32768, 8


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
    width = max(base.shape[1], plus.shape[1])
    is_shared = width > SHARED_WIDTH and torch.get_num_threads() >= MANY_THREADS
    is_fused = fused_rows is not None and base.device.type == "cpu" and not is_shared
    by = FusedRows(width) if is_fused else TorchRows
    results = [[0.0] * plus.shape[0] for _ in range(3)]
    for row, source, bound in zip(rows, sources, chosen, strict=True):
        value = plus[source].float()
        anti = None if minus is None else minus[source].float()
        delta, low, high = by.subtract(value, anti)
        if not -LARGEST_DIFFERENCE <= low <= high <= LARGEST_DIFFERENCE:  # True for NaN too
            delta = clean_difference(delta)
            anti = None if anti is None else torch.where(value.isfinite(), anti, float("-inf"))
        # A target that is NaN counts as 0 too.
        target = by.divergence(anti, delta) if wanted is None else max(0.0, wanted[source])
        delta = align(delta, base.shape[1], columns)
        if bound < 0:
            delta = -delta
        weight, divergence = by.search(base[row].float(), delta, abs(bound), target, wanted is not None)
        for result, number in zip(results, (math.copysign(weight, bound), divergence, target), strict=True):
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


class FusedRows:
    """What a row takes, by `ivl_kernels.fused_rows`. `subtract` overwrites what it gave before."""

    def __init__(self, width: int):
        """Take memory for rows of this width."""
        self.delta, self.shares = fused_rows.memory(width)

    def subtract(self, value: torch.Tensor, anti: torch.Tensor | None) -> tuple[torch.Tensor, float, float]:
        """As in `TorchRows`."""
        if anti is None:
            return value, *fused_rows.bounds(value.numpy())
        delta = self.delta[: len(value)]
        low, high = fused_rows.subtract(value.numpy(), anti.numpy(), delta)
        return torch.from_numpy(delta), low, high

    def divergence(self, logits: torch.Tensor, delta: torch.Tensor) -> float:
        """As in `TorchRows`."""
        found = fused_rows.divergence(logits.numpy(), delta.numpy(), self.shares[: len(logits)])
        return TorchRows.divergence(logits, delta) if math.isnan(found) else found

    def search(
        self, logits: torch.Tensor, delta: torch.Tensor, limit: float, target: float, wants_largest: bool
    ) -> tuple[float, float]:
        """As in `TorchRows`."""
        arrays = logits.numpy(), delta.numpy(), self.shares[: len(logits)]
        weight, divergence = fused_rows.search(*arrays, limit, target, wants_largest)
        if math.isnan(divergence):
            return TorchRows.search(logits, delta, limit, target, wants_largest)
        return weight, divergence


class TorchRows:
    """What a row takes, by torch."""

    @staticmethod
    def subtract(value: torch.Tensor, anti: torch.Tensor | None) -> tuple[torch.Tensor, float, float]:
        """Give the difference, or `value` where there is no `anti`, and its bounds, of which one is NaN if it has one.

        All rows are float32 `[V]`.
        """
        delta = value if anti is None else value - anti
        return delta, *(bound.item() for bound in torch.aminmax(delta))

    @staticmethod
    def divergence(logits: torch.Tensor, delta: torch.Tensor) -> float:
        """KL(softmax(logits + delta) ‖ softmax(logits)) over the columns where a logit is finite; `delta` is."""
        return Curve(logits, delta).evaluate(1.0)[0]

    @staticmethod
    def search(
        logits: torch.Tensor, delta: torch.Tensor, limit: float, target: float, wants_largest: bool
    ) -> tuple[float, float]:
        """`ivl_kernels.weight_search.find` for such a divergence along `delta`."""
        curve = Curve(logits, delta)
        return find(Curve.evaluate, curve, curve.spread, curve.variance, limit, target, wants_largest)


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
        self.spread = self.variance = 0.0
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
        likeliest = (logs + exponents).argmax()
        shifts = shifts or (logs + exponents)[likeliest].item() > 1.0
        if shifts:  # by the differences, as products of huge weights are too coarse to be subtracted
            exponents = (self.centred - self.centred[likeliest]) * weight - logs[likeliest]
            exponents -= (logs + exponents).max()
        moved = torch.exp(logs + exponents)
        gains = torch.where(exponents.abs() < 0.5, self.shares * exponents.expm1(), moved - self.shares)
        # Where nothing is shifted, the sum of shares · exponents is 0 up to rounding: apart, it keeps small sums exact.
        mean = torch.dot(moved, exponents) if shifts else gains.dot(exponents) + self.shares.dot(exponents)
        return gains.sum().item(), mean.item(), torch.dot(moved * exponents, exponents).item()
