"""Which CUDA graphs a step replays, asked of vLLM's own dispatchers; capturing and replaying them takes a GPU."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

from ivl_vllm.serving.graphs import choose_graphs
from ivl_vllm.serving.steps import Steps

SIZES = [1, 2, 4, 8]


def steps(networks=2):
    """Two networks, in a step that needs all of them."""
    made = Steps.__new__(Steps)
    made.settings = SimpleNamespace(networks=list(range(networks)))
    made.needed = frozenset(range(networks))
    return made


def config(mode):
    compilation = CompilationConfig(
        mode=3, cudagraph_mode=mode, cudagraph_capture_sizes=SIZES, max_cudagraph_capture_size=max(SIZES)
    )
    compilation.set_splitting_ops_for_v1(all2all_backend="naive", data_parallel_size=1)
    return SimpleNamespace(
        compilation_config=compilation,
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        lora_config=None,
        speculative_config=None,
        num_speculative_tokens=0,
    )


def v1(mode):
    dispatcher = CudagraphDispatcher(config(mode))
    dispatcher.initialize_cudagraph_keys(mode)
    return SimpleNamespace(cudagraph_dispatcher=dispatcher)


def v1_mode(runner, tokens=3, uniform=True, **kwargs):
    return runner.cudagraph_dispatcher.dispatch(num_tokens=tokens, uniform_decode=uniform, **kwargs)[0]


def v2(mode, monkeypatch):
    from vllm.v1.worker.gpu import cudagraph_utils

    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True))
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "current_platform", platform)
    manager = cudagraph_utils.CudaGraphManager(config(mode), torch.device("cpu"), mode, decode_query_len=1)
    manager._graphs_captured = True
    return SimpleNamespace(cudagraph_manager=manager)


def v2_mode(runner, tokens=3, uniform=True):
    length = 1 if uniform else None
    return runner.cudagraph_manager.dispatch(tokens, tokens, length, 0, max_query_len=length).cg_mode


@pytest.fixture(params=["v1", "v2"])
def make(request, monkeypatch):
    """Makes a runner for a mode, and says how to ask it."""
    if request.param == "v1":
        return v1, v1_mode
    return (lambda mode: v2(mode, monkeypatch)), v2_mode


def test_the_whole_forward_where_all_networks_are_needed_and_pieces_else(make):
    new, ask = make
    runner, found = new(CUDAGraphMode.FULL_AND_PIECEWISE), steps()
    choose_graphs(runner, found)
    owner = getattr(runner, "cudagraph_manager", None) or runner.cudagraph_dispatcher
    dispatch = owner.dispatch
    choose_graphs(runner, found)
    assert owner.dispatch is dispatch  # once is enough
    assert ask(runner) == CUDAGraphMode.FULL
    for needed in (frozenset(), frozenset({1})):
        found.needed = needed
        assert ask(runner) == CUDAGraphMode.PIECEWISE
    found.needed = None  # capture and profiling
    assert ask(runner) == CUDAGraphMode.FULL
    found.needed = frozenset()
    assert ask(runner, uniform=False) == CUDAGraphMode.PIECEWISE  # a prompt, with or without networks
    assert ask(runner, tokens=99) == CUDAGraphMode.NONE


@pytest.mark.parametrize("mode", [CUDAGraphMode.FULL, CUDAGraphMode.FULL_DECODE_ONLY])
def test_without_graphs_in_pieces_all_networks_run(make, mode):
    new, ask = make
    runner, found = new(mode), steps()
    choose_graphs(runner, found)
    found.needed = frozenset()
    assert ask(runner) == CUDAGraphMode.FULL


def test_what_the_runner_forbids_stays_forbidden():
    runner, found = v1(CUDAGraphMode.FULL_AND_PIECEWISE), steps()
    choose_graphs(runner, found)
    for needed in (frozenset(), frozenset({0, 1})):
        found.needed = needed
        assert v1_mode(runner, valid_modes=frozenset({CUDAGraphMode.NONE})) == CUDAGraphMode.NONE
        assert v1_mode(runner, invalid_modes={CUDAGraphMode.FULL}) == CUDAGraphMode.PIECEWISE


def test_breakable_graphs_hold_all_networks(make, monkeypatch):
    new, ask = make
    runner, found = new(CUDAGraphMode.FULL_AND_PIECEWISE), steps()
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    choose_graphs(runner, found)
    found.needed = frozenset()
    assert ask(runner) == CUDAGraphMode.FULL


def test_a_runner_without_graphs_is_left_alone():
    choose_graphs(SimpleNamespace(cudagraph_manager=None), steps())
