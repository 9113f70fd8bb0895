"""Base and value networks in lock-step: one forward, and the value rows that the logits processor picks up."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

from ivl_vllm.serving.network import Network, StableInput
from ivl_vllm.serving.steps import Steps
from ivl_vllm.serving.value_rows import Rows, ValueRows


class _Join:
    """What the joined forward needs, kept off the module tree: LoRA wraps every submodule that it finds there."""

    def __init__(
        self, steps: Steps, default_weights: Sequence[float], for_drafter: StableInput | None, base_reads_ids: bool
    ):
        self.steps, self.rows = steps, steps.rows
        # Whether the base takes token ids besides embeddings.
        self.base_reads_ids = base_reads_ids
        self.default_weights = default_weights
        self.for_drafter = for_drafter
        # The networks that the last forward ran.
        self.active: list[int] = []
        # Of the hidden states of the base and of every network: known after their first forward, in which all run.
        self.widths: list[int] = []
        self.dtypes: list[torch.dtype] = []

    def choose(self) -> list[int]:
        """The networks that the coming forward runs: all of them, unless the step in progress needs fewer."""
        needed = self.steps.needed
        everything = range(len(self.rows.networks))
        self.active = list(everything) if needed is None or not self.widths else sorted(needed)
        return self.active

    def learn(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Joins the parts of the first forward, and keeps what the later ones need to know."""
        self.widths = [part.shape[-1] for part in parts]
        self.dtypes = [part.dtype for part in parts]
        # Different dtypes travel in the wider one, which holds both exactly.
        return torch.cat(parts, dim=-1)

    def allocate(self, base: torch.Tensor) -> list[torch.Tensor]:
        """Uninitialised room for the parts of `[tokens, width]`: views of one tensor, and that tensor at the end."""
        parts = [0, *(number + 1 for number in self.active)]
        dtype = functools.reduce(torch.promote_types, (self.dtypes[part] for part in parts))
        widths = [self.widths[part] for part in parts]
        joined = base.new_empty(base.shape[0], sum(widths), dtype=dtype)
        return [*joined.split(widths, dim=-1), joined]

    def split(self, joined: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """The base's hidden states, and every network's, None where it did not run."""
        parts = [0, *(number + 1 for number in self.active)]
        if joined.shape[-1] != sum(self.widths[part] for part in parts):
            # A CUDA graph of the whole forward was replayed: it was captured with all of them.
            parts = list(range(len(self.widths)))
        split = joined.split([self.widths[part] for part in parts], dim=-1)
        by_part = {part: hidden.to(self.dtypes[part]) for part, hidden in zip(parts, split, strict=True)}
        base, *values = (by_part.get(part) for part in range(len(self.widths)))
        return base, values


class JoinedModel:
    """Mixed into the base model's class, so that vLLM (and LoRA, and quantization) sees the base that it knows."""

    _ivl: _Join
    # vLLM hands multimodal bases embeddings, and token ids besides only if they ask for these, as value networks do.
    requires_raw_input_tokens = True

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """`[base hidden | value hidden | ...]` of `[tokens]` ids at `[tokens]` or `[axes, tokens]` positions.

        Each network's hidden states are copied out before the next one runs. Captured in pieces, a model's last CUDA
        graph leaves its output in memory that the graphs of the next model may use. A step that needs no network
        returns what the base returned. What a base returns for EAGLE 3 besides stays beside the joined ones.
        """
        join = self._ivl
        join.steps.sampled = False
        base_logits = super().compute_logits
        # By name and only if there: some models take these by name alone, some not at all.
        for name, given in (("intermediate_tensors", intermediate_tensors), ("inputs_embeds", inputs_embeds)):
            if given is not None:
                kwargs[name] = given
        ids = input_ids if inputs_embeds is None or join.base_reads_ids else None
        base, auxiliary = super().forward(ids, positions, **kwargs), None
        if isinstance(base, tuple):
            base, auxiliary = base
        if join.for_drafter is not None:
            join.for_drafter.hold(base)
        active = join.choose()
        if not active:
            return base if auxiliary is None else (base, auxiliary)
        if auxiliary is not None:
            auxiliary = [hidden.clone() for hidden in auxiliary]
        first = not join.widths
        room = [] if first else join.allocate(base)
        parts = [base.clone() if first else room[0].copy_(base)]
        base = parts[0].to(base.dtype)
        positions = join.steps.text_positions(positions)
        input_ids = join.steps.token_ids(input_ids, positions)
        for place, number in enumerate(active, 1):
            value = join.rows.networks[number].forward(input_ids, positions, base, base_logits)
            parts.append(value.clone() if first else room[place].copy_(value))
        joined = join.learn(parts) if first else room[-1]
        return joined if auxiliary is None else (joined, auxiliary)

    def compute_logits(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The base's logits of `[rows, joined hidden]`; the value rows wait for the logits processor.

        No processor ever sees the logits of prompt log-probabilities, which a step computes after those that it samples
        from: the engine's default weight is applied to them here.
        """
        base, values = self._ivl.split(hidden_states)
        # Contiguous: kernels of quantized heads take a row stride equal to the width for granted.
        logits = super().compute_logits(base.contiguous(), *args, **kwargs)
        if not self._ivl.steps.sampled:
            self._ivl.steps.sampled = True
            self._ivl.rows.put(values, hidden_states.shape[0])
        elif logits is not None and any(self._ivl.default_weights):
            logits, defaults = logits.float(), enumerate(self._ivl.default_weights)
            weights = {n: logits.new_full(logits.shape[:1], weight) for n, weight in defaults if weight}
            self._ivl.rows.add_to_all(logits, Rows(values), weights)
        return logits


class ReadByDrafter(JoinedModel):
    """A joined model whose hidden states a drafter reads. Where none does, vLLM must not find the method below."""

    def get_mtp_target_hidden_states(self) -> torch.Tensor:
        """What drafters such as EAGLE and MTP read: the base's hidden states, `[most tokens of a step, hidden]`.

        vLLM asks bases for it whose drafters read something else than what they return.
        """
        of_base = getattr(super(), "get_mtp_target_hidden_states", None)
        own = None if of_base is None else of_base()
        return self._ivl.for_drafter.buffer if own is None else own


def join(
    base: nn.Module, steps: Steps, default_weights: Sequence[float], for_drafter: StableInput | None = None
) -> nn.Module:
    """Makes `base` run the value networks on the same tokens. The same object comes back, of a class of its own.

    Args:
        base: the base model.
        steps: says which networks a step needs; its `rows` hold them, and take what they make to the processor.
        default_weights: each network's weight in a request that says nothing.
        for_drafter: keeps the base's hidden states for a drafter that reads them.
    """
    base_reads_ids = getattr(base, "requires_raw_input_tokens", False)
    base._ivl = _Join(steps, default_weights, for_drafter, base_reads_ids)
    if hasattr(base, "do_not_compile"):
        # vLLM compiles this class's forward, bound before it was joined. The layers below are compiled by themselves.
        base.do_not_compile = True
    kind = JoinedModel if for_drafter is None else ReadByDrafter
    base.__class__ = type(f"IVL{type(base).__name__}", (kind, type(base)), {"__module__": __name__})
    weakref.finalize(base, release, steps.rows, steps.rows.networks).atexit = False
    return base


def release(rows: ValueRows, networks: list[Network]) -> None:
    """Lets the networks of a base that is gone go too, and the KV cache with them, all of which each layer holds.

    vLLM frees an engine of this process through the modules of its base, among which the networks are not: torch keeps
    a compiled module until its hook is taken away.
    """
    for network in networks:
        for module in network.model.modules():
            if isinstance(module, TorchCompileWithNoGuardsWrapper):
                module.cleanup()
    if rows.networks is networks:  # and not those of a base that came after it
        rows.networks, rows.groups = [], []
