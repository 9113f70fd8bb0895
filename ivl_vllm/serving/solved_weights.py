"""Weights that are found anew for every token: Dynamic Logits Fusion (`auto`), and bounded divergence (`max_kl`).

Dynamic Logits Fusion: Fan et al., 2024, arXiv 2406.15480. How the weights are found stands in `ivl_kernels.fusion`.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from ivl_kernels import fusion_weights, joint_fusion_weights, trust_region_weights, value_add
from ivl_kernels.checks import choose_backend
from torch import nn
from vllm.utils.torch_utils import async_tensor_h2d

from ivl_vllm.serving.network import no_logits, warm_up_rows
from ivl_vllm.serving.value_rows import Rows, ValueRows
from ivl_vllm.settings import Settings
from ivl_vllm.steering import Steering

FIXED, BOUNDED = 0, 1  # kinds of slots; further ones are the sets of pairs that requests have asked for


class Solved(NamedTuple):
    """What was found for the requests that ask for the same.

    Attributes:
        names: the pairs of `auto`; empty for `max_kl`.
        rows: int `[n]` row numbers on the device; None for all rows.
        weights: fp32 `[n, names]` weights on the device, or `[n, 1]` parts of the weights that `max_kl` left over; 0 in
            rows of other requests.
    """

    names: tuple[str, ...]
    rows: torch.Tensor | None
    weights: torch.Tensor


class SolvedWeights:
    """What requests with solved weights ask for, by slot: on the host to choose rows by, on the device to solve with.

    Args:
        settings: the engine's.
        value_rows: the value networks.
        num_slots: requests that can run at once.
        device: where the logits are.
    """

    def __init__(self, settings: Settings, value_rows: ValueRows, num_slots: int, device: torch.device):
        self._settings, self._value_rows = settings, value_rows
        self._kind = np.zeros(num_slots, dtype=np.int64)
        # Per slot: the weight of every network, and then max_kl.
        self._bounds = np.zeros((num_slots, len(settings.networks) + 1), dtype=np.float32)
        self._device_kind = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._device_bounds = torch.zeros(num_slots, self._bounds.shape[1], dtype=torch.float32, device=device)
        self._kinds: dict[tuple[str, ...], int] = {}
        self._dirty = False
        self.any = False
        numbers = {source: number for number, source in enumerate(settings.networks)}
        # Name of a pair -> numbers of its expert and of the expert's base.
        self.pairs = {
            name: tuple(numbers[source] for source, _ in value.signed_networks)
            for name, value in settings.values.items()
            if value.minus is not None
        }

    def set(self, slot: int, steering: Steering) -> bool:
        """Gives a slot its request's wish. Returns whether its weights have to be solved."""
        kind, bounds = FIXED, np.zeros(self._bounds.shape[1], np.float32)
        if steering.auto:
            kind = self._kinds.setdefault(steering.auto, BOUNDED + 1 + len(self._kinds))
        elif steering.max_kl is not None and steering.weights:
            kind = BOUNDED
            bounds[:] = [*self._settings.network_weights(steering.weights), steering.max_kl]
        if kind != self._kind[slot] or not np.array_equal(bounds, self._bounds[slot]):
            self._kind[slot], self._bounds[slot] = kind, bounds
            self._dirty = True
        return kind != FIXED

    def flush(self) -> None:
        """Sends changes to the device; nothing waits for it."""
        if self._dirty:
            self._device_kind.copy_(async_tensor_h2d(self._kind, device=self._device_kind.device))
            self._device_bounds.copy_(async_tensor_h2d(self._bounds, device=self._device_bounds.device))
            self._dirty = False
            self.any = bool(self._kind.any())

    def apply(
        self,
        logits: torch.Tensor,
        rows: Rows,
        slots: np.ndarray,
        slot_of_row: torch.Tensor | None = None,
    ) -> list[Solved]:
        """Solves the weights of these rows and adds their value logits, in place.

        Args:
            logits: fp32 `[rows, vocab of the base]`.
            rows: the same rows of every network.
            slots: int `[rows]`, the slot of every row; with `slot_of_row`, the slots that the rows belong to.
            slot_of_row: int `[rows]` on the device, where only the device knows them (draft rows).
        """
        found = []
        kinds = self._kind[slots]
        for kind in np.unique(kinds[kinds != FIXED]):
            row_index, of_row, own = None, slot_of_row, rows
            if slot_of_row is None:
                index = np.flatnonzero(kinds == kind)
                row_index = async_tensor_h2d(index, device=logits.device)
                of_row = async_tensor_h2d(slots[index], device=logits.device)
                own = rows.at(row_index)
            # Where all rows are taken, the others get no weight.
            member = (self._device_kind[of_row] == int(kind)).float()
            if kind == BOUNDED:
                names: tuple[str, ...] = ()
                used = np.flatnonzero(self._bounds[slots[kinds == kind], :-1].any(axis=0))
                weights = self._bound(logits, own, row_index, member, self._device_bounds[of_row], used.tolist())
            else:
                names = next(names for names, number in self._kinds.items() if number == kind)
                weights = self.fuse(logits, own, row_index, member, names)
            found.append(Solved(names, row_index, weights))
        return found

    def _bound(
        self,
        logits: torch.Tensor,
        rows: Rows,
        row_index: torch.Tensor | None,
        member: torch.Tensor,
        bounds: torch.Tensor,
        used: Sequence[int],
    ) -> torch.Tensor:
        """Adds the largest part of the weighted value logits that keeps within `max_kl` of the base."""
        delta = logits.new_zeros(member.shape[0], logits.shape[1])
        self._value_rows.add_to_all(delta, rows, {number: bounds[:, number] for number in used})
        # What all columns have in common changes no distribution, but the solver cuts large differences.
        middle = (delta.amin(1, keepdim=True) + delta.amax(1, keepdim=True)) / 2
        most = bounds[:, -1].contiguous()
        part = trust_region_weights(logits, delta - middle, member, most, row_index=row_index).weights
        value_add(logits, delta, part, row_index=row_index)
        return part[:, None]

    def fuse(
        self,
        logits: torch.Tensor,
        rows: Rows,
        row_index: torch.Tensor | None,
        member: torch.Tensor,
        names: tuple[str, ...],
    ) -> torch.Tensor:
        """Adds each pair's difference with the weight that Dynamic Logits Fusion finds for it."""
        experts, antis, maps = [], [], []
        pairs = [self.pairs[name] for name in names]
        value_logits = self._value_rows.project(rows, itertools.chain(*pairs))
        for pair in pairs:
            expert, anti = (value_logits[number] for number in pair)
            known = min(expert.shape[1], anti.shape[1])  # they may be padded differently
            experts.append(expert[:, :known])
            antis.append(anti[:, :known])
            maps.append(self._value_rows.networks[pair[0]].partners)
        highest = member * self._settings.max_weight
        if len(names) == 1:
            solved = fusion_weights(
                logits, experts[0], antis[0], max_weight=highest, row_index=row_index, vocab_map=maps[0]
            ).weights[:, None]
        else:
            solved = joint_fusion_weights(
                logits, experts, antis, max_weight=highest, row_index=row_index, vocab_maps=maps
            ).weights
        for expert, anti, vocab_map, weights in zip(experts, antis, maps, solved.unbind(1), strict=True):
            delta, weights = expert.float() - anti.float(), weights.contiguous()
            value_add(logits, delta, weights, row_index=row_index, vocab_map=vocab_map)
        return solved


