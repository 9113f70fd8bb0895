"""`lm_head_value_add` as one Triton kernel: project, gather, scale, add; value logits are never stored."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Config(NamedTuple):
    """Tile: value rows × base columns × hidden columns per step; parts of the final add; pipeline depth; warps."""

    block_m: int
    block_n: int
    block_k: int
    pieces: int
    num_stages: int
    num_warps: int


def choose_config(rows: int, dtype: torch.dtype) -> Config:
    """Choose the tile for `rows` value rows.

    Up to 64 rows one tile holds them all, so that the matrix is streamed exactly once. What counts is that every
    multiprocessor keeps enough of it in flight, `programs · (stages - 1) · block_n · block_k` numbers, and that more
    than one program fits, so that one adds while another projects: hence the add in pieces, which halves the registers.
    Beyond 64 rows the tile grows, to read the matrix and the hidden states less often from the L2 cache.
    float32 is multiplied exactly, outside the tensor cores, from smaller tiles.
    """
    if dtype == torch.float32:
        return Config(16 if rows <= 16 else 32, 64, 32, 1, 3, 4)
    if rows <= 16:
        return Config(16, 128, 64, 1, 4, 4)
    if rows <= 32:
        return Config(32, 128, 64, 2, 4, 4)
    if rows <= 64:
        return Config(64, 128, 64, 4, 3, 8)
    return Config(128, 128, 64, 4, 3, 8)


@triton.jit
def _add_tile(logits, offsets, first, steer, used, num_columns, PIECES: tl.constexpr):
    """Add a tile `steer` into the logits; in PIECES parts, one after the other, to need fewer registers."""
    BLOCK_M: tl.constexpr = steer.shape[0]
    WIDTH: tl.constexpr = steer.shape[1] // 2
    if PIECES > 1:
        left, right = tl.split(tl.permute(tl.reshape(steer, (BLOCK_M, 2, WIDTH)), (0, 2, 1)))
        _add_tile(logits, offsets, first, left, used, num_columns, PIECES // 2)
        _add_tile(logits, offsets, first + WIDTH, right, used, num_columns, PIECES // 2)
    else:
        columns = first + tl.arange(0, 2 * WIDTH)
        # Not in both branches: Triton 3.6 moves one's into the other, and then fails.
        pointers = logits + offsets[:, None] + columns[None, :]
        if first + 2 * WIDTH <= num_columns:
            _add_columns(pointers, steer, used[:, None])
        else:
            _add_columns(pointers, steer, used[:, None] & (columns < num_columns)[None, :])


@triton.jit
def _add_columns(pointers, steer, mask):
    base = tl.load(pointers, mask=mask, other=0.0)
    total = base.to(tl.float32)
    # False for NaN too, and for columns without a partner, which carry an infinity. They are written back as they were:
    # a store mask that depends on the map would make every store scalar.
    total = tl.where(tl.abs(steer) < float("inf"), total + steer, total)
    tl.store(pointers, total.to(base.dtype), mask=mask)


@triton.jit(
    do_not_specialize=["count", "num_rows"],
    do_not_specialize_on_alignment=["weights", "row_index"],
)
def lm_head_value_add_kernel(
    logits,
    hidden,
    matrix,
    weights,
    row_index,
    vocab_map,
    count,
    num_rows,
    num_columns,
    num_value_columns,
    width,
    logits_stride,
    hidden_stride,
    matrix_stride,
    HAS_ROW_INDEX: tl.constexpr,
    HAS_MAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr,
):
    """One program: BLOCK_M value rows × BLOCK_N base columns."""
    # Row tiles of one block of columns are neighbours in the launch order: they run together and the block of the
    # matrix comes from memory for the first of them, from the L2 cache for the others.
    row_tiles = tl.cdiv(count, BLOCK_M)
    lanes = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) // row_tiles * BLOCK_N
    weight = tl.load(weights + lanes, mask=lanes < count, other=0.0).to(tl.float32)
    row = lanes
    if HAS_ROW_INDEX:
        row = tl.load(row_index + lanes, mask=lanes < count, other=-1)
    used = (weight != 0.0) & (row >= 0) & (row < num_rows)
    if tl.max(used.to(tl.int32), axis=0) > 0:
        columns = first + tl.arange(0, BLOCK_N)
        # Columns past the end or without a partner read the matrix's row 0 and are dropped below: an unmasked load is
        # what the pipeline copies in 16-byte pieces.
        source = columns
        present = columns < num_columns
        if HAS_MAP:
            source = tl.load(vocab_map + columns, mask=present, other=-1)
            present = (source >= 0) & (source < num_value_columns)
        source = tl.where(present, source, 0)
        steps = tl.arange(0, BLOCK_K)
        hidden_tile = hidden + lanes.to(tl.int64)[:, None] * hidden_stride + steps[None, :]
        matrix_tile = matrix + source.to(tl.int64)[:, None] * matrix_stride + steps[None, :]
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, width, BLOCK_K):
            if EVEN_K:
                a = tl.load(hidden_tile + start, mask=used[:, None], other=0.0)
                b = tl.load(matrix_tile + start)
            else:
                inside = (start + steps < width)[None, :]
                a = tl.load(hidden_tile + start, mask=used[:, None] & inside, other=0.0)
                b = tl.load(matrix_tile + start, mask=inside, other=0.0)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            sums = tl.dot(a, tl.trans(b), sums, input_precision="ieee")
        steer = tl.where(present[None, :], sums * weight[:, None], float("inf"))
        offsets = row.to(tl.int64) * logits_stride
        _add_tile(logits, offsets, first, steer, used, num_columns, PIECES)


def lm_head_value_add_triton(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    weights: torch.Tensor,
    row_index: torch.Tensor | None,
    vocab_map: torch.Tensor | None,
) -> torch.Tensor:
    """Launch the kernel on arguments that were checked; no device sync. See `ivl_kernels.lm_head_value_add`."""
    count, width = hidden.shape
    columns = logits.shape[1] if vocab_map is not None else min(logits.shape[1], lm_head_weight.shape[0])
    if count == 0 or columns == 0:
        return logits
    config = choose_config(count, hidden.dtype)
    grid = (triton.cdiv(count, config.block_m) * triton.cdiv(columns, config.block_n),)
    with torch.cuda.device_of(logits):
        lm_head_value_add_kernel[grid](
            logits,
            hidden,
            lm_head_weight,
            weights,
            weights if row_index is None else row_index,  # a pointer that is not read
            logits if vocab_map is None else vocab_map,  # likewise, and aligned as the kernel was compiled for
            count,
            logits.shape[0],
            columns,
            lm_head_weight.shape[0],
            width,
            logits.stride(0),
            hidden.stride(0),
            lm_head_weight.stride(0),
            HAS_ROW_INDEX=row_index is not None,
            HAS_MAP=vocab_map is not None,
            EVEN_K=width % config.block_k == 0,
            UPCAST=not logits.is_cuda,  # the interpreter's dot product knows no bfloat16
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            PIECES=config.pieces,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return logits
