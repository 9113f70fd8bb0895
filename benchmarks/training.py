"""Benchmark of `ivl train`'s step: correct first, then peak memory of the joint loss, then tokens per second.

On a GPU:       python benchmarks/training.py            vocabulary 152k, 8,192 tokens, bf16: training-<gpu>.json
Without a GPU:  python benchmarks/training.py            small networks in fp32: training-cpu.json
                python benchmarks/training.py --threads 1 --goal-memory    and the memory at vocabulary 152k
See the wiring: python benchmarks/training.py --quick    seconds, on any machine

Memory   What a loss and its backward pass allocate at most, from hidden states to the gradients of hidden states and
         output layer, less those gradients: parameters, gradients and optimizer are not in it. On a GPU from
         torch.cuda.max_memory_allocated; on the CPU from every allocation and release that torch's profiler records,
         temporaries within operators included. `naive` holds whole logits, `chunked` is what `ivl train` does.
         --goal-memory runs the chunked loss at the goal's size on the CPU too, and the naive one on few tokens, from
         which it is extrapolated along a straight line.
Speed    One step: forward passes, backward pass, AdamW. The bound is a frozen forward pass of the base plus a step of
         plain supervised fine-tuning of the value network alone (transformers' own loss), timed in the same rounds.
         The share of the bound is the median of the rounds' own shares. On the CPU also by processor time, which other
         programs hardly change; use --threads 1 then. Two threads on two busy cores wait for each other at every
         operator, of which small chunks have more: such a share says nothing about the loss.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # from a checkout, installed or not

from kernel_timing import environment  # noqa: E402
from training_memory import LossAlone, memory_at  # noqa: E402

from ivl_vllm.training.chunked_loss import CHUNK  # noqa: E402
from ivl_vllm.training.frozen_bases import FrozenBases  # noqa: E402
from ivl_vllm.training.joint_loss import JointLoss  # noqa: E402
from ivl_vllm.training.objective import residual_terms, sum_terms  # noqa: E402

GOALS = [
    ("peak memory of the chunked loss over the naive one's", 0.1, "≤"),
    ("tokens per second over the bound", 0.9, "≥"),
]


@dataclass
class Size:
    """What is measured: a batch of `rows` × `length` tokens, all trained, and two networks of one shape.

    Args:
        vocabulary: Columns of both networks.
        rows: Sequences in a batch.
        length: Tokens in each.
        base: Hidden size, layers and heads of the base.
        value: The same of the value network.
        chunk: Positions whose logits exist at a time.
    """

    vocabulary: int
    rows: int
    length: int
    base: tuple[int, int, int]
    value: tuple[int, int, int]
    chunk: int


SIZES = {
    "cuda": Size(151_936, 8, 1024, (1536, 28, 12), (896, 24, 14), CHUNK),
    "cpu": Size(32_000, 4, 256, (256, 4, 4), (128, 2, 2), 64),
    "quick": Size(2_000, 2, 64, (64, 2, 2), (32, 2, 2), 8),
}


def make_network(kind: str, size: Size, shape: tuple[int, int, int], device: torch.device) -> torch.nn.Module:
    """A network with random weights: a Llama base, a Qwen2 value network."""
    hidden, layers, heads = shape
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=size.vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=size.length,
    )
    with device:
        return getattr(transformers, f"{kind}ForCausalLM")(config)


class Steps:
    """Whole training steps: ours, the naive joint loss, and the two parts of the bound."""

    def __init__(self, size: Size, device: torch.device, compiled: bool) -> None:
        torch.manual_seed(0)
        self.device, self.is_gpu = device, device.type == "cuda"
        base = make_network("Llama", size, size.base, device)
        self.base = base.to(torch.bfloat16) if self.is_gpu else base
        self.value = make_network("Qwen2", size, size.value, device).train()
        self.optimizer = torch.optim.AdamW(self.value.parameters(), lr=1e-6, fused=self.is_gpu)
        bases = FrozenBases([self.base])
        self.joint = JointLoss(self.value, bases, chunk=size.chunk, compiled=compiled)
        ids = torch.randint(size.vocabulary, (size.rows, size.length), device=device)
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def _train(self, loss: Callable[[], torch.Tensor]) -> None:
        with torch.autocast("cuda", torch.bfloat16) if self.is_gpu else nullcontext():
            found = loss()
        found.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _ours(self) -> torch.Tensor:
        sums, count = self.joint(self.value, self.batch, 0)
        return sums.total / count

    def _naive(self) -> torch.Tensor:
        inputs = {name: self.batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            base = self.base(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        value = self.value(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        labels = self.batch["labels"][:, 1:].flatten()
        return sum_terms(residual_terms(base, value, labels), labels, 1.0).total / labels.numel()

    @torch.no_grad()
    def _frozen_forward(self) -> None:
        inputs = {name: self.batch[name] for name in ("input_ids", "attention_mask")}
        with torch.autocast("cuda", torch.bfloat16) if self.is_gpu else nullcontext():
            self.base(**inputs, use_cache=False)

    def time(self, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Each kind of step once a round, so that a busy machine is busy for all of them.

        Returns:
            Kind → seconds of each round, and the same in seconds of the processor.
        """
        kinds: dict[str, Callable[[], None]] = {
            "joint step": lambda: self._train(self._ours),
            "naive joint step": lambda: self._train(self._naive),
            "frozen forward": self._frozen_forward,
            "plain SFT step": lambda: self._train(lambda: self.value(**self.batch, use_cache=False).loss),
        }
        found: dict[str, list[float]] = {name: [] for name in kinds}
        processor: dict[str, list[float]] = {name: [] for name in kinds}
        for number in tqdm(range(rounds + 1), desc="steps", unit="round", disable=None):
            for name, step in kinds.items():
                if self.is_gpu:
                    torch.cuda.synchronize()
                start, used = time.perf_counter(), time.process_time()
                step()
                if self.is_gpu:
                    torch.cuda.synchronize()
                if number:  # the first round warms up
                    found[name].append(time.perf_counter() - start)
                    processor[name].append(time.process_time() - used)
        return found, processor


