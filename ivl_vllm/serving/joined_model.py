"""Base and value networks in lock-step: one forward, and the value rows that the logits processor picks up."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig

from ivl_vllm.serving.network import Network


class ValueRows:
    """The value networks' hidden states of the rows to be sampled, on their way from `compute_logits` to the processor.

    There is one per engine and process; the rows are in the order of the logits.
    """

    def __init__(self) -> None:
        self.networks: list[Network] = []
        self._hidden: list[torch.Tensor] = []
        self._taken = 0

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> ValueRows:
        """The one of this engine: loader and processor are handed the same configuration object."""
        key = id(vllm_config)
        if key not in _rows_of_engine:
            _rows_of_engine[key] = cls()
            weakref.finalize(vllm_config, _rows_of_engine.pop, key)
        return _rows_of_engine[key]

    def put(self, hidden: list[torch.Tensor]) -> None:
        """Keeps this step's rows: one `[rows, hidden]` tensor per network."""
        self._hidden = hidden
        self._taken = 0

    def take(self, count: int) -> list[torch.Tensor]:
        """The next `count` rows of every network: vLLM may hand the processor the logits of a step in several pieces.

        Raises:
            RuntimeError: this step has fewer rows than logits, so which row belongs to which request is unknown.
        """
        start, end = self._taken, self._taken + count
        have = self._hidden[0].shape[0] if self._hidden else 0
        if end > have:
            raise RuntimeError(
                f"ivl: {count} rows of logits after {start}, but {have} rows of value hidden states: this vLLM samples "
                "from logits that did not come from the model's compute_logits; please report the engine arguments"
            )
        self._taken = end
        return [hidden[start:end] for hidden in self._hidden]


# By identity: configurations are compared by value and cannot be keys, nor may they carry attributes of ours.
_rows_of_engine: dict[int, ValueRows] = {}


class _Join:
    """What the joined forward needs, kept off the module tree: LoRA wraps every submodule that it finds there."""

    def __init__(self, rows: ValueRows, networks: list[Network], base_vocab_size: int):
        self.rows = rows
        self.clamp = [network.vocab_size < base_vocab_size for network in networks]
        # Of [base hidden, value hidden, ...]: known after the first forward, which always precedes the first logits.
        self.widths: list[int] = []
        self.dtypes: list[torch.dtype] = []
        rows.networks = networks

    def learn(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Joins the parts of the first forward, and keeps what the later ones need to know."""
        self.widths = [part.shape[-1] for part in parts]
        self.dtypes = [part.dtype for part in parts]
        # Different dtypes travel in the wider one, which holds both exactly.
        return torch.cat(parts, dim=-1)

    def allocate(self, base: torch.Tensor) -> list[torch.Tensor]:
        """Uninitialised room for all parts of `[tokens, width]`: views of one tensor, and that tensor at the end."""
        dtype = functools.reduce(torch.promote_types, self.dtypes)
        joined = base.new_empty(base.shape[0], sum(self.widths), dtype=dtype)
        return [*joined.split(self.widths, dim=-1), joined]

    def split(self, joined: torch.Tensor) -> list[torch.Tensor]:
        parts = joined.split(self.widths, dim=-1)
        return [part.to(dtype) for part, dtype in zip(parts, self.dtypes, strict=True)]


class JoinedModel:
    """Mixed into the base model's class, so that vLLM (and LoRA, and quantization) sees the base that it knows."""

    _ivl: _Join

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`[base hidden | value hidden | ...]` of `[tokens]` ids at `[tokens]` positions.

        Each network's hidden states are copied out before the next one runs. Captured in pieces, a model's last CUDA
        graph leaves its output in memory that the graphs of the next model may use.
        """
        base_logits = super().compute_logits
        base = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        first = not self._ivl.widths
        room = [] if first else self._ivl.allocate(base)
        parts = [base.clone() if first else room[0].copy_(base)]
        base = parts[0].to(base.dtype)
        for number, (network, clamp) in enumerate(zip(self._ivl.rows.networks, self._ivl.clamp, strict=True), 1):
            value = network.forward(input_ids, positions, clamp, base, base_logits)
            parts.append(value.clone() if first else room[number].copy_(value))
        return self._ivl.learn(parts) if first else room[-1]

    def compute_logits(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The base's logits of `[rows, joined hidden]`; the value rows wait for the logits processor."""
        base, *values = self._ivl.split(hidden_states)
        self._ivl.rows.put(values)
        # Contiguous: kernels of quantized heads take a row stride equal to the width for granted.
        return super().compute_logits(base.contiguous(), *args, **kwargs)


def join(base: nn.Module, rows: ValueRows, networks: list[Network], base_vocab_size: int) -> nn.Module:
    """Makes `base` run `networks` on the same tokens. The same object comes back, of a class derived from its own."""
    base._ivl = _Join(rows, networks, base_vocab_size)
    base.__class__ = type(f"IVL{type(base).__name__}", (JoinedModel, type(base)), {"__module__": __name__})
    return base
