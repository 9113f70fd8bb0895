"""`value_add`: add weighted value logits, which exist already, into base logits. The math, and the torch backend."""

import math
from collections.abc import Sequence

import torch
from torch.autograd.graph import increment_version

from ivl_kernels.checks import check_operands, choose_backend, load_compiled

FLOAT32_MAX = torch.finfo(torch.float32).max
# Calls for so many value logits, or by so few of torch's threads, go to numba's one pass, which has one thread; torch
# shares its several passes, with at least 32,768 numbers for each thread. Beyond two threads this is an estimate.
FUSED_NUMBERS, FUSED_THREADS = 1 << 17, 2
# Temporaries of fewer numbers than this (64 KiB) are not cut in two.
SMALL = 16384
# A tensor: adding Python's 1 takes longer than adding 1 to a thousand columns does.
ONE = torch.ones((), dtype=torch.int32, device="cpu")


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
    * No gradient flows through it.
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
    steered: tuple[Sequence[int], Sequence[int], list[float]] | None = None,
) -> torch.Tensor:
    """The torch backend: what the CPU runs.

    `steered` is what `steered_rows` gave, from a caller who made `value_logits` for these rows alone and leaves them to
    be overwritten.

    Where numba is installed, `ivl_kernels.fused_add` does what `is_fused` tells, torch's operations the rest.
    """
    is_owned = steered is not None
    fused = load_compiled("fused_add") if is_fused(logits, value_logits, weights, vocab_map) else None
    if fused is not None:
        if is_owned:
            row_index = torch.tensor(steered[0], device="cpu")
            weights = torch.tensor(steered[2], device="cpu", dtype=torch.float32)
        fused.add_fused(logits, value_logits, weights, row_index, vocab_map)
        if not logits.is_inference():
            increment_version(logits)  # as operations in place do, for those who kept `logits` for a gradient
        return logits
    rows, sources, factors = steered_rows(logits, weights, row_index) if steered is None else steered
    with torch.no_grad():
        add_rows(logits, value_logits, rows, sources, factors, vocab_map, is_owned)
    return logits


def add_rows(
    logits: torch.Tensor,
    value_logits: torch.Tensor,
    rows: Sequence[int],
    sources: Sequence[int],
    factors: list[float],
    vocab_map: torch.Tensor | None,
    is_owned: bool,
) -> None:
    """Add the value rows `sources`, each times its factor, into `rows` of `logits`; owned ones are overwritten.

    Consecutive rows of float32 logits, as where every row is steered, are multiplied and added in one operation. Others
    go one by one: the second pass over a row finds it in the processor's cache, and no temporary grows with the batch.
    Logits of other dtypes go in groups that stay in the cache. Temporaries never hold more numbers together than one of
    rows × columns, value logits that are owned not counted, except where that is less than `SMALL`.
    """
    base_width, width = logits.shape[1], value_logits.shape[1]
    if not (rows and base_width and width):
        return
    changed, columns = logits, None
    if vocab_map is not None:
        columns = Columns(vocab_map)
    elif width != base_width:
        width = min(width, base_width)
        changed, value_logits = logits[:, :width], value_logits[:, :width]
    if logits.dtype != torch.float32:
        add_in_groups(changed, value_logits, rows, sources, factors, columns, is_owned)
    elif columns is None and is_run(rows) and is_run(sources):
        add_run(changed, value_logits, rows[0], sources[0], factors)
    else:
        targets, values = row_views(changed, rows), row_views(value_logits, sources)
        for target, value, factor in zip(targets, values, factors, strict=True):
            add_row(target, value, factor, columns)


def is_fused(
    logits: torch.Tensor, value_logits: torch.Tensor, weights: torch.Tensor, vocab_map: torch.Tensor | None
) -> bool:
    """Whether numba's pass can take these and is the fastest way."""
    numbers = value_logits.numel()
    return (
        logits.is_cpu
        and logits.dtype == torch.float32
        and value_logits.dtype in (torch.float32, torch.bfloat16)
        and (vocab_map is None or vocab_map.dtype == torch.int32)
        and numbers > 0
        and logits.numel() > 0
        and (numbers <= FUSED_NUMBERS or torch.get_num_threads() <= FUSED_THREADS)
        and not (logits.requires_grad or value_logits.requires_grad or weights.requires_grad)
    )


def add_run(logits: torch.Tensor, value_logits: torch.Tensor, row: int, source: int, factors: list[float]) -> None:
    """Add value rows from `source` on, each times its factor, into rows of float32 logits from `row` on."""
    count, group, largest = len(factors), rows_in_cache(logits.shape[1]), max(map(abs, factors))
    steps = torch.tensor(factors, device=logits.device, dtype=torch.float32).view(-1, 1)
    for start in range(0, count, group):
        end = min(start + group, count)
        target, value = logits[row + start : row + end], value_logits[source + start : source + end]
        if largest_magnitude(value) * largest <= FLOAT32_MAX:  # which leaves the rows in the cache
            target.addcmul_(value, steps[start:end])
        else:
            target.add_((value * steps[start:end]).nan_to_num_(0.0, 0.0, 0.0))


