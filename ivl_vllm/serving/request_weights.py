"""The weights of the running requests, by slot: on the host to choose rows by, on the device to add with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d


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
        self._chosen: dict[int, tuple[torch.Tensor | None, torch.Tensor] | None] = {}
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

    def of_rows(self, slots: np.ndarray) -> dict[int, tuple[torch.Tensor | None, torch.Tensor] | None]:
        """Which rows of logits each network is added to, when the slot of every row is known on the host.

        The answer is kept on the device until requests come or go, so a steady batch costs nothing here.

        Args:
            slots: int `[rows]`, the slot of every row of logits.

        Returns:
            network -> None (no row has a weight), or `(row_index, weights)`: int64 and fp32 `[steered rows]`;
            `row_index` is None when every row has one.
        """
        key = slots.tobytes()
        if key != self._chosen_for:
            self._chosen = {n: self._choose(self._host[slots, n]) for n in range(self._host.shape[1])}
            self._chosen_for = key
        return self._chosen

    def _choose(self, weights: np.ndarray) -> tuple[torch.Tensor | None, torch.Tensor] | None:
        rows = np.flatnonzero(weights)
        if not rows.size:
            return None
        device = self._device.device
        on_device = async_tensor_h2d(np.ascontiguousarray(weights[rows]), device=device)
        return (None if rows.size == weights.size else async_tensor_h2d(rows, device=device)), on_device

    def of_slots(self, slots: torch.Tensor, on_host: np.ndarray) -> dict[int, tuple[None, torch.Tensor] | None]:
        """The same when only the device knows the slot of every row (draft rows of speculative decoding).

        All rows are taken for every network that some request wants; the kernel leaves those with weight 0 alone.

        Args:
            slots: int `[rows]` on the device.
            on_host: int `[requests]`, the slots that the rows belong to, in any order.
        """
        steered = self._host[on_host].any(axis=0)
        return {n: (None, self._device[n][slots]) if steered[n] else None for n in range(len(steered))}
