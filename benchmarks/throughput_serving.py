"""What steering costs in vLLM: cases that differ in which requests are steered, over the same prompts, in turns."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from peers import HFPeers
from throughput_bound import Rates, bound, loads, phase_seconds
from throughput_models import Scale, folder
from throughput_worker import CLOCK, Engine, Request, Run, Worker, serve_metrics, workers

# What vLLM's figures are kept of.
KEPT = ("output_throughput", "total_token_throughput", "request_throughput", "duration")


@dataclass(frozen=True)
class Case:
    """One way of serving the requests.

    Args:
        name: Key in the report.
        label: For tables.
        engine: Key of the engine that runs it.
        ivl: What a steered request asks for.
        share: Of the requests that are steered.
        networks: Value networks that a steered request uses.
    """

    name: str
    label: str
    engine: str
    ivl: Any = None
    share: float = 0.0
    networks: int = 1

    def requests(self, requests: list[Request]) -> list[Request]:
        """The same requests, the steered ones spread evenly over them."""
        count = len(requests)
        steered = (
            {int((number + 0.5) / self.share) for number in range(round(count * self.share))} if self.share else ()
        )
        return [Request(r.prompt, r.output_len, self.ivl if n in steered else None) for n, r in enumerate(requests)]


CASES = [
    Case("plain", "base alone (plain vLLM)", "plain"),
    Case("none", "none steered", "ours"),
    Case("none, no skip", "none steered, skip_unsteered=false", "ours, no skip"),
    Case("10 %", "10 % steered", "ours", 1.0, 0.1),
    Case("50 %", "50 % steered", "ours", 1.0, 0.5),
    Case("all", "all steered", "ours", 1.0, 1.0),
    Case("two", "all steered by two value networks", "two", "default=1.0,second=0.5", 1.0, 2),
    Case("cascade", "all steered by a cascade", "cascade", 1.0, 1.0),
    Case("value", "value network alone (plain vLLM)", "value"),
]
FEW = ("plain", "none", "all")


def sample(scale: Scale, count: int, seed: int) -> list[Request]:
    """Random prompts of mixed length with mixed output lengths."""
    rng = random.Random(seed)
    return [
        Request(
            [
                rng.randrange(1, min(scale.base.vocabulary, scale.value.vocabulary))
                for _ in range(rng.randint(*scale.input_len))
            ],
            rng.randint(*scale.output_len),
        )
        for _ in range(count)
    ]


class Setup:
    """Model folders, engine arguments and environment of one scale.

    Args:
        scale: What is measured.
        threads: Of every contestant.
        device: `cpu` or `cuda`.
        compiled: With torch.compile, and CUDA graphs on a GPU; else eager.
        options: Further keyword arguments of `vllm.LLM`.
        cpu_time: Time is CPU time.
    """

    def __init__(
        self, scale: Scale, threads: int, device: str, compiled: bool, options: dict[str, Any], cpu_time: bool = False
    ) -> None:
        self.scale, self.threads, self.device = scale, threads, device
        self._compiled, self._more_options, self._cpu_time = compiled, options, cpu_time

        def write(seed: int, shape: Any, scheme: str = "residual") -> str:
            return str(folder(shape, scale.positions, seed, scheme, scale.random_weights))

        self.base, self.value, self.second = write(0, scale.base), write(1, scale.value), write(2, scale.value)
        self.cascade = write(1, scale.value, "cascade")
        self.options = {
            "dtype": scale.dtype,
            "enforce_eager": not compiled,
            "max_model_len": scale.positions,
            "kv_cache_memory_bytes": scale.kv_bytes,
            "max_num_seqs": scale.prompts,
            "max_num_batched_tokens": scale.step_tokens,
            "enable_prefix_caching": False,  # the same prompts come again every round
            "skip_tokenizer_init": True,
            "seed": 0,
        }
        if not scale.random_weights:
            self.options["load_format"] = "dummy"
        if device == "cpu":
            self.options["block_size"] = 32
        self.options |= options
        self.environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        if cpu_time:
            self.environment[CLOCK] = "cpu"

    def like(self, scale: Scale) -> Setup:
        """The same machine and arguments with another scale."""
        return Setup(scale, self.threads, self.device, self._compiled, self._more_options, self._cpu_time)

    def engine(self, name: str) -> tuple[Callable[..., Any], dict, dict]:
        """What `workers` starts an engine from."""
        given = {
            "plain": {"model": self.base},
            "value": {"model": self.value},
            "plugin": {"model": self.base, "peer_value": self.value},
            "ours": {"model": self.base, "values": {"value_model": self.value}},
            "ours, no skip": {"model": self.base, "values": {"value_model": self.value, "skip_unsteered": False}},
            "cascade": {"model": self.base, "values": {"value_model": self.cascade}},
            "two": {
                "model": self.base,
                "values": {
                    "values": {
                        "default": {"model": self.value},
                        "second": {"model": self.second},
                        "proxy": {"model": self.value, "minus": self.second},
                    }
                },
            },
        }[name]
        environment = dict(self.environment)
        if "values" not in given:
            environment["VLLM_PLUGINS"] = ""  # this project's plugin is not even loaded
        return Engine, {"options": self.options, **given}, environment

    def peers(self) -> tuple[Callable[..., Any], dict, dict]:
        """What `workers` starts the Hugging Face peers from."""
        values = [self.value, self.second]
        given = {"base": self.base, "values": values, "dtype": self.scale.dtype, "device": self.device}
        return HFPeers, given, self.environment

    def rates(self) -> dict[str, float]:
        """What this machine reaches."""
        with workers({"rates": (Rates, {}, self.environment)}) as started:
            started["rates"].answer()
            return started["rates"].call("measure", self.scale.dtype, self.device)


def check(setup: Setup, engines: dict[str, Worker], cases: Iterable[Case], peers: Worker | None) -> dict[str, Any]:
    """Greedy tokens of every case against the formula, on a few prompts, before anything is timed.

    Raises:
        RuntimeError: a case gives other tokens.
    """
    if peers is None:
        return {"checked": False, "why": "vLLM's dummy weights exist in no folder that transformers could read"}
    few = [Request(request.prompt[:24], 8) for request in sample(setup.scale, 4, seed=1)]
    weights = {"value": None, "two": [1.0, 0.5], "proxy": [1.0, -1.0]}
    for case in cases:
        given = case.requests(few) if case.share in (0.0, 1.0) else [Request(r.prompt, r.output_len, 1.0) for r in few]
        asked = weights.get(case.name, [1.0] if case.share else [])
        if asked is None:
            continue
        expected = peers.call("recomputed", few, asked, case.engine == "cascade")
        found = engines[case.engine].call("run", given).tokens
        if found != expected:
            raise RuntimeError(f"{case.label}: {found} but the formula gives {expected}")
    return {"checked": True, "prompts": len(few), "tokens": sum(request.output_len for request in few)}


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over rounds of vLLM's figures, with the spread of those that tables show."""
    found = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    return {**found, "spread": {name: [min(r[name] for r in rounds), max(r[name] for r in rounds)] for name in KEPT}}


