"""The obvious plugin: a vLLM logits processor that holds a Hugging Face value model with a dense KV cache of its own.

It needs nothing from vLLM but the tokens of every request. Written as well as that goes: one cache row for each
position of vLLM's batch, so that one forward decodes all requests on a plain view of the cache; a row moves when vLLM
moves the request. What it cannot have is paged memory, chunked or batched prompts, and prefix caching.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate


class RowCache:
    """Keys and values `[layers, 2, rows, kv_heads, positions, head_size]`; row i belongs to position i of the batch.

    Takes the place of transformers' `Cache` in a forward of one token a row.
    """

    def __init__(self, config: Any, rows: int, positions: int, dtype: torch.dtype, device: torch.device) -> None:
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, positions, head_size)
        self.store = torch.zeros(shape, dtype=dtype, device=device)
        self._rows = self._positions = torch.empty(0)
        self._longest = 0

    def begin(self, positions: torch.Tensor, longest: int) -> None:
        """A step of one token for each of the first rows, at these positions (int `[rows]`), all before `longest`."""
        self._rows, self._positions = torch.arange(len(positions), device=positions.device), positions
        self._longest = longest

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores `[rows, kv_heads, 1, head_size]` and gives views of all that is stored for these rows."""
        views = []
        for kind, new in enumerate((keys, values)):
            store = self.store[layer, kind]
            store[self._rows, :, self._positions] = new[:, :, 0]
            views.append(store[: len(self._rows), :, : self._longest])
        return views[0], views[1]

    def get_seq_length(self, layer: int = 0) -> int:
        """Longest sequence, in tokens."""
        return self._longest


@dataclass
class _Request:
    """A request at a position of the batch; `outputs` is vLLM's own list, which grows."""

    weight: float
    prompt: list[int]
    outputs: list[int]
    row: int | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.outputs)


class HFValueProcessor(LogitsProcessor):
    """Adds `extra_args["ivl"]` times the value model's logits. The model's folder is in `PEER_VALUE_MODEL`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        dtype = vllm_config.model_config.dtype
        self._model = AutoModelForCausalLM.from_pretrained(os.environ["PEER_VALUE_MODEL"], dtype=dtype).eval()
        self._model.to(device)
        self._device = device
        rows, positions = vllm_config.scheduler_config.max_num_seqs, vllm_config.model_config.max_model_len
        self._cache = RowCache(self._model.config, rows, positions, dtype, device)
        self._requests: dict[int, _Request] = {}

    def is_argmax_invariant(self) -> bool:
        """False: it changes which token is the likeliest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows requests that were added, removed or moved, and moves their rows."""

        def new(params: SamplingParams, prompt: list[int] | None, outputs: list[int]) -> _Request | None:
            weight = (params.extra_args or {}).get("ivl")
            return _Request(float(weight), prompt or [], outputs) if weight else None

        process_dict_updates(self._requests, batch_update, new)
        moved = [(at, request) for at, request in self._requests.items() if request.row not in (None, at)]
        if moved:
            store = self._cache.store
            store[:, :, [at for at, _ in moved]] = store[:, :, [request.row for _, request in moved]]
            for at, request in moved:
                request.row = at

    @torch.inference_mode()
    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Adds the weighted value logits to `[rows, vocabulary]`, in place."""
        here = {at: request for at, request in self._requests.items() if at < logits.shape[0]}
        known = [at for at, request in here.items() if request.row is not None]
        if known:
            self._decode(logits, here, max(known) + 1)
        for at, request in here.items():
            if request.row is None:
                self._prefill(logits, at, request)
        return logits

    def _decode(self, logits: torch.Tensor, here: dict[int, _Request], rows: int) -> None:
        # A row without a known request computes something that nobody reads.
        tokens, positions, weights = [0] * rows, [0] * rows, [0.0] * rows
        for at, request in here.items():
            if request.row is not None:
                tokens[at] = (request.outputs or request.prompt)[-1]
                positions[at], weights[at] = request.length - 1, request.weight
        longest = max(positions) + 1
        at_positions = torch.tensor(positions, device=self._device)
        self._cache.begin(at_positions, longest)
        mask = torch.arange(longest, device=self._device) <= at_positions[:, None]
        value = self._model(
            torch.tensor(tokens, device=self._device)[:, None],
            attention_mask=mask[:, None, None],
            position_ids=at_positions[:, None],
            past_key_values=self._cache,
        ).logits[:, -1]
        logits[:rows].addcmul_(value, torch.tensor(weights, device=self._device)[:, None])

    def _prefill(self, logits: torch.Tensor, at: int, request: _Request) -> None:
        # Prompts differ in length: one by one costs less here than padding all to the longest.
        ids = torch.tensor([request.prompt + request.outputs], device=self._device)
        cache = DynamicCache(config=self._model.config)
        value = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        for number, layer in enumerate(cache.layers):
            self._cache.store[number, 0, at, :, : request.length] = layer.keys[0]
            self._cache.store[number, 1, at, :, : request.length] = layer.values[0]
        request.row = at
        logits[at].add_(value, alpha=request.weight)
