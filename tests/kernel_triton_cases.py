"""The Triton backend's cases. `test_kernels_triton.py` runs this file in a process of its own.

Without a GPU they need TRITON_INTERPRET=1 from the start of the process, which no other test may see.
"""

import importlib

import ivl_kernels
import pytest
import torch
from ivl_kernels import triton_lm_head_value_add, triton_value_add
from kernel_cases import KernelCases, check, device, make_case


class TestTriton(KernelCases):
    backend = "triton"


def spy(monkeypatch, module: str, function: str) -> list:
    """Record the calls of a function, which still runs."""
    place = importlib.import_module(module)
    original, calls = getattr(place, function), []
    monkeypatch.setattr(place, function, lambda *args: calls.append(args) or original(*args))
    return calls


def test_auto_takes_the_kernels(monkeypatch):
    launches = spy(monkeypatch, "ivl_kernels.triton_value_add", "value_add_triton")
    projections = spy(monkeypatch, "ivl_kernels.triton_lm_head_value_add", "lm_head_value_add_triton")
    check(make_case("value_add"), "auto")
    check(make_case("lm_head"), "auto")
    assert len(launches) == 1
    assert len(projections) == 1


def test_torch_backend_takes_no_kernel(monkeypatch):
    launches = spy(monkeypatch, "ivl_kernels.triton_value_add", "value_add_triton")
    check(make_case("value_add"), "torch")
    assert launches == []


@pytest.mark.parametrize(
    "config",
    [triton_value_add.Config(1024, 1, 4), triton_value_add.Config(1024, 3, 4), triton_value_add.Config(4096, 1, 8)],
    ids=str,
)
@pytest.mark.parametrize("columns", [4096, 5000])
def test_value_add_is_right_for_every_launch_shape(monkeypatch, config, columns):
    monkeypatch.setattr(triton_value_add, "choose_config", lambda *args: config)
    check(make_case("value_add", 3, columns), "triton")


@pytest.mark.parametrize(("pieces", "columns"), [(1, 512), (2, 500), (4, 512), (4, 300), (8, 513)])
def test_lm_head_is_right_for_every_number_of_pieces(monkeypatch, pieces, columns):
    config = triton_lm_head_value_add.Config(16, 256, 32, pieces, 2, 4)
    monkeypatch.setattr(triton_lm_head_value_add, "choose_config", lambda *args: config)
    check(make_case("lm_head", 20, columns), "triton")


def test_launchers_ask_for_their_configuration(monkeypatch):
    shapes = spy(monkeypatch, "ivl_kernels.triton_value_add", "choose_config")
    tiles = spy(monkeypatch, "ivl_kernels.triton_lm_head_value_add", "choose_config")
    check(make_case("value_add", 5, 1000, 777), "triton")
    check(make_case("lm_head", 5, value_dtype=torch.bfloat16), "triton")
    assert [shape[:2] for shape in shapes] == [(5, 777)]
    assert tiles == [(5, torch.bfloat16)]


def test_entries_past_the_end_are_never_read():
    # Not a promise to callers, who validate their map once, but what keeps a wrong map from reading foreign memory.
    case = make_case("value_add", 2, 100, 50, map_dtype=torch.int32)
    case.vocab_map[::2] = 10**8
    before = case.logits.clone()
    ivl_kernels.value_add(
        case.logits, case.value, case.weights, row_index=case.row_index, vocab_map=case.vocab_map, backend="triton"
    )
    assert torch.equal(case.logits[:, ::2], before[:, ::2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("operation", ["value_add", "lm_head"])
def test_captured_graph_follows_device_side_rows(operation):
    case = make_case(operation, 8, 1000)
    case.run("triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run("triton")
    for seed in (1, 2):
        fresh = make_case(operation, 8, 1000, seed=seed)
        for name in ("storage", "weights", "row_index", "value", "hidden", "matrix"):
            if getattr(case, name) is not None:
                getattr(case, name).copy_(getattr(fresh, name))
        graph.replay()
        fresh.run("triton")
        torch.testing.assert_close(case.storage, fresh.storage)
        assert case.logits.device == device()
