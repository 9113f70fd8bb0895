"""What an expert and its small base can share when the expert is that base plus a LoRA adapter.

`python benchmarks/siblings.py` on a CPU, fp32; `--engine` measures the same in vLLM and keeps the rest of the JSON;
`--quick` shows the wiring in seconds. All ways give the pair's difference of logits, `expert - base`, and are checked
against transformers before they are timed: within 1e-4 of its largest entry, and the same greedy tokens.

separate        two networks, one pass each, both sets of logits, subtracted
one head        the same two passes; where the output layers are equal byte for byte (`ivl train --lora_rank` freezes
                them), the hidden states are subtracted first and projected once
stacked         one pass over twice the rows, base rows over expert rows: every matrix is streamed once and the
                adapter's product is added to the expert's rows. Needs the adapter, not the merged weights
stacked, one head   both

Times are CPU time, medians of rounds in which all ways take turns; shares are medians of the rounds' own shares. The
limit is the larger of bytes and FLOPs at the machine's own rates. The joined step adds a 125 M base to the pair.
The figures for a GPU are computed from shapes (bytes streamed by a decode step), not measured.

In vLLM (`--engine`) a decode step of 1 to 16 requests takes 4 to 7 % less with a fixed weight. With `auto`, where both
sets of logits are needed and their rows are projected in one go, 2 to 6 % (the two experts differ, so the time to solve
their weights may, too).

Decision, from `results/siblings-cpu.json` (AMD EPYC, one thread; 125 M base, 21 M pair of vocabulary 32k, adapters of
rank 8 and 32, decode steps of 1 to 64 rows): one head takes 5 to 8 % off the joined step, and equal tables held once
take 39 % off the pair's weights; the engine does both (`ivl_vllm/serving/shared_weights.py`). Stacked with one head
it would be 7 to 11 %, with 48 to 49 % less memory: not kept, as two KV caches under one set of layers would have to
be built into every model of vLLM, and the adapter kept beside the merged checkpoint, for a further 0 to 4 % of a step
here. Nothing gains more than 1 % on a prompt of 512 tokens, or for a 0.5 M pair. Computed for a 7 B base and a 0.5 B
pair on a GPU: one head 1.7 % of the bytes of a decode step and 14 % of the pair's weights, stacked 5.9 % and 48 %.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # from a checkout, installed or not

from kernel_timing import environment  # noqa: E402
from siblings_engine import engines  # noqa: E402
from siblings_ways import BASE, CONTEXT, PROMPT, RANKS, ROWS, SHAPES, WAYS, Pair, Stack, check, siblings  # noqa: E402
from throughput_bound import Rates  # noqa: E402
from throughput_models import SCALES, Shape  # noqa: E402


def limits(shape: Shape, rank: int, rows: int, rates: dict[str, float]) -> dict[str, float]:
    """Seconds that a decode step of each way takes at least, by bytes or by FLOPs, whichever is more."""
    widths = 6 * shape.hidden + 2 * shape.kv_heads * shape.head_size + 3 * (shape.hidden + shape.intermediate)
    low = shape.layers * rank * widths
    cached = 2 * rows * CONTEXT * shape.kv_numbers
    found = {}
    for name in WAYS:
        layers = shape.layer_weights if name.startswith("stacked") else 2 * shape.layer_weights
        extra = low if name.startswith("stacked") else 0
        heads = 2 if name == "separate" else 1
        multiplied = rows * (2 * shape.layer_weights + (1 if name.endswith("head") else 2) * shape.head_weights + extra)
        attention = 2 * rows * CONTEXT * shape.heads * shape.head_size * shape.layers * 4
        read = 4 * (layers + extra + heads * shape.head_weights + cached)
        found[name] = max(read / rates["bytes"], (2 * multiplied + attention) / rates["flops"])
    return found


def alternate(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every call, the ways taking turns; the first two rounds are thrown away."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, work in ways.items():
            start = time.process_time()
            work()
            if number > 1:
                found[name].append(time.process_time() - start)
    return found


@torch.inference_mode()
def base_seconds(cases: list[tuple[int, int]], rounds: int) -> dict[tuple[int, int], float]:
    """Median CPU seconds of the 125 M base, logits included, for each (rows, tokens)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {name: value for name, value in BASE.config(PROMPT + 64).items() if name != "architectures"}
    model, found = LlamaForCausalLM(LlamaConfig(**config)), {}
    for rows, tokens in cases:
        base = Stack(model, rows)
        ids, start = torch.randint(BASE.vocabulary, (rows, tokens)), CONTEXT if tokens == 1 else 0
        work = functools.partial(lambda base, *given: base.hidden(*given) @ base.head.t(), base, ids, start)
        found[rows, tokens] = statistics.median(alternate({"base": work}, rounds if tokens == 1 else 2)["base"])
    return found


