"""Value networks' hidden states of the rows to be sampled: from `compute_logits` to the processor, into the logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from ivl_vllm.serving.request_weights import Addition, together

if TYPE_CHECKING:
    from ivl_vllm.serving.network import Network


class Rows(list):
    """Per network `[rows, hidden]`, None for one that sits this step out, which nobody may then ask for."""

    def __getitem__(self, number: int) -> torch.Tensor:
        """The rows of one network.

        Raises:
            RuntimeError: it sits this step out.
        """
        hidden = super().__getitem__(number)
        if hidden is None:
            raise RuntimeError(
                f"ivl: value network {number} sat out a step in which a request uses it; set skip_unsteered to "
                'false in additional_config["ivl"] and please report the engine arguments'
            )
        return hidden

    def at(self, rows: torch.Tensor) -> Rows:
        """Some of the rows, by number."""
        return Rows(None if hidden is None else hidden[rows] for hidden in self)


class ValueRows:
    """One engine's value networks, and what they made of this step's rows, in the order of the logits.

    Attributes:
        networks: all of them; filled when they are loaded.
        groups: their numbers, those together that are projected together: see `shared_weights`.
    """

    def __init__(self) -> None:
        self.networks: list[Network] = []
        self.groups: list[tuple[int, ...]] = []
        self._hidden: list[torch.Tensor | None] = []
        self._rows = self._taken = 0

    def put(self, hidden: list[torch.Tensor | None], rows: int) -> None:
        """Keeps this step's rows: one `[rows, hidden]` tensor per network, None for one that sits this step out."""
        self._hidden = hidden
        self._rows, self._taken = rows, 0

    def take(self, count: int) -> Rows:
        """The next `count` rows of every network: vLLM may hand the processor the logits of a step in several pieces.

        Raises:
            RuntimeError: this step has fewer rows than logits, so which row belongs to which request is unknown.
        """
        start, end = self._taken, self._taken + count
        if end > self._rows:
            raise RuntimeError(
                f"ivl: {count} rows of logits after {start}, but {self._rows} rows of value hidden states: this vLLM "
                "samples from logits that did not come from the model's compute_logits; please report the engine "
                "arguments"
            )
        self._taken = end
        return Rows(None if hidden is None else hidden[start:end] for hidden in self._hidden)

    def add(self, logits: torch.Tensor, rows: Rows, additions: Iterable[Addition]) -> None:
        """Adds weighted value logits to fp32 `[rows, vocab of the base]` logits, in place.

        Args:
            logits: of the base.
            rows: the same rows of every network.
            additions: which networks are added to which rows, with what weights.
        """
        for addition in additions:
            summed, weights = addition.summed(rows)
            self.networks[addition.networks[0]].add_logits(logits, summed, weights, addition.row_index)

    def add_to_all(self, logits: torch.Tensor, rows: Rows, weights: dict[int, torch.Tensor]) -> None:
        """The same for all rows: a network's number -> its fp32 `[rows]` weights."""
        members = together(self.groups, weights)
        self.add(logits, rows, (Addition(m, None, torch.stack([weights[n] for n in m])) for m in members))

    def project(self, rows: Rows, used: Iterable[int]) -> dict[int, torch.Tensor]:
        """Logits of each of some networks, fp32 `[rows, columns of its own vocabulary]`, by the network's number."""
        logits = {}
        for members in together(self.groups, set(used)):
            parts = [rows[number] for number in members]
            stacked = self.networks[members[0]].value_logits(torch.cat(parts) if len(parts) > 1 else parts[0]).float()
            logits |= zip(members, stacked.split(len(parts[0])), strict=True)
        return logits
