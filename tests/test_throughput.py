"""The throughput benchmark: its peers compute the formula, its bounds are right, its tables say what the JSON says."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run_python(code: str, *arguments: object) -> str:
    """Runs code that sees benchmarks/: it must not come into this process's sys.path."""
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n" + code
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


PEERS = """
import torch
from peers import HFPeers
from throughput_worker import Request

torch.set_num_threads(1)
base, value, second = sys.argv[1:]
requests = [Request([(7 * n + k) % 300 + 4 for k in range(3 + 5 * n)], 3 + 2 * n) for n in range(5)]
peers = HFPeers(base, [value, second])
for weights in ((), (1.0,), (1.0, -1.0), (0.5, 2.0)):
    expected = peers.recomputed(requests, weights)
    assert [len(tokens) for tokens in expected] == [request.output_len for request in requests]
    for batch_size in (1, 2, 5):
        run = peers.run(requests, weights, batch_size)
        assert run.tokens == expected, (weights, batch_size)
        assert all(times == sorted(times) and len(times) == r.output_len for times, r in zip(run.times, requests))
assert peers.recomputed(requests, (1.0,)) != peers.recomputed(requests, ())
print("ok")
"""


def test_hugging_face_peers_compute_the_formula(models):
    # Another architecture, and one with more columns than the base.
    assert run_python(PEERS, models["base"], models["value"], models["anti"]).endswith("ok\n")


PLUGIN = """
import os
os.environ |= {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
               "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
from peers import HFPeers
from throughput_bound import loads
from throughput_worker import Engine, Request, serve_metrics

base, value = sys.argv[1:]
# More requests than run at once, prompts cut into pieces: rows come, go and move.
requests = [Request([(11 * n + k) % 300 + 4 for k in range(2 + 9 * (n % 5))], 3 + n % 7, 1.0 if n % 4 else None)
            for n in range(14)]
engine = Engine(base, {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4,
                       "kv_cache_memory_bytes": 16 << 20, "block_size": 32, "max_num_batched_tokens": 16,
                       "enable_prefix_caching": False, "skip_tokenizer_init": True}, peer_value=value)
peers = HFPeers(base, [value])
run = engine.run(requests)
for number, request in enumerate(requests):
    expected = peers.recomputed([request], [request.ivl or 0.0])[0]
    assert run.tokens[number] == expected, (number, run.tokens[number], expected)
found = serve_metrics(requests, run)
assert found["total_output_tokens"] == sum(request.output_len for request in requests)
assert 0 < found["p50_ttft_ms"] <= found["p90_ttft_ms"] <= found["p99_ttft_ms"]
steps = [step for phase in loads(requests, run).values() for step in phase]
# Every token but each request's last goes through the layers; every generated one through the output projection.
assert sum(step.tokens for step in steps) == sum(len(r.prompt) + r.output_len - 1 for r in requests)
assert sum(step.rows for step in steps) == sum(r.output_len for r in requests)
assert engine.memory()["kv_cache_tokens"] > 0
print("ok")
"""


def test_the_plugin_with_a_hugging_face_model_computes_the_formula(models):
    assert run_python(PLUGIN, models["base"], models["value"]).endswith("ok\n")


