"""Steering in vLLM beside every other way to do it: same models, prompts, output lengths and dtype, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from throughput_cases import Case
from throughput_check import check, check_peers
from throughput_serving import Setup, in_turns, sample, summary
from throughput_worker import Request, Run, serve_metrics, workers

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
    HFCase("hf batch", "(b) two Hugging Face models, static batches", (1.0,), True),
    HFCase("proxy 1", "(c) proxy-tuning, three models, batch 1", (1.0, -1.0), False),
    HFCase("proxy batch", "(c) proxy-tuning, three models, static batches", (1.0, -1.0), True),
]
BATCHED = [case for case in HF_CASES if case.batched]
# Batch sizes of the sweep: what is small takes minutes on a GPU and is never its best.
SIZES = {"cpu": (4, 8, 16, 32, 64, 128, 256), "cuda": (16, 32, 64, 128, 256)}
# Requests that stand for all where they run one by one, which is what takes longest.
ONE_BY_ONE = {"cpu": 8, "cuda": 4}
SUBSET = (
    "evenly spaced in the order of their length; their time is scaled by prompt tokens up to the first token and by "
    "output tokens after it"
)
# ours over peer, by name: (ours, goal on the CPU, goal on a GPU)
GOALS = {
    "hf 1": ("all", 10.0, 50.0),
    "hf batch": ("all", 3.0, 10.0),
    "proxy 1": ("proxy", None, None),
    "proxy batch": ("proxy", 3.0, 10.0),
    "plugin": ("all", 2.0, 5.0),
}


def sweep(setup: Setup, seed: int, say: Callable[[str], None], save: Callable[[dict[str, Any]], None]) -> None:
    """Output tokens per second of the statically batched Hugging Face peers at several batch sizes.

    Args:
        setup: Models.
        seed: Of the requests.
        say: Told about the progress.
        save: Given the report, after every batch size.
    """
    requests = sample(setup.scale, setup.scale.prompts, seed)
    ways: dict[str, dict[str, Any]] = {case.name: {"label": case.label, "sizes": []} for case in BATCHED}
    with workers({"peers": setup.peers()}) as started:
        started["peers"].answer()
        with workers({"reference": setup.reference()}) as others:
            others["reference"].answer()
            checked = check_peers(setup, started["peers"], others["reference"], (case.weights for case in BATCHED))
        for batch_size in SIZES[setup.device]:
            if batch_size > max(4, len(requests)):
                break
            for case in BATCHED:
                rate = _rate(started["peers"].call("run", requests, case.weights, batch_size))
                say(f"{case.label}, batches of {batch_size}: {rate:,.1f} output tokens/s")
                way = ways[case.name]
                way["sizes"].append({"batch_size": batch_size, "output_throughput": rate})
                way["best"] = max(way["sizes"], key=lambda entry: entry["output_throughput"])["batch_size"]
            save({"check": checked, "ways": {name: way for name, way in ways.items() if way["sizes"]}})


def quantiles(requests: list[Request], count: int) -> list[int]:
    """The numbers of `count` requests that stand for all: evenly spaced in the order of their length."""
    order = sorted(range(len(requests)), key=lambda n: (len(requests[n].prompt) + requests[n].output_len, n))
    count = min(count, len(order))
    return sorted(order[int((place + 0.5) * len(order) / count)] for place in range(count))


def seconds_of_all(some: list[Request], run: Run, requests: list[Request]) -> float:
    """What all requests would take one by one, from a run of some of them one by one.

    Time up to a request's first token is scaled by prompt tokens, the rest by the output tokens after the first.

    Args:
        some: Requests of the run.
        run: One by one, in any order.
        requests: All of them.
    """
    begin, prompts, decode = 0.0, 0.0, 0.0
    for times in sorted(run.times):
        prompts, decode, begin = prompts + times[0] - begin, decode + times[-1] - times[0], times[-1]

    def tokens(of: list[Request]) -> tuple[int, int]:
        return sum(len(request.prompt) for request in of), sum(request.output_len - 1 for request in of)

    (inputs, outputs), (all_inputs, all_outputs) = tokens(some), tokens(requests)
    return prompts * all_inputs / inputs + decode * all_outputs / outputs


def measure(
    setup: Setup,
    batch_sizes: dict[str, int],
    rounds: int,
    seed: int,
    say: Callable[[str], None],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Runs every way once a round; what is slow at batch 1 gets a few requests that stand for all.

    Args:
        setup: Models and engines.
        batch_sizes: Of the statically batched peers, by name: the best of the sweep.
        rounds: After one that warms up.
        seed: Of the requests.
        say: Told about the progress.
        save: Given the report, after every round.
    """
    scale = setup.scale
    requests = sample(scale, scale.prompts, seed)
    few = [requests[number] for number in quantiles(requests, ONE_BY_ONE[setup.device])]
    say("starting engines and peers")
    runs: dict[str, list[Timed]] = {}
    names = list(dict.fromkeys(case.engine for case in ENGINE_CASES))
    with workers({name: setup.engine(name) for name in names} | {"peers": setup.peers()}) as started:
        memory = {name: started[name].answer() for name in started}
        runners = {name: started[name].call("model_runner") for name in names}
        with workers({"reference": setup.reference()}) as others:
            others["reference"].answer()
            checked = check(setup, started, ENGINE_CASES, others["reference"])
            ways = (case.weights for case in HF_CASES)
            checked |= {"peers": check_peers(setup, started["peers"], others["reference"], ways)}
        for number in range(rounds + 1):
            for case in in_turns([*ENGINE_CASES, *HF_CASES], number):
                if isinstance(case, Case):
                    some = case.requests(requests if number else requests[:8])
                    run = started[case.engine].call("run", some)
                elif number:  # the check has warmed them up
                    some = requests if case.batched else few
                    run = started["peers"].call("run", some, case.weights, batch_sizes.get(case.name, 1))
                if number:
                    seconds = run.seconds if len(some) == len(requests) else seconds_of_all(some, run, requests)
                    timed = Timed(some, run, sum(request.output_len for request in requests) / seconds)
                    runs.setdefault(case.name, []).append(timed)
                    say(f"round {number}: {case.label}: {timed.rate:,.1f} output tokens/s")
            if number:
                for name in started:
                    memory[name] |= started[name].call("memory")
                cases = [_report(case, runs, memory, setup.device) for case in (*ENGINE_CASES, *HF_CASES)]
                report = {"check": checked, "rounds": number, "batch_sizes": batch_sizes, "subset": SUBSET}
                save(report | {"model_runners": runners, "cases": cases})


