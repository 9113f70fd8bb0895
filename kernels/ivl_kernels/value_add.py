"""`value_add`: add weighted value logits, which exist already, into base logits. The math, and the torch backend."""

import torch

from ivl_kernels.checks import check_operands, choose_backend

FLOAT32_MAX = torch.finfo(torch.float32).max


def value_add(
    logits: torch.Tensor,
    value_logits: torch.Tensor,
    weights: torch.Tensor,
    *,
    row_index: torch.Tensor | None = None,
    vocab_map: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Add weighted value logits into `logits`, in place.

    `logits[row_index[i], j] += weights[i] * value_logits[i, vocab_map[j]]`, which is `B(x) + w · V(x)` of Inverse Value
    Learning (Lu et al., NAACL 2025, arXiv 2410.21027) for a batch in which every row has its own weight.

    What it promises beyond the formula:

    * Sums and products are float32 whatever the dtypes; the result is rounded once, to the dtype of `logits`.
    * A row with weight 0 or with a `row_index` outside `[0, rows)` is skipped: nothing of it is read, nothing written.
      So a caller may pad to a fixed number of rows with index -1, which keeps a captured CUDA graph valid.
    * `-inf` in `logits` stays `-inf`, whatever the weight's sign.
    * A product `weight · value` that is not finite (a NaN or an infinity in either, or an overflow) contributes
      nothing: that column of that row stays as it is, and no other is touched.

    Args:
        logits: `[rows, V_base]` float32, bfloat16 or float16, columns adjacent, rows possibly strided. Changed.
        value_logits: `[n, V_value]` float32, bfloat16 or float16, columns adjacent.
        weights: `[n]` float32, bfloat16 or float16.
        row_index: `[n]` int32 or int64, the row of `logits` for each value row; no row may occur twice. None: row i.
        vocab_map: `[V_base]` int32 or int64, the value column for each base column, -1 leaves the column as it is. Pass
            it through `check_vocab_map` once. None: the identity over the first `min(V_base, V_value)` columns.
        backend: `"auto"` (Triton on a GPU, torch on the CPU), `"triton"` or `"torch"`. On a GPU the torch backend waits
            for the device, since it reads the weights on the host.

    Returns:
        `logits`.

    Raises:
        ValueError: Shapes, dtypes, strides or devices that do not fit; found on the host, without a device sync.
    """
    check_operands(logits, {"value_logits": value_logits}, weights, row_index, vocab_map)
    if choose_backend(backend, logits.device) == "triton":
        from ivl_kernels.triton_value_add import value_add_triton

        return value_add_triton(logits, value_logits, weights, row_index, vocab_map)
    return value_add_torch(logits, value_logits, weights, row_index, vocab_map)


def value_add_torch(
    logits: torch.Tensor,
    value_logits: torch.Tensor,
    weights: torch.Tensor,
    row_index: torch.Tensor | None,
    vocab_map: torch.Tensor | None,
) -> torch.Tensor:
    """The torch backend: what the CPU runs, and the reference that the kernel is tested against.

    Rows go in groups that stay in the processor's cache: the passes after the first then cost little, and no temporary
    grows with the batch.
    """
    rows, sources, scale = steered_rows(logits, weights, row_index)
    width = value_logits.shape[1] if vocab_map is not None else min(logits.shape[1], value_logits.shape[1])
    if not rows or width == 0:
        return logits
    group = min(rows_in_cache(width), len(rows))
    if vocab_map is not None:
        group = min(group, -(-len(rows) // 2))  # there are two temporaries then, together one of rows × columns
        # A zero column stands before the value's own: -1 points to it once the map is shifted by one.
        vocab_map = vocab_map + 1
        products = torch.zeros(group, width + 1, dtype=torch.float32, device=logits.device)
    for start in range(0, len(rows), group):
        part = slice(start, start + group)
        targets, value, factor = rows[part], take_rows(value_logits, sources[part])[:, :width], scale[part, None]
        if vocab_map is not None:
            steer = products[: len(targets), 1:].copy_(value).mul_(factor)
            drop_non_finite(steer)
            steer = take_columns(products[: len(targets)], vocab_map)
            add_to_rows(logits, targets, steer)
        elif is_run(targets) and logits.dtype == value.dtype == torch.float32 and products_are_finite(value, factor):
            logits[targets[0] : targets[0] + len(targets), :width].addcmul_(value, factor)
        else:
            # Rows that are not consecutive were copied already.
            steer = value.to(torch.float32, copy=is_run(sources[part])).mul_(factor)
            drop_non_finite(steer)
            add_to_rows(logits[:, :width], targets, steer)
    return logits


def steered_rows(
    logits: torch.Tensor, weights: torch.Tensor, row_index: torch.Tensor | None
) -> tuple[list[int], list[int], torch.Tensor]:
    """Choose the rows that change, on the host.

    Returns:
        Rows of `logits`, the value row of each, and their weights as float32 `[len(rows)]`.
    """
    targets = range(weights.shape[0]) if row_index is None else row_index.tolist()
    count = logits.shape[0]
    steered = [
        (row, source)
        for source, (row, weight) in enumerate(zip(targets, weights.tolist(), strict=True))
        if weight != 0.0 and 0 <= row < count
    ]
    rows = [row for row, _ in steered]
    sources = [source for _, source in steered]
    return rows, sources, take_rows(weights, sources).to(torch.float32)


def rows_in_cache(width: int) -> int:
    """How many rows of `width` float32 numbers fit into 2 MiB for each of torch's threads (at least one row)."""
    return max(1, 524288 * torch.get_num_threads() // width)


def is_run(rows: list[int]) -> bool:
    """Whether the rows are consecutive."""
    return not rows or rows == list(range(rows[0], rows[0] + len(rows)))


def take_rows(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Select rows: a view if they are consecutive, else a copy."""
    if is_run(rows):
        return tensor[rows[0] : rows[0] + len(rows)] if rows else tensor[:0]
    return tensor.index_select(0, torch.tensor(rows, device=tensor.device))


def take_columns(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Gather columns of a matrix; torch is a third faster at it when there is one row only and it is a vector."""
    if matrix.shape[0] == 1:
        return matrix[0].index_select(0, columns)[None]
    return matrix.index_select(1, columns)


def products_are_finite(value: torch.Tensor, factor: torch.Tensor) -> bool:
    """Whether no product of a number in `value` and one in `factor` is NaN or overflows float32; one pass."""
    low, high = (float(bound) for bound in torch.aminmax(value))
    return max(-low, high) * max(map(abs, factor.flatten().tolist())) <= FLOAT32_MAX


def drop_non_finite(steer: torch.Tensor) -> None:
    """Set NaN and infinities to 0, in place."""
    steer.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def add_to_rows(logits: torch.Tensor, rows: list[int], steer: torch.Tensor) -> None:
    """Add float32 `steer` `[len(rows), width]` into the given rows of `logits` `[·, width]`, rounding once."""
    if is_run(rows):
        logits[rows[0] : rows[0] + len(rows)].add_(steer)
    elif logits.dtype == torch.float32 and logits.is_contiguous():
        logits.index_add_(0, torch.tensor(rows, device=logits.device), steer)
    else:  # index_add_ is slow with strides and cannot mix dtypes
        views = logits.unbind(0)
        torch._foreach_add_([views[row] for row in rows], list(steer.unbind(0)))
