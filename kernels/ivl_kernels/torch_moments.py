"""The torch backend's quick way for one row: plain sums over columns, where they are exact enough.

`S_k(α) = Σ_j 2^(y_j + α·c·u_j) · u_j^k` with `y` the base's logits over log 2, `c = 1 / log 2` and `u` the differences
less their mean: from `S_0` to `S_3` follow the divergence, its slope and its curvature, all from one product of a
matrix and a vector. On a CPU `exp2()` takes a third of the time of `exp()`, a quarter of that of `expm1()`. The sums of
second order of `ivl_kernels.torch_fusion` stay for what these cannot do: divergences near 0, where
`α · S_1 / S_0 - log(S_0 / S_0(0))` cancels, and exponents near float32's end.
"""

import math
import threading

import torch

BITS = 1.0 / math.log(2.0)
# Exponents in which the weighted difference has more than this are left to the other way: third powers of differences
# would make the sums overflow.
LARGEST_EXPONENT = 60.0
# Divergences below these are left to the other way: in nats, and as a share of the largest difference of logits, whose
# rounding the target's plain formula has in it.
LEAST_DIVERGENCE, LEAST_SHARE = 1e-2, 3e-3
# The variance is a difference: below this share of the mean's square too much of it is rounding.
LEAST_VARIANCE = 1e-4
# Sums beyond these are taken again with the largest of the logits at 0.
LEAST_SUM, LARGEST_SUM = 1e-20, 1e20
EVALUATIONS = 6
# A step of third order is the last one if it moves no exponent by more than this, and the weight by no more than these:
# what is left to change is about the cube.
LAST_MOVE, LAST_STEP, LAST_SHARE = 0.1, 2e-2, 5e-2


_kept = threading.local()


def moments(width: int, value_width: int, device: torch.device) -> "Moments":
    """Buffers for rows of these widths; the last ones are kept, since memory that is new costs as much as the sums."""
    key = (width, value_width, device)
    if getattr(_kept, "key", None) != key:
        with torch.inference_mode(False):  # else they could not be written to outside of that mode
            _kept.key, _kept.moments = key, Moments(*key)
    return _kept.moments


def raise_two(logits: torch.Tensor, exponents: torch.Tensor, powers: torch.Tensor) -> float:
    """Write `logits` over log 2 into `exponents`, shifted if need be, and 2 to that into `powers`; give their sum."""
    torch.mul(logits, BITS, out=exponents)
    total = torch.exp2(exponents, out=powers).sum().item()
    if LEAST_SUM < total < LARGEST_SUM:
        return total
    torch.add(logits.amax() * -BITS, logits, alpha=BITS, out=exponents)
    return torch.exp2(exponents, out=powers).sum().item()


class Moments:
    """Sums for rows of one width, in buffers that all rows share: nothing of a row is left for the next."""

    def __init__(self, width: int, value_width: int, device: torch.device):
        """Take the columns of the base logits and of the value logits."""
        options = {"device": device, "dtype": torch.float32}
        self.powers = torch.empty(4, width, **options)  # of the centred differences
        ones, self.centred, self.square, self.cube = self.powers.unbind(0)
        ones.fill_(1.0)
        first, second = torch.empty(2, max(width, value_width), **options).unbind(0)
        self.shares, self.moved = first[:width], second[:width]
        self.expert, self.anti = first[:value_width], second[:value_width]
        self.delta, self.sums = torch.empty(value_width, **options), torch.empty(4, **options)

    def target(self, anti: torch.Tensor, delta: torch.Tensor, low: float, high: float) -> float | None:
        """KL(softmax(anti + delta) ‖ softmax(anti)).

        Args:
            anti: `[V_value]` float32.
            delta: `[V_value]` float32.
            low: Smallest of `delta`.
            high: Largest of `delta`.

        Returns:
            Nats; None where plain sums do not tell: something is not finite, or the divergence too small.
        """
        before = raise_two(anti, self.expert, self.anti)
        torch.add(self.expert, delta, alpha=BITS, out=self.expert)
        after = self.expert.exp2_().sum().item()
        if not (0.0 < before < math.inf and 0.0 < after < math.inf):
            return None
        divergence = torch.dot(self.expert, delta).item() / after - math.log(after / before)
        return divergence if LEAST_DIVERGENCE + LEAST_SHARE * max(-low, high) <= divergence < math.inf else None

    def find(
        self, logits: torch.Tensor, delta: torch.Tensor, low: float, high: float, limit: float, target: float
    ) -> tuple[float, float] | None:
        """Find the weight in `[0, limit]` where the divergence along `delta` meets `target`.

        Args:
            logits: `[V_base]` float32.
            delta: `[V_base]` float32.
            low: Smallest of `delta`, or less.
            high: Largest of `delta`, or more.
            limit: Largest weight, above 0.
            target: Divergence wanted, in nats.

        Returns:
            The weight and the divergence there; None where plain sums do not tell.
        """
        if not target >= LEAST_DIVERGENCE:
            return None
        before = raise_two(logits, self.shares, self.moved)
        if not 0.0 < before < math.inf:
            return None
        centre = torch.dot(self.moved, delta).item() / before
        spread, largest = high - low, high - centre
        torch.sub(delta, centre, out=self.centred)
        torch.mul(self.centred, self.centred, out=self.square)
        torch.mul(self.square, self.centred, out=self.cube)
        _, _, variance, skew = self.cumulants()
        if not variance > 0.0:
            return None
        root = math.sqrt(target)
        # K(α) = α² · variance / 2 + α³ · skew / 3 + …
        weight = math.sqrt(2.0 / variance) * root
        weight = min(limit, weight / max(0.5, 1.0 + skew / (3.0 * variance) * weight))
        low, high = 0.0, limit
        for _ in range(EVALUATIONS):
            if weight * largest > LARGEST_EXPONENT:
                return None
            torch.add(self.shares, self.centred, alpha=weight * BITS, out=self.moved)
            self.moved.exp2_()
            total, mean, variance, skew = self.cumulants()
            # Where a sum has overflowed, the third cumulant is not finite.
            if not (total > 0.0 and variance > LEAST_VARIANCE * mean * mean and math.isfinite(skew)):
                return None
            divergence = weight * mean - math.log(total / before)
            if divergence < LEAST_DIVERGENCE:
                return None
            if divergence > target:
                high = weight
            elif weight >= limit:
                return limit, divergence
            else:
                low = weight
            # Halley's step on the square root of the divergence, which is nearly straight, but never less than half of
            # Newton's: far from the target only that one shows how far.
            size = math.sqrt(divergence)
            slope = 0.5 * weight * variance / size
            bend = (0.5 * (variance + weight * skew) - slope * slope) / size
            step = (root - size) / slope
            step /= min(2.0, max(0.5, 1.0 + 0.5 * step * bend / slope))
            if abs(step) <= min(LAST_STEP, LAST_SHARE * weight, LAST_MOVE / spread):
                step = min(step, limit - weight)
                return weight + step, divergence + step * (weight * variance + 0.5 * step * (variance + weight * skew))
            following = weight + step
            weight = following if low < following < high else limit if high == limit else 0.5 * (low + high)
        return None

    def cumulants(self) -> tuple[float, float, float, float]:
        """The sum of `moved`, and mean, variance and third cumulant of the differences under it."""
        total, first, second, third = torch.mv(self.powers, self.moved, out=self.sums).tolist()
        if not total > 0.0:
            return total, 0.0, 0.0, 0.0
        mean, square = first / total, second / total
        return total, mean, square - mean * mean, third / total - mean * (3.0 * square - 2.0 * mean * mean)
