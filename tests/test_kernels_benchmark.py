"""The kernel benchmark runs without a GPU, and refuses to time a wrong result."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    for case in report["cases"]:
        assert case["largest_objective"]["ours"] <= case["largest_objective"]["grid search"] + 1e-9
        assert case["times_faster"] > 0