class Columns:
    """Gathers value columns into base columns through a map.

    Without gaps in the map nothing but the result is created; else a column of zeros is put in front, to which -1
    points once the map is shifted by one.
    """

    def __init__(self, vocab_map: torch.Tensor):
        """Take the map `[V_base]`, not empty; one pass over it finds out whether there are gaps."""
        self.has_gaps = vocab_map.min().item() < 0
        self.indices = vocab_map + ONE if self.has_gaps else vocab_map

    def temporaries(self, value: torch.Tensor) -> int:
        """How many temporaries gathering float32 numbers from these takes, besides the result."""
        return self.has_gaps + (value.dtype != torch.float32)

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        """Give `[..., V_base]` from `[..., V_value]`, 0 where there is no partner."""
        if self.has_gaps:
            value = torch.cat((value.new_zeros(*value.shape[:-1], 1), value), -1)
        return value.index_select(-1, self.indices)


def steered_rows(
    logits: torch.Tensor, weights: torch.Tensor, row_index: torch.Tensor | None
) -> tuple[Sequence[int], Sequence[int], list[float]]:
    """Choose the rows that change, on the host: a weight that is not finite has no finite product, so it is skipped.

    Returns:
        Rows of `logits`, the value row of each, and their weights.
    """
    count = logits.shape[0]
    factors = weights.tolist()
    everything = range(len(factors))
    targets = everything if row_index is None else row_index.tolist()
    # As most calls are. The sum of numbers that are not all finite is not finite.
    if factors and 0.0 not in factors and math.isfinite(sum(factors)) and min(targets) >= 0 and max(targets) < count:
        return targets, everything, factors
    rows, sources, chosen = [], [], []
    for source, (row, factor) in enumerate(zip(targets, factors, strict=True)):
        if 0 <= row < count and 0.0 < abs(factor) <= FLOAT32_MAX:
            rows.append(row)
            sources.append(source)
            chosen.append(factor)
    return rows, sources, chosen


def add_row(target: torch.Tensor, value: torch.Tensor, factor: float, columns: Columns | None) -> None:
    """Add one value row into a row of float32 logits, which has the value's width unless there is a map."""
    bound = largest_magnitude(value)  # which leaves the row in the cache
    if columns is not None:
        value = columns.gather(value)
    if bound * abs(factor) <= FLOAT32_MAX:
        target.add_(value, alpha=factor)
    else:
        target.add_(value.to(torch.float32, copy=True).mul_(factor).nan_to_num_(0.0, 0.0, 0.0))


def row_views(tensor: torch.Tensor, rows: Sequence[int]) -> list[torch.Tensor]:
    """Views of the given rows; made in one call unless most of the rows are not wanted."""
    if len(rows) == 1 or tensor.shape[0] > 4 * len(rows):
        return [tensor[row] for row in rows]
    views = tensor.unbind(0)
    return [views[row] for row in rows]


def add_in_groups(
    logits: torch.Tensor,
    value_logits: torch.Tensor,
    rows: Sequence[int],
    sources: Sequence[int],
    factors: list[float],
    columns: Columns | None,
    is_owned: bool,
) -> None:
    """Add the value rows `sources`, each times its factor, into `rows` of `logits` of any dtype, and round once.

    They go in groups that stay in the cache. Value rows that are owned are overwritten.
    """
    count, width = len(rows), max(value_logits.shape[1], logits.shape[1])
    # So many temporaries of a group together hold no more than one of rows × columns, or half of that beside value
    # logits that are a temporary themselves.
    temporaries = 1 + (not is_run(sources)) + (0 if columns is None else columns.temporaries(value_logits))
    group = min(rows_in_cache(width), -(-count // (2 * temporaries if is_owned else temporaries)))
    group = count if count * width <= SMALL else group
    steps = torch.tensor(factors, device=logits.device, dtype=torch.float32).view(-1, 1)
    views = row_views(logits, rows)
    for start in range(0, count, group):
        part = slice(start, start + group)
        values = take_rows(value_logits, sources[part])
        if columns is None and values.dtype == torch.float32:
            steer = values.mul_(steps[part]) if is_owned else values * steps[part]
        else:
            values = values.float()  # before the gather, which is slow for narrower numbers
            steer = (values if columns is None else columns.gather(values)).mul_(steps[part])
        torch._foreach_add_(views[part], list(steer.nan_to_num_(0.0, 0.0, 0.0).unbind(0)))


def rows_in_cache(width: int) -> int:
    """How many rows of `width` float32 numbers fit into 2 MiB for each of torch's threads (at least one row)."""
    return max(1, 524288 * torch.get_num_threads() // width)


def is_run(rows: Sequence[int]) -> bool:
    """Whether the rows are consecutive."""
    if not rows or isinstance(rows, range):
        return True
    return rows == list(range(rows[0], rows[0] + len(rows)))


def take_rows(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Select rows: a view if they are consecutive, else a copy."""
    if is_run(rows):
        return tensor[rows[0] : rows[0] + len(rows)] if rows else tensor[:0]
    return tensor.index_select(0, torch.tensor(rows, device=tensor.device))


def largest_magnitude(value: torch.Tensor) -> float:
    """The largest absolute value, or a NaN if there is one; one pass."""
    low, high = torch.aminmax(value)
    return max(-low.item(), high.item())
