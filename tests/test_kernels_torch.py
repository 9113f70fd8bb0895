"""The torch backend without numba: right, chosen on the CPU, and frugal with memory."""

import importlib
import subprocess
import sys
from pathlib import Path

import ivl_kernels
import pytest
import torch
from ivl_kernels.checks import choose_backend
from kernel_cases import NAN, KernelCases, check, make_case
from own_process import count_results
from torch.utils._python_dispatch import TorchDispatchMode

value_add_module = importlib.import_module("ivl_kernels.value_add")
lm_head_module = importlib.import_module("ivl_kernels.lm_head_value_add")


@pytest.fixture(autouse=True)
def no_numba(monkeypatch):
    for module in (value_add_module, lm_head_module):
        monkeypatch.setattr(module, "load_compiled", lambda name: None)


class TestTorch(KernelCases):
    backend = "torch"


@pytest.mark.parametrize("operation", ["value_add", "lm_head"])
def test_groups_and_blocks_of_every_size(monkeypatch, operation):
    monkeypatch.setattr(value_add_module, "rows_in_cache", lambda width: 3)
    monkeypatch.setattr(value_add_module, "SMALL", 0)
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


def scattered_case(operation: str = "value_add", **options):
    """All rows steered, by an index that has no order."""
    case = plain_case(operation, **options)
    case.row_index = torch.tensor([3, 0, 6, 2], device=case.logits.device)
    return case


def test_float32_rows_go_one_by_one_and_in_one_pass():
    names = operations_of(scattered_case())
    assert names.count("add_") == 4
    assert not {"mul", "mul_", "nan_to_num_", "_foreach_add_"} & set(names)


def test_only_the_row_with_a_non_finite_value_takes_the_careful_path():
    case = scattered_case()
    case.value[1, 1] = NAN
    names = operations_of(case)
    assert names.count("nan_to_num_") == 1
    assert names.count("add_") == 4


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1000, 9000])
def test_consecutive_rows_are_multiplied_and_added_at_once(columns, value_dtype):
    case = plain_case(base_columns=columns, value_dtype=value_dtype)
    check(case, "torch")
    names = operations_of(case)
    assert names.count("addcmul_") == names.count("aminmax") == 1
    assert not {"mul", "nan_to_num_", "add_", "unbind"} & set(names)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skipped", [None, 0, 3])
@pytest.mark.parametrize("first", [0, 2])
def test_consecutive_rows_in_groups(monkeypatch, first, skipped, weights):
    monkeypatch.setattr(value_add_module, "rows_in_cache", lambda width: 2)
    case = plain_case()
    case.row_index = torch.arange(first, first + 4, device=case.logits.device)
    case.weights = torch.tensor([0.5, -1.25, 3.0, 0.75], device=case.logits.device).to(weights)
    case.value[1, 7], case.value[2, 8] = NAN, torch.finfo(torch.float32).max  # in both groups
    if skipped is not None:
        case.weights[skipped] = 0.0
    check(case, "torch")
    assert operations_of(case).count("nan_to_num_") == (1 if skipped == 0 else 2)


@pytest.mark.parametrize(
    ("weights", "index", "rows"),
    [
        ([0.5, 2.0], None, [0, 1]),
        ([0.5, 2.0], [2, 0], [2, 0]),
        ([0.5, 0.0], [2, 0], [2]),
        ([0.5, NAN], None, [0]),
        ([0.5, 2.0], [3, 0], [0]),
        ([0.5, 2.0], [-1, 0], [0]),
    ],
)
def test_which_rows_are_steered(weights, index, rows):
    index = None if index is None else torch.tensor(index)
    found, sources, factors = value_add_module.steered_rows(torch.zeros(3, 4), torch.tensor(weights), index)
    assert list(found) == rows
    assert [weights[source] for source in sources] == factors
    assert isinstance(sources, range) == (len(rows) == 2)  # all are: nothing is gone through one by one


@pytest.mark.parametrize("entry", [-1, 0])
def test_gaps_of_a_map_are_noticed(entry):
    assert value_add_module.Columns(torch.tensor([2, entry, 1])).has_gaps == (entry < 0)


def test_columns_that_the_base_lacks_are_not_projected():
    case = plain_case("lm_head", base_columns=300, value_columns=500)
    with Operations() as operations:
        case.run("torch")
    assert max(operations.sizes) == 4 * 300


@pytest.mark.parametrize("skips", [False, True])
def test_hidden_states_are_copied_only_where_rows_are_skipped(monkeypatch, skips):
    case = plain_case("lm_head")
    case.weights[1] *= not skips
    taken, original = [], lm_head_module.take_rows
    monkeypatch.setattr(lm_head_module, "take_rows", lambda *args: taken.append(args[1]) or original(*args))
    check(case, "torch")
    assert taken == ([[0, 2, 3]] if skips else [])


def test_a_single_row_needs_no_product():
    case = make_case("value_add", 1, index_dtype=None)
    names = operations_of(case)
    assert names.count("addcmul_") == names.count("aminmax") == 1
    assert not {"mul", "mul_", "nan_to_num_"} & set(names)


