"""The kernel benchmark runs without a GPU, and refuses to time a wrong result."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_tools import run_python

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def load(name: str):
    """Load a module from its file: benchmarks/ must not come into sys.path (see test_kernels_compiled.py)."""
    specification = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_runs_on_the_cpu_and_draws(tmp_path):
    output = tmp_path / "kernels-cpu.json"
    printed = run(BENCHMARKS / "kernels.py", "--cpu", "--quick", "--threads", 1, "--output", output)
    assert "not yet measured" in printed
    report = json.loads(output.read_text())
    assert report["environment"]["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{10}\+?|unknown", report["environment"]["commit"])
    assert {case["operation"] for case in report["cases"]} == {"value_add", "lm_head_value_add"}
    assert all(case["timings"]["ours"]["median_us"] > 0 for case in report["cases"])
    run(BENCHMARKS / "plot.py", output)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("hidden", [None, 16])
@pytest.mark.parametrize("has_map", [False, True])
def test_a_wrong_result_is_not_timed(hidden, has_map):
    timing = load("kernel_timing")
    inputs = timing.make_inputs(torch.device("cpu"), 3, 50, hidden=hidden, has_map=has_map, value_dtype=torch.float32)

    def forgets_the_weight(inputs):
        value = inputs.value if hidden is None else inputs.hidden @ inputs.matrix.t()
        inputs.logits[inputs.row_index] += value if inputs.vocab_map is None else value[:, inputs.vocab_map]

    with pytest.raises(SystemExit, match=r"wrong result: row \d is off by .*nothing was timed"):
        timing.check(forgets_the_weight, inputs)


def gpu_case(rows: int, ours: float | None, eager: float | None = 40.0) -> dict:
    times = {"ours": ours, "eager": eager, "compiled": 20.0}
    timings = {
        name: {"failed": "out of memory"}
        if time is None
        else {"median_us": time, "p20_us": time, "p80_us": time, "gb_per_s": 900.0, "share_of_copy": 9.5 / time}
        for name, time in times.items()
    }
    return {"operation": "value_add", "rows": rows, "columns": 50, "timings": timings}


def gpu_report(*cases: dict) -> dict:
    head = {"operation": "lm_head_value_add", "rows": 64, "columns": 50, "has_map": True}
    head |= {"matrix_at_copy_bandwidth_us": 10.0, "timings": {"ours": {"median_us": 10.5}}}
    head["timings"]["project + value_add"] = {"median_us": 21.0}
    idle = {"value_add": {"rows": 256, "columns": 50, "median_us": 2.0}}
    return {"cases": [*cases, head], "no_steered_row": idle, "copy_gb_per_s": 1000.0}


def test_a_goal_names_the_case_that_decided_it():
    goals = load("kernel_goals").judge(gpu_report(gpu_case(32, 10.0), gpu_case(64, 10.5), gpu_case(8, 99.0)))
    assert all(goal["met"] and "missing" not in goal for goal in goals)
    assert goals[0]["measured"] == 9.5 / 10.5 and goals[0]["case"] == "64 × 50"
    assert goals[0]["goal"].endswith("copy bandwidth; least at 64 × 50")
    assert goals[3]["measured"] == 1.05 and goals[3]["goal"].endswith("once; most at 64 × 50, map")
    assert goals[5]["case"] == "value_add 256 × 50"


def test_a_goal_without_all_of_its_cases_is_not_met(tmp_path):
    module = load("kernel_goals")
    report = gpu_report(gpu_case(32, 10.0), gpu_case(64, 10.0, eager=None), gpu_case(128, None))
    report["cases"].append({"operation": "value_add", "rows": 512, "columns": 50, "timings": {}})
    report["no_steered_row"]["value_add"] = {"rows": 256, "columns": 50, "failed": "not run"}
    report["goals"] = module.judge(report)
    states = [(goal["measured"], goal["met"], goal.get("missing", "")[:6]) for goal in report["goals"]]
    assert states[:3] == [(0.95, False, "2 of 4"), (4.0, False, "3 of 4"), (2.0, False, "2 of 4")]
    assert states[3:] == [(1.05, True, ""), (0.5, True, ""), (None, False, "1 of 1")]
    assert len(module.failures(report)) == 4  # eager, ours, a whole case, no steered row
    report["environment"] = {
        "command": "python x",
        "gpu": "a GPU",
        "cpu": "",
        "threads": 1,
        "torch": "2",
        "date": "today",
    }
    table = load("readme").kernels(report)
    assert "| 4.00 | **missed**, 3 of 4 cases not timed, the first at 64 × 50 |" in table
    assert table.count("| met |") == 2
    output = tmp_path / "kernels-gpu.json"
    output.write_text(json.dumps(report))
    run(BENCHMARKS / "plot.py", output)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


FAILING = """
import torch
import kernels
from kernel_timing import Timing

