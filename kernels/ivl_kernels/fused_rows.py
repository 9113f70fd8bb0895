"""One row of the torch backend's solver, compiled by numba: what runs on a CPU.

In torch every product in a sum over columns is a pass of its own, `expm1()` takes most of the time, and the calls of a
row, cold after a model's forward pass, take as long as its sums. Here a row is three calls, a sum is one pass, and
`exp()` a polynomial in as many columns at once as the processor has lanes.

Where a weighted difference is too large for plain sums the answer is NaN. Nothing is raised: numba would never free the
arrays of that call.
"""

import math
import threading

import numpy as np

from ivl_kernels.compiler import njit
from ivl_kernels.weight_search import LARGEST_EXPONENT, find

FLOAT, INT = np.float32, np.int32
ZERO, HALF, ONE, LOG2_E = FLOAT(0.0), FLOAT(0.5), FLOAT(1.0), FLOAT(math.log2(math.e))
INFINITY_BITS, LEAST, LARGEST = INT(0x7F800000), INT(-0x80000000), INT(0x7FFFFFFF)
# 2^f - 1 = f · (C0 + C1·f + …) for |f| ≤ 1/2: Taylor's series; its eighth term is below float32's rounding.
C0, C1, C2, C3, C4, C5, C6 = (FLOAT(math.log(2.0) ** k / math.factorial(k)) for k in range(1, 8))
# Exponents beyond these count as these: exp() would soon be no normal number.
LEAST_EXPONENT, MOST_EXPONENT = FLOAT(-86.0), FLOAT(88.0)
# Sums may be taken in any order; where a number is NaN, what comes of it is not used.
FAST = {"reassoc", "contract", "nsz", "nnan"}

_kept = threading.local()
_find = njit(find)


def memory(width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two float32 arrays `[width]`: the thread's last ones if they serve, since new ones cost as much as a pass.

    They are NumPy's, because tensors made in inference mode may not be written to outside of it.
    """
    if getattr(_kept, "width", None) != width:
        _kept.width, _kept.arrays = width, tuple(np.empty((2, width), np.float32))
    return _kept.arrays


@njit(inline="always")
def _ordered(bits):
    """Turn a float's bits into an integer of the same order, and back: integers have a vector minimum, NaN or not."""
    return INT(bits ^ (INT(bits >> 31) & LARGEST))


@njit(inline="always")
def _exp_parts(x):
    """`s` and `r` of `exp(x) = s · (1 + r)`: with `s` a power of two, 1 near 0, nothing of `expm1(x)` cancels."""
    y = min(max(x, LEAST_EXPONENT), MOST_EXPONENT) * LOG2_E
    whole = np.floor(y + HALF)
    f = y - whole
    r = f * (C0 + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * (C5 + f * C6))))))
    return INT((INT(whole) + 127) << 23).view(np.float32), r  # the exponent's bits


