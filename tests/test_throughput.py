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
alone, joint = bound([load], base, [], False, 4, rates), bound([load], base, [(value, 1.0)], False, 4, rates)
attention = 4 * 4000 * 2 * 32 * 2
flops, read = 2 * 40 * (base.layer_weights + base.head_weights) + attention, 4 * 4000 * 2 * 2 * 32
read += 4 * 10 * (base.layer_weights + base.head_weights)
more = 2 * 40 * (value.layer_weights + value.head_weights) + 4 * 4000 * 32


def close(found, expected):
    return abs(found - expected) < 1e-9 * expected


assert close(alone["seconds_by_flops"], flops / 1e9) and close(alone["seconds_by_bytes"], read / 1e9)
assert close(joint["seconds_by_flops"], (flops + more) / 1e9)
assert bound([load], base, [(value, 0.0)], False, 4, rates)["seconds"] == alone["seconds"]
cascade = bound([load], base, [(value, 1.0)], True, 4, rates)
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
    phase |= {"bound_of_speed_over_plain": 0.885, "share_of_bound": 0.99}
    phases = {"prefill": phase, "decode": phase}
    scale = {"base_parameters": 125e6, "value_parameters": 21e6, "dtype": "float32", "prompts": 64, "quick": False}
    scale |= {"input_len": [16, 192], "output_len": [16, 96]}
    environment = {
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
    serving["cases"] = [a_case("plain", 300.0, phases=phases), a_case("all", 265.4, phases=phases)]
    peers = {"check": {"checked": True}}
    goal = {"times_faster": 13.25, "goal": 10.0, "met": True, "requests": 4}
    peers["cases"] = [a_case("all", 265.0), a_case("hf 1", 20.0, **goal)]
    point = {"label": "64", "plain_ms": 3.0, "steered_ms": 3.3, "cost": 1.1, "cost_spread": [1.0, 1.2]}
    point |= {"cost_bound": 1.09, "share_bound_by_flops": 0.0}
    curves = {"curves": {"concurrency": [point, point], "vocabulary": [point]}}
    sweep = {"sizes": [{"batch_size": 8, "output_throughput": 55.5}]} | common
    sections = {"sweep": sweep, "serving": serving | common, "peers": peers | common, "curves": curves | common}
    return {"sections": sections, "skipped": [{"what": "a thing", "why": "a reason"}]}


def test_tables_and_pictures_come_from_the_json(report, tmp_path):
    results = tmp_path / "throughput-x.json"
    results.write_text(json.dumps(report))
    subprocess.run([sys.executable, str(BENCHMARKS / "throughput_table.py"), str(results)], check=True)
    text = results.with_suffix(".md").read_text()
    for expected in ("265.4 (264.4–266.4)", "0.876", "0.885", "0.990", "12,345", "2.00 GiB", "13.25×", "≥ 10× met"):
        assert expected in text
    assert "4 of the requests" in text and "a thing: a reason" in text and "| 8 | 55.5 |" in text and "1.090" in text
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
