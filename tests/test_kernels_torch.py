"""The torch backend: right, chosen on the CPU, and frugal with memory."""

import importlib

import ivl_kernels
import pytest
import torch
from kernel_cases import NAN, KernelCases, check, make_case
from torch.utils._python_dispatch import TorchDispatchMode

value_add_module = importlib.import_module("ivl_kernels.value_add")
lm_head_module = importlib.import_module("ivl_kernels.lm_head_value_add")


class TestTorch(KernelCases):
    backend = "torch"


@pytest.mark.parametrize("operation", ["value_add", "lm_head"])
def test_groups_and_blocks_of_every_size(monkeypatch, operation):
    monkeypatch.setattr(value_add_module, "rows_in_cache", lambda width: 3)
    monkeypatch.setattr(value_add_module, "FEW_ROWS", 0)
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


class Operations(TorchDispatchMode):
    """Names of the operations that run, and sizes of the tensors they create (views and results in place left out)."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        known = {a.untyped_storage().data_ptr() for a in (*args, *(kwargs or {}).values()) if torch.is_tensor(a)}
        if torch.is_tensor(result) and result.untyped_storage().data_ptr() not in known:
            self.sizes.append(result.numel())
        return result


def operations_of(case) -> list[str]:
    with Operations() as operations:
        case.run("torch")
    return operations.names


def plain_case(operation: str = "value_add", **options):
    """All rows steered, in order."""
    case = make_case(operation, 4, index_dtype=None, **options)
    case.weights.fill_(0.5)
    return case


def test_float32_rows_go_one_by_one_and_in_one_pass():
    names = operations_of(plain_case())
    assert names.count("add_") == 4
    assert not {"mul", "mul_", "nan_to_num_", "index_add_", "_foreach_add_"} & set(names)


def test_only_the_row_with_a_non_finite_value_takes_the_careful_path(monkeypatch):
    monkeypatch.setattr(value_add_module, "SHORT_ROW", 0)
    case = plain_case()
    case.value[1, 1] = NAN
    names = operations_of(case)
    assert names.count("nan_to_num_") == 1
    assert names.count("add_") == 4


def test_short_rows_are_looked_through_in_one_call():
    assert operations_of(plain_case()).count("aminmax") == 1


@pytest.mark.parametrize(
    ("n", "columns", "logits_dtype", "one_by_one"),
    [
        pytest.param(4, 1000, torch.float32, True, id="few-rows"),
        pytest.param(40, 1000, torch.float32, False, id="many-short-rows"),
        pytest.param(40, 8192, torch.float32, True, id="many-long-rows"),
        pytest.param(4, 8192, torch.bfloat16, False, id="other-dtype"),
    ],
)
def test_choice_between_rows_and_groups(monkeypatch, n, columns, logits_dtype, one_by_one):
    taken = []
    for name in ("add_row_by_row", "add_in_groups"):
        original = getattr(value_add_module, name)
        wrapped = lambda *args, name=name, original=original: taken.append(name) or original(*args)  # noqa: E731
        monkeypatch.setattr(value_add_module, name, wrapped)
    check(make_case("value_add", n, columns, logits_dtype=logits_dtype), "torch")
    assert taken == ["add_row_by_row" if one_by_one else "add_in_groups"]


@pytest.mark.parametrize(("rows", "total", "used"), [([2], 3, "select"), ([2, 0], 3, "unbind"), ([2, 0], 9, "select")])
def test_views_of_rows(rows, total, used):
    tensor = torch.arange(2.0 * total).reshape(total, 2)
    with Operations() as operations:
        views = value_add_module.row_views(tensor, rows)
    assert torch.equal(torch.stack(views), tensor[rows])
    assert set(operations.names) == {used}


@pytest.mark.parametrize(
    ("padding", "logits_dtype", "used"),
    [
        pytest.param(0, torch.float32, "index_add_", id="contiguous"),
        pytest.param(8, torch.float32, "_foreach_add_", id="strided"),
        pytest.param(0, torch.bfloat16, "_foreach_add_", id="other-dtype"),
    ],
)
def test_scattered_rows_of_a_group(monkeypatch, padding, logits_dtype, used):
    monkeypatch.setattr(value_add_module, "FEW_ROWS", 0)
    case = plain_case(padding=padding, logits_dtype=logits_dtype)
    case.row_index = torch.tensor([3, 0, 6, 2], device=case.logits.device)
    names = operations_of(case)
    assert {"index_add_", "_foreach_add_"} & set(names) == {used}


@pytest.mark.parametrize(
    ("count", "dtype", "product"),
    [
        (1, torch.float32, "mv"),
        (1, torch.bfloat16, "exchanged"),
        (4, torch.float32, "exchanged"),
        (5, torch.float32, ""),
    ],
)
def test_product_for_every_number_of_rows(monkeypatch, count, dtype, product):
    monkeypatch.setattr(lm_head_module, "BLOCK_BYTES", 4 * 64 * 100)
    inputs, matrix = torch.randn(count, 64), torch.randn(1000, 64).to(dtype)
    with Operations() as operations:
        found = lm_head_module.project(inputs, matrix)
    torch.testing.assert_close(found, inputs @ matrix.float().t(), rtol=1e-5, atol=1e-4)
    assert ("mv" in operations.names) == (product == "mv")
    assert operations.names.count("copy_") == (10 if product == "exchanged" else 0)


def test_the_projection_goes_in_blocks(monkeypatch):
    monkeypatch.setattr(lm_head_module, "BLOCK_BYTES", 4 * 64 * 100)
    for dtype in (torch.float32, torch.bfloat16):
        assert operations_of(plain_case("lm_head", value_dtype=dtype)).count("mm") == 10


def test_nothing_steered_computes_nothing():
    for operation in ("value_add", "lm_head"):
        case = plain_case(operation)
        case.weights.zero_()
        assert not {"mm", "mv", "mul", "add_", "aminmax", "zeros", "empty"} & set(operations_of(case))


@pytest.mark.parametrize("threads", [1, 64])
@pytest.mark.parametrize("map_dtype", [None, torch.int64])
@pytest.mark.parametrize("short_row", [0, 10**6], ids=["rows", "groups"])
@pytest.mark.parametrize("operation", ["value_add", "lm_head"])
def test_no_more_than_one_temporary_of_rows_times_columns(monkeypatch, operation, short_row, map_dtype, threads):
    monkeypatch.setattr(value_add_module, "SHORT_ROW", short_row)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rows, columns = 64, 40_000
    case = make_case(operation, rows, columns, hidden=32, map_dtype=map_dtype, index_dtype=None)
    case.row_index = torch.randperm(rows + 3, device=case.logits.device)[:rows]
    with Operations() as operations:
        case.run("torch")
    *_, second, largest = [0, 0, *sorted(operations.sizes)]
    if operation == "lm_head":  # the value logits of all rows are the one; the others hold a group of rows
        assert largest <= rows * columns
        if threads == 1:
            assert second <= largest // 2
    else:
        assert second + largest <= rows * (columns + 1)


def test_auto_on_the_cpu_is_torch(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    calls = []
    monkeypatch.setattr(value_add_module, "value_add_torch", lambda *args: calls.append("value_add"))
    monkeypatch.setattr(lm_head_module, "lm_head_value_add_torch", lambda *args: calls.append("lm_head"))
    logits, weights = torch.zeros(1, 4), torch.ones(1)
    ivl_kernels.value_add(logits, torch.ones(1, 4), weights)
    ivl_kernels.lm_head_value_add(logits, torch.ones(1, 2), torch.ones(4, 2), weights)
    assert calls == ["value_add", "lm_head"]
