"""The logits processor: adds each request's weighted value logits. One class for both of vLLM's model runners."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.logger import init_logger
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.sample.logits_processor import process_dict_updates

from ivl_vllm.serving import admission
from ivl_vllm.steering import Steering, plain

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor
except ImportError:  # vLLM before 0.31 has the V1 interface only

    class V2LogitsProcessor:
        """Takes the place of the interface that this vLLM lacks."""


if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

    from ivl_vllm.serving.trace import TracedRequest

# vLLM shows what is logged under its own name and nothing else.
logger = init_logger(f"vllm.{__name__}")


class IVLLogitsProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Adds `weight * value logits` to the rows of the requests that have a weight.

    vLLM's runner V1 makes it with `(vllm_config, device, is_pin_memory)` and keeps it up to date through
    `update_state`; runner V2 makes it with `(vllm_config, req_states)` and calls `add_request`.
    """

    def __init__(self, vllm_config: VllmConfig, device_or_states: Any, is_pin_memory: bool = False):
        # Not at the top: the frontend imports this module only to validate requests.
        from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

        from ivl_vllm.serving.checks import engine_settings
        from ivl_vllm.serving.request_weights import RequestWeights
        from ivl_vllm.serving.solved_weights import SolvedWeights
        from ivl_vllm.serving.steps import Steps
        from ivl_vllm.serving.trace import Trace

        if "ivl" not in vllm_config.additional_config:
            raise ValueError(
                "ivl: the logits processor was given to vLLM without the plugin's help (its entry point did not run): "
                "check that ivl-vllm is installed in this environment and that VLLM_PLUGINS, if set, contains ivl"
            )
        self._settings = engine_settings(vllm_config)
        self._value_rows = Steps.of(vllm_config).rows
        num_slots = vllm_config.scheduler_config.max_num_seqs
        device = getattr(device_or_states, "device", device_or_states)
        self._weights = RequestWeights(num_slots, len(self._settings.networks), device)
        self._solved = SolvedWeights(self._settings, self._value_rows, num_slots, device)
        self._drafts = vllm_config.speculative_config is not None
        self._in_pieces = self._drafts and _may_come_in_pieces(vllm_config)
        self._by_position: dict[int, tuple[Steering, TracedRequest | None]] = {}
        self._trace = None
        is_traced = self._settings.trace_file is not None
        if is_traced and get_tensor_model_parallel_rank() == 0 and get_pp_group().is_last_rank:
            prompt_len = getattr(device_or_states, "prompt_len", None)
            self._trace = Trace(self._settings.trace_file, None if prompt_len is None else prompt_len.np)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuses a bad `extra_args["ivl"]` when the request is admitted; a good one is kept in plain types.

        Raises:
            ValueError: vLLM answers it with HTTP 400.
        """
        extra_args = sampling_params.extra_args
        admission.check_request(extra_args)
        asked = (extra_args or {}).get("ivl")
        if asked is not None and (sent := plain(asked)) is not asked:
            sampling_params.extra_args = {**extra_args, "ivl": sent}

    def is_argmax_invariant(self) -> bool:
        """False: steering changes which token is the likeliest."""
        return False

    def _steering(self, params: SamplingParams) -> Steering | None:
        """What a request asks for, None if that is nothing."""
        try:
            steering = self._settings.steering(params.extra_args)
        except ValueError as error:
            # Possible only where several engines share a process and another one's settings admitted the request.
            # Raising would take down every other request with it.
            logger.error("%s; the request runs unsteered", error)
            return None
        return steering if steering != Steering() else None

    def _set(self, slot: int, steering: Steering | None, traced_request: TracedRequest | None) -> bool:
        """Gives a slot its request's wish. Returns whether its rows have to come by."""
        traced = self._trace is not None and self._trace.set(slot, traced_request)
        steering = steering or Steering()
        solved = self._solved.set(slot, steering)
        fixed = None if solved or not steering.weights else self._settings.network_weights(steering.weights)
        return self._weights.set(slot, fixed) or solved or traced

    def _added(
        self, params: SamplingParams, _prompt: Any, outputs: list[int] | None = None
    ) -> tuple[Steering, TracedRequest | None] | None:
        from ivl_vllm.serving.trace import TracedRequest

        steering = self._steering(params)
        return None if steering is None else (steering, TracedRequest.of(steering, params, outputs))

    # Runner V1: requests sit at positions of a batch and are moved about.

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows requests that were added, removed or moved."""
        if batch_update is None:  # most steps: nobody came, left or was moved
            return
        before = dict(self._by_position)
        if process_dict_updates(self._by_position, batch_update, self._added):
            for position in before.keys() | self._by_position.keys():
                if self._by_position.get(position) is not before.get(position):
                    self._set(position, *self._by_position.get(position, (None, None)))
        self.apply_staged_writes()

    # Runner V2: requests keep a slot, and rows are mapped to slots every step.

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Fills a slot. Returns whether `apply` has to be called for this request."""
        steered = self._set(req_idx, *(self._added(sampling_params, None) or (None, None)))
        return steered or self._in_pieces

    def apply_staged_writes(self) -> None:
        """Sends this step's new weights to the device."""
        self._weights.flush()
        self._solved.flush()

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Adds the weighted value logits in place.

        Args:
            logits: fp32 `[rows, vocab]`.
            ctx: V2's `LogitsContext`; None from V1, where row i belongs to the request at position i.
        """
        steered = self._weights.any_steered or self._solved.any
        if not steered and self._trace is None:
            return logits
        slots = np.arange(logits.shape[0]) if ctx is None else ctx.idx_mapping_np
        traced = [] if self._trace is None else self._trace.rows(slots, ctx)
        base = logits[[row.row for row in traced]] if traced else None
        solved = self._steer(logits, slots, ctx) if steered else []
        if traced:
            self._trace.write(traced, base, logits[[row.row for row in traced]], solved)
        return logits

    def _steer(self, logits: torch.Tensor, slots: np.ndarray, ctx: Any) -> list:
        """Adds the value logits, and returns the weights that were solved, see `SolvedWeights.apply`."""
        rows = self._value_rows.take(logits.shape[0])
        slot_of_row = None
        if ctx is not None and (slots.shape[0] != logits.shape[0] or self._drafts):
            slot_of_row = ctx.expanded_idx_mapping
        solved = self._solved.apply(logits, rows, slots, slot_of_row) if self._solved.any else []
        if self._weights.any_steered:
            groups = self._value_rows.groups
            if slot_of_row is None:
                chosen = self._weights.of_rows(slots, groups)
            else:
                chosen = self._weights.of_slots(slot_of_row, slots, groups)
            self._value_rows.add(logits, rows, chosen)
        return solved


def _may_come_in_pieces(vllm_config: VllmConfig) -> bool:
    """Whether a step's logits with drafts may come in several pieces, all of which must come by to keep rows in step.

    Runner V2 checks so many at a time as take 1 GB.
    """
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    most = vllm_config.scheduler_config.max_num_seqs * (1 + vllm_config.speculative_config.num_speculative_tokens)
    limit = getattr(rejection_sampler, "get_max_chunk_logits", None)
    return limit is None or most > limit(vllm_config.model_config.get_vocab_size())
