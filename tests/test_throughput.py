"""The throughput benchmark: its peers compute the formula, its bounds are right, its engines are wired."""

from benchmark_tools import run_python

PEERS = """
import torch
from peers import HFPeers
from throughput_worker import Request
from transformers import AutoModelForCausalLM

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
steered, alone = peers.recomputed(requests, (1.0,)), peers.recomputed(requests, ())
assert steered != alone
ones = [(1.0,)] * len(requests)
assert peers.shortfall(requests, steered, ones)[0] == 0
# Tokens of the formula fall short by nothing, of two of its tokens that were exchanged by the logits of these two.
assert peers.shortfall(requests, alone, ones)[0] > 0
logits, (prompt, first) = [], (requests[0].prompt, steered[0][0])
for model, weight in ((base, 1.0), (value, 1.0)):
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    columns = model(torch.tensor([prompt])).logits[0, -1].detach()
    logits.append(columns)
joint = logits[0] + torch.nn.functional.pad(logits[1], (0, len(logits[0]) - len(logits[1])))[: len(logits[0])]
other = (first + 1) % 300
short, best = peers.shortfall([Request(prompt, 1)], [[other]], [(1.0,)])
assert abs(short - float(joint.max() - joint[other])) < 1e-4 and abs(best - float(joint.max().abs())) < 1e-4
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
from throughput_cases import CASES, Case
from throughput_peers import quantiles, seconds_of_all
from throughput_serving import in_turns, median_interval, medians
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
assert medians([1.0, 2.0, 9.0, 5.0, 4.0], 3) == [2.0, 4.5] and medians([3.0, 1.0], 1) == [3.0, 1.0]
assert [in_turns(["a", "b", "c"], n)[0] for n in range(4)] == ["a", "b", "c", "a"]
mixed = {case.name: case.steered(40) for case in CASES}
assert [len(mixed[name]) for name in ("none", "10 %", "50 %", "all")] == [0, 4, 20, 40]
assert max(mixed["50 %"]) < 40 and Case("x", "x", "ours", 1.0, 0.1).steered(10) == {5}
print("ok")
"""


def test_few_requests_stand_for_all_and_rounds_for_the_median():
    assert run_python(SUBSET).endswith("ok\n")


STARTS = """
from contextlib import contextmanager
from types import SimpleNamespace
import throughput_check
import throughput_serving
from throughput_cases import CASES
from throughput_models import SCALES
from throughput_worker import Run, Step

started, reports = [], []


class Fake:
    # Plain vLLM takes a second a step; with the value network a tenth more in the first start, and a third later.
    def __init__(self, name):
        self.name, self.memory = name, {"kv_cache_tokens": 1, "peak_resident_bytes": 1}
        self.slow = 1.0 if name == "plain" else (1.1, 1.3, 1.3)[sum("plain" in names for names in started) - 1]

    def answer(self):
        return dict(self.memory)

    def call(self, method, *given):
        if method != "run":
            return {"memory": self.memory, "model_runner": "V1"}[method]
        requests, steps, times = given[0], [], [[] for _ in given[0]]
        for number in range(max(r.output_len for r in requests)):
            rows = {n: 1 for n, r in enumerate(requests) if r.output_len > number}
            steps.append(Step(self.slow, rows, number == 0))
            for n in rows:
                times[n].append((number + 1) * self.slow)
        return Run(len(steps) * self.slow, [[5] * r.output_len for r in requests], times, steps)


@contextmanager
def workers(specifications):
    started.append(list(specifications))
    yield {name: Fake(name) for name in specifications}


throughput_serving.workers = workers
throughput_check.check = lambda *_: {"checked": True}
nothing = SimpleNamespace(scale=SCALES["tiny"], rates=lambda: {"flops": 1e9, "bytes": 1e9}, reference=lambda: None,
                          engine=lambda name: name)
cases = [case for case in CASES if case.name in ("plain", "all")]
throughput_serving.measure(nothing, cases, 2, 3, 0, lambda _: None, reports.append)
assert [(r["starts"], r["rounds"]) for r in reports] == [(1, 1), (1, 2), (2, 4), (3, 6)], reports
assert [len(names) for names in started if "plain" in names] == [2, 2, 2] and ["reference"] in started
decode = [next(c for c in r["cases"] if c["name"] == "all")["phases"]["decode"] for r in reports]
ratios = [round(phase["speed_over_plain"], 4) for phase in decode]
assert ratios == [round(r, 4) for r in (1 / 1.1, 1 / 1.1, (1 / 1.1 + 1 / 1.3) / 2, 1 / 1.3)], ratios
assert [round(r, 4) for r in decode[-1]["speed_over_plain_spread"]] == [round(1 / 1.3, 4), round(1 / 1.1, 4)]
assert len(decode[-1]["seconds_of_rounds"]) == 6
print("ok")
"""