def measure(
    setup: Setup,
    cases: list[Case],
    rounds: int,
    seed: int,
    say: Callable[[str], None],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Runs every case once a round, and compares each with plain vLLM and with its bound.

    Args:
        setup: Models and engines.
        cases: The first one is plain vLLM.
        rounds: After one that warms up.
        seed: Of the requests.
        say: Told about the progress.
        save: Given the report, after every round.
    """
    scale = setup.scale
    rates = setup.rates()
    requests = sample(scale, scale.prompts, seed)
    wanted = list(dict.fromkeys(case.engine for case in cases))
    say(f"starting {len(wanted)} engines")
    runs: dict[str, list[Run]] = {case.name: [] for case in cases}
    with workers({name: setup.engine(name) for name in wanted}) as engines:
        memory = {name: engines[name].answer() for name in wanted}
        if scale.random_weights:
            with workers({"peers": setup.peers()}) as started:
                started["peers"].answer()
                checked = check(setup, engines, cases, started["peers"])
        else:
            checked = check(setup, engines, cases, None)
        for number in range(rounds + 1):
            # The first round warms up, on a few requests.
            some = requests if number else requests[: max(2, len(requests) // 8)]
            for case in cases:
                run = engines[case.engine].call("run", case.requests(some))
                if number:
                    runs[case.name].append(run)
                    say(f"round {number}: {case.label}: {sum(map(len, run.tokens)) / run.seconds:,.1f} output tokens/s")
            if number:
                for name in wanted:
                    memory[name] |= engines[name].call("memory")
                found = [_case_report(setup, case, requests, runs, rates, memory[case.engine]) for case in cases]
                save({"rates": rates, "check": checked, "rounds": number, "cases": found})


def _case_report(
    setup: Setup, case: Case, requests: list[Request], runs: dict[str, list[Run]], rates: dict, memory: dict
) -> dict[str, Any]:
    scale, mine, plain = setup.scale, runs[case.name], runs["plain"]
    report = {"name": case.name, "label": case.label, "share": case.share, "memory": memory}
    report |= summary([serve_metrics(requests, run) for run in mine])
    steered = [request for request in case.requests(requests) if request.ivl is not None]
    shares = {
        "prefill": sum(len(request.prompt) for request in steered) / sum(len(request.prompt) for request in requests),
        "decode": sum(request.output_len for request in steered) / sum(request.output_len for request in requests),
    }
    base = scale.value if case.name == "value" else scale.base
    report["phases"] = {}
    for phase, steps in loads(requests, plain[0]).items():
        values = [(scale.value, shares[phase])] * case.networks
        limit = bound(steps, base, values, case.engine == "cascade", scale.itemsize, rates)
        alone = bound(steps, scale.base, [], False, scale.itemsize, rates)
        seconds = [phase_seconds(run)[phase] for run in mine]
        ratios = [phase_seconds(other)[phase] / own for other, own in zip(plain, seconds, strict=True)]
        report["phases"][phase] = {
            "median_seconds": statistics.median(seconds),
            "tokens": sum(load.tokens for load in steps),
            "bound": limit,
            "share_of_absolute_bound": limit["seconds"] / statistics.median(seconds),
            "speed_over_plain": statistics.median(ratios),
            "speed_over_plain_spread": [min(ratios), max(ratios)],
            "bound_of_speed_over_plain": alone["seconds"] / limit["seconds"],
            "share_of_bound": statistics.median(ratios) * limit["seconds"] / alone["seconds"],
        }
    return report