def share_of_bound(times: dict[str, list[float]]) -> list[float]:
    """Tokens per second over the bound's, round by round."""
    parts = (times[name] for name in ("frozen forward", "plain SFT step", "joint step"))
    return [(frozen + plain) / joint for frozen, plain, joint in zip(*parts, strict=True)]


def measure(size: Size, device: torch.device, chunks: list[int], rounds: int, compiled: bool) -> dict:
    """Check, then measure memory at each size of a chunk, then speed."""
    report: dict = {"size": {**vars(size), "tokens": size.rows * size.length, "compiled": compiled}}
    loss = LossAlone(size.rows * size.length, size.vocabulary, (size.base[0], size.value[0]), device, size.chunk)
    report["dtype"] = str(loss.dtype).removeprefix("torch.")
    report["relative_difference_to_naive"] = loss.check()
    naive, report["memory"] = loss.peak("naive"), []
    for chunk in tqdm(chunks, desc="memory", unit="size", disable=None):
        loss.chunk = chunk
        chunked = loss.peak("chunked")
        report["memory"].append(
            {"chunk": chunk, "naive_bytes": naive, "chunked_bytes": chunked, "ratio": chunked / naive}
        )
    del loss
    gc.collect()
    steps = Steps(size, device, compiled)
    seconds, processor = steps.time(rounds)
    times = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = size.rows * size.length
    shares = share_of_bound(seconds)
    report["speed"] = {
        "rounds": rounds,
        "load_average": os.getloadavg()[0],
        "median_seconds": times,
        "tokens_per_second": tokens / times["joint step"],
        "naive_tokens_per_second": tokens / times["naive joint step"],
        "bound_tokens_per_second": tokens / (times["frozen forward"] + times["plain SFT step"]),
        "share_of_bound": statistics.median(shares),
        "share_of_bound_range": [min(shares), max(shares)],
    }
    if device.type == "cpu":
        used = share_of_bound(processor)
        report["speed"] |= {
            "median_processor_seconds": {name: statistics.median(values) for name, values in processor.items()},
            "share_of_bound_by_processor_time": statistics.median(used),
            "share_of_bound_by_processor_time_range": [min(used), max(used)],
        }
    at_default = next(entry["ratio"] for entry in report["memory"] if entry["chunk"] == size.chunk)
    measured = [at_default, report["speed"]["share_of_bound"]] if device.type == "cuda" else [None, None]
    report["goals"] = [
        {
            "goal": text,
            "target": f"{sign} {target}",
            "measured": value,
            "met": None if value is None else (value <= target if sign == "≤" else value >= target),
        }
        for (text, target, sign), value in zip(GOALS, measured, strict=True)
    ]
    return report


