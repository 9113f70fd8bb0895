"""Which networks a step needs, where that hangs on the engine's configuration and not on its requests."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from own_process import assert_all_pass
from parity import create
from tiny import make_model
from vllm.v1.worker import gpu_worker

import ivl_vllm
from ivl_vllm.serving import network
from ivl_vllm.serving import steps as steps_module
from ivl_vllm.serving.checks import check_engine
from ivl_vllm.serving.network import no_logits
from ivl_vllm.serving.steps import Steps, watch_steps


def config(models, **kwargs):
    return create(models["base"], **ivl_vllm.engine_args(value_model=str(models["value"])), **kwargs)


@pytest.mark.parametrize("mode, skips", [(0, True), (1, False), (2, True)])
def test_a_model_that_is_compiled_as_a_whole_always_runs_all_networks(models, mode, skips):
    """Each set of networks would be compiled anew, and torch raises at the eighth."""
    found = config(models, enforce_eager=False, compilation_config={"mode": mode})
    assert Steps.of(found).skip == skips


def test_ranks_that_make_the_same_calls_always_run_all_networks(models):
    """Experts are spread over data-parallel ranks, all of which have to take part in every network's."""
    found = config(models)
    assert Steps(found).skip
    found.parallel_config.data_parallel_size = 2
    assert not Steps(found).skip


@pytest.mark.parametrize("most, limit, in_pieces", [(4, 12, False), (4, 11, True), (1, 3, False)])
def test_rows_with_drafts_come_by_unsteered_only_where_logits_may_come_in_pieces(monkeypatch, most, limit, in_pieces):
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    from ivl_vllm.serving.processor import _may_come_in_pieces

    monkeypatch.setattr(rejection_sampler, "get_max_chunk_logits", {320: limit}.get)
    found = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=most),
        speculative_config=SimpleNamespace(num_speculative_tokens=2),
        model_config=SimpleNamespace(get_vocab_size=lambda: 320),
    )
    assert _may_come_in_pieces(found) == in_pieces


def test_a_request_that_another_engine_admitted_runs_unsteered():
    """Several engines of one process check each other's requests."""
    from ivl_vllm.serving.processor import IVLLogitsProcessor
    from ivl_vllm.serving.steps import needed_networks
    from ivl_vllm.settings import parse_settings

    processor = IVLLogitsProcessor.__new__(IVLLogitsProcessor)
    processor._settings = parse_settings({"values": {"math": {"model": "folder"}}})
    params = SimpleNamespace(extra_args={"ivl": "code=1.0"}, prompt_logprobs=None)
    assert processor._steering(params) is None
    assert needed_networks(processor._settings, params) == frozenset()
    params.extra_args = {"ivl": "math=1.0"}
    assert processor._steering(params) is not None and needed_networks(processor._settings, params) == {0}


@pytest.mark.parametrize("asked", [{"prompt_logprobs": 1}, {"prompt_logprob_token_ids": [5]}, {}])
def test_prompt_logprobs_need_the_networks_of_the_default_weight(asked):
    from ivl_vllm.serving.steps import needed_networks
    from ivl_vllm.settings import parse_settings

    settings = parse_settings({"value_model": "folder", "default_weight": 0.5})
    params = SimpleNamespace(**{"extra_args": {"ivl": 0}, "prompt_logprobs": None} | asked)
    assert needed_networks(settings, params) == ({0} if asked else frozenset())


def test_rows_of_a_network_that_sat_out_are_not_to_be_had():
    from ivl_vllm.serving.value_rows import Rows

    with pytest.raises(RuntimeError, match="network 1 sat out a step.*skip_unsteered"):
        Rows([torch.zeros(2, 3), None])[1]


def test_value_networks_get_places_in_the_sequence(models):
    """Also where the base counts along the axes of an image, at an address that stays."""
    steps, axes = Steps.of(config(models)), torch.zeros(3, 4, dtype=torch.long)
    assert torch.equal(steps.text_positions(axes[0]), axes[0])
    assert torch.equal(steps.text_positions(axes), axes[0])  # while memory is measured
    kept = torch.arange(8)
    buffers = SimpleNamespace(positions=kept, input_ids=None)
    for runner in (SimpleNamespace(positions=kept), SimpleNamespace(input_buffers=buffers)):
        steps.follow(runner)
        found = steps.text_positions(axes)
        assert found.tolist() == [0, 1, 2, 3] and found.data_ptr() == kept.data_ptr()


def test_value_networks_get_token_ids(models):
    """Also on the last of several stages, which runner V2 hands none, at an address that stays."""
    steps, positions = Steps.of(config(models)), torch.arange(3)
    given, kept = torch.tensor([7, 8, 9]), torch.arange(8, dtype=torch.int32)
    assert steps.token_ids(given, positions) is given
    assert steps.token_ids(None, positions).dtype == torch.int32  # while memory is measured
    steps.follow(SimpleNamespace(input_buffers=SimpleNamespace(positions=positions, input_ids=kept)))
    found = steps.token_ids(None, positions)
    assert found.tolist() == [0, 1, 2] and found.data_ptr() == kept.data_ptr()


