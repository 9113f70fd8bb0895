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


class Launches:
    """Takes the place of a kernel: what it was launched with, and nothing more."""

    def __init__(self):
        self.options = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.options.append(options)


@pytest.mark.parametrize("map_dtype", [None, torch.int32])
@pytest.mark.parametrize("index_dtype", [None, torch.int32])
@pytest.mark.parametrize("hidden", [128, 63])
def test_what_the_kernels_are_launched_with(monkeypatch, hidden, index_dtype, map_dtype):
    adds, projections = Launches(), Launches()
    monkeypatch.setattr(triton_value_add, "value_add_kernel", adds)
    monkeypatch.setattr(triton_lm_head_value_add, "lm_head_value_add_kernel", projections)
    options = {"index_dtype": index_dtype, "map_dtype": map_dtype, "hidden": hidden, "value_dtype": torch.bfloat16}
    for rows in (1, 64):
        for operation in ("value_add", "lm_head"):
            make_case(operation, rows, **options).run("triton")
    for launch in adds.options + projections.options:
        assert launch["HAS_MAP"] == (map_dtype is not None)
        assert launch["HAS_ROW_INDEX"] == (index_dtype is not None)
    assert [launch["EVEN_K"] for launch in projections.options] == [hidden == 128] * 2
    assert [launch["UPCAST"] for launch in projections.options] == [not torch.cuda.is_available()] * 2
    wanted = [triton_lm_head_value_add.choose_config(rows, torch.bfloat16) for rows in (1, 64)]
    for launch, config in zip(projections.options, wanted, strict=True):
        assert (launch["BLOCK_M"], launch["BLOCK_N"], launch["PIECES"]) == (
            config.block_m,
            config.block_n,
            config.pieces,
        )


@pytest.mark.parametrize(("n", "columns"), [(0, 100), (3, 0)])
def test_nothing_to_do_launches_nothing(monkeypatch, n, columns):
    launches = Launches()
    monkeypatch.setattr(triton_value_add, "value_add_kernel", launches)
    monkeypatch.setattr(triton_lm_head_value_add, "lm_head_value_add_kernel", launches)
    for operation in ("value_add", "lm_head"):
        make_case(operation, n, columns, index_dtype=None).run("triton")
    assert not launches.options


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