@njit("UniTuple(float32, 2)(float32[::1])", nogil=True)
def bounds(numbers: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest of `numbers`, float32 `[V]`; one of them is NaN if it holds one."""
    low, high = LARGEST, LEAST
    for j in range(numbers.shape[0]):
        number = _ordered(FLOAT(numbers[j]).view(np.int32))
        low, high = INT(min(low, number)), INT(max(high, number))
    return _ordered(low).view(np.float32), _ordered(high).view(np.float32)


@njit("UniTuple(float32, 2)(float32[::1], float32[::1], float32[::1])", nogil=True)
def subtract(value: np.ndarray, anti: np.ndarray, delta: np.ndarray) -> tuple[float, float]:
    """Write `value - anti` into `delta`, all float32 `[V]`; give its bounds, of which one is NaN if it holds one."""
    low, high = LARGEST, LEAST
    for j in range(delta.shape[0]):
        difference = value[j] - anti[j]
        delta[j] = difference
        number = _ordered(FLOAT(difference).view(np.int32))
        low, high = INT(min(low, number)), INT(max(high, number))
    return _ordered(low).view(np.float32), _ordered(high).view(np.float32)


@njit(fastmath=FAST)
def _prepare(logits, delta, shares):
    """Write softmax(logits) into `shares`, 0 where a logit is not finite, and look at `delta` where it is.

    Returns:
        The smallest and the largest of `delta`; its mean under the shares; the mean (0 up to rounding) and the variance
        of what is left without that mean.
    """
    top, low, high = LEAST, LARGEST, LEAST
    for j in range(shares.shape[0]):
        bits = FLOAT(logits[j]).view(np.int32)
        allowed = INT(bits & INFINITY_BITS) != INFINITY_BITS
        number = _ordered(FLOAT(delta[j]).view(np.int32))
        top = INT(max(top, _ordered(bits) if allowed else LEAST))
        low = INT(min(low, number if allowed else LARGEST))
        high = INT(max(high, number if allowed else LEAST))
    if low > high:
        return ZERO, ZERO, ZERO, ZERO, ZERO
    largest_logit = _ordered(top).view(np.float32)
    total, first = ZERO, ZERO
    for j in range(shares.shape[0]):
        bits = FLOAT(logits[j]).view(np.int32)
        x = logits[j] - largest_logit
        s, r = _exp_parts(x)
        share = s + s * r if INT(bits & INFINITY_BITS) != INFINITY_BITS and x > LEAST_EXPONENT else ZERO
        shares[j] = share
        total += share
        first += share * delta[j]
    scale, centre = ONE / total, first / total
    offset, variance = ZERO, ZERO
    for j in range(shares.shape[0]):
        share = shares[j] * scale
        shares[j] = share
        u = delta[j] - centre
        offset += share * u
        variance += share * u * u
    return _ordered(low).view(np.float32), _ordered(high).view(np.float32), centre, offset, variance


@njit(fastmath=FAST)
def _gains(shares, delta, centre, weight):
    """Sums of `g`, `g · u` and `g · u²` with `u = delta - centre` and `g = shares · expm1(weight · u)`."""
    growth, pull, second = ZERO, ZERO, ZERO
    for j in range(shares.shape[0]):
        u = delta[j] - centre
        s, r = _exp_parts(u * weight)
        gain = (s * r + (s - ONE)) * shares[j]
        growth += gain
        pull += gain * u
        second += gain * u * u
    return growth, pull, second


@njit
def _evaluate(curve, weight):
    shares, delta, high, centre, offset, variance = curve
    if weight * (high - centre) > LARGEST_EXPONENT:
        return np.nan, np.nan
    growth, pull, second = _gains(shares, delta, centre, FLOAT(weight))
    total = 1.0 + growth
    if not total > 0.0:  # rounding, where differences hardly differ
        return np.nan, np.nan
    mean = weight * (pull + offset) / total
    variance = weight * weight * (second + variance) / total - mean * mean
    return max(0.0, mean - math.log1p(growth)), max(0.0, variance)


@njit("float64(float32[::1], float32[::1], float32[::1])", nogil=True)
def divergence(logits: np.ndarray, delta: np.ndarray, shares: np.ndarray) -> float:
    """KL(softmax(logits + delta) ‖ softmax(logits)) over the columns where a logit is finite.

    Args:
        logits: `[V]` float32.
        delta: `[V]` float32, finite.
        shares: `[V]` float32. Changed.

    Returns:
        Nats; NaN where a difference is too large for plain sums.
    """
    low, high, centre, offset, variance = _prepare(logits, delta, shares)
    if high - low <= 0.0:
        return 0.0
    return _evaluate((shares, delta, float(high), float(centre), float(offset), float(variance)), 1.0)[0]


@njit("UniTuple(float64, 2)(float32[::1], float32[::1], float32[::1], float64, float64, boolean)", nogil=True)
def search(
    logits: np.ndarray, delta: np.ndarray, shares: np.ndarray, limit: float, target: float, wants_largest: bool
) -> tuple[float, float]:
    """`ivl_kernels.weight_search.find` along `delta`, float32 `[V]` and finite; the others are as for `divergence`."""
    low, high, centre, offset, variance = _prepare(logits, delta, shares)
    curve = (shares, delta, float(high), float(centre), float(offset), float(variance))
    return _find(_evaluate, curve, float(high - low), float(variance), limit, target, wants_largest)