BOUND = """
import torch
from throughput_bound import Load, bound
from throughput_models import SCALES, Shape, folder, _write_weights
from transformers import AutoConfig, AutoModelForCausalLM

for scale in SCALES.values():
    for shape in (scale.base, scale.value):
        config = shape.config(512)
        settings = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
        small = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 1)  # norms and biases
        assert shape.parameters == sum(p.numel() for p in model.parameters()) - small, shape
base, value = Shape(64, 2, 2, 1, 128, 1000), Shape(32, 1, 1, 1, 64, 1000)
load = Load(steps=10, tokens=40, rows=40, attended=4000, cached=4000)
rates = {"flops": 1e9, "bytes": 1e9}
alone, joint = bound([load], base, [], False, 4, rates), bound([load], base, [(value, [load])], False, 4, rates)
attention = 4 * 4000 * 2 * 32 * 2
flops, read = 2 * 40 * (base.layer_weights + base.head_weights) + attention, 4 * 4000 * 2 * 2 * 32
read += 4 * 10 * (base.layer_weights + base.head_weights)
more = 2 * 40 * (value.layer_weights + value.head_weights) + 4 * 4000 * 32


def close(found, expected):
    return abs(found - expected) < 1e-9 * expected


assert close(alone["seconds_by_flops"], flops / 1e9) and close(alone["seconds_by_bytes"], read / 1e9)
assert close(joint["seconds_by_flops"], (flops + more) / 1e9)
nothing = Load(steps=0, tokens=0, rows=0, attended=0, cached=0)
assert bound([load], base, [(value, [nothing])], False, 4, rates)["seconds"] == alone["seconds"]
cascade = bound([load], base, [(value, [load])], True, 4, rates)
assert close(cascade["seconds_by_flops"], (flops + more + 2 * 40 * value.head_weights) / 1e9)
# Of two steps one is bound by operations, the other one by bytes.
single = Load(steps=1, tokens=1, rows=1, attended=10, cached=10)
mixed = bound([load, single], base, [], False, 4, rates)
assert mixed["seconds"] > max(mixed["seconds_by_flops"], mixed["seconds_by_bytes"])
assert 0.9 < mixed["share_bound_by_flops"] < 1.0
print("ok")
"""


def test_bounds():
    assert run_python(BOUND).endswith("ok\n")


LOADS = """
from throughput_bound import Load, loads
from throughput_worker import Request, Run, Step

requests = [Request([5] * 3, 3), Request([5] * 7, 1), Request([5] * 4, 4)]
# The second prompt is computed in the second step; the third request gets two tokens at once, by a draft.
steps = [Step(1.0, {0: 1, 2: 1}, True), Step(1.0, {0: 1, 1: 1, 2: 1}, True), Step(1.0, {2: 2}, False)]
steps.append(Step(1.0, {0: 1}, False))
run = Run(4.0, [], [], steps)
everything = loads(requests, run)
# Prompts attend to 1 + 2 + 3, 1 + ... + 7 and 1 + ... + 4 tokens, the tokens decoded beside them to 4 and 5.
assert everything["prefill"] == [Load(2, 14 + 2, 5, 6 + 28 + 10 + 4 + 5, 3 + 4 + 4 + 7 + 5)], everything
assert everything["decode"] == [Load(1, 2, 2, 6 + 7, 7), Load(1, 1, 1, 5, 5)], everything
chosen = loads(requests, run, {0})
assert chosen["prefill"] == [Load(2, 3 + 1, 2, 6 + 4, 3 + 4)], chosen
assert chosen["decode"] == [Load(0, 0, 0, 0, 0), Load(1, 1, 1, 5, 5)], chosen
others = loads(requests, run, {1, 2})
for phase, parts in everything.items():
    for whole, mine, rest in zip(parts, chosen[phase], others[phase], strict=True):
        for field in ("tokens", "rows", "attended", "cached"):
            assert getattr(whole, field) == getattr(mine, field) + getattr(rest, field), (phase, field)
print("ok")
"""


def test_a_value_network_is_asked_for_what_steered_requests_need():
    assert run_python(LOADS).endswith("ok\n")


SUBSET = """
from throughput_peers import quantiles, seconds_of_all
from throughput_serving import CASES, Case, in_turns, median_interval
from throughput_worker import Request, Run

requests = [Request([5] * (1 + n % 4), 1 + 5 * (n % 9)) for n in range(40)]
few = quantiles(requests, 5)
lengths = sorted(len(r.prompt) + r.output_len for r in requests)
assert sorted(len(requests[n].prompt) + requests[n].output_len for n in few) == lengths[4::8]
assert quantiles(requests[:3], 8) == [0, 1, 2]
# 2 s for each prompt token, 3 s for each token after the first.
some, times, now = [requests[n] for n in few], [], 10.0
for request in some:
    first = now + 2 * len(request.prompt)
    times.append([first + 3 * number for number in range(request.output_len)])
    now = times[-1][-1]
times = [[moment - 10.0 for moment in row] for row in times]
expected = sum(2 * len(r.prompt) + 3 * (r.output_len - 1) for r in requests)
assert abs(seconds_of_all(some, Run(0.0, [], times), requests) - expected) < 1e-9
assert median_interval([3.0, 1.0, 2.0]) == [1.0, 3.0]
assert median_interval([float(n) for n in range(9)]) == [1.0, 7.0]
assert [in_turns(["a", "b", "c"], n)[0] for n in range(4)] == ["a", "b", "c", "a"]
mixed = {case.name: case.steered(40) for case in CASES}
assert [len(mixed[name]) for name in ("none", "10 %", "50 %", "all")] == [0, 4, 20, 40]
assert max(mixed["50 %"]) < 40 and Case("x", "x", "ours", 1.0, 0.1).steered(10) == {5}
print("ok")
"""


