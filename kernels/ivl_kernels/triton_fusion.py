"""The solvers as one Triton kernel: a program reads its row again in every iteration, from the L2 cache.

A program ends as soon as its own row is solved; the host neither knows nor waits.

For the math see `ivl_kernels.fusion`; the passes over a row stand in `ivl_kernels.triton_divergence`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ivl_kernels import fusion
from ivl_kernels.fusion import ITERATIONS
from ivl_kernels.triton_divergence import evaluate, prepare

INF: tl.constexpr = tl.constexpr(float("inf"))
LAST_STEP: tl.constexpr = tl.constexpr(fusion.LAST_STEP)
LAST_MOVE: tl.constexpr = tl.constexpr(fusion.LAST_MOVE)


class Config(NamedTuple):
    """Columns per step of a program, and its warps."""

    block: int
    num_warps: int


# Rows are few, so that one program has to draw on all of a multiprocessor's bandwidth.
CONFIG = Config(4096, 16)


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["limits", "targets", "row_index", "results"],
)
def fusion_kernel(
    results,
    base,
    plus,
    minus,
    limits,
    targets,
    row_index,
    vocab_map,
    num_rows,
    num_columns,
    num_value_columns,
    base_stride,
    plus_stride,
    minus_stride,
    HAS_MINUS: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    HAS_ROW_INDEX: tl.constexpr,
    HAS_MAP: tl.constexpr,
    ITERATIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one value row."""
    source = tl.program_id(0)
    count = tl.num_programs(0)
    bound = tl.load(limits + source)
    row = source
    if HAS_ROW_INDEX:
        row = tl.load(row_index + source)
    weight, divergence, target = 0.0, 0.0, 0.0
    if (tl.abs(bound) > 0.0) & (tl.abs(bound) < INF) & (row >= 0) & (row < num_rows):
        sign = tl.where(bound < 0.0, -1.0, 1.0)
        limit = tl.abs(bound)
        # 64 bit: rows · stride passes 2**31 with 14,000 rows of 152k columns.
        base += row.to(tl.int64) * base_stride
        plus += source.to(tl.int64) * plus_stride
        minus += source.to(tl.int64) * minus_stride
        if HAS_TARGETS:
            target = tl.load(targets + source)
            target = tl.where(target > 0.0, target, 0.0)  # NaN too
        else:
            scale, centre, variance, low, high = prepare(
                base, plus, minus, vocab_map, 1.0, num_value_columns, num_value_columns, True, False, True, BLOCK
            )
            target, variance = evaluate(
                base, plus, minus, vocab_map, 1.0, 1.0, scale, centre, high, num_value_columns, num_value_columns,
                True, False, True, BLOCK,
            )  # fmt: skip
        scale, centre, variance, smallest, largest = prepare(
            base, plus, minus, vocab_map, sign, num_columns, num_value_columns, HAS_MINUS, HAS_MAP, False, BLOCK
        )
        if target > 0.0:
            if largest > smallest:
                low, high, is_open = 0.0, limit, limit > 0.0
                # For small weights the divergence is weight² · variance / 2: a bound for where it saturates.
                trial = tl.minimum(limit, 2.0 * tl.sqrt(2.0 * target / variance))
                if not HAS_TARGETS:
                    trial = tl.minimum(trial, 1.0)
                moved = 2.0 * limit
                iteration, is_going = 0, limit > 0.0
                while is_going & (iteration < ITERATIONS):
                    found, variance = evaluate(
                        base, plus, minus, vocab_map, sign, trial, scale, centre, largest, num_columns,
                        num_value_columns, HAS_MINUS, HAS_MAP, False, BLOCK,
                    )  # fmt: skip
                    below = found <= target
                    better = (tl.abs(found - target) <= tl.abs(divergence - target)) | (below & (trial > weight))
                    weight = tl.where(better, trial, weight)
                    divergence = tl.where(better, found, divergence)
                    low = tl.where(below, trial, low)
                    high = tl.where(below, high, trial)
                    is_open = is_open & below & (trial < limit)
                    step = -2.0 * trial * (found - tl.sqrt(found * target)) / variance
                    newton = trial + step
                    slack = 1e-6 * limit
                    # All three are False for NaN.
                    accepted = (newton >= low - slack) & (newton <= high + slack) & (tl.abs(step) <= 0.5 * moved)
                    following = tl.where(is_open, limit, 0.5 * (low + high))
                    following = tl.where(accepted, newton, following)
                    following = tl.minimum(tl.maximum(following, low), high)
                    moved = tl.abs(following - trial)
                    settled = accepted & (tl.abs(step) <= LAST_STEP)
                    settled = settled & (tl.abs(step) * (largest - smallest) <= LAST_MOVE)
                    weight = tl.where(settled, following, weight)
                    # Along the root, which is nearly straight.
                    root = tl.sqrt(tl.maximum(found, 1e-37))
                    root = tl.maximum(root + 0.5 * variance / (trial * root) * (following - trial), 0.0)
                    divergence = tl.where(settled, root * root, divergence)
                    is_going = ~(settled | (below & (trial >= limit)))
                    trial = following
                    iteration += 1
            elif HAS_TARGETS:
                weight = limit
        weight *= sign
    tl.store(results + source, weight)
    tl.store(results + count + source, divergence)
    tl.store(results + 2 * count + source, target)


def solve_triton(
    base: torch.Tensor,
    plus: torch.Tensor,
    minus: torch.Tensor | None,
    limits: torch.Tensor,
    targets: torch.Tensor | None,
    row_index: torch.Tensor | None,
    vocab_map: torch.Tensor | None,
) -> torch.Tensor:
    """Launch the kernel on arguments that were checked; no device sync. As `ivl_kernels.torch_fusion.solve_torch`."""
    count = plus.shape[0]
    if count == 0 or 0 in (base.shape[1], plus.shape[1]):
        return torch.zeros(3, count, device=base.device, dtype=torch.float32)
    results = torch.empty(3, count, device=base.device, dtype=torch.float32)
    with torch.cuda.device_of(base):
        fusion_kernel[(count,)](
            results,
            base,
            plus,
            plus if minus is None else minus,  # a pointer that is not read, like the next ones
            limits,
            limits if targets is None else targets,
            limits if row_index is None else row_index,
            base if vocab_map is None else vocab_map,  # aligned as the kernel was compiled for
            base.shape[0],
            base.shape[1],
            plus.shape[1],
            base.stride(0),
            plus.stride(0),
            plus.stride(0) if minus is None else minus.stride(0),
            HAS_MINUS=minus is not None,
            HAS_TARGETS=targets is not None,
            HAS_ROW_INDEX=row_index is not None,
            HAS_MAP=vocab_map is not None,
            ITERATIONS=ITERATIONS,
            BLOCK=CONFIG.block,
            num_warps=CONFIG.num_warps,
        )
    return results
