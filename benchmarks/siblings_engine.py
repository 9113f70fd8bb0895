"""A pair of LoRA siblings in vLLM, beside a pair of the same shapes that shares nothing."""

from __future__ import annotations

import itertools
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from siblings_ways import BASE, LINEARS, PAIR
from throughput_models import CACHE, SCALES, folder
from throughput_worker import CLOCK, Engine, Request, workers

# What the requests ask for: a fixed weight, which adds hidden states up, and a solved one, which needs both logits.
ASKED = (1.0, "auto")


class Resident(Engine):
    """An engine that also says how much memory it holds."""

    def resident(self) -> int:
        """Bytes of this process in memory now."""
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def engines(rows: tuple[int, ...], rounds: int, threads: int) -> dict[str, Any]:
    """The same joined step in vLLM: an expert that shares tables with its base, and one of its shape that does not.

    Decode steps of equal requests, engines in turns; only the experts' weights differ.
    """
    positions = SCALES["cpu"].positions
    base, small, other = (folder(shape, positions, seed) for shape, seed in ((BASE, 0), (PAIR, 1), (PAIR, 2)))
    pairs = {"tables shared": sibling_folder(small), "nothing shared": other}
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": positions,
        "kv_cache_memory_bytes": 128 << 20,
        "max_num_seqs": max(rows),
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "block_size": 32,
    }
    quiet = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    quiet |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind", CLOCK: "cpu"}
    made = {
        name: (
            Resident,
            {
                "model": str(base),
                "options": options,
                "values": {"values": {"pair": {"model": str(expert), "minus": str(small)}}},
            },
            quiet,
        )
        for name, expert in pairs.items()
    }
    found: dict[str, Any] = {"resident_bytes": {}, "decode": []}
    with workers(made) as started:
        for name, worker in started.items():
            worker.answer()
            found["resident_bytes"][name] = worker.call("resident")
        for count, asked in itertools.product(rows, ASKED):
            torch.manual_seed(count)
            prompts = torch.randint(1, PAIR.vocabulary, (count, 16)).tolist()
            requests = [Request(prompt, 24, asked) for prompt in prompts]
            steps: dict[str, list[float]] = {name: [] for name in made}
            for number in range(rounds + 1):
                for name, worker in started.items():
                    run = worker.call("run", requests)
                    if number:
                        steps[name].append(statistics.median(s.seconds for s in run.steps if not s.prefill))
            shares = [own / both for own, both in zip(*steps.values(), strict=True)]
            entry = {"rows": count, "ivl": asked, "rounds": rounds, "of_nothing_shared": statistics.median(shares)}
            entry |= {"range": [min(shares), max(shares)]}
            entry["step_ms"] = {name: 1e3 * statistics.median(values) for name, values in steps.items()}
            found["decode"].append(entry)
            print(f"vLLM, {count:>3} rows: {entry}", flush=True)
    print(f"resident: {found['resident_bytes']}")
    return found


def sibling_folder(small: Path) -> Path:
    """The folder of an expert: `small` plus a LoRA adapter of rank 8 on every layer but the output layer, merged."""
    from safetensors.torch import load_file, save_file

    target = CACHE / f"{small.name}-sibling"
    if not target.exists():
        target.mkdir()
        torch.manual_seed(5)
        weights = load_file(small / "model.safetensors")
        for name, weight in weights.items():
            if name.split(".")[-2] in LINEARS:
                weight += (
                    torch.randn(weight.shape[0], 8) * 0.05 @ torch.randn(8, weight.shape[1]) / weight.shape[1] ** 0.5
                )
        save_file(weights, target / "model.safetensors", {"format": "pt"})
        (target / "config.json").write_text((small / "config.json").read_text())
    return target
