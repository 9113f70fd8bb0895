"""The limit of every figure of the throughput benchmark: what must be computed and read, at the machine's own rates.

A step cannot be faster than its floating point operations at the rate of a large matrix product, nor than the bytes
that it must read at the rate of streaming a large matrix; the slower of both is its bound. A phase (decoding, or
prompts) is bound by the sum over its steps: those with many requests often by operations, those with few by bytes.
The bound of a steered case counts value networks for the tokens of steered requests alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from throughput_models import Shape
from throughput_worker import Request, Run, clock, process_memory


class Rates:
    """Measures this machine."""

    def measure(self, dtype: str, device: str) -> dict[str, float]:
        """Best of several: FLOP/s of square matrix products, bytes/s of a matrix times a vector.

        Args:
            dtype: Of the models.
            device: `cpu` or `cuda`.
        """
        import torch

        size, wide = (8192, 1 << 30) if device == "cuda" else (2048, 1 << 27)
        square = torch.randn(size, size, dtype=getattr(torch, dtype), device=device)
        tall = torch.ones(wide // 4096, 4096, dtype=square.dtype, device=device)
        vector = torch.ones(4096, dtype=square.dtype, device=device)
        seconds = min(self._best(product, device) for product in self._products(square, device))
        return {"flops": 2 * size**3 / seconds, "bytes": tall.nbytes / self._best(lambda: tall @ vector, device)}

    @staticmethod
    def _products(square: Any, device: str) -> list[Callable[[], Any]]:
        """torch's own product, and on a CPU that of vLLM's linear layers, whose weights are packed: often faster."""
        found = [lambda: square @ square]
        if device == "cpu":
            from vllm import _custom_ops

            if _custom_ops._supports_onednn:
                packed = _custom_ops.create_onednn_mm(square, 1)
                found.append(lambda: _custom_ops.onednn_mm(packed, square, None))
        return found

    @staticmethod
    def _best(work: Any, device: str) -> float:
        import torch

        found = []
        for _ in range(12):
            start = clock()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            found.append(clock() - start)
        return min(found)

    def memory(self) -> dict[str, int]:
        """Bytes that this process has used at most."""
        return process_memory()


@dataclass
class Load:
    """What steps ask of a model, whatever its shape.

    Args:
        steps: Their number.
        tokens: Tokens through the layers.
        rows: Rows through the output projection.
        attended: Pairs of a token and one that it attends to.
        cached: Tokens whose keys and values are read, summed over steps and requests.
    """

    steps: int
    tokens: int
    rows: int
    attended: float
    cached: int


def loads(requests: list[Request], run: Run, chosen: Collection[int] | None = None) -> dict[str, list[Load]]:
    """What decoding asked for in every step of a run, and prompts in all of theirs together.

    A step belongs to the prompts while any request is without its first token; the few tokens that are decoded in such
    steps are counted there. Drafts that were rejected are not counted.

    Args:
        requests: Those of the run.
        run: The run.
        chosen: The numbers of the requests to count; a step that gave none of them a token counts as no step. All of
            them by default.
    """
    chosen = set(range(len(requests)) if chosen is None else chosen)
    known = [len(request.prompt) for request in requests]
    prompts = [known[number] for number in chosen]
    early, late = [], []
    for step in run.steps:
        here = {number: count for number, count in step.generated.items() if number in chosen}
        rows = sum(here.values())
        attended = sum(count * known[number] + count * (count - 1) / 2 for number, count in here.items())
        cached = sum(known[number] + count - 1 for number, count in here.items())
        (early if step.prefill else late).append(Load(int(bool(here)), rows, rows, attended, cached))
        for number, count in here.items():
            known[number] += count
    attended = sum(length * (length + 1) / 2 for length in prompts) - sum(prompts)
    prefill = Load(
        sum(load.steps for load in early),
        sum(prompts) - len(prompts) + sum(load.rows for load in early),
        sum(load.rows for load in early),
        attended + sum(load.attended for load in early),
        sum(load.cached for load in early),
    )
    return {"prefill": [prefill], "decode": late}


def bound(
    phase: list[Load],
    base: Shape,
    values: list[tuple[Shape, list[Load]]],
    cascade: bool,
    itemsize: int,
    rates: dict[str, float],
) -> dict[str, Any]:
    """Seconds that a phase takes at least, and which limit says so.

    Args:
        phase: What is asked of the base.
        base: The base model.
        values: Value networks, each with what is asked of it in the same steps: that of the requests that it steers.
        cascade: Whether the value networks read the base's expected next embedding, which takes its logits at every
            token and their product with the embedding matrix.
        itemsize: Bytes of a number.
        rates: What `Rates` measured.
    """
    steps = []
    for number, load in enumerate(phase):
        flops = base.flops(load.tokens, load.rows, load.attended)
        read = base.bytes_read(load.steps, load.cached, itemsize)
        for shape, parts in values:
            part = parts[number]
            flops += shape.flops(part.tokens, part.rows, part.attended)
            read += shape.bytes_read(part.steps, part.cached, itemsize)
            if cascade:
                flops += 2 * ((part.tokens - part.rows) * base.head_weights + part.tokens * shape.head_weights)
                read += itemsize * part.steps * shape.head_weights
        steps.append((flops / rates["flops"], read / rates["bytes"]))
    found = {"seconds_by_flops": sum(f for f, _ in steps), "seconds_by_bytes": sum(b for _, b in steps)}
    found["seconds"] = sum(map(max, steps))
    found["share_bound_by_flops"] = sum(f for f, b in steps if f >= b) / found["seconds"] if steps else 0.0
    return found


def phase_seconds(run: Run) -> dict[str, float]:
    """Seconds of the steps of each phase."""
    return {
        "prefill": sum(step.seconds for step in run.steps if step.prefill),
        "decode": sum(step.seconds for step in run.steps if not step.prefill),
    }
