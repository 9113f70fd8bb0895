"""What both operations demand of their arguments. Nothing here reads a tensor's contents, except `check_vocab_map`."""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)
BACKENDS = ("auto", "triton", "torch")

# Shapes, strides, dtypes and devices that were found to fit: a decode step repeats them, and its rows may be short.
_passed: set[tuple] = set()
MOST_PASSED = 4096


@functools.cache
def choose_backend(backend: str, device: torch.device) -> str:
    """Resolve `"auto"`: Triton on a GPU, and on the CPU when Triton's interpreter is on; torch otherwise.

    The environment is asked once, as Triton itself does.

    Args:
        backend: `"auto"`, `"triton"` or `"torch"`.
        device: Where the logits are.

    Returns:
        `"triton"` or `"torch"`.

    Raises:
        ValueError: Unknown name, or `"triton"` where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(map(repr, BACKENDS))}")
    if backend == "torch":
        return "torch"
    runnable = (device.type == "cuda" or is_interpreted()) and has_triton()
    if backend == "triton" and not runnable:
        raise ValueError(
            f"backend='triton' cannot run with logits on {device}; move the tensors to a GPU and install Triton, use "
            "backend='torch', or set TRITON_INTERPRET=1 before Triton is imported (slow, for tests)"
        )
    return "triton" if runnable else "torch"


def is_interpreted() -> bool:
    """Whether the environment asks for Triton's interpreter."""
    setting = os.environ.get("TRITON_INTERPRET")
    return setting is not None and setting.lower() in ("1", "true", "on", "yes", "y")


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def load_compiled(name: str) -> ModuleType | None:
    """A module of this package that numba compiles, which takes seconds.

    Args:
        name: `"fused_add"`, `"fused_projection"` or `"fused_rows"`.

    Returns:
        The module, or None where numba is missing or does not work. A fault of the module itself is raised.
    """
    try:
        importlib.import_module("ivl_kernels.compiler")
    # Beside ImportError what numba and llvmlite raise where they do not fit each other, NumPy or the machine.
    except (ImportError, OSError, SystemError, AttributeError, RuntimeError):
        return None
    return importlib.import_module(f"ivl_kernels.{name}")


def check_vocab_map(vocab_map: torch.Tensor, num_value_columns: int, num_base_columns: int) -> torch.Tensor:
    """Validate a vocabulary map once, where it is made or moved to its device.

    The operations check shape and dtype only on every call, because reading the entries would stop the device.

    Args:
        vocab_map: `[num_base_columns]`, int32 or int64: base column → value column, -1 where there is no partner.
        num_value_columns: Columns of the value logits (rows of the value network's projection matrix).
        num_base_columns: Columns of the base logits.

    Returns:
        The map as contiguous int32 on the same device: half the bytes of int64 for the kernels to read.

    Raises:
        ValueError: Wrong shape or dtype, or an entry outside `[-1, num_value_columns)`.
    """
    _check_map_form(vocab_map, num_base_columns, vocab_map.device)
    if vocab_map.numel():
        low, high = (int(bound) for bound in torch.aminmax(vocab_map))
        if low < -1 or high >= num_value_columns:
            raise ValueError(
                f"vocab_map holds entries from {low} to {high}, but the value network has columns 0 to "
                f"{num_value_columns - 1} (-1 means no partner); make the map for this pair of vocabularies"
            )
    return vocab_map.to(torch.int32).contiguous()


def check_operands(
    logits: torch.Tensor,
    rows: dict[str, torch.Tensor],
    weights: torch.Tensor,
    row_index: torch.Tensor | None,
    vocab_map: torch.Tensor | None,
) -> None:
    """Check everything that the two operations have in common, without a device sync.

    Args:
        logits: The base logits.
        rows: Name → matrix of the value side; the first one has one row for each weight.
        weights: One weight per value row.
        row_index: Value row → row of `logits`, or None.
        vocab_map: Base column → value column, or None.

    Raises:
        ValueError: Naming the argument, what it is, what it has to be and how to get there.
    """
    # A good call pays for little more than this. Devices take long to ask for; on the CPU there is only one.
    form = (row_index is None, vocab_map is None)
    form += (logits.shape, logits.stride(), logits.dtype, logits.is_cpu or logits.device)
    form += (weights.shape, weights.stride(), weights.dtype, weights.is_cpu or weights.device)
    for tensor in rows.values():
        form += (tensor.shape, tensor.stride(), tensor.dtype, tensor.is_cpu or tensor.device)
    if row_index is not None:
        form += (row_index.shape, row_index.stride(), row_index.dtype, row_index.is_cpu or row_index.device)
    if vocab_map is not None:
        form += (vocab_map.shape, vocab_map.stride(), vocab_map.dtype, vocab_map.is_cpu or vocab_map.device)
    if form in _passed:
        return
    device = logits.device
    _check_matrix("logits", logits, device)
    for name, matrix in rows.items():
        _check_matrix(name, matrix, device)
    if not logits.is_contiguous() and logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(
            f"logits has row stride {logits.stride(0)} but {logits.shape[1]} columns, so its rows overlap and "
            "cannot be written in place; pass a tensor that is not expanded"
        )
    first, matrix = next(iter(rows.items()))
    count = matrix.shape[0]
    what = "one per row of the value side"
    _check_vector("weights", weights, count, what, LOGITS_DTYPES, device)
    if row_index is not None:
        _check_vector("row_index", row_index, count, what, INDEX_DTYPES, device)
    elif count > logits.shape[0]:
        raise ValueError(
            f"{first} has {count} rows but logits only {logits.shape[0]}; pass row_index to say which rows they change"
        )
    if vocab_map is not None:
        _check_map_form(vocab_map, logits.shape[1], device)
    if len(_passed) >= MOST_PASSED:
        _passed.clear()
    _passed.add(form)


def _check_matrix(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it has to be a matrix, one row per token")
    if tensor.dtype not in LOGITS_DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}; use one of {_names(LOGITS_DTYPES)}")
    if not tensor.is_contiguous() and tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(
            f"{name} has column stride {tensor.stride(1)}; its columns have to be adjacent (stride 1), rows may be "
            "strided: make it contiguous, not transposed"
        )
    _check_device(name, tensor, device)


def _check_vector(
    name: str,
    tensor: torch.Tensor,
    count: int,
    what: str,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if tensor.shape != (count,):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected ({count},), {what}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}; use one of {_names(dtypes)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has stride {tensor.stride(0)}; expected stride 1: call .contiguous() on it")
    _check_device(name, tensor, device)


def _check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but logits on {device}; move it there once, outside the step")


def _check_map_form(vocab_map: torch.Tensor, num_base_columns: int, device: torch.device) -> None:
    _check_vector("vocab_map", vocab_map, num_base_columns, "one entry per column of logits", INDEX_DTYPES, device)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