def test_few_requests_stand_for_all_and_rounds_for_the_median():
    assert run_python(SUBSET).endswith("ok\n")


CHECK = """
from types import SimpleNamespace
from throughput_check import check
from throughput_models import SCALES
from throughput_serving import CASES

FORMULA = {(): 1, (1.0,): 2, (1.0, 0.5): 3}


class Peers:
    def call(self, method, requests, weights, cascade):
        return [[FORMULA[weights] + 10 * cascade, *request.prompt] for request in requests]


class Engine:
    # Tokens as the formula gives them, or not quite.
    def __init__(self, name, wrong):
        self.name, self.wrong = name, wrong

    def call(self, method, requests):
        steered = {"two": 3, "cascade": 12}.get(self.name, 2)
        marks = [1 if request.ivl is None else steered for request in requests]
        if self.wrong == "neighbour":
            marks = marks[-1:] + marks[:-1]
        return SimpleNamespace(tokens=[[mark, *request.prompt] for mark, request in zip(marks, requests)])


setup = SimpleNamespace(scale=SCALES["tiny"])
cases = [case for case in CASES if case.name != "value"]
engines = {case.engine: Engine(case.engine, "") for case in cases}
found = check(setup, engines, cases, Peers())
assert found["checked"] and found["cases"]["10 %"] == {"steered": 1, "other_tokens_than_base": 1}, found
assert found["cases"]["50 %"] == {"steered": 5, "other_tokens_than_base": 5}, found


def refused(engines, peers, text):
    try:
        check(setup, engines, cases, peers)
    except RuntimeError as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"accepted: {text}")


# Right when all or none are steered, wrong in mixed batches.
refused(engines | {"ours": Engine("ours", "neighbour")}, Peers(), "10 % steered")
FORMULA[(1.0,)] = 1
Engine.call = lambda self, method, requests: SimpleNamespace(tokens=[[1, *request.prompt] for request in requests])
refused({case.engine: Engine(case.engine, "") for case in cases}, Peers(), "no steered request")
print("ok")
"""


def test_mixed_batches_are_checked_request_by_request_with_a_control():
    assert run_python(CHECK).endswith("ok\n")


DRAFTS = """
from throughput_models import SCALES
from throughput_serving import SPECULATIVE, Setup
from vllm.engine.arg_utils import EngineArgs

setup = Setup(SCALES["tiny"], 1, "cpu", False, {})
for name in dict.fromkeys(case.engine for case in SPECULATIVE):
    _, given, environment = setup.engine(name)
    assert environment["VLLM_USE_V2_MODEL_RUNNER"] == "1", environment
    assert ("values" in given) == (name == "ours, drafts") and "speculative_config" not in setup.options
    if "values" not in given:
        config = EngineArgs(model=given["model"], **given["options"]).create_engine_config()
        assert config.speculative_config.method == "ngram", config.speculative_config
        assert config.speculative_config.num_speculative_tokens == 3
assert "VLLM_USE_V2_MODEL_RUNNER" not in setup.engine("ours")[2]
assert {case.against for case in SPECULATIVE} == {SPECULATIVE[0].name}
gpu = Setup(SCALES["gpu"], 1, "cuda", True, {})
assert gpu.engine("ours, drafts")[1]["options"] | {"load_format": "dummy", "enforce_eager": False} == (
    gpu.engine("ours, drafts")[1]["options"]
)
print("ok")
"""


