"""Which value networks a step needs: those that some scheduled request uses. The others do not run.

A network that sits out a step leaves no keys and values for that step's tokens. So a request runs, in every step of its
own, the same set of networks, and requests with different sets share no blocks of the prefix cache: `mark_requests`
puts the set into the request's cache salt where the engine core admits it. Where a KV connector stores blocks, all
networks run, and the salt says which these are.
"""

from __future__ import annotations

import contextlib
import functools
import uuid
import weakref
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import torch
from vllm.config.compilation import CompilationMode

from ivl_vllm.plugin import ENGINE_KEY
from ivl_vllm.serving.admission import ALL_NETWORKS, MARKS, TRACE_ID
from ivl_vllm.serving.graphs import choose_graphs
from ivl_vllm.serving.value_rows import ValueRows
from ivl_vllm.settings import Settings, parse_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import SchedulerOutput


def needed_networks(settings: Settings, params: SamplingParams | None) -> frozenset[int]:
    """The numbers of the networks that a request uses.

    Args:
        settings: the engine's.
        params: the request's; None for a request that samples nothing.
    """
    if params is None:
        return frozenset()
    if ALL_NETWORKS in (params.extra_args or {}):
        return frozenset(range(len(settings.networks)))
    try:
        names = settings.steering(params.extra_args).names
    except ValueError:  # runs unsteered: see the processor
        names = ()
    used = settings.networks_of(names)
    if settings.default_weight and (
        params.prompt_logprobs is not None or getattr(params, "prompt_logprob_token_ids", None) is not None
    ):
        used |= settings.networks_of(settings.steering(None).names)
    return used


def mark_requests() -> None:
    """Has the engine core keep requests with different sets of networks apart in the prefix cache, and name traces."""
    from vllm.v1.engine.core import EngineCore

    preprocess = EngineCore.preprocess_add_request

    @functools.wraps(preprocess)
    def preprocess_add_request(self: EngineCore, request: Any) -> Any:
        steps = Steps.of(self.vllm_config)
        if steps is not None:
            _mark(steps, request)
        return preprocess(self, request)

    EngineCore.preprocess_add_request = preprocess_add_request


def _mark(steps: Steps, request: Any) -> None:
    params = request.sampling_params
    given = dict((params.extra_args if params is not None else None) or {})
    # Marks are not the client's to set.
    extra_args = {name: value for name, value in given.items() if name not in MARKS}
    if steps.skip and request.resumable:
        extra_args[ALL_NETWORKS] = True
    if steps.settings.trace_file and _wants_trace(steps.settings, params):
        extra_args[TRACE_ID] = uuid.uuid4().hex[:12]
    if params is not None and extra_args != given:
        request.sampling_params = params.clone()
        request.sampling_params.extra_args = extra_args
    if steps.skip:
        needed = sorted(needed_networks(steps.settings, request.sampling_params))
        # At the end, so that no salt of the user's can imitate another set. Blocks that no network has a part in keep
        # the hashes of plain vLLM, which routers may know.
        if needed or request.cache_salt:
            request.cache_salt = f"{request.cache_salt or ''}\0ivl:{','.join(map(str, needed))}"
    elif steps.fingerprint:
        request.cache_salt = f"{request.cache_salt or ''}\0ivl:{steps.fingerprint}"


def _wants_trace(settings: Settings, params: SamplingParams | None) -> bool:
    try:
        return params is not None and settings.steering(params.extra_args).trace is not None
    except ValueError:  # runs unsteered: see the processor
        return False


