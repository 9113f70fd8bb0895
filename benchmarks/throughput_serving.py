"""What steering costs in vLLM: cases that differ in which requests are steered, over the same prompts, in turns."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from typing import Any

from packaging.version import Version
from peers import HFPeers
from throughput_bound import Rates, bound, loads, phase_seconds
from throughput_cases import Case
from throughput_models import Scale, folder
from throughput_worker import CLOCK, Engine, Request, Run, serve_metrics, workers

RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
DRAFTER = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}

# What vLLM's figures are kept of.
KEPT = ("output_throughput", "total_token_throughput", "request_throughput", "duration")


def steers_in_v2() -> bool:
    """Whether model runner V2 of this vLLM takes logits processors."""
    import vllm

    return Version(vllm.__version__).release >= (0, 31)


def drafts_run() -> bool:
    """Whether this vLLM takes n-gram drafts beside a logits processor."""
    import vllm

    return Version(vllm.__version__).release >= (0, 32)


class ServedEngine(Engine):
    """A vLLM engine in this process that tells which model runner it has."""

    def model_runner(self) -> str:
        """`V1` or `V2`."""
        return "V2" if self.llm.llm_engine.vllm_config.use_v2_model_runner else "V1"


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
            return str(folder(shape, scale.positions, seed, scheme, scale.random_weights, scale.dtype))

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
        else:
            # Several engines share the GPU. Their KV cache is given above; this is what must be free when one starts.
            self.options["gpu_memory_utilization"] = 0.15
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
        if device == "cuda" and not steers_in_v2():
            self.environment[RUNNER] = "0"  # else plain vLLM alone would run V2

    def like(self, scale: Scale) -> Setup:
        """The same machine and arguments with another scale."""
        return Setup(scale, self.threads, self.device, self._compiled, self._more_options, self._cpu_time)

    def engine(self, name: str) -> tuple[Callable[..., Any], dict, dict]:
        """What `workers` starts an engine from; with drafts if the name says so."""
        drafts, name = name.endswith(", drafts"), name.removesuffix(", drafts")
        given = {
            "plain": {"model": self.base},
            "plain again": {"model": self.base},
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
        environment, options = dict(self.environment), dict(self.options)
        if "values" not in given:
            environment["VLLM_PLUGINS"] = ""  # this project's plugin is not even loaded
        if "peer_value" in given:
            environment[RUNNER] = "0"  # which its logits processor was written for
        if drafts:
            environment[RUNNER] = "1"
            options["speculative_config"] = DRAFTER
        return ServedEngine, {"options": options, **given}, environment

    def peers(self) -> tuple[Callable[..., Any], dict, dict]:
        """What `workers` starts the Hugging Face peers from."""
        values = [self.value, self.second]
        given = {"base": self.base, "values": values, "dtype": self.scale.dtype, "device": self.device}
        return HFPeers, given, self.environment

    def reference(self) -> tuple[Callable[..., Any], dict, dict]:
        """What `workers` starts the formula from, which checks tokens: fp32 on the CPU, wherever they come from."""
        maker, given, environment = self.peers()
        return maker, given | {"dtype": "float32", "device": "cpu"}, environment

    def rates(self) -> dict[str, float]:
        """What this machine reaches."""
        with workers({"rates": (Rates, {}, self.environment)}) as started:
            started["rates"].answer()
            return started["rates"].call("measure", self.scale.dtype, self.device)


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over rounds of vLLM's figures, with the spread of those that tables show."""
    found = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    return {**found, "spread": {name: [min(r[name] for r in rounds), max(r[name] for r in rounds)] for name in KEPT}}