device, copies = torch.device("cpu"), []


def clock(step, sets):
    for inputs in sets:
        step(inputs)
    if step is kernels.copy:
        copies.extend(sets)
    return Timing(2.0 if step is kernels.copy else 4.0, 1.0, 5.0)


def broken(inputs):
    raise RuntimeError("out of memory")


kernels.time_cuda, kernels.eager = clock, broken
torch.compile = lambda step, **options: lambda inputs: inputs.logits.zero_()
case = {"rows": 4, "columns": 50}
found = kernels.measure_case(device, case, 1000.0, 2000)
assert found["timings"]["eager"] == {"failed": "RuntimeError: out of memory"}
assert found["timings"]["compiled"]["failed"].startswith("SystemExit: wrong result")
assert found["timings"]["ours"]["median_us"] == 4.0 and found["share_of_equal_copy"] == 0.5
assert len(copies) > 2 and all(2 * one.nbytes == 2 * other.nbytes == found["bytes"] for one, other in copies), copies
assert (copies[0][0] == copies[0][1]).all()
kernels.make_inputs = lambda *given, **more: broken(None)
assert set(kernels.measure_case(device, case, 1000.0, 2000)["timings"]) == {"ours", "eager", "compiled"}

# A run that is ended in its second case has saved the first one, and no goal is met.
saved, timing = [], {"median_us": 1.0, "share_of_copy": 1.0}


def measure_case(device, case, copy_rate, cache):
    if saved:
        raise KeyboardInterrupt
    return {"timings": {"ours": timing, "eager": {"median_us": 9.0}, "compiled": {"median_us": 9.0}}}


kernels.measure_case, kernels.copy_bandwidth = measure_case, lambda device: 1000.0
kernels.environment = lambda device: {"l2_bytes": 1}
try:
    kernels.measure_gpu(True, lambda report: saved.append(json.loads(json.dumps(report))))
except KeyboardInterrupt:
    pass
assert len(saved) == 1 and len(saved[0]["cases"]) == len(kernels.gpu_cases(True)), saved
assert saved[0]["cases"][0]["timings"]["ours"] == timing and saved[0]["cases"][1]["timings"] == {}
assert len(saved[0]["goals"]) == 6 and not any(goal["met"] for goal in saved[0]["goals"])
print("ok")
"""


def test_a_step_that_fails_keeps_the_others_and_an_ended_run_what_it_has():
    assert run_python("import json\n" + FAILING).endswith("ok\n")


TUNING = """
import torch
import kernel_tuning
import kernels
from kernel_timing import Timing

