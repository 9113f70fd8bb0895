"""`value_add` compiled by numba, one pass over each row: what runs on a CPU for most calls, see `is_fused`.

Torch needs a pass, and a call, for each of: are the products finite, multiply, gather, add.
"""

import numpy as np
import torch

from ivl_kernels.compiler import njit

INFINITY, ZERO = np.float32(np.inf), np.float32(0.0)
NO_ROWS, NO_MAP, NO_PRODUCTS = np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)
SIGNATURE = (
    "void(float32[::1], int64, int64, int64, {}[::1], int64, int64, float32[::1], int64[::1], int32[::1], float32[::1])"
)


@njit(inline="always")
def _plain(number):
    return number


@njit(inline="always")
def _widened(bits):
    """The float32 number of a bfloat16 number's bits."""
    return np.int32(np.int32(bits) << 16).view(np.float32)


@njit
def _add_gathered(target, products, vocab_map):
    for j in range(len(target)):
        column = vocab_map[j]
        if 0 <= column < len(products):
            target[j] += products[column]


def _compiled(number_type: str, widen):
    @njit
    def add(target, numbers, weight):
        for j in range(len(target)):
            product = weight * widen(numbers[j])
            target[j] += product if abs(product) < INFINITY else ZERO

    @njit(SIGNATURE.format(number_type), nogil=True)
    def add_rows(
        logits, stride, height, columns, value, value_stride, value_columns, weights, rows, vocab_map, products
    ):
        for i in range(len(weights)):
            row, weight = i, weights[i]
            if len(rows) > 0:
                row = rows[i]
            # False for NaN too, as above.
            if not (0 <= row < height and ZERO < abs(weight) < INFINITY):
                continue
            target = logits[row * stride : row * stride + columns]
            numbers = value[i * value_stride : i * value_stride + value_columns]
            if len(vocab_map) == 0:
                add(target, numbers, weight)
                continue
            # In order first, so that what the map jumps to is in the cache.
            products[:] = ZERO
            add(products, numbers, weight)
            _add_gathered(target, products, vocab_map)

    return add_rows


_add_float32, _add_bfloat16 = _compiled("float32", _plain), _compiled("int16", _widened)


def add_fused(
    logits: torch.Tensor,
    value_logits: torch.Tensor,
    weights: torch.Tensor,
    row_index: torch.Tensor | None,
    vocab_map: torch.Tensor | None,
) -> None:
    """`ivl_kernels.value_add` for float32 `logits`, float32 or bfloat16 `value_logits` and an int32 map; none empty."""
    (height, columns), value_columns = logits.shape, value_logits.shape[1]
    products = NO_PRODUCTS
    if vocab_map is None:
        columns = value_columns = min(columns, value_columns)
    else:
        products = np.empty(value_columns, np.float32)
    if weights.dtype != torch.float32:
        weights = weights.float()
    if row_index is not None and row_index.dtype != torch.int64:
        row_index = row_index.long()
    add_rows = _add_float32
    numbers = value_logits
    if value_logits.dtype == torch.bfloat16:  # which NumPy has not
        add_rows, numbers = _add_bfloat16, value_logits.view(torch.int16)
    add_rows(
        flat(logits),
        logits.stride(0),
        height,
        columns,
        flat(numbers),
        value_logits.stride(0),
        value_columns,
        weights.numpy(),
        NO_ROWS if row_index is None else row_index.numpy(),
        NO_MAP if vocab_map is None else vocab_map.numpy(),
        products,
    )


def flat(matrix: torch.Tensor) -> np.ndarray:
    """The numbers of a matrix with adjacent columns from its first to its last, with what lies between its rows."""
    if matrix.is_contiguous():
        return matrix.numpy().reshape(-1)
    (height, width), stride = matrix.shape, matrix.stride(0)
    return matrix.as_strided(((height - 1) * stride + width,), (1,)).numpy()