def measure(
    setup: Setup,
    cases: list[Case],
    rounds: int,
    starts: int,
    seed: int,
    say: Callable[[str], None],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Runs every case once a round, and compares each with plain vLLM and with its bound.

    Processes of one engine differ in speed by a few percent for as long as they live, whatever they run. With several
    starts a ratio is the median over starts of the median over a start's rounds, and its interval is that of starts.

    Args:
        setup: Models and engines.
        cases: The first one is plain vLLM.
        rounds: Of each start, after one that warms up.
        starts: How often all engines are started anew.
        seed: Of the requests.
        say: Told about the progress.
        save: Given the report, after every round.
    """
    from throughput_check import check

    scale = setup.scale
    rates = setup.rates()
    requests = sample(scale, scale.prompts, seed)
    wanted = list(dict.fromkeys(case.engine for case in cases))
    runs: dict[str, list[Run]] = {case.name: [] for case in cases}
    checked: dict[str, Any] = {}
    for start in range(starts):
        say(f"starting {len(wanted)} engines" + (f", {start + 1} of {starts} times" if starts > 1 else ""))
        with workers({name: setup.engine(name) for name in in_turns(wanted, start)}) as engines:
            memory = {name: engines[name].answer() for name in wanted}
            runners = {name: engines[name].call("model_runner") for name in wanted}
            if len(set(runners.values())) > 1:
                say(f"the engines' model runners differ, and so may their speed: {runners}")
            if not start:
                with workers({"reference": setup.reference()}) as started:
                    started["reference"].answer()
                    checked = check(setup, engines, cases, started["reference"])
                say("checked")
            for number in range(rounds + 1):
                # The first round warms up, on a few requests.
                some = requests if number else requests[: max(2, len(requests) // 8)]
                for case in in_turns(cases, start + number):
                    run = engines[case.engine].call("run", case.requests(some))
                    if number:
                        runs[case.name].append(run)
                        rate = sum(map(len, run.tokens)) / run.seconds
                        say(f"round {len(runs[case.name])}: {case.label}: {rate:,.1f} output tokens/s")
                if number == rounds or (number and not start):  # of later starts whole ones count alone
                    for name in wanted:
                        memory[name] |= engines[name].call("memory")
                    of_start = rounds if start else 1
                    found = [
                        _case_report(setup, case, requests, runs, of_start, rates, memory[case.engine])
                        for case in cases
                    ]
                    report = {"rates": rates, "check": checked, "model_runners": runners, "starts": start + 1}
                    save(report | {"rounds": start * rounds + number, "cases": found})


def in_turns(cases: list, number: int) -> list:
    """The cases in another order each round: each comes first once before any does again."""
    shift = number % len(cases)
    return cases[shift:] + cases[:shift]


def medians(values: list[float], count: int) -> list[float]:
    """The median of each `count` values that follow each other."""
    return [statistics.median(values[first : first + count]) for first in range(0, len(values), count)]


def median_interval(values: list[float]) -> list[float]:
    """Where the median lies with a probability of at least 95 %, by order statistics; below 6 values, their range."""
    values, count, outside = sorted(values), len(values), 0.0
    for skip in range(count):
        outside += 2 * math.comb(count, skip) / 2**count
        if outside > 0.05:
            break
    skip = max(0, skip - 1)
    return [values[skip], values[count - 1 - skip]]


def _case_report(
    setup: Setup,
    case: Case,
    requests: list[Request],
    runs: dict[str, list[Run]],
    together: int,
    rates: dict,
    memory: dict,
) -> dict[str, Any]:
    scale, mine, plain = setup.scale, runs[case.name], runs[case.against]
    report = {"name": case.name, "label": case.label, "share": case.share, "against": case.against, "memory": memory}
    report |= summary([serve_metrics(requests, run) for run in mine])
    base = scale.value if case.name == "value" else scale.base
    steered = loads(requests, plain[0], case.steered(len(requests)))
    report["phases"] = {}
    for phase, steps in loads(requests, plain[0]).items():
        networks = case.networks if case.share else 0
        # A step runs a value network for all of its tokens or for none of them.
        whole = [load if part.steps else part for load, part in zip(steps, steered[phase], strict=True)]
        limit, lock_step = (
            bound(steps, base, [(scale.value, asked)] * networks, case.engine == "cascade", scale.itemsize, rates)
            for asked in (steered[phase], whole)
        )
        alone = bound(steps, scale.base, [], False, scale.itemsize, rates)
        seconds = [phase_seconds(run)[phase] for run in mine]
        ratios = [phase_seconds(other)[phase] / own for other, own in zip(plain, seconds, strict=True)]
        ratios = medians(ratios, together)
        slower = limit["seconds"] / alone["seconds"]
        report["phases"][phase] = {
            "median_seconds": statistics.median(seconds),
            "seconds_of_rounds": seconds,
            "tokens": sum(load.tokens for load in steps),
            "tokens_per_request_and_step": _tokens_per_turn(mine, phase),
            "bound": limit,
            "share_of_absolute_bound": limit["seconds"] / statistics.median(seconds),
            "speed_over_plain": statistics.median(ratios),
            "speed_over_plain_spread": [min(ratios), max(ratios)],
            "bound_of_speed_over_plain": 1 / slower,
            "bound_in_lock_step": alone["seconds"] / lock_step["seconds"],
            "share_of_bound": statistics.median(ratios) * slower,
            "share_of_bound_interval": [ratio * slower for ratio in median_interval(ratios)],
        }
    return report


def _tokens_per_turn(runs: list[Run], phase: str) -> float:
    turns = [step.generated for run in runs for step in run.steps if step.prefill == (phase == "prefill")]
    return sum(sum(turn.values()) for turn in turns) / max(1, sum(map(len, turns)))