class Steps:
    """Follows the scheduled requests of one engine, in each of its workers.

    Attributes:
        rows: the value networks, and what they make of a step.
        settings: the engine's.
        skip: whether networks may sit out steps. Not with data parallelism, whose ranks must make the same collective
            calls, nor with a KV connector, which may hand blocks to requests by rules of its own, nor where
            torch.compile takes the model as a whole (mode 1): each set of networks would be compiled again, up to
            torch's limit, at which the engine ends.
        fingerprint: of the networks, with a KV connector: what it stores may outlive the engine, and be found by one
            with other networks.
        needed: numbers of the networks that the step in progress needs; None outside of steps (profiling, warm-up,
            capture of CUDA graphs), where all of them run.
        reads_outputs: whether a logits processor of this engine may read what requests have generated so far: another
            one than ours, or ours for a trace.
        positions: `[most tokens]`, where the model runner writes each token's place in its sequence; None before
            warm-up.
        input_ids: `[most tokens]`, where runner V2 writes each token's id; None before warm-up.
        sampled: whether the step in progress has computed its logits to sample from. What comes after them is prompt
            log-probabilities.
    """

    def __init__(self, vllm_config: VllmConfig):
        self.rows = ValueRows()
        self.settings = parse_settings(vllm_config.additional_config["ivl"])
        self.skip = (
            self.settings.skip_unsteered
            and vllm_config.parallel_config.data_parallel_size == 1
            and vllm_config.kv_transfer_config is None
            and vllm_config.compilation_config.mode != CompilationMode.STOCK_TORCH_COMPILE
        )
        self.fingerprint: str | None = vllm_config.additional_config.get(ENGINE_KEY, {}).get("fingerprint")
        processors = vllm_config.model_config.logits_processors or ()
        installed = entry_points(group="vllm.logits_processors")  # vLLM runs these too
        self.reads_outputs = len(processors) > 1 or bool(installed) or self.settings.trace_file is not None
        self._of_request: dict[str, frozenset[int]] = {}
        self._everything = frozenset(range(len(self.settings.networks)))
        self._is_warming_up = False
        self.needed: frozenset[int] | None = None
        self.positions: torch.Tensor | None = None
        self.input_ids: torch.Tensor | None = None
        self.sampled = False

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Steps | None:
        """The one of this engine and process; None for an engine without `ivl`."""
        key = id(vllm_config)
        if key not in _steps_of_engine:
            if not isinstance(vllm_config.additional_config, dict) or "ivl" not in vllm_config.additional_config:
                return None
            _steps_of_engine[key] = cls(vllm_config)
            weakref.finalize(vllm_config, _steps_of_engine.pop, key)
        return _steps_of_engine[key]

    def begin(self, scheduled: SchedulerOutput) -> None:
        """A step starts."""
        self.sampled = False
        if not self.skip or self._is_warming_up:
            return
        for request in scheduled.finished_req_ids:
            self._of_request.pop(request, None)
        for new in scheduled.scheduled_new_reqs:
            self._of_request[new.req_id] = needed_networks(self.settings, new.sampling_params)
        # Few different sets, however many requests.
        used = {self._of_request.get(request, self._everything) for request in scheduled.num_scheduled_tokens}
        self.needed = frozenset().union(*used)

    def follow(self, runner: Any) -> None:
        """Learns where the model runner keeps its inputs: V1 in attributes of its own, V2 in buffers.

        For any custom processor V1 waits in every step for the tokens of the step before: not for one that reads none.
        """
        # Not the runner itself, which would keep the engine alive.
        buffers = getattr(runner, "input_buffers", None)
        self.positions = (buffers or runner).positions
        self.input_ids = None if buffers is None else buffers.input_ids
        batch = getattr(runner, "input_batch", None)
        if not self.reads_outputs and getattr(batch, "logitsprocs_need_output_token_ids", False):
            batch.logitsprocs_need_output_token_ids = False

    def text_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """`[tokens]` places in the sequence, whatever the base's own positions are.

        Args:
            positions: as the base takes them: these, or `[axes, tokens]` of text and images (M-RoPE).
        """
        if positions.dim() == 1:
            return positions
        # While vLLM measures memory the runner is not known yet, and any numbers do.
        return positions[0] if self.positions is None else self.positions[: positions.shape[1]]

    def token_ids(self, input_ids: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        """`[tokens]` ids, which runner V2 does not hand to the last of several stages (vLLM before 0.33).

        Args:
            input_ids: as the base takes them.
            positions: `[tokens]`.
        """
        if input_ids is not None:
            return input_ids
        if self.input_ids is None:  # as above
            return torch.zeros_like(positions, dtype=torch.int32)
        return self.input_ids[: positions.shape[0]]

    @property
    def is_partial(self) -> bool:
        """Whether the step in progress leaves some network out."""
        return self.needed is not None and len(self.needed) < len(self.settings.networks)

    def end(self) -> None:
        """The step's forward is over."""
        self.needed = None

    @contextlib.contextmanager
    def warming_up(self) -> Iterator[None]:
        """Steps in here are of vLLM's own making, to compile kernels: all networks run."""
        self._is_warming_up = True
        try:
            yield
        finally:
            self._is_warming_up = False


# By identity: configurations are compared by value and cannot be keys, nor may they carry attributes of ours.
_steps_of_engine: dict[int, Steps] = {}


def watch_steps() -> None:
    """Has the workers of this process tell `Steps` what is scheduled."""
    from vllm.v1.worker.gpu_worker import Worker

    execute, warm_up = Worker.execute_model, Worker.compile_or_warm_up_model
    if getattr(execute, "ivl", False):
        return

    @functools.wraps(execute)
    def execute_model(self: Worker, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        steps = Steps.of(self.vllm_config)
        if steps is None:
            return execute(self, scheduler_output, *args, **kwargs)
        steps.follow(self.model_runner)
        if steps.skip:
            choose_graphs(self.model_runner, steps)
        steps.begin(scheduler_output)
        try:
            return execute(self, scheduler_output, *args, **kwargs)
        finally:
            steps.end()

    @functools.wraps(warm_up)
    def compile_or_warm_up_model(self: Worker, *args: Any, **kwargs: Any) -> Any:
        steps = Steps.of(self.vllm_config)
        if steps is None:
            return warm_up(self, *args, **kwargs)
        steps.follow(self.model_runner)
        with steps.warming_up():
            return warm_up(self, *args, **kwargs)

    execute_model.ivl = True
    Worker.execute_model, Worker.compile_or_warm_up_model = execute_model, compile_or_warm_up_model