for quick in (False, True):
    plans = kernel_tuning.make_plans(151_936, 896, 132, quick)
    assert len(plans) == 5
    for module, case, configs in plans:
        assert len(configs) == len(set(configs)), case
        given = (case["rows"], torch.bfloat16) if "hidden" in case else (case["rows"], case["columns"], 132)
        assert configs[0] == module.choose_config(*given), case
        if "hidden" not in case:
            assert all(1 <= c.splits <= -(-case["columns"] // c.block) for c in configs)
            assert any(c.splits == -(-case["columns"] // c.block) for c in configs[1:])
    assert (sum(len(configs) for _, case, configs in plans if "hidden" in case) < 100) == quick
# A narrow matrix has fewer tiles than some of the shapes have splits.
assert len(kernel_tuning.make_plans(1000, 64, 132, True)[0].configs) < len(plans[0].configs)

device, saved = torch.device("cpu"), []
plan = kernel_tuning.make_plans(200, 16, 132, True)[3]
default, fastest, broken = plan.configs[0], plan.configs[5], plan.configs[2]
before = plan.module.choose_config


def clock(step, sets, **options):
    config = plan.module.choose_config(1, None)
    if config == broken:
        raise RuntimeError("out of resource: shared memory")
    return Timing({default: 8.0, fastest: 4.0}.get(config, 9.0), 1.0, 9.0)


kernel_tuning.time_cuda = clock
report = {"tuning": []}
save = lambda report: saved.append(len(report["tuning"]))
found = kernel_tuning.tune_one(device, kernels.ours, plan, 1, report, save)
assert plan.module.choose_config is before
assert found["times_faster"] == 2.0 and found["winner"]["config"] == fastest._asdict(), found
assert found["default"]["config"] == default._asdict() and found["default"]["median_us"] == 8.0
assert len(report["tuning"]) == len(plan.configs)
assert [entry["config"] for entry in report["tuning"] if "failed" in entry] == [broken._asdict()]
kernel_tuning.SAVED_EVERY = 3
kernel_tuning.tune_one(device, kernels.ours, plan, 1, {"tuning": []}, save)
assert saved == list(range(3, len(plan.configs) + 1, 3)), saved
print("ok")
"""


def test_tuning_tries_the_default_too_and_each_configuration_once():
    pytest.importorskip("triton", reason="the kernels work with torch alone; CI pins Triton")
    assert run_python(TUNING).endswith("ok\n")


GRID = """
import itertools
import torch
from kernel_fusion import divergence, grid_search, make_inputs, objective

torch.manual_seed(0)
for experts in (1, 2):
    inputs = make_inputs(3, 200, experts, 2.0)
    found = objective(*inputs, grid_search(*inputs))
    grid = itertools.product([0.1 * (i + 1) for i in range(20)], repeat=experts)
    least = torch.stack([objective(*inputs, torch.tensor(weights).expand(3, -1)) for weights in grid]).amin(0)
    assert torch.allclose(found, least, rtol=1e-3, atol=1e-7), (found, least)
print("ok")
"""


def test_the_grid_search_finds_the_least_of_the_grid():
    assert run_python(GRID).endswith("ok\n")


def test_a_failed_case_of_the_solver_counts_against_its_goal():
    cases = [{"experts": 1, "times_faster": 12.0}, {"experts": 1, "failed": "not run"}]
    cases += [{"experts": 2, "failed": "not run"}]
    table = load("readme").solver({"cases": cases, "environment": {"command": "python x"}})
    assert "| 1 | 12.0× to 12.0× | 1 of 2 |" in table and "| 2 | – | 0 of 1 |" in table


def test_inputs_rotate_past_the_cache():
    timing = load("kernel_timing")
    sets = timing.rotating_sets(lambda: timing.make_inputs(torch.device("cpu"), 2, 1000), cache_bytes=50_000)
    assert sum(timing.size_of(part) for inputs in sets for part in (inputs.logits, inputs.value)) >= 200_000
    assert len({inputs.logits.data_ptr() for inputs in sets}) == len(sets)
    assert sets[0].bytes_moved() == 2 * 1000 * (4 + 2 + 4)


def test_fusion_runs_and_is_no_worse_than_the_grid(tmp_path):
    output = tmp_path / "fusion-cpu.json"
    run(BENCHMARKS / "kernel_fusion.py", "--cpu", "--quick", "--threads", 1, "--output", output)
    report = json.loads(output.read_text())
    assert report["environment"]["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{10}\+?|unknown", report["environment"]["commit"])
    for case in report["cases"]:
        assert case["largest_objective"]["ours"] <= case["largest_objective"]["grid search"] + 1e-9
        assert case["times_faster"] > 0