def test_an_engine_that_is_gone_leaves_nothing_behind(models):
    """Its configuration is what all that is known of it hangs on, and its model runner holds that."""
    found = config(models)
    runner = SimpleNamespace(vllm_config=found, positions=torch.arange(8), input_batch=None)
    Steps.of(found).follow(runner)
    gone = weakref.ref(found)
    del found, runner
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "more, traces, installed",
    [((), False, ()), ((), True, ()), (("other:Processor",), False, ()), ((), False, ("other",))],
)
def test_runner_v1_keeps_outputs_for_those_that_read_them(models, tmp_path, monkeypatch, more, traces, installed):
    """For traces and for other processors; in `test_parity_v1.py` an engine without either."""
    found = config(models)
    settings = found.additional_config["ivl"]
    found.additional_config["ivl"] = settings | {"trace_file": str(tmp_path / "trace.jsonl")} if traces else settings
    found.model_config.logits_processors = [*found.model_config.logits_processors, *more]
    monkeypatch.setattr(steps_module, "entry_points", lambda group: installed)
    batch = SimpleNamespace(logitsprocs_need_output_token_ids=True)
    Steps(found).follow(SimpleNamespace(positions=None, input_batch=batch))
    assert batch.logitsprocs_need_output_token_ids == (traces or bool(more or installed))


class Worker:
    """Stands for vLLM's: its warm-up takes two steps by `execute_model`, as that of runner V2 does."""

    def __init__(self, vllm_config):
        self.vllm_config, self.model_runner, self.seen = vllm_config, SimpleNamespace(positions=None), []

    def execute_model(self, scheduled):
        self.seen.append(Steps.of(self.vllm_config).needed)

    def compile_or_warm_up_model(self):
        for _ in range(2):
            self.execute_model(scheduled("_warmup_0_"))
        return "compiled"


def scheduled(request):
    new = SimpleNamespace(req_id=request, sampling_params=None)
    return SimpleNamespace(finished_req_ids=(), scheduled_new_reqs=[new], num_scheduled_tokens={request: 3})


def test_all_networks_run_while_vllm_warms_up(models, monkeypatch):
    monkeypatch.setattr(gpu_worker, "Worker", Worker)
    watch_steps()
    worker = Worker(config(models))
    assert worker.compile_or_warm_up_model() == "compiled"
    worker.execute_model(scheduled("0"))
    assert worker.seen == [None, None, frozenset()]


def test_sleep_that_discards_weights_is_refused_before_anything_stops(models):
    from vllm.v1.engine.core import EngineCore

    slept = []

    def core(config):
        def pause(**_):
            slept.append("paused")

        executor = SimpleNamespace(sleep=slept.append)
        return SimpleNamespace(vllm_config=config, pause_scheduler=pause, model_executor=executor)

    steered = core(create(models["base"], **ivl_vllm.engine_args(value_model=str(models["value"]))))
    with pytest.raises(ValueError, match="ivl: sleep level is 2, which discards all weights.*use level 1"):
        EngineCore.sleep(steered, level=2)
    assert slept == []
    EngineCore.sleep(steered, 1)
    EngineCore.sleep(core(create(models["base"])), 2)
    assert slept == ["paused", 1, "paused", 2]


def test_a_warm_up_that_fails_is_over(models):
    steps = Steps.of(config(models))
    with pytest.raises(MemoryError), steps.warming_up():
        raise MemoryError
    steps.begin(scheduled("0"))
    assert steps.needed == frozenset()


@pytest.mark.parametrize(
    "rows, columns, strides",
    [(1, 50_257, [50_257, 50_304]), (2, 50_257, [50_257, 50_304]), (1, 32_000, [32_000])],
)
def test_kernels_are_compiled_for_every_stride_of_logits(rows, columns, strides):
    """A single row keeps the stride that padding gave it, and so do all that are fp32 before they are converted."""
    found = no_logits(rows, columns, torch.device("cpu"))
    assert [logits.stride(0) for logits in found] == strides
    assert all(logits.shape == (rows, columns) for logits in found)
    for dtype in (torch.bfloat16, torch.float32):
        padded = torch.zeros(rows, -(-columns // 64) * 64, dtype=dtype)[:, :columns]
        assert padded.float().stride(0) in strides


def test_nothing_is_compiled_after_the_warm_up():
    assert_all_pass("warm_up_cases.py", 7)


@pytest.mark.parametrize("hidden, stays", [(64, True), (160, False)])
def test_a_buffer_as_wide_as_the_base_is_not_shared_with_a_wider_network(models, tmp_path, hidden, stays):
    wide = make_model(tmp_path / "wide", seed=5, hidden=hidden, layers=1, heads=2)
    found = create(models["base"], **ivl_vllm.engine_args(value_model=str(wide)))
    found.compilation_config.pass_config.fuse_allreduce_rms = True
    check_engine(found)
    assert found.compilation_config.pass_config.fuse_allreduce_rms == stays


def test_what_adds_value_logits_is_compiled_before_requests_come(monkeypatch):
    called = []
    monkeypatch.setattr(network, "load_compiled", called.append)
    made = network.Network.__new__(network.Network)
    made.model = torch.nn.Linear(1, 1)
    made.warm_up(4)
    assert called == ["fused_add"]
