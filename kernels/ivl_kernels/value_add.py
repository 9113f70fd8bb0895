"""`value_add`: add weighted value logits, which exist already, into base logits. The math, and the torch backend."""

import torch

from ivl_kernels.checks import check_operands, choose_backend

FLOAT32_MAX = torch.finfo(torch.float32).max
# In the torch backend: columns below which the calls for one row take longer than its numbers, and how many rows may
# nevertheless go one by one.
SHORT_ROW = 8192
FEW_ROWS = 16


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

    Rows of float32 logits go one by one: the second pass over a row finds it in the processor's cache, and no temporary
    grows with the batch. Rows so short that the calls would cost more than the numbers, and other dtypes, go in groups.
    """
    rows, sources, factors = steered_rows(logits, weights, row_index)
    width = value_logits.shape[1] if vocab_map is not None else min(logits.shape[1], value_logits.shape[1])
    if not rows or width == 0:
        return logits
    if value_logits.shape[1] != width:
        value_logits = value_logits[:, :width]
    if vocab_map is not None:
        # A zero column stands before the value's own: -1 points to it once the map is shifted by one.
        vocab_map = vocab_map + 1
    changed = logits if vocab_map is not None or logits.shape[1] == width else logits[:, :width]
    one_by_one = logits.dtype == torch.float32 and (width >= SHORT_ROW or len(rows) <= FEW_ROWS)
    add = add_row_by_row if one_by_one else add_in_groups
    add(changed, value_logits, rows, sources, factors, vocab_map)
    return logits


def steered_rows(
    logits: torch.Tensor, weights: torch.Tensor, row_index: torch.Tensor | None
) -> tuple[list[int], list[int], list[float]]:
    """Choose the rows that change, on the host: a weight that is not finite has no finite product, so it is skipped.

    Returns:
        Rows of `logits`, the value row of each, and their weights.
    """
    count = logits.shape[0]
    factors = weights.tolist()
    targets = range(len(factors)) if row_index is None else row_index.tolist()
    rows, sources, chosen = [], [], []
    for source, (row, factor) in enumerate(zip(targets, factors, strict=True)):
        if 0.0 < abs(factor) <= FLOAT32_MAX and 0 <= row < count:
            rows.append(row)
            sources.append(source)
            chosen.append(factor)
    return rows, sources, chosen


def add_row_by_row(
    logits: torch.Tensor,
    value_logits: torch.Tensor,
    rows: list[int],
    sources: list[int],
    factors: list[float],
    vocab_map: torch.Tensor | None,
) -> None:
    """Add into float32 `logits` of the value's width (or of the map's, whose entries are shifted by one)."""
    zero = None if vocab_map is None else value_logits.new_zeros(1)
    targets, values = row_views(logits, rows), row_views(value_logits, sources)
    if len(rows) > 1 and value_logits.shape[1] < SHORT_ROW and is_run(sources):
        bounds = [largest_magnitude(take_rows(value_logits, sources))] * len(sources)
    else:
        bounds = map(largest_magnitude, values)  # in turn, so that the row is in the cache when it is added
    for target, value, factor, bound in zip(targets, values, factors, bounds, strict=True):
        if vocab_map is not None:
            value = torch.cat((zero, value)).index_select(0, vocab_map)
        if bound * abs(factor) <= FLOAT32_MAX:
            target.add_(value, alpha=factor)
        else:
            target.add_(drop_non_finite(value.to(torch.float32, copy=True).mul_(factor)))


def row_views(tensor: torch.Tensor, rows: list[int]) -> list[torch.Tensor]:
    """Views of the given rows; made in one call unless most of the rows are not wanted."""
    if len(rows) == 1 or tensor.shape[0] > 4 * len(rows):
        return [tensor[row] for row in rows]
    views = tensor.unbind(0)
    return [views[row] for row in rows]


def add_in_groups(
    logits: torch.Tensor,
    value_logits: torch.Tensor,
    rows: list[int],
    sources: list[int],
    factors: list[float],
    vocab_map: torch.Tensor | None,
) -> None:
    """Add several rows at a time, as many as stay in the cache; arguments as for `add_row_by_row`, any dtype."""
    width = value_logits.shape[1]
    # There may be two temporaries: together they hold no more than one of rows × columns.
    group = min(rows_in_cache(width), -(-len(rows) // 2))
    if vocab_map is not None:
        products = torch.zeros(group, width + 1, dtype=torch.float32, device=logits.device)
    scale = torch.tensor(factors, dtype=torch.float32, device=logits.device)[:, None]
    for start in range(0, len(rows), group):
        part = slice(start, start + group)
        targets, value, factor = rows[part], take_rows(value_logits, sources[part]), scale[part]
        if vocab_map is None:
            steer = drop_non_finite(torch.mul(value, factor))  # float32, as the factor is
        else:
            drop_non_finite(torch.mul(value, factor, out=products[: len(targets), 1:]))
            steer = products[: len(targets)].index_select(1, vocab_map)
        add_to_rows(logits, targets, steer)


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


def largest_magnitude(value: torch.Tensor) -> float:
    """The largest absolute value, or a NaN if there is one; one pass."""
    low, high = torch.aminmax(value)
    return max(-low.item(), high.item())


def drop_non_finite(steer: torch.Tensor) -> torch.Tensor:
    """Set NaN and infinities to 0, in place."""
    return steer.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def add_to_rows(logits: torch.Tensor, rows: list[int], steer: torch.Tensor) -> None:
    """Add float32 `steer` `[len(rows), width]` into the given rows of `logits` `[·, width]`, rounding once."""
    if is_run(rows):
        logits[rows[0] : rows[0] + len(rows)].add_(steer)
    elif logits.dtype == torch.float32 and logits.is_contiguous():
        logits.index_add_(0, torch.tensor(rows, device=logits.device), steer)
    else:  # index_add_ is slow with strides and cannot mix dtypes
        views = logits.unbind(0)
        torch._foreach_add_([views[row] for row in rows], list(steer.unbind(0)))