@torch.inference_mode()
def measure(name: str, rank: int, base: dict, rounds: int, rates: dict[str, float]) -> list[dict]:
    """Every way of a pair, for the decode steps and the prompt that `base` has the base's seconds of."""
    shape, found = SHAPES[name], []
    models = siblings(shape, rank, 3)
    off = check(models)
    for (rows, tokens), alone in base.items():
        pair, start = Pair(models, rows), CONTEXT if tokens == 1 else 0
        ids = torch.randint(shape.vocabulary, (rows, tokens))
        turns = {way: functools.partial(work, pair, ids, start) for way, work in WAYS.items()}
        seconds = alternate(turns, rounds if tokens == 1 else max(3, rounds // 5))
        bounds = limits(shape, rank, rows, rates) if tokens == 1 else {}
        entry: dict[str, Any] = {"pair": name, "rank": rank, "rows": rows, "tokens": tokens}
        entry |= {"relative_difference": off, "base_ms": 1e3 * alone, "ways": {}}
        for way in WAYS:
            zipped = list(zip(seconds[way], seconds["separate"], strict=True))
            entry["ways"][way] = {
                "ms": 1e3 * statistics.median(seconds[way]),
                "of_separate": statistics.median(own / both for own, both in zipped),
                "of_joined_step": statistics.median((alone + own) / (alone + both) for own, both in zipped),
                **({"limit_ms": 1e3 * bounds[way]} if bounds else {}),
            }
        found.append(entry)
        print_entry(entry)
    return found


def print_entry(entry: dict) -> None:
    """One line for each way."""
    what = f"{entry['rows']:>3} rows" if entry["tokens"] == 1 else f"{entry['tokens']} tokens"
    for name, way in entry["ways"].items():
        limit = f"limit {way['limit_ms']:6.2f}" if "limit_ms" in way else " " * 12
        print(
            f"{entry['pair']:6} rank {entry['rank']:>2} {what:10} {name:18} {way['ms']:8.2f} ms  {limit}  "
            f"{way['of_separate']:.2f} of separate  {way['of_joined_step']:.3f} of the joined step",
            flush=True,
        )


def memory(shape: Shape, rank: int, itemsize: int) -> dict[str, float]:
    """Bytes of a pair's weights, whole and shared; norms left out."""
    widths = 6 * shape.hidden + 2 * shape.kv_heads * shape.head_size + 3 * (shape.hidden + shape.intermediate)
    tables = shape.head_weights * (1 if shape.tied else 2)
    whole = 2 * shape.parameters
    return {
        "separate_bytes": itemsize * whole,
        "equal_tables_shared_bytes": itemsize * (whole - tables),
        "equal_tables_saved": tables / whole,
        "stacked_bytes": itemsize * (shape.parameters + shape.layers * rank * widths),
        "stacked_saved": 1 - (shape.parameters + shape.layers * rank * widths) / whole,
    }


def on_a_gpu() -> dict[str, Any]:
    """Bytes streamed by one decode step of a 7 B base and a 0.5 B pair in bf16; computed from shapes, not measured."""
    scale = SCALES["gpu"]
    base, pair, item = scale.base, scale.value, scale.itemsize
    streams = {"base": item * (base.layer_weights + base.head_weights)}
    widths = 6 * pair.hidden + 2 * pair.kv_heads * pair.head_size + 3 * (pair.hidden + pair.intermediate)
    low = pair.layers * 32 * widths
    for name in WAYS:
        stacked = name.startswith("stacked")
        layers = pair.layer_weights + low if stacked else 2 * pair.layer_weights
        streams[name] = item * (layers + (2 if name == "separate" else 1) * pair.head_weights)
    joined = {name: (streams["base"] + streams[name]) / (streams["base"] + streams["separate"]) for name in WAYS}
    return {
        "computed_not_measured": True,
        "shapes": "Qwen2.5-7B base, pair of Qwen2.5-0.5B (tied embeddings), bf16, adapter of rank 32",
        "bytes_per_decode_step": streams,
        "of_joined_step": joined,
        "memory": memory(pair, 32, item),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--engine", action="store_true", help="measure joined steps in vLLM in the place of torch modules"
    )
    parser.add_argument("--quick", action="store_true", help="the 0.5 M pair alone, few rounds")
    parser.add_argument("--rounds", type=int, metavar="N", help="timed rounds (default: 20; with --engine 7)")
    parser.add_argument("--rows", type=int, nargs="+", metavar="N", help=f"rows of a decode step (default: {ROWS})")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "siblings-cpu.json", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = tuple(arguments.rows or ROWS)
    import transformers

    found = environment(torch.device("cpu")) | {"transformers": transformers.__version__}
    report: dict[str, Any] = {}
    if arguments.engine:
        import vllm

        found["vllm"] = vllm.__version__
        report["engine"] = {"environment": found, **engines(rows, arguments.rounds or 7, arguments.threads)}
    else:
        rates = Rates().measure("float32", "cpu")
        names = ["0.5 M"] if arguments.quick else list(SHAPES)
        rounds = arguments.rounds or (5 if arguments.quick else 20)
        report |= {"environment": found, "rates": rates, "gpu": on_a_gpu()}
        report["memory"] = {n: {str(rank): memory(SHAPES[n], rank, 4) for rank in RANKS} for n in names}
        base = base_seconds([*((count, 1) for count in rows), (1, PROMPT)], min(rounds, 5))
        report["modules"] = [e for n in names for rank in RANKS for e in measure(n, rank, base, rounds, rates)]
        print(json.dumps({"memory": report["memory"], "gpu": report["gpu"]}, indent=2))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    arguments.output.write_text(json.dumps(kept | report, indent=2) + "\n")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
