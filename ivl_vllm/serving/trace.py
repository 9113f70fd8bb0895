"""The trace: for requests that ask for it, how far each token was steered, as JSON lines in a file of the operator's.

One line for each row that the engine samples from: the request's name for it, an id of the request, the position among
the output tokens, the token before it, the base's likeliest token, the steered distribution's, the weights, and
`KL(softmax(steered) ‖ softmax(base))` in nats. Lines are written as the step runs, so of a position that is computed
again (a prompt in chunks, a rejected draft) the last line counts, and the last positions may lie behind the end of the
answer (a step that was scheduled before the end was known). `draft` says that the token before was only a guess when
the line was written. No token of the prompt is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm import SamplingParams
from vllm.logger import init_logger

from ivl_vllm.serving.solved_weights import Solved
from ivl_vllm.serving.steps import TRACE_ID
from ivl_vllm.steering import Steering

# vLLM shows what is logged under its own name and nothing else.
logger = init_logger(f"vllm.{__name__}")

MAX_BYTES = 64 << 20


class TracedRequest(NamedTuple):
    """A traced request.

    Attributes:
        steering: what it asks for.
        outputs: vLLM's own list of its output tokens; None from V2, which has none.
        id: tells it from others of the same name.
    """

    steering: Steering
    outputs: list[int] | None
    id: str

    @classmethod
    def of(cls, steering: Steering, params: SamplingParams, outputs: list[int] | None = None) -> TracedRequest | None:
        """A request that the batch takes in, None if it asks for no trace."""
        return None if steering.trace is None else cls(steering, outputs, params.extra_args.get(TRACE_ID, ""))


class _Row(NamedTuple):
    """A traced row of logits.

    Its position is below 0 while the prompt is not done. A draft's token before it is a guess, not yet an output.
    """

    row: int
    request: TracedRequest
    position: int
    token_before: int | None
    draft: bool = False


class Trace:
    """Writes the trace of one engine. Waits for the device in every step that has a traced request.

    Args:
        path: of the file; lines are appended.
        prompt_len: V2's `[slots]` prompt lengths on the host; V1 has none.
        max_bytes: nothing more is written once the file is this large.
    """

    def __init__(self, path: str, prompt_len: np.ndarray | None = None, max_bytes: int = MAX_BYTES):
        self._path = Path(path)
        self._prompt_len = prompt_len
        self._max_bytes = max_bytes
        self._size = self._path.stat().st_size if self._path.exists() else 0
        self._requests: dict[int, TracedRequest] = {}

    def set(self, slot: int, request: TracedRequest | None) -> bool:
        """Gives a slot its request, None for one that is not traced. Returns whether it is."""
        self._requests.pop(slot, None)
        if request is not None:
            self._requests[slot] = request
        return request is not None

    def rows(self, slots: np.ndarray, ctx: Any) -> list[_Row]:
        """The traced rows of a step.

        Args:
            slots: int, the slot of every row (V1), or the slots that the rows belong to.
            ctx: V2's `LogitsContext`; None from V1.
        """
        if not any(slot in self._requests for slot in slots.tolist()):
            return []
        if ctx is None:
            found = ((row, self._requests.get(slot)) for row, slot in enumerate(slots.tolist()))
            # A token that vLLM has sampled but not yet sent to the host stands there as -1.
            return [
                _Row(row, request, len(request.outputs), next((t for t in request.outputs[-1:] if t >= 0), None))
                for row, request in found
                if request is not None
            ]
        columns = (ctx.expanded_idx_mapping, ctx.pos, ctx.input_ids, ctx.expanded_local_pos)
        columns = torch.stack([column.long() for column in columns]).tolist()
        rows = []
        for row, (slot, position, token, place) in enumerate(zip(*columns, strict=True)):
            if slot in self._requests:
                position += 1 - int(self._prompt_len[slot])
                rows.append(_Row(row, self._requests[slot], position, token if position > 0 else None, place > 0))
        return rows

    @torch.inference_mode()
    def write(
        self,
        rows: list[_Row],
        base: torch.Tensor,
        steered: torch.Tensor,
        solved: list[Solved],
    ) -> None:
        """Appends one line for each row.

        Args:
            rows: the traced rows.
            base: fp32 `[len(rows), vocab]` logits before steering.
            steered: the same after it.
            solved: what `SolvedWeights.apply` found.
        """
        before, after = base.log_softmax(-1), steered.log_softmax(-1)
        # What both exclude is -inf in both, and contributes nothing.
        kl = (after.exp() * (after - before).nan_to_num(0.0, posinf=0.0, neginf=0.0)).sum(-1)
        choices = torch.stack([before.argmax(-1), after.argmax(-1)], dim=1).tolist()
        lines = []
        for row, divergence, (base_token, token) in zip(rows, kl.tolist(), choices, strict=True):
            if row.position >= 0:
                steering = row.request.steering
                line: dict[str, Any] = {"trace": steering.trace, "request": row.request.id, "position": row.position}
                line |= {"token_before": row.token_before, "draft": row.draft}
                line |= {"base_token": base_token, "token": token}
                line |= {"weights": _weights(row, solved), "kl": max(divergence, 0.0)}
                lines.append(json.dumps(line) + "\n")
        self._append("".join(lines))

    def _append(self, text: str) -> None:
        if self._size + len(text) > self._max_bytes:
            logger.warning_once("ivl: trace file %s is full (%d bytes), the rest is left out", self._path, self._size)
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            # Raising would take down every request of the step.
            logger.error("ivl: trace file %s cannot be written (%s): nothing more is traced", self._path, error)
            self._size = self._max_bytes
        self._size += len(text)


def _weights(row: _Row, solved: list[Solved]) -> dict[str, float]:
    """Name -> weight with which a row was steered in the end."""
    steering = row.request.steering
    if not steering.auto and steering.max_kl is None:
        return steering.weights
    found = [0.0] * max(len(steering.auto), 1)
    for names, rows, weights in solved:
        if names == steering.auto:
            place = row.row if rows is None else rows.tolist().index(row.row)
            found = weights[place].tolist()
    if steering.auto:
        return dict(zip(steering.auto, found, strict=False))
    return {name: weight * found[0] for name, weight in steering.weights.items()}
