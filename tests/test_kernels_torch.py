"""The torch backend: right, chosen on the CPU, and frugal with memory."""

import importlib

import ivl_kernels
import pytest
import torch
from kernel_cases import KernelCases, check, make_case
from torch.utils._python_dispatch import TorchDispatchMode

value_add_module = importlib.import_module("ivl_kernels.value_add")
lm_head_module = importlib.import_module("ivl_kernels.lm_head_value_add")


class TestTorch(KernelCases):
    backend = "torch"


@pytest.mark.parametrize("operation", ["value_add", "lm_head"])
def test_groups_and_blocks_of_every_size(monkeypatch, operation):
    monkeypatch.setattr(value_add_module, "rows_in_cache", lambda width: 3)
    monkeypatch.setattr(lm_head_module, "BLOCK_BYTES", 4 * 64 * 100)
    check(make_case(operation, 11, 333, map_dtype=torch.int32), "torch")
    check(make_case(operation, 11, 333), "torch")


def test_rows_in_cache_is_one_row_for_a_wide_vocabulary_and_many_for_a_narrow_one(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert value_add_module.rows_in_cache(2_000_000) == 1
    assert value_add_module.rows_in_cache(151_936) == 6
    assert value_add_module.rows_in_cache(32_000) == 32


@pytest.mark.parametrize(
    ("rows", "is_view"), [([2, 3, 4], True), ([4], True), ([], True), ([2, 4], False), ([3, 2], False)]
)
def test_consecutive_rows_are_not_copied(rows, is_view):
    tensor = torch.arange(12.0).reshape(6, 2)
    taken = value_add_module.take_rows(tensor, rows)
    assert torch.equal(taken, tensor[rows])
    assert (taken.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()) == is_view


class Allocations(TorchDispatchMode):
    """Sizes of the tensors that operations create, leaving out views and results in place."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in (*args, *(kwargs or {}).values()) if torch.is_tensor(a)}
        if torch.is_tensor(result) and result.untyped_storage().data_ptr() not in known:
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("map_dtype", [None, torch.int64])
@pytest.mark.parametrize("operation", ["value_add", "lm_head"])
def test_temporaries_together_stay_below_rows_times_columns(operation, map_dtype):
    rows, columns = 64, 40_000
    case = make_case(operation, rows, columns, hidden=32, map_dtype=map_dtype, index_dtype=None)
    with Allocations() as allocations:
        case.run("torch")
    assert allocations.sizes
    largest = sorted(allocations.sizes)[-3:]
    if operation == "value_add":
        assert sum(largest) < rows * columns
    else:  # the other temporaries are blocks of the matrix
        assert max(allocations.sizes) <= rows * columns


def test_auto_on_the_cpu_is_torch(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    calls = []
    monkeypatch.setattr(value_add_module, "value_add_torch", lambda *args: calls.append("value_add"))
    monkeypatch.setattr(lm_head_module, "lm_head_value_add_torch", lambda *args: calls.append("lm_head"))
    logits, weights = torch.zeros(1, 4), torch.ones(1)
    ivl_kernels.value_add(logits, torch.ones(1, 4), weights)
    ivl_kernels.lm_head_value_add(logits, torch.ones(1, 2), torch.ones(4, 2), weights)
    assert calls == ["value_add", "lm_head"]