@dataclass
class Timed:
    """One run of one way.

    Args:
        requests: Those that it was given.
        run: What came of them.
        rate: Output tokens per second, of all requests.
    """

    requests: list[Request]
    run: Run
    rate: float


def _report(case: Case | HFCase, runs: dict[str, list[Timed]], memory: dict[str, dict], device: str) -> dict[str, Any]:
    mine = runs[case.name]
    found = {"name": case.name, "label": case.label, "memory": memory[getattr(case, "engine", "peers")]}
    found |= {"requests": len(mine[0].requests)}
    found |= summary([serve_metrics(timed.requests, timed.run) for timed in mine])
    rates = [timed.rate for timed in mine]
    # Of all requests, also where some of them stood for all.
    found["output_throughput"], found["spread"]["output_throughput"] = (
        statistics.median(rates),
        [min(rates), max(rates)],
    )
    return found | _against_ours(case.name, runs, device)


def _rate(run: Run) -> float:
    return sum(map(len, run.tokens)) / run.seconds


def _against_ours(name: str, runs: dict[str, list[Timed]], device: str) -> dict[str, Any]:
    if name not in GOALS:
        return {}
    ours, cpu, gpu = GOALS[name]

    def times(other: str) -> list[float]:
        return [mine.rate / theirs.rate for mine, theirs in zip(runs[other], runs[name], strict=True)]

    ratios, goal = times(ours), gpu if device == "cuda" else cpu
    found = {"compared_with": ours, "times_faster": statistics.median(ratios), "goal": goal}
    found |= {
        "times_faster_spread": [min(ratios), max(ratios)],
        "plain_times_faster": statistics.median(times("plain")),
    }
    return found | {"met": None if goal is None else found["times_faster"] >= goal}
