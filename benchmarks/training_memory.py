"""Memory of the joint loss, for `benchmarks/training.py`: naive against chunked, checked against each other first."""

import gc
from collections.abc import Callable

import torch
from torch.nn import functional

from ivl_vllm.training.chunked_loss import Shape, chunked_loss
from ivl_vllm.training.frozen_bases import BaseRows
from ivl_vllm.training.objective import residual_terms, sum_terms


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
        device: Where; bf16 is computed under autocast.
        chunk: Positions whose logits exist at a time.
        dtype: Of the products; left out, bf16 on a GPU and fp32 on the CPU.
    """

    def __init__(
        self,
        tokens: int,
        vocabulary: int,
        hidden: tuple[int, int],
        device: torch.device,
        chunk: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.chunk, self.device = chunk, device
        self.dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        make = {"device": device}
        self.hidden = torch.randn(tokens, hidden[1], **make).requires_grad_()
        self.weight = (torch.randn(vocabulary, hidden[1], **make) / hidden[1] ** 0.5).requires_grad_()
        base_hidden = torch.randn(tokens, hidden[0], **make).to(self.dtype)
        matrix = (torch.randn(vocabulary, hidden[0], **make) / hidden[0] ** 0.5).to(self.dtype)
        self.rows = BaseRows((base_hidden,), ((matrix, None, Shape()),))
        self.labels = torch.randint(vocabulary, (tokens,), **make)

    def run(self, way: str) -> torch.Tensor:
        """Forward and backward; leaves the gradients in `hidden` and `weight`."""
        self.hidden.grad = self.weight.grad = None
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if way == "chunked":
                arguments = (self.hidden, self.weight, None, self.rows, self.rows.columns, self.labels)
                sums = chunked_loss(*arguments, chunk=self.chunk)
            else:
                (features,), ((matrix, _, _),) = self.rows.features, self.rows.heads
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
        if self.device.type == "cuda":
            self.run(way)  # what a library allocates once is not the loss's
        self.hidden.grad = self.weight.grad = None
        gc.collect()
        measure = peak_cuda if self.device.type == "cuda" else peak_cpu
        bytes_held = measure(lambda: self.run(way) and None)
        kept = sum(t.grad.numel() * t.grad.element_size() for t in (self.hidden, self.weight))
        return bytes_held - kept


def memory_at(tokens: int, vocabulary: int, hidden: tuple[int, int], chunk: int) -> dict:
    """Memory of the loss in bf16 on the CPU, at a size where the naive loss does not fit.

    The chunked loss is run at that size. The naive one is run on few tokens; what it holds grows with them along a
    straight line, which three sizes show, and the line tells what it would hold.

    Raises:
        SystemExit: The two ways differ, or the three sizes lie on no straight line.
    """
    device = torch.device("cpu")
    sizes = [256, 512, 768]
    naive, off = [], None
    for few in sizes:
        loss = LossAlone(few, vocabulary, hidden, device, 64, torch.bfloat16)
        off = off or loss.check()
        naive.append(loss.peak("naive"))
        del loss
        gc.collect()
    slope = (naive[2] - naive[0]) / (sizes[2] - sizes[0])
    expected = naive[0] + slope * (sizes[1] - sizes[0])
    if abs(naive[1] - expected) > 0.01 * naive[1]:
        raise SystemExit(f"the naive loss's memory at {sizes} tokens, {naive} bytes, lies on no straight line")
    chunked = LossAlone(tokens, vocabulary, hidden, device, chunk, torch.bfloat16).peak("chunked")
    whole = naive[0] + slope * (tokens - sizes[0])
    return {
        "dtype": "bfloat16",
        "tokens": tokens,
        "vocabulary": vocabulary,
        "hidden": hidden,
        "chunk": chunk,
        "relative_difference_to_naive": off,
        "naive_measured_bytes": dict(zip(map(str, sizes), naive, strict=True)),
        "naive_extrapolated_bytes": round(whole),
        "chunked_bytes": chunked,
        "ratio": chunked / whole,
    }