@pytest.mark.parametrize(
    ("index", "has_map", "logits_dtype", "chosen"),
    [
        pytest.param([0, 1, 2, 3], False, torch.float32, "add_run", id="consecutive"),
        pytest.param([3, 0, 6, 2], False, torch.float32, "add_row", id="scattered"),
        pytest.param([0, 1, 2, 3], True, torch.float32, "add_row", id="consecutive-with-a-map"),
        pytest.param([0, 1, 2, 3], False, torch.bfloat16, "add_in_groups", id="other-dtype"),
        pytest.param([3, 0, 6, 2], True, torch.bfloat16, "add_in_groups", id="other-dtype-with-a-map"),
    ],
)
def test_choice_between_rows_and_groups(monkeypatch, index, has_map, logits_dtype, chosen):
    taken = set()
    for name in ("add_run", "add_row", "add_in_groups"):
        original = getattr(value_add_module, name)
        wrapped = lambda *args, name=name, original=original: taken.add(name) or original(*args)  # noqa: E731
        monkeypatch.setattr(value_add_module, name, wrapped)
    case = plain_case(logits_dtype=logits_dtype, map_dtype=torch.int32 if has_map else None)
    case.row_index = torch.tensor(index, device=case.logits.device)
    check(case, "torch")
    assert taken == {chosen}


@pytest.mark.parametrize(("rows", "groups"), [(8, 1), (40, 5)])
def test_groups_are_cut_where_they_are_large(monkeypatch, rows, groups):
    monkeypatch.setattr(value_add_module, "rows_in_cache", lambda width: 8)
    case = make_case("value_add", rows, logits_dtype=torch.bfloat16, index_dtype=None)
    case.weights.fill_(0.5)
    check(case, "torch")
    assert operations_of(case).count("_foreach_add_") == groups


@pytest.mark.parametrize(("rows", "total", "used"), [([2], 3, "select"), ([2, 0], 3, "unbind"), ([2, 0], 9, "select")])
def test_views_of_rows(rows, total, used):
    tensor = torch.arange(2.0 * total).reshape(total, 2)
    with Operations() as operations:
        views = value_add_module.row_views(tensor, rows)
    assert torch.equal(torch.stack(views), tensor[rows])
    assert set(operations.names) == {used}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 5])
def test_a_matrix_is_widened_block_by_block(monkeypatch, count, dtype):
    monkeypatch.setattr(lm_head_module, "BLOCK_BYTES", 4 * 64 * 100)
    inputs, matrix = torch.randn(count, 64).to(dtype), torch.randn(1050, 64).to(dtype)
    with Operations() as operations:
        found = lm_head_module.project(inputs, matrix)
    torch.testing.assert_close(found, inputs.float() @ matrix.float().t(), rtol=1e-5, atol=1e-4)
    if dtype == torch.float32:  # which is read where it is
        assert operations.names.count("mm") == len(operations.sizes) == 1
    else:
        assert operations.names.count("mm") == 11
        # The value logits, the inputs in float32, and one buffer for all blocks.
        assert sorted(operations.sizes) == sorted([count * 1050, count * 64, 64 * 100])


def test_nothing_steered_computes_nothing():
    for operation in ("value_add", "lm_head"):
        case = plain_case(operation)
        case.weights.zero_()
        assert not {"mm", "mv", "mul", "add_", "aminmax", "zeros", "empty"} & set(operations_of(case))


@pytest.mark.parametrize("threads", [1, 64])
@pytest.mark.parametrize("map_dtype", [None, torch.int64])
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=["rows", "groups"])
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", ["value_add", "lm_head"])
def test_no_more_than_one_temporary_of_rows_times_columns(
    monkeypatch, operation, value_dtype, logits_dtype, map_dtype, threads
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rows, columns = 64, 40_000
    dtypes = {"logits_dtype": logits_dtype, "value_dtype": value_dtype, "map_dtype": map_dtype, "index_dtype": None}
    case = make_case(operation, rows, columns, hidden=32, **dtypes)
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


def test_a_narrow_value_under_a_wide_base_goes_in_groups():
    case = make_case("value_add", 8, 7000, 50, logits_dtype=torch.bfloat16, map_dtype=torch.int32, index_dtype=None)
    with Operations() as operations:
        case.run("torch")
    *_, second, largest = sorted(operations.sizes)
    assert second + largest <= 8 * 7001


@pytest.mark.parametrize("entry", [-1, 0])
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
def test_maps_with_and_without_gaps(value_dtype, entry):
    for rows in (1, 3):
        case = make_case("value_add", rows, 300, value_dtype=value_dtype, map_dtype=torch.int32, index_dtype=None)
        case.vocab_map.clamp_(min=0)
        case.vocab_map[7] = entry
        check(case, "torch")


def test_auto_on_the_cpu_is_torch(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choose_backend.cache_clear()
    calls = []
    monkeypatch.setattr(value_add_module, "value_add_torch", lambda *args: calls.append("value_add"))
    monkeypatch.setattr(lm_head_module, "lm_head_value_add_torch", lambda *args: calls.append("lm_head"))
    logits, weights = torch.zeros(1, 4), torch.ones(1)
    ivl_kernels.value_add(logits, torch.ones(1, 4), weights)
    ivl_kernels.lm_head_value_add(logits, torch.ones(1, 2), torch.ones(4, 2), weights)
    assert calls == ["value_add", "lm_head"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the CPU's memory; the torch backend is the CPU's")
def test_memory_at_a_time():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "kernel_memory_cases.py"]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert count_results(run.stdout) == {"passed": 96}
