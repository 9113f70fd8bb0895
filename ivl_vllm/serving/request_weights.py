"""The weights of the running requests, by slot: on the host to choose rows by, on the device to add with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d


def together(groups: Sequence[tuple[int, ...]], used: Collection[int]) -> list[tuple[int, ...]]:
    """What is left of groups of networks, which are projected together, when those that are not used are left out."""
    left = (tuple(number for number in group if number in used) for group in groups)
    return [members for members in left if members]


class Addition(NamedTuple):
    """Rows of logits, and the networks that are added to them.

    Attributes:
        networks: their numbers; several are projected together.
        row_index: int64 `[n]`; None for all rows.
        weights: fp32 `[networks, n]`.
    """

    networks: tuple[int, ...]
    row_index: torch.Tensor | None
    weights: torch.Tensor

    def summed(self, hidden: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and weights whose projection, made once, is that of all these networks.

        Args:
            hidden: `[rows, hidden]` of every network of the engine.

        Returns:
            `[n, hidden]` in their dtype, and fp32 `[n]`. A row's largest weight stays outside of its sum: so what one
            network alone contributes does not change when others join it, and no weight enlarges the sum.
        """
        parts = [hidden[n] if self.row_index is None else hidden[n][self.row_index] for n in self.networks]
        if len(parts) == 1:
            return parts[0], self.weights[0]
        largest = self.weights.abs().amax(0)
        shares = self.weights / torch.where(largest > 0, largest, 1.0)
        total = torch.zeros(parts[0].shape, dtype=torch.float32, device=self.weights.device)
        for part, share, weight in zip(parts, shares, self.weights, strict=True):
            # A network that a request does not use has read none of its earlier tokens: anything may stand here.
            total += torch.where((weight != 0)[:, None], part.float() * share[:, None], 0.0)
        return total.to(parts[0].dtype), largest


class RequestWeights:
    """`[slots, networks]` fp32 weights. A slot is V1's position in the batch or V2's request slot.

    Args:
        num_slots: requests that can run at once.
        num_networks: value networks loaded.
        device: where the logits are.
    """

    def __init__(self, num_slots: int, num_networks: int, device: torch.device):
        self._host = np.zeros((num_slots, num_networks), dtype=np.float32)
        self._device = torch.zeros((num_networks, num_slots), dtype=torch.float32, device=device)
        self._dirty = False
        # Whether any slot has a weight. A slot that V2 has freed counts until it is filled again.
        self.any_steered = False
        self._chosen: list[Addition] = []
        self._chosen_for: bytes | None = None

    def set(self, slot: int, weights: Sequence[float] | None) -> bool:
        """Gives a slot its request's weights (`[networks]`), or none. Returns whether any of them is not zero."""
        row = np.zeros(self._host.shape[1], np.float32) if weights is None else np.asarray(weights, np.float32)
        if not np.array_equal(self._host[slot], row):
            self._host[slot] = row
            self._dirty = True
        return bool(row.any())

    def flush(self) -> None:
        """Sends changes to the device. Asynchronous: the copy is staged in pinned memory, nothing waits for it."""
        if self._dirty:
            self._device.copy_(async_tensor_h2d(np.ascontiguousarray(self._host.T), device=self._device.device))
            self._dirty = False
            self._chosen_for = None
            self.any_steered = bool(self._host.any())

    def of_rows(self, slots: np.ndarray, groups: Sequence[tuple[int, ...]]) -> list[Addition]:
        """Which rows of logits the networks are added to, when the slot of every row is known on the host.

        The answer is kept on the device until requests come or go, so a steady batch costs nothing here.

        Args:
            slots: int `[rows]`, the slot of every row of logits.
            groups: numbers of the networks, those together that are projected together. They stay the same.
        """
        key = slots.tobytes()
        if key != self._chosen_for:
            chosen = (self._choose(slots, members) for members in self._wanted(slots, groups))
            self._chosen, self._chosen_for = list(chosen), key
        return self._chosen

    def _wanted(self, slots: np.ndarray, groups: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Those of each group that any of these slots has a weight for."""
        return together(groups, np.flatnonzero(self._host[slots].any(axis=0)).tolist())

    def _choose(self, slots: np.ndarray, members: tuple[int, ...]) -> Addition:
        weights = self._host[np.ix_(slots, members)].T
        rows = np.flatnonzero(weights.any(axis=0))
        device = self._device.device
        on_device = async_tensor_h2d(np.ascontiguousarray(weights[:, rows]), device=device)
        row_index = None if rows.size == slots.size else async_tensor_h2d(rows, device=device)
        return Addition(members, row_index, on_device)

    def of_slots(self, slots: torch.Tensor, on_host: np.ndarray, groups: Sequence[tuple[int, ...]]) -> list[Addition]:
        """The same when only the device knows the slot of every row (draft rows of speculative decoding).

        All rows are taken for every network that some request wants; the kernel leaves those with weight 0 alone.

        Args:
            slots: int `[rows]` on the device.
            on_host: int `[requests]`, the slots that the rows belong to, in any order.
            groups: as above.
        """
        wanted = self._wanted(on_host, groups)
        return [Addition(m, None, torch.stack([self._device[number][slots] for number in m])) for m in wanted]