def test_engines_with_drafts_are_wired():
    assert run_python(DRAFTS).endswith("ok\n")


def a_case(name: str, throughput: float, **more: object) -> dict:
    found = {"name": name, "label": f"label of {name}", "output_throughput": throughput}
    found |= {f"p{p}_{kind}_ms": float(p) for p in (50, 90, 99) for kind in ("ttft", "tpot", "itl")}
    found["memory"] = {"peak_resident_bytes": 2 << 30, "kv_cache_tokens": 12_345}
    return found | {"spread": {"output_throughput": [throughput - 1, throughput + 1]}, "requests": 64} | more


@pytest.fixture
def report() -> dict:
    limit = {"seconds_by_flops": 8.0, "seconds_by_bytes": 2.0, "seconds": 9.0}
    limit["share_bound_by_flops"] = 0.75
    phase = {"median_seconds": 10.0, "bound": limit, "share_of_absolute_bound": 0.8, "speed_over_plain": 0.876}
    phase |= {"bound_of_speed_over_plain": 0.885, "share_of_bound": 0.99, "share_of_bound_interval": [0.985, 1.01]}
    phase |= {"bound_in_lock_step": 0.875}
    phase |= {"seconds_of_rounds": [10.0, 10.0, 11.0], "tokens_per_request_and_step": 1.75}
    phases = {"prefill": phase, "decode": phase}
    scale = {"base_parameters": 125e6, "value_parameters": 21e6, "dtype": "float32", "prompts": 64, "quick": False}
    scale |= {"input_len": [16, 192], "output_len": [16, 96]}
    environment = {
        "interpreted": False,
        "cpu": "a CPU",
        "threads": 2,
        "vllm": "1",
        "torch": "2",
        "transformers": "3",
        "date": "today",
        "clock": "wall",
    }
    common = {"environment": environment | {"command": "python x"}, "scale": scale, "rounds": 3}
    serving = {"check": {"checked": True}, "rates": {"flops": 1e11, "bytes": 2e10}}
    none = {
        "phases": {name: phase | {"share_of_bound": 0.97, "share_of_bound_interval": [0.96, 0.975]} for name in phases}
    }
    serving["cases"] = [
        a_case("plain", 300.0, phases=phases, against="plain"),
        a_case("plain again", 300.0, phases={p: phase | {"speed_over_plain": 1.005} for p in phases}, against="plain"),
        a_case("none", 299.0, against="plain", **none),
        a_case("all", 265.4, phases=phases, against="plain"),
        a_case("value", 900.0, phases=phases, against="plain"),
    ]
    peers = {"check": {"checked": True}, "batch_sizes": {"hf batch": 16}, "subset": "some of them"}
    goal = {"times_faster": 13.25, "goal": 10.0, "met": True, "requests": 4}
    goal |= {"times_faster_spread": [9.5, 14.0], "plain_times_faster": 15.125}
    peers["cases"] = [a_case("all", 265.0), a_case("hf 1", 20.0, **goal)]
    point = {"label": "64", "plain_ms": 3.0, "steered_ms": 3.3, "cost": 1.1, "cost_spread": [1.0, 1.2]}
    point |= {"cost_bound": 1.09, "share_bound_by_flops": 0.0}
    curves = {"curves": {"concurrency": [point, point], "vocabulary": [point]}}
    sizes = [{"batch_size": 8, "output_throughput": 55.5}, {"batch_size": 16, "output_throughput": 66.5}]
    ways = {"hf batch": {"label": "batched", "sizes": sizes, "best": 16}}
    ways["proxy batch"] = {"label": "proxy", "sizes": sizes[:1], "best": 8}
    sweep = {"ways": ways} | common
    sections = {"sweep": sweep, "serving": serving | common, "peers": peers | common, "curves": curves | common}
    return {"sections": sections, "skipped": [{"what": "a thing", "why": "a reason"}]}