def print_report(report: dict) -> None:
    """Print what was measured."""
    size, speed = report["size"], report["speed"]
    print(f"{size['tokens']:,} tokens, vocabulary {size['vocabulary']:,}, {report['dtype']}")
    for entry in report["memory"]:
        sizes = " → ".join(f"{entry[name] / 2**20:,.0f} MiB" for name in ("naive_bytes", "chunked_bytes"))
        print(f"memory of the loss, chunks of {entry['chunk']:>5}: {sizes} ({entry['ratio']:.3f} of the naive loss's)")
    print(
        f"speed: {speed['tokens_per_second']:,.0f} tokens/s, naive joint loss {speed['naive_tokens_per_second']:,.0f}, "
        f"bound {speed['bound_tokens_per_second']:,.0f}: {speed['share_of_bound']:.2f} of the bound "
        "({:.2f} to {:.2f} in {} rounds)".format(*speed["share_of_bound_range"], speed["rounds"])
    )
    if "share_of_bound_by_processor_time" in speed:
        low, high = speed["share_of_bound_by_processor_time_range"]
        share = speed["share_of_bound_by_processor_time"]
        print(f"by processor time {share:.2f} ({low:.2f} to {high:.2f}); load average {speed['load_average']:.1f}")
    if found := report.get("memory_at_goal_size"):
        naive, chunked = (found[f"{name}_bytes"] / 2**30 for name in ("naive_extrapolated", "chunked"))
        print(
            f"memory of the loss at {found['tokens']:,} tokens, vocabulary {found['vocabulary']:,}, {found['dtype']}, "
            f"on the CPU: naive {naive:.1f} GiB (extrapolated) → chunked {chunked:.2f} GiB ({found['ratio']:.3f})"
        )
    print("\ngoals, on a GPU at vocabulary 152k, 8,192 tokens, bf16:")
    for goal in report["goals"]:
        verdict = "not yet measured"
        if goal["measured"] is not None:
            verdict = f"{goal['measured']:.3f} {'met' if goal['met'] else 'MISSED'}"
        print(f"{goal['goal']:56} {goal['target']:>6}   {verdict}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU even where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="a tiny size")
    parser.add_argument("--rows", type=int, metavar="N", help="sequences in a batch")
    parser.add_argument("--length", type=int, metavar="N", help="tokens in each")
    parser.add_argument("--vocabulary", type=int, metavar="N", help="columns of the logits")
    parser.add_argument("--chunk", type=int, metavar="N", help="positions whose logits exist at a time")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timed rounds (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="fuse each chunk's arithmetic with torch.compile")
    parser.add_argument("--goal-memory", action="store_true", help="on the CPU: also at the goal's size, minutes, 5 GB")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's CPU threads (default: torch's choice)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file (default: in benchmarks/results/)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    size = SIZES["quick" if arguments.quick else device.type]
    given = {name: getattr(arguments, name) for name in ("rows", "length", "vocabulary", "chunk")}
    size = Size(**{**vars(size), **{name: value for name, value in given.items() if value}})
    chunks = sorted({max(1, size.chunk // 4), size.chunk, size.chunk * 4})
    found = environment(device) | {"transformers": transformers.__version__}
    report = {"environment": found, **measure(size, device, chunks, arguments.rounds, arguments.compile)}
    if arguments.goal_memory and device.type == "cpu":
        goal = SIZES["cuda"]
        hidden = (goal.base[0], goal.value[0])
        report["memory_at_goal_size"] = memory_at(goal.rows * goal.length, goal.vocabulary, hidden, goal.chunk)
    print_report(report)
    name = found["gpu"].lower().replace(" ", "-") if device.type == "cuda" else "cpu"
    output = arguments.output or HERE / "results" / f"training-{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nwrote {output}")


if __name__ == "__main__":
    main()
