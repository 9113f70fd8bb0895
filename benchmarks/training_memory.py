"""Memory of the joint loss, for `benchmarks/training.py`: naive against chunked, checked against each other first."""

import gc
from collections.abc import Callable

import torch
from torch.nn import functional

from ivl_vllm.training.frozen_bases import BaseRows
from ivl_vllm.training.objective import chunked_loss, residual_terms, sum_terms


def peak_cpu(work: Callable[[], None]) -> int:
    """Bytes that `work` held at most on the CPU above what was there before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_cuda(work: Callable[[], None]) -> int:
    """The same on a GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class LossAlone:
    """The loss alone, from hidden states: the naive way and the chunked one on the same numbers.

    Args:
        tokens: Positions, all of them trained.
        vocabulary: Columns of both networks.
        hidden: Hidden size of the base and of the value network.
        device: Where; a GPU computes in bf16 under autocast, the CPU in fp32.
        chunk: Positions whose logits exist at a time.
    """

    def __init__(self, tokens: int, vocabulary: int, hidden: tuple[int, int], device: torch.device, chunk: int) -> None:
        torch.manual_seed(0)
        self.chunk, self.device = chunk, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        make = {"device": device}
        self.hidden = torch.randn(tokens, hidden[1], **make).requires_grad_()
        self.weight = (torch.randn(vocabulary, hidden[1], **make) / hidden[1] ** 0.5).requires_grad_()
        base_hidden = torch.randn(tokens, hidden[0], **make).to(self.dtype)
        matrix = (torch.randn(vocabulary, hidden[0], **make) / hidden[0] ** 0.5).to(self.dtype)
        self.rows = BaseRows((base_hidden,), ((matrix, None),))
        self.labels = torch.randint(vocabulary, (tokens,), **make)

    def run(self, way: str) -> torch.Tensor:
        """Forward and backward; leaves the gradients in `hidden` and `weight`."""
        self.hidden.grad = self.weight.grad = None
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if way == "chunked":
                arguments = (self.hidden, self.weight, None, self.rows, self.rows.columns, self.labels)
                sums = chunked_loss(*arguments, chunk=self.chunk)
            else:
                (features,), ((matrix, _),) = self.rows.features, self.rows.heads
                with torch.no_grad():
                    base = functional.linear(features, matrix)
                terms = residual_terms(base, functional.linear(self.hidden, self.weight), self.labels)
                sums = sum_terms(terms, self.labels, 1.0)
                del base, terms
        (sums.total / self.labels.numel()).backward()
        return sums.total.detach()

    def check(self) -> dict[str, float]:
        """Compare values and gradients of the two ways.

        Raises:
            SystemExit: They differ by more than rounding explains.
        """
        totals, gradients = {}, {}
        for way in ("naive", "chunked"):
            totals[way] = self.run(way)
            gradients[way] = (self.hidden.grad, self.weight.grad)
        off = {"loss": float((totals["chunked"] / totals["naive"] - 1).abs())}
        for name, one, other in zip(("hidden", "weight"), gradients["chunked"], gradients["naive"], strict=True):
            off[name] = float((one - other).norm() / other.norm())
        limit = 1e-4 if self.dtype == torch.float32 else 2e-2
        if not all(value <= limit for value in off.values()):
            raise SystemExit(f"wrong result: the chunked loss is off by {off}; nothing was measured")
        return off

    def peak(self, way: str) -> int:
        """Bytes above parameters and gradients."""
        self.run(way)  # what a library allocates once is not the loss's
        self.hidden.grad = self.weight.grad = None
        gc.collect()
        measure = peak_cuda if self.device.type == "cuda" else peak_cpu
        bytes_held = measure(lambda: self.run(way) and None)
        kept = sum(t.grad.numel() * t.grad.element_size() for t in (self.hidden, self.weight))
        return bytes_held - kept
