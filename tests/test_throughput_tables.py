"""The throughput benchmark's tables, pictures and goals say what its JSON says."""

import copy
import json
import subprocess
import sys

import pytest
from benchmark_tools import BENCHMARKS, load_module, run_python


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


def test_the_model_runner_is_told(report):
    module = load_module("throughput_table")
    assert "runner" not in module.markdown(report)
    report["sections"]["serving"]["model_runners"] = {"plain": "V1", "ours": "V1"}
    assert "vLLM's model runner V1." in module.markdown(report)
    report["sections"]["serving"]["model_runners"]["plain"] = "V2"
    assert "MODEL RUNNERS DIFFER, so that ratios compare them too (plain: V2, ours: V1)" in module.markdown(report)


def test_a_quick_or_missed_result_says_so(report, tmp_path):
    quick = copy.deepcopy(report)  # with shared parts still shared
    quick["sections"]["peers"]["scale"] = quick["sections"]["peers"]["scale"] | {"quick": True}
    quick["sections"]["peers"]["cases"][1] |= {"times_faster": 3.0, "met": False}
    module = load_module("throughput_table")
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


def test_several_starts_are_told_and_judged_by_their_number(report, tmp_path):
    report["sections"]["serving"] |= {"rounds": 9, "starts": 3}
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    found, text = json.loads(run_python(GOALS, file))
    assert not any(entry["beyond_noise"] for entry in found) and "serving, 9 rounds in 3 starts |" in text
    said = load_module("throughput_table").markdown(report)
    assert "medians of 9 rounds in turns, in 3 starts of all engines." in said
    assert "Ratios are of one start (the median of its rounds) each" in said
    run = load_module("readme").run
    assert "medians of 9 rounds in 3 starts, a CPU" in run(report["sections"]["serving"])
    assert "medians of 3 rounds, a CPU" in run(report["sections"]["peers"])
    report["sections"]["serving"] |= {"rounds": 12, "starts": 6}
    file.write_text(json.dumps(report))
    assert sum(entry["beyond_noise"] for entry in json.loads(run_python(GOALS, file))[0]) == 4


def test_an_interrupted_curve_says_so(report):
    report["sections"]["curves"] |= {"points": 3, "points_wanted": 16}
    code = "import json\nfrom throughput_table import markdown\nprint(markdown(json.loads(sys.argv[1])))"
    assert "Interrupted: 3 of 16 points" in run_python(code, json.dumps(report))
