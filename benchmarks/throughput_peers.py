"""Steering in vLLM beside every other way to do it: same models, prompts, output lengths and dtype, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from throughput_serving import Case, Setup, check, sample, summary
from throughput_worker import Request, Run, Worker, serve_metrics, workers

ENGINE_CASES = [
    Case("all", "ours, all steered", "ours", 1.0, 1.0),
    Case("proxy", "ours, all steered by expert - anti-expert", "two", "proxy=1.0", 1.0, 2),
    Case("plain", "(d) plain vLLM, fine-tuned big model", "plain"),
    Case("plugin", "(e) vLLM, Hugging Face value model in a logits processor", "plugin", 1.0, 1.0),
]


@dataclass(frozen=True)
class HFCase:
    """One way of running two or three Hugging Face models.

    Args:
        name: Key in the report.
        label: For tables.
        weights: Of the value models.
        batched: With the best batch size, else one by one.
    """

    name: str
    label: str
    weights: tuple[float, ...]
    batched: bool


HF_CASES = [
    HFCase("hf 1", "(a) two Hugging Face models, KV cache, batch 1", (1.0,), False),
    HFCase("hf batch", "(b) the same, statically batched", (1.0,), True),
    HFCase("proxy 1", "(c) proxy-tuning, three models, batch 1", (1.0, -1.0), False),
    HFCase("proxy batch", "(c) the same, statically batched", (1.0, -1.0), True),
]
# ours over peer, by name: (ours, goal on the CPU, goal on a GPU)
GOALS = {
    "hf 1": ("all", 10.0, 50.0),
    "hf batch": ("all", 3.0, 10.0),
    "proxy 1": ("proxy", None, None),
    "proxy batch": ("proxy", 3.0, 10.0),
    "plugin": ("all", 2.0, 5.0),
}


def check_peers(setup: Setup, peers: Worker) -> dict[str, Any]:
    """Greedy tokens of the Hugging Face peers against the formula.

    Raises:
        RuntimeError: a peer gives other tokens.
    """
    few = [Request(request.prompt[:24], 8) for request in sample(setup.scale, 4, seed=1)]
    for weights in sorted({case.weights for case in HF_CASES}):
        expected = peers.call("recomputed", few, weights)
        for batch_size in (1, 4):
            found = peers.call("run", few, weights, batch_size).tokens
            if found != expected:
                raise RuntimeError(
                    f"peers, weights {weights}, batch {batch_size}: {found}, the formula gives {expected}"
                )
    return {"checked": True, "prompts": len(few), "tokens": sum(request.output_len for request in few)}


def sweep(setup: Setup, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Output tokens per second of two Hugging Face models at several batch sizes.

    Args:
        setup: Models.
        seed: Of the requests.
        say: Told about the progress.
    """
    requests = sample(setup.scale, setup.scale.prompts, seed)
    found = []
    with workers({"peers": setup.peers()}) as started:
        started["peers"].answer()
        check_peers(setup, started["peers"])
        for batch_size in (4, 8, 16, 32, 64, 128, 256):
            if batch_size > max(4, len(requests)):
                break
            rate = _rate(started["peers"].call("run", requests, (1.0,), batch_size))
            found.append({"batch_size": batch_size, "output_throughput": rate})
            say(f"Hugging Face, batches of {batch_size}: {rate:,.1f} output tokens/s")
    return {"sizes": found, "best": max(found, key=lambda entry: entry["output_throughput"])["batch_size"]}


def measure(
    setup: Setup,
    batch_size: int,
    rounds: int,
    seed: int,
    say: Callable[[str], None],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Runs every way once a round; what is slow at batch 1 gets four of the requests.

    Args:
        setup: Models and engines.
        batch_size: Of static batches, the best of the sweep.
        rounds: After one that warms up.
        seed: Of the requests.
        say: Told about the progress.
        save: Given the report, after every round.
    """
    scale = setup.scale
    requests = sample(scale, scale.prompts, seed)
    one_by_one = requests[:: max(1, len(requests) // 4)]
    say("starting engines and peers")
    runs: dict[str, list[tuple[list[Request], Run]]] = {}
    names = list(dict.fromkeys(case.engine for case in ENGINE_CASES))
    with workers({name: setup.engine(name) for name in names} | {"peers": setup.peers()}) as started:
        memory = {name: started[name].answer() for name in started}
        checked = check(setup, started, ENGINE_CASES, started["peers"]) | {
            "peers": check_peers(setup, started["peers"])
        }
        for number in range(rounds + 1):
            for case in ENGINE_CASES:
                some = case.requests(requests if number else requests[:8])
                _keep(runs, case, some, started[case.engine].call("run", some), number, say)
            for case in HF_CASES if number else ():  # the check has warmed them up
                some = requests if case.batched else one_by_one
                run = started["peers"].call("run", some, case.weights, batch_size if case.batched else 1)
                _keep(runs, case, some, run, number, say)
            if number:
                for name in started:
                    memory[name] |= started[name].call("memory")
                cases = [_report(case, runs, memory, setup.device) for case in (*ENGINE_CASES, *HF_CASES)]
                save({"check": checked, "rounds": number, "batch_size": batch_size, "cases": cases})


def _report(case: Case | HFCase, runs: dict[str, list], memory: dict[str, dict], device: str) -> dict[str, Any]:
    found = {"name": case.name, "label": case.label, "memory": memory[getattr(case, "engine", "peers")]}
    found |= {"requests": len(runs[case.name][0][0])} | summary([serve_metrics(*run) for run in runs[case.name]])
    return found | _against_ours(case.name, runs, device)


def _keep(runs: dict, case: Case | HFCase, requests: list[Request], run: Run, number: int, say: Callable) -> None:
    if number:
        runs.setdefault(case.name, []).append((requests, run))
        say(f"round {number}: {case.label}: {_rate(run):,.1f} output tokens/s")


def _rate(run: Run) -> float:
    return sum(map(len, run.tokens)) / run.seconds


def _against_ours(name: str, runs: dict[str, list[tuple[list[Request], Run]]], device: str) -> dict[str, Any]:
    if name not in GOALS:
        return {}
    ours, cpu, gpu = GOALS[name]
    ratios = [_rate(mine) / _rate(run) for (_, mine), (_, run) in zip(runs[ours], runs[name], strict=True)]
    goal = gpu if device == "cuda" else cpu
    found = {"compared_with": ours, "times_faster": statistics.median(ratios), "goal": goal}
    return found | {"met": None if goal is None else found["times_faster"] >= goal}
