"""`value_add` as one Triton kernel: read the base row, gather the value row, scale, add, write."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Triton knows of a number only that it is divisible by 16 or not. Columns up to the last multiple of 16 take vector
# accesses; the few behind it are handled on their own, so that a ragged width does not make all accesses scalar.
VECTOR: tl.constexpr = tl.constexpr(16)


class Config(NamedTuple):
    """Launch shape: columns per tile, tiles of one row that run side by side, warps per program."""

    block: int
    splits: int
    num_warps: int


def choose_config(rows: int, columns: int, processors: int) -> Config:
    """Choose the launch shape for `rows` value rows of `columns` columns on a GPU with `processors` multiprocessors.

    Each thread has 16 numbers in flight (64 bytes of logits). Programs walk along a row when there are many rows: rows
    that are skipped then cost one short program in place of one for each tile.
    """
    few = rows * columns < processors * 8 * 4096
    block, num_warps = (2048, 4) if few else (4096, 8)
    tiles = triton.cdiv(columns, block)
    splits = min(tiles, triton.cdiv(processors * 32, rows))
    return Config(block, splits, num_warps)


@functools.cache
def processor_count(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the CPU, where Triton's interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _add_columns(logits_row, value_row, vocab_map, weight, columns, mask, num_value_columns, HAS_MAP: tl.constexpr):
    base = tl.load(logits_row + columns, mask=mask, other=0.0)
    if HAS_MAP:
        source = tl.load(vocab_map + columns, mask=mask, other=-1)
        present = (source >= 0) & (source < num_value_columns)
        value = tl.load(value_row + source, mask=present, other=float("inf"))
    else:
        value = tl.load(value_row + columns, mask=mask, other=0.0)
    total = base.to(tl.float32)
    steer = weight * value.to(tl.float32)
    # False for NaN too, and for columns without a partner, which got an infinity above. They are written back as they
    # were: a store mask that depends on the map would make every store scalar.
    total = tl.where(tl.abs(steer) < float("inf"), total + steer, total)
    tl.store(logits_row + columns, total.to(base.dtype), mask=mask)


@triton.jit(
    do_not_specialize=["num_rows", "splits"],
    do_not_specialize_on_alignment=["weights", "row_index"],
)
def value_add_kernel(
    logits,
    value,
    weights,
    row_index,
    vocab_map,
    num_rows,
    num_columns,
    num_value_columns,
    logits_stride,
    value_stride,
    splits,
    HAS_ROW_INDEX: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: every `splits`-th tile of BLOCK columns of one value row."""
    source_row = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    weight = tl.load(weights + source_row).to(tl.float32)
    row = source_row
    if HAS_ROW_INDEX:
        row = tl.load(row_index + source_row)
    if (weight != 0.0) & (row >= 0) & (row < num_rows):
        # 64 bit: rows · stride passes 2**31 with 14,000 rows of 152k columns.
        logits_row = logits + row.to(tl.int64) * logits_stride
        value_row = value + source_row.to(tl.int64) * value_stride
        even_columns = num_columns // VECTOR * VECTOR
        for start in range(split * BLOCK, even_columns, splits * BLOCK):
            columns = start + tl.arange(0, BLOCK)
            _add_columns(
                logits_row, value_row, vocab_map, weight, columns, columns < even_columns, num_value_columns, HAS_MAP
            )
        if (split == splits - 1) & (even_columns < num_columns):
            columns = even_columns + tl.arange(0, VECTOR)
            _add_columns(
                logits_row, value_row, vocab_map, weight, columns, columns < num_columns, num_value_columns, HAS_MAP
            )


def value_add_triton(
    logits: torch.Tensor,
    value_logits: torch.Tensor,
    weights: torch.Tensor,
    row_index: torch.Tensor | None,
    vocab_map: torch.Tensor | None,
) -> torch.Tensor:
    """Launch the kernel on arguments that were checked; no device sync. See `ivl_kernels.value_add`."""
    count = value_logits.shape[0]
    columns = logits.shape[1] if vocab_map is not None else min(logits.shape[1], value_logits.shape[1])
    if count == 0 or columns == 0:
        return logits
    config = choose_config(count, columns, processor_count(logits.device))
    with torch.cuda.device_of(logits):
        value_add_kernel[(count * config.splits,)](
            logits,
            value_logits,
            weights,
            weights if row_index is None else row_index,  # a pointer that is not read
            logits if vocab_map is None else vocab_map,  # likewise, and aligned as the kernel was compiled for
            logits.shape[0],
            columns,
            value_logits.shape[1],
            logits.stride(0),
            value_logits.stride(0),
            config.splits,
            HAS_ROW_INDEX=row_index is not None,
            HAS_MAP=vocab_map is not None,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    return logits
