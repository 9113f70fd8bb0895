"""Which networks a step needs, where that hangs on the engine's configuration and not on its requests."""

from types import SimpleNamespace

import pytest
import torch
from parity import create
from vllm.v1.worker import gpu_worker

import ivl_vllm
from ivl_vllm.serving.network import no_logits
from ivl_vllm.serving.steps import Steps, watch_steps


def config(models, **kwargs):
    return create(models["base"], **ivl_vllm.engine_args(value_model=str(models["value"])), **kwargs)


@pytest.mark.parametrize("mode, skips", [(0, True), (1, False), (2, True)])
def test_a_model_that_is_compiled_as_a_whole_always_runs_all_networks(models, mode, skips):
    """Each set of networks would be compiled anew, and torch raises at the eighth."""
    found = config(models, enforce_eager=False, compilation_config={"mode": mode})
    assert Steps.of(found).skip == skips


class Worker:
    """Stands for vLLM's: its warm-up takes two steps by `execute_model`, as that of runner V2 does."""

    def __init__(self, vllm_config):
        self.vllm_config, self.model_runner, self.seen = vllm_config, SimpleNamespace(), []

    def execute_model(self, scheduled):
        self.seen.append(Steps.of(self.vllm_config).needed)

    def compile_or_warm_up_model(self):
        for _ in range(2):
            self.execute_model(scheduled("_warmup_0_"))
        if self.vllm_config is None:
            raise MemoryError
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


@pytest.mark.parametrize(
    "rows, columns, strides",
    [(1, 50_257, [50_257, 50_304]), (2, 50_257, [50_257]), (1, 32_000, [32_000])],
)
def test_kernels_are_compiled_for_every_stride_of_logits(rows, columns, strides):
    """A single row keeps the stride that padding gave it."""
    found = no_logits(rows, columns, torch.device("cpu"))
    assert [logits.stride(0) for logits in found] == strides
    assert all(logits.shape == (rows, columns) for logits in found)
    padded = torch.zeros(rows, 50_304, dtype=torch.bfloat16)[:, :columns]
    assert padded.float().stride(0) in [*strides, 50_304 if rows == 1 else strides[0]]
