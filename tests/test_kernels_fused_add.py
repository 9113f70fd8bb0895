"""The torch backend with numba: one pass over each row, where that is the fastest way."""

import importlib

import ivl_kernels
import pytest
import torch
from ivl_kernels.checks import load_compiled
from kernel_cases import FLOATS, KernelCases, check, make_case

pytest.importorskip("numba", reason="the kernels work without it; CI has it")
value_add_module = importlib.import_module("ivl_kernels.value_add")
# Not skipped with numba: a fault in here would otherwise pass for a missing package.
fused_add = importlib.import_module("ivl_kernels.fused_add")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="cases go to the GPU where there is one; CI has none")


@pytest.fixture
def calls(monkeypatch) -> list:
    """The value logits' dtype of each call that numba takes."""
    taken, original = [], fused_add.add_fused
    monkeypatch.setattr(fused_add, "add_fused", lambda *args: taken.append(args[1].dtype) or original(*args))
    return taken


class TestFused(KernelCases):
    backend = "torch"


def test_a_fault_of_ours_does_not_pass_for_a_missing_numba():
    with pytest.raises(ModuleNotFoundError, match="ivl_kernels.nonsense"):
        load_compiled("nonsense")


def operands(logits=torch.float32, value=torch.float32, map_dtype=None, rows=2, columns=10, weights=torch.float32):
    """Arguments of `is_fused`."""
    vocab_map = None if map_dtype is None else torch.zeros(columns, dtype=map_dtype)
    tensors = torch.zeros(rows, columns, dtype=logits), torch.zeros(rows, columns, dtype=value)
    return *tensors, torch.ones(rows, dtype=weights), vocab_map


@pytest.mark.parametrize(
    ("options", "threads", "wanted"),
    [
        ({}, 1, True),
        ({"value": torch.bfloat16, "map_dtype": torch.int32, "weights": torch.float16}, 64, True),
        ({"rows": 8, "columns": 16385}, 2, True),
        ({"rows": 8, "columns": 16384}, 3, True),
        ({"rows": 8, "columns": 16385}, 3, False),
        ({"logits": torch.bfloat16}, 1, False),
        ({"value": torch.float16}, 1, False),
        ({"map_dtype": torch.int64}, 1, False),
        ({"rows": 0}, 1, False),
        ({"columns": 0}, 1, False),
    ],
)
def test_what_numba_takes(monkeypatch, options, threads, wanted):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert value_add_module.is_fused(*operands(**options)) == wanted


@pytest.mark.parametrize("number", range(3))
def test_tensors_with_gradients_are_left_to_torch(number):
    given = list(operands())
    given[number].requires_grad_()
    assert not value_add_module.is_fused(*given)


@pytest.mark.parametrize("index_dtype", [None, torch.int32, torch.int64])
@pytest.mark.parametrize("map_dtype", [None, torch.int32])
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0, 24], ids=["contiguous", "strided"])
@pytest.mark.parametrize("value_columns", [700, 1000, 1300])
def test_numba_adds_the_value_logits(calls, value_dtype, map_dtype, index_dtype, padding, value_columns):
    case = make_case(
        "value_add",
        5,
        1000,
        value_columns,
        value_dtype=value_dtype,
        map_dtype=map_dtype,
        index_dtype=index_dtype,
        padding=padding,
    )
    check(case, "torch")
    assert calls == [value_dtype]


@pytest.mark.parametrize("value_dtype", FLOATS)
def test_numba_adds_the_steered_rows_of_a_projection(calls, value_dtype):
    check(make_case("lm_head", 5, value_dtype=value_dtype), "torch")
    assert calls == [torch.float32]


@pytest.mark.parametrize("has_map", [False, True])
def test_products_are_rounded_before_they_are_added(has_map):
    """As in `base + w * value` of eager PyTorch, number for number."""
    torch.manual_seed(0)
    base, value, weights = torch.randn(4, 999), torch.randn(4, 999), torch.randn(4)
    vocab_map = torch.randperm(999, dtype=torch.int32) if has_map else None
    wanted = base + weights[:, None] * (value[:, vocab_map.long()] if has_map else value)
    assert torch.equal(ivl_kernels.value_add(base.clone(), value, weights, vocab_map=vocab_map), wanted)


def test_entries_of_a_map_beyond_the_value_columns_count_as_no_partner():
    vocab_map = torch.tensor([2, 3, -5, 0], dtype=torch.int32)
    found = ivl_kernels.value_add(
        torch.zeros(1, 4), torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1), vocab_map=vocab_map
    )
    assert found.tolist() == [[3.0, 0.0, 0.0, 1.0]]


def test_one_value_row_for_all():
    value = torch.randn(1, 30).expand(3, 30)
    found = ivl_kernels.value_add(torch.zeros(3, 30), value, torch.tensor([1.0, -2.0, 0.5]))
    assert torch.equal(found, torch.stack([value[0], -2 * value[0], value[0] / 2]))


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
def test_columns_of_a_transposed_matrix(value_dtype):
    """One column has any stride."""
    logits, value = torch.zeros(5, 3), torch.arange(15.0).reshape(3, 5).t().to(value_dtype)
    ivl_kernels.value_add(logits[:, 1:2], value[:, 1:2], torch.ones(5))
    assert logits.tolist() == [[0.0, 5.0 + row, 0.0] for row in range(5)]


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        logits = torch.zeros(2, 3)
    with torch.inference_mode():
        assert ivl_kernels.value_add(logits, torch.ones(2, 3), torch.ones(2)).tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("way", ["numba", "torch"])
@pytest.mark.parametrize("index", [[0, 1], [1, 0]], ids=["run", "scattered"])
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_flows_through_it(monkeypatch, way, index, logits_dtype):
    """But a gradient that needs the logits as they were is refused, as after every operation in place."""
    if way == "torch":
        monkeypatch.setattr(value_add_module, "load_compiled", lambda name: None)
    logits = torch.zeros(2, 3, dtype=logits_dtype)
    factor = torch.ones((), requires_grad=True)
    kept = (factor * logits).sum()
    value, weights = torch.ones(2, 3), torch.ones(2)
    ivl_kernels.value_add(logits, value, weights, row_index=torch.tensor(index))
    assert logits.tolist() == [[1.0] * 3] * 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
    given = [part.clone().requires_grad_() for part in (logits, value, weights)]
    ivl_kernels.value_add(*given, row_index=torch.tensor(index))
    assert given[0].tolist() == [[2.0] * 3] * 2
    assert given[0].is_leaf


def test_any_default_device():
    with torch.device("meta"):
        logits = torch.zeros(1, 4, device="cpu")
        states, head = torch.ones(1, 2, device="cpu"), torch.ones(4, 2, device="cpu")
        ivl_kernels.lm_head_value_add(logits, states, head, torch.ones(1, device="cpu"), backend="torch")
    assert logits.tolist() == [[2.0] * 4]
