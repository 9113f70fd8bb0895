"""Weights that find themselves: Dynamic Logits Fusion and the trust region. The public functions, and the math.

Along a direction `d` the divergence of the steered distribution from the base's,
`K(α) = KL(softmax(z + α·d) ‖ softmax(z))`, never falls as `α ≥ 0` grows, since `K'(α) = α · Var_α(d)`. Both solvers
look for the `α` where it meets a target.

With `u = d - E_0[d]`, `G = E_0[exp(αu) - 1]` and `T = E_0[u·exp(αu)]` it is `K = α·T / (1 + G) - log(1 + G)`. All of
these are of second order in `α·u`, so that nothing cancels where the divergence is tiny, as it is in most steps of a
confident model. Iterations are Newton steps on the square root of `K`, which is nearly straight, inside a bracket
(`ivl_kernels.weight_search`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ivl_kernels.checks import check_operands, choose_backend
from ivl_kernels.value_add import value_add

# Evaluations of K at most. Ordinary rows need 3 or 4, the hardest of the tests 14: a token of tiny probability leaps up
# by 300 nats.
ITERATIONS = 24
# A Newton step is the last one if it changes neither the weight nor any exponent by more than this: what is left to
# change is about the square.
LAST_STEP, LAST_MOVE = 5e-4, 4e-3
# Differences of logits beyond this count as this: exp() has been 0 or infinite long before, and rounding would spoil
# what lies between.
LARGEST_DIFFERENCE = 1e3


class Solution(NamedTuple):
    """What a solver found: the weights, the divergence that they reach, and the divergence that was wanted."""

    weights: torch.Tensor
    divergence: torch.Tensor
    target: torch.Tensor


def fusion_weights(
    base_logits: torch.Tensor,
    expert_logits: torch.Tensor,
    anti_logits: torch.Tensor,
    *,
    max_weight: float | torch.Tensor = 2.0,
    row_index: torch.Tensor | None = None,
    vocab_map: torch.Tensor | None = None,
    backend: str = "auto",
) -> Solution:
    r"""Solve the weight of one expert for every row, as in Dynamic Logits Fusion (Fan et al., 2024, arXiv 2406.15480).

    The weight is the smallest `α` in `[0, max_weight]` that minimises the difference between
    `KL(softmax(z + α·d) ‖ softmax(z))`, `d = expert - anti` on the base's columns, and
    `KL(softmax(expert) ‖ softmax(anti))`: the base is moved as far as the expert moved from its own base. So `α` is
    `max_weight` where the base cannot be moved far enough, and 0 where `d` changes nothing (it is 0, or the same on
    every column that the base allows) or where the expert equals its base.

    * Arithmetic is float32. Columns that are not finite in the base logits (a grammar's `-inf`) have probability 0.
      Columns where expert or anti-expert is not finite have no part in their divergence, and `d` is 0 there.
      Differences beyond ±1000 count as ±1000. What a row holds never touches another row.
    * A row whose `max_weight` is 0 or whose `row_index` lies outside `[0, rows)` is skipped; all its results are 0.
    * No device sync on a GPU, where every row ends its own iterations, at most 24: it can be captured in a CUDA graph.

    Args:
        base_logits: `[rows, V_base]` float32, bfloat16 or float16, columns adjacent. Read only.
        expert_logits: `[n, V_value]` of such a dtype, columns adjacent.
        anti_logits: The small base's logits, shape and dtype of `expert_logits`.
        max_weight: Largest weight; a number, or `[n]` float32. The paper searches up to 2. A tensor's entries are not
            looked at, which would wait for the device: they have to be finite and at least 0.
        row_index: `[n]` int32 or int64, the row of `base_logits` for each value row. None: row i.
        vocab_map: `[V_base]` int32 or int64, value column for each base column, -1: none, `d` is 0 there. None: the
            identity over the first `min(V_base, V_value)` columns.
        backend: `"auto"` (Triton on a GPU, torch on the CPU), `"triton"` or `"torch"`.

    Returns:
        `weights`, `divergence` (reached) and `target`, each `[n]` float32.

    Raises:
        ValueError: Shapes, dtypes, strides or devices that do not fit; a number as `max_weight` that is negative or not
            finite.
    """
    limits = _limits(max_weight, expert_logits)
    _check(base_logits, expert_logits, anti_logits, limits, row_index, vocab_map)
    return _solve(base_logits, expert_logits, anti_logits, limits, None, row_index, vocab_map, backend)


def trust_region_weights(
    base_logits: torch.Tensor,
    value_logits: torch.Tensor,
    weights: torch.Tensor,
    max_kl: float | torch.Tensor,
    *,
    minus_logits: torch.Tensor | None = None,
    row_index: torch.Tensor | None = None,
    vocab_map: torch.Tensor | None = None,
    backend: str = "auto",
) -> Solution:
    """Shrink weights until the steered distribution stays within a divergence of the base's.

    The result is the weight of the largest size up to `|weights[i]|`, with its sign, for which
    `KL(softmax(z + w·d) ‖ softmax(z)) ≤ max_kl[i]`, up to float32 rounding; `d` is `value_logits`, less `minus_logits`
    where given. A `max_kl` that is not above 0 (or NaN) gives 0, an infinite one the weight itself. Everything else is
    as for `fusion_weights`; a row with weight 0 is skipped.

    Args:
        base_logits: `[rows, V_base]` float32, bfloat16 or float16, columns adjacent. Read only.
        value_logits: `[n, V_value]` of such a dtype, columns adjacent.
        weights: `[n]` float32, the weights that were asked for; a row whose weight is not finite is skipped.
        max_kl: The divergence allowed, in nats; a number, or `[n]` float32.
        minus_logits: Shape and dtype of `value_logits`, or None.
        row_index: As for `fusion_weights`.
        vocab_map: As for `fusion_weights`.
        backend: As for `fusion_weights`.

    Returns:
        `weights`, `divergence` (reached) and `target` (`max_kl`), each `[n]` float32.

    Raises:
        ValueError: Shapes, dtypes, strides or devices that do not fit.
    """
    if not isinstance(max_kl, torch.Tensor):
        max_kl = torch.full(value_logits.shape[:1], float(max_kl), device=value_logits.device, dtype=torch.float32)
    _check_float32("max_kl", max_kl, value_logits)
    _check(base_logits, value_logits, minus_logits, weights, row_index, vocab_map)
    return _solve(base_logits, value_logits, minus_logits, weights, max_kl, row_index, vocab_map, backend)


def joint_fusion_weights(
    base_logits: torch.Tensor,
    expert_logits: Sequence[torch.Tensor],
    anti_logits: Sequence[torch.Tensor],
    *,
    max_weight: float | torch.Tensor = 2.0,
    row_index: torch.Tensor | None = None,
    vocab_maps: Sequence[torch.Tensor | None] | None = None,
    backend: str = "auto",
) -> Solution:
    """Solve the weights of several experts at once, for every row.

    Minimises `Σ_t (K(α) - K_t)²` over `α` in `[0, max_weight]^T`, with
    `K(α) = KL(softmax(z + Σ_t α_t·d_t) ‖ softmax(z))` and `K_t = KL(softmax(expert_t) ‖ softmax(anti_t))`. The sum
    depends on `α` through `K(α)` alone and is least where `K(α)` is the mean of the `K_t`: a whole surface of `α`. The
    one that is taken:

    1. the point on the ray through the experts' own solutions (`fusion_weights` of each alone), so that every expert
       keeps its share and the order of the experts does not matter;
    2. where that ray ends below the mean, since experts cancel each other or the range is too small: whichever reaches
       the mean best of that ray's end and the first expert alone, the second alone, …; the first one of equals.

    One Newton step along a ray is the Gauss-Newton step of the problem, projected onto the ray. An expert that is not
    clipped on its own and whose `K_t` is at least the mean reaches it alone, so the minimum is always found then.

    Args:
        base_logits: As for `fusion_weights`.
        expert_logits: For each expert `[n, V_t]`.
        anti_logits: For each expert its small base's logits, shape and dtype of the expert's.
        max_weight: Largest weight of any expert; a number, or `[n]` float32.
        row_index: As for `fusion_weights`.
        vocab_maps: For each expert its map or None, as for `fusion_weights`. None: no maps.
        backend: As for `fusion_weights`.

    Returns:
        `weights` `[n, T]` float32; `divergence` (reached) and `target` (the mean of the `K_t`), each `[n]` float32.

    Raises:
        ValueError: As for `fusion_weights`; no expert, or sequences of unequal length.
    """
    maps = [None] * len(expert_logits) if vocab_maps is None else list(vocab_maps)
    if not expert_logits or not len(expert_logits) == len(anti_logits) == len(maps):
        raise ValueError(
            f"expert_logits has {len(expert_logits)} entries, anti_logits {len(anti_logits)}, vocab_maps {len(maps)}; "
            "give one of each for every expert, and at least one expert"
        )
    limits = _limits(max_weight, expert_logits[0])
    for expert, anti, vocab_map in zip(expert_logits, anti_logits, maps, strict=True):
        _check(base_logits, expert, anti, limits, row_index, vocab_map)
    pairs = list(zip(expert_logits, anti_logits, maps, strict=True))
    own = [_solve(base_logits, e, a, limits, None, row_index, m, backend) for e, a, m in pairs]
    shares = torch.stack([solution.weights for solution in own], dim=1)
    # Only their ratios count. So small, no sum of differences goes beyond LARGEST_DIFFERENCE.
    shares = shares / shares.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    mean = torch.stack([solution.target for solution in own], dim=1).mean(dim=1)

    total = torch.zeros(len(mean), base_logits.shape[1], device=base_logits.device, dtype=torch.float32)
    for (expert, anti, vocab_map), share in zip(pairs, shares.unbind(1), strict=True):
        # One of both not finite: no difference, as for each expert on its own.
        delta = (expert.float() - anti.float()).nan_to_num_(0.0, 0.0, 0.0)
        delta.clamp_(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE)
        value_add(total, delta, share.contiguous(), vocab_map=vocab_map, backend=backend)
    # The ray leaves the box where the largest of the weights does.
    largest = shares.amax(dim=1)
    stretch = torch.where(largest > 0, limits / largest.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    ray = _solve(base_logits, total, None, stretch, mean, row_index, None, backend)
    weights, divergence = shares * ray.weights[:, None], ray.divergence

    for index, (expert, anti, vocab_map) in enumerate(pairs):
        missed = divergence < mean * (1 - 1e-4)
        alone = _solve(base_logits, expert, anti, limits * missed, mean, row_index, vocab_map, backend)
        better = missed & ((alone.divergence - mean).abs() < (divergence - mean).abs())
        single = torch.zeros_like(weights)
        single[:, index] = alone.weights
        weights = torch.where(better[:, None], single, weights)
        divergence = torch.where(better, alone.divergence, divergence)
    return Solution(weights, divergence, mean)


def _solve(base, plus, minus, limits, targets, row_index, vocab_map, backend) -> Solution:
    if choose_backend(backend, base.device) == "triton":
        from ivl_kernels.triton_fusion import solve_triton as solve
    else:
        from ivl_kernels.torch_fusion import solve_torch as solve
    return Solution(*solve(base, plus, minus, limits, targets, row_index, vocab_map).unbind(0))


def _limits(max_weight: float | torch.Tensor, expert_logits: torch.Tensor) -> torch.Tensor:
    if isinstance(max_weight, torch.Tensor):
        _check_float32("max_weight", max_weight, expert_logits)
        return max_weight
    if not 0.0 <= max_weight < float("inf"):
        raise ValueError(f"max_weight is {max_weight}; it has to be a finite number of at least 0")
    return torch.full(expert_logits.shape[:1], float(max_weight), device=expert_logits.device, dtype=torch.float32)


def _check_float32(name: str, tensor: torch.Tensor, rows: torch.Tensor) -> None:
    if tensor.dtype != torch.float32 or tensor.shape != rows.shape[:1]:
        raise ValueError(
            f"{name} has dtype {tensor.dtype} and shape {tuple(tensor.shape)}; expected a number, or float32 with one "
            f"entry per value row, ({rows.shape[0]},)"
        )
    if tensor.device != rows.device:
        raise ValueError(f"{name} is on {tensor.device} but the logits on {rows.device}; move it there once")


def _check(base, plus, minus, limits, row_index, vocab_map) -> None:
    rows = {"value logits": plus} if minus is None else {"expert logits": plus, "anti-expert logits": minus}
    check_operands(base, rows, limits, row_index, vocab_map)
    _check_float32("weights", limits, plus)
    if minus is not None and (minus.shape != plus.shape or minus.dtype != plus.dtype):
        raise ValueError(
            f"the expert's logits are {tuple(plus.shape)} {plus.dtype}, the anti-expert's {tuple(minus.shape)} "
            f"{minus.dtype}; cut both to the columns that both have, `[:, :columns]`, and to one dtype"
        )