@torch.inference_mode()
def warm_up_solvers(
    settings: Settings, value_rows: ValueRows, base_columns: int, base: nn.Module, most_rows: int
) -> None:
    """Compiles the kernels that solve weights, so that no request waits for the compiler; nothing is computed.

    Args:
        settings: the engine's.
        value_rows: the value networks.
        base_columns: columns of the base's logits.
        base: any model on the device.
        most_rows: rows that a step may have; few and many are added by kernels of different shapes.
    """
    device = next(base.parameters()).device
    if choose_backend("auto", device) != "triton":
        importlib.import_module("ivl_kernels.torch_fusion")  # which compiles
        return
    solved = SolvedWeights(settings, value_rows, 1, device)
    pairs = [(name,) for name in solved.pairs]
    # What is added to the logits: as wide as these, and as each pair is.
    added = [(base_columns, None)]
    for numbers in solved.pairs.values():
        networks = [value_rows.networks[number] for number in numbers]
        known = min(network.value_logits(network.no_hidden(1)).shape[1] for network in networks)
        added.append((known, networks[0].partners))
    for count in warm_up_rows(most_rows):
        nothing = torch.zeros(count, device=device)
        for logits, row_index in itertools.product(
            no_logits(count, base_columns, device), (None, torch.arange(count, device=device))
        ):
            for columns, partners in added:
                delta = torch.zeros(count, columns, device=device)
                value_add(logits, delta, nothing, row_index=row_index, vocab_map=partners)  # nothing is read or written
            # A row is solved alike however many there are. But value logits that are projected together lie behind each
            # other, and whether 16 bytes divide where the second ones begin depends on the rows: 8 of them always do.
            if count > 8:
                continue
            delta = torch.zeros(count, base_columns, device=device)
            trust_region_weights(logits, delta, nothing, nothing, row_index=row_index)
            for names in [*pairs, tuple(solved.pairs)] if len(pairs) > 1 else pairs:
                rows = Rows(network.no_hidden(count) for network in value_rows.networks)
                solved.fuse(logits, rows, row_index, nothing, names)
