"""`lm_head_value_add`: project the value network's hidden states and add them, weighted, into base logits."""

import torch

from ivl_kernels.checks import check_operands, choose_backend, load_compiled
from ivl_kernels.value_add import steered_rows, take_rows, value_add_torch

# Bytes of the projection matrix, as float32, that the torch backend multiplies at a time.
BLOCK_BYTES = 4 << 20
# Rows up to which numba's loops are faster than a BLAS library.
FUSED_ROWS = 64


def lm_head_value_add(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    weights: torch.Tensor,
    *,
    row_index: torch.Tensor | None = None,
    vocab_map: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Add weighted value logits `hidden @ lm_head_weight.T` into `logits`, in place; Triton never stores them.

    `logits[row_index[i], j] += weights[i] * (hidden[i] · lm_head_weight[vocab_map[j]])`: `value_add` with the value
    network's output projection inside. Its promises are those of `value_add`: float32 sums and products, skipped rows,
    `-inf` stays, what is not finite contributes nothing. A bias, a scale, a soft cap or a quantized head are not
    applied here: compute such value logits with the model's own code and call `value_add`.

    Args:
        logits: `[rows, V_base]` float32, bfloat16 or float16, columns adjacent, rows possibly strided. Changed.
        hidden: `[n, H]` float32, bfloat16 or float16, the value network's final hidden states, columns adjacent.
        lm_head_weight: `[V_value, H]`, same dtype as `hidden`, columns adjacent.
        weights: `[n]` float32, bfloat16 or float16.
        row_index: `[n]` int32 or int64, the row of `logits` for each hidden row; no row may occur twice. None: row i.
        vocab_map: `[V_base]` int32 or int64, the value column for each base column, -1 leaves the column as it is. Pass
            it through `check_vocab_map` once. None: the identity over the first `min(V_base, V_value)` columns.
        backend: `"auto"` (Triton on a GPU, torch on the CPU), `"triton"` or `"torch"`.

    Returns:
        `logits`.

    Raises:
        ValueError: Shapes, dtypes, strides or devices that do not fit; found on the host, without a device sync.
    """
    check_operands(logits, {"hidden": hidden, "lm_head_weight": lm_head_weight}, weights, row_index, vocab_map)
    if hidden.shape[1] != lm_head_weight.shape[1]:
        raise ValueError(
            f"hidden has {hidden.shape[1]} columns but lm_head_weight {lm_head_weight.shape[1]}; both have to be the "
            "value network's hidden size: is this the head of another model?"
        )
    if hidden.dtype != lm_head_weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} but lm_head_weight {lm_head_weight.dtype}; convert one of them")
    if choose_backend(backend, logits.device) == "triton":
        from ivl_kernels.triton_lm_head_value_add import lm_head_value_add_triton

        return lm_head_value_add_triton(logits, hidden, lm_head_weight, weights, row_index, vocab_map)
    return lm_head_value_add_torch(logits, hidden, lm_head_weight, weights, row_index, vocab_map)


@torch.no_grad()
def lm_head_value_add_torch(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    weights: torch.Tensor,
    row_index: torch.Tensor | None,
    vocab_map: torch.Tensor | None,
) -> torch.Tensor:
    """The torch backend: what the CPU runs.

    The matrix is read once, in blocks that are widened to float32 in the cache; the steered rows' value logits are the
    one large temporary. The gather through the map is left to `value_add`: gathering rows of the matrix would copy it.
    """
    rows, sources, factors = steered_rows(logits, weights, row_index)
    if not rows:
        return logits
    inputs = hidden if len(rows) == hidden.shape[0] else take_rows(hidden, sources)
    matrix = lm_head_weight
    if vocab_map is None and logits.shape[1] < matrix.shape[0]:
        matrix = matrix[: logits.shape[1]]
    value_logits = project(inputs, matrix)
    steered = rows, range(len(rows)), factors
    return value_add_torch(logits, value_logits, weights, row_index, vocab_map, steered)


def project(inputs: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Multiply `inputs` `[n, H]` by `matrix.T` (`[V, H]`, same dtype) with float32 sums, giving float32 `[n, V]`.

    Where numba is installed, `ivl_kernels.fused_projection` does what `is_projected` tells, torch's operations the
    rest: a float32 matrix is read where it is, others are widened block by block into one buffer, which stays in the
    cache.
    """
    count, (columns, width) = inputs.shape[0], matrix.shape
    value_logits = torch.empty(count, columns, dtype=torch.float32, device=inputs.device)
    fused = load_compiled("fused_projection") if is_projected(inputs, matrix) else None
    if fused is not None and fused.can_project(inputs.dtype):
        fused.project_fused(inputs.detach(), matrix.detach(), value_logits)
        return value_logits
    if matrix.dtype == torch.float32:
        return torch.mm(inputs, matrix.t(), out=value_logits)
    inputs = inputs.to(torch.float32)
    block = max(1, min(columns, BLOCK_BYTES // (4 * max(1, width))))
    buffer = torch.empty(block, width, dtype=torch.float32, device=inputs.device)
    for start in range(0, columns, block):
        part = slice(start, start + block)
        rows = matrix[part]
        torch.mm(inputs, buffer[: rows.shape[0]].copy_(rows).t(), out=value_logits[:, part])
    return value_logits


def is_projected(inputs: torch.Tensor, matrix: torch.Tensor) -> bool:
    """Whether numba's loops can take these and are the fastest way."""
    return (
        inputs.is_cpu
        and inputs.dtype in (torch.float32, torch.bfloat16)
        and 0 < inputs.shape[0] <= FUSED_ROWS
        and matrix.numel() > 0
        and inputs.data_ptr() % inputs.itemsize == matrix.data_ptr() % matrix.itemsize == 0
    )