def test_ratios_are_medians_over_starts():
    assert run_python(STARTS).endswith("ok\n")


DRAFTS = """
from dataclasses import replace
from throughput_cases import SPECULATIVE
from throughput_models import SCALES
from throughput_serving import Setup
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
gpu = Setup(replace(SCALES["gpu"], random_weights=False), 1, "cuda", True, {})
assert gpu.engine("ours, drafts")[1]["options"] | {"load_format": "dummy", "enforce_eager": False} == (
    gpu.engine("ours, drafts")[1]["options"]
)
print("ok")
"""


def test_engines_with_drafts_are_wired():
    assert run_python(DRAFTS).endswith("ok\n")


RUNNERS = """
from dataclasses import replace
import vllm
from throughput import skipped, usual_parts
from throughput_models import SCALES
from throughput_serving import Setup, drafts_run, steers_in_v2

for version, newer in (("0.26.0", False), ("0.30.2+cu130", False), ("0.31.0", True), ("1.0.0", True)):
    vllm.__version__ = version
    assert steers_in_v2() == newer and drafts_run() == (newer and version != "0.31.0"), version
    setup = Setup(replace(SCALES["gpu"], random_weights=False), 1, "cuda", True, {})
    # Plain vLLM and ours, in the same runner.
    for name in ("plain", "ours"):
        assert setup.engine(name)[2].get("VLLM_USE_V2_MODEL_RUNNER") == (None if newer else "0"), version
    assert setup.engine("plugin")[2]["VLLM_USE_V2_MODEL_RUNNER"] == "0"  # it has the interface of V1 alone
    assert "VLLM_USE_V2_MODEL_RUNNER" not in Setup(SCALES["tiny"], 1, "cpu", True, {}).environment
    assert usual_parts("gpu", newer) == ["compiled", "speculative"][: 2 if newer else 1]
    assert usual_parts("gpu-peers", newer) == ["sweep", "peers"]
    assert usual_parts("cpu", newer) == ["serving", "compiled", "sweep", "peers"]
    assert ("speculative decoding" in [entry["what"] for entry in skipped("cuda", newer)]) == (not newer)
print("ok")
"""


def test_plain_vllm_runs_in_the_runner_that_steers():
    assert run_python(RUNNERS).endswith("ok\n")


REFUSED = """
import contextlib
import io
from types import SimpleNamespace
import throughput
import throughput_serving
import vllm.platforms


def refusal(*arguments):
    sys.argv, said = ["throughput.py", *arguments], io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            throughput.main()
        except SystemExit as error:
            return error.code, said.getvalue()


throughput_serving.measure = throughput_serving.Setup = None  # what is not refused fails before it starts an engine
vllm.platforms.current_platform = SimpleNamespace(is_cuda=lambda: True)
for scale in ("cpu", "tiny"):
    code, said = refusal("--scale", scale)
    assert code == 2 and "would put its engines on the GPU: use --scale gpu" in said, said
throughput_serving.drafts_run = lambda: False
code, said = refusal("--scale", "gpu", "--only", "speculative")
assert code == 2 and "needs vLLM 0.32 or later" in said, said
print("ok")
"""


def test_cpu_figures_are_not_taken_on_a_gpu():
    assert run_python(REFUSED).endswith("ok\n")