def test_tables_and_pictures_come_from_the_json(report, tmp_path):
    results = tmp_path / "throughput-x.json"
    results.write_text(json.dumps(report))
    subprocess.run([sys.executable, str(BENCHMARKS / "throughput_table.py"), str(results)], check=True)
    text = results.with_suffix(".md").read_text()
    for expected in ("265.4 (264.4–266.4)", "0.876", "0.885", "0.990", "12,345", "2.00 GiB", "13.25×", "≥ 10× met"):
        assert expected in text
    assert "(4 requests)" in text and "a thing: a reason" in text and "1.090" in text and "15.12×" in text
    assert "| 8 | 55.5 | **55.5** (best) |" in text and "| 16 | **66.5** (best) |  |" in text
    assert (
        "0.885 (0.875 in lock-step)" in text
        and "0.990 (0.985–1.010)" in text
        and "rounds differ by 1%" in text
        and "some of them" in text
        and "Interrupted" not in text
    )
    assert "QUICK" not in text
    for name in ("throughput-x.png", "throughput-x-curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_quick_or_missed_result_says_so(report, tmp_path):
    quick = copy.deepcopy(report)  # with shared parts still shared
    quick["sections"]["peers"]["scale"] = quick["sections"]["peers"]["scale"] | {"quick": True}
    quick["sections"]["peers"]["cases"][1] |= {"times_faster": 3.0, "met": False}
    specification = importlib.util.spec_from_file_location("throughput_table", BENCHMARKS / "throughput_table.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    text = module.markdown(quick)
    assert "MISSED" in text and text.count("QUICK RUN") == 1


GOALS = """
import json
from pathlib import Path
from throughput_goals import goals
from throughput_table import goals_table

found = goals(json.loads(Path(sys.argv[1]).read_text())["sections"])
print(json.dumps([found, goals_table(found)]))
"""


def test_goals_are_judged_beside_their_limits(report, tmp_path):
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    found, text = json.loads(run_python(GOALS, file))
    by_goal = {entry["goal"]: entry for entry in found}
    assert len(by_goal) == len(found) == 5
    none = by_goal["label of none, decode: speed of plain vLLM"]
    assert not none["met"] and not none["beyond_noise"] and none["wanted"] == 0.98 and "1%" in none["limited_by"]
    steered = by_goal["label of all, prompts: share of the bound"]
    assert steered["met"] and not steered["beyond_noise"] and steered["wanted"] == 0.97
    # 10 s of the base and 10 s of the value network in place of 10 s: half of the speed, where 0.885 is the bound.
    assert "one after the other they would reach 0.56" in steered["limited_by"]
    peer = by_goal["ours, times as fast as label of hf 1"]
    assert peer["met"] and not peer["beyond_noise"] and "15.12 times" in peer["limited_by"]
    assert "| ≥ 10× | 13.25× (9.50–14.00) | met, not beyond noise |" in text
    assert "| ≥ 0.98 | 0.970 (0.960–0.975) | MISSED, not beyond noise |" in text
    assert "in another process it is 1.005 times as fast" in none["limited_by"]
    # Nine rounds are enough, and so is one that is far away.
    report["sections"]["serving"]["rounds"] = 9
    report["sections"]["peers"]["cases"][1] |= {"times_faster": 6.0, "times_faster_spread": [6.0, 6.0]}
    file.write_text(json.dumps(report))
    found, text = json.loads(run_python(GOALS, file))
    assert all(entry["beyond_noise"] for entry in found)
    for phase in ("decode", "prefill"):
        report["sections"]["serving"]["cases"][1]["phases"][phase]["speed_over_plain"] = 1.03
    file.write_text(json.dumps(report))
    assert [entry["beyond_noise"] for entry in json.loads(run_python(GOALS, file))[0]] == [False] * 4 + [True]
    assert "| ≥ 0.98 | 0.970 (0.960–0.975) | MISSED |" in text and "| ≥ 10× | 6.00× (6.00–6.00) | MISSED |" in text


def test_an_interrupted_curve_says_so(report):
    report["sections"]["curves"] |= {"points": 3, "points_wanted": 16}
    code = "import json\nfrom throughput_table import markdown\nprint(markdown(json.loads(sys.argv[1])))"
    assert "Interrupted: 3 of 16 points" in run_python(code, json.dumps(report))
