"""`benchmarks/training.py` checks the loss before it measures, and says what it could not measure."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from training_tools import (
    ENVIRONMENT,
)

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "training.py"


def test_the_benchmark_checks_then_measures_memory_and_speed(tmp_path):
    report = tmp_path / "training.json"
    command = [sys.executable, str(BENCHMARK), "--cpu", "--quick", "--rounds", "1", "--output", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("not yet measured") == 2
    found = json.loads(report.read_text())
    assert found["environment"]["torch"] == torch.__version__
    assert max(found["relative_difference_to_naive"].values()) < 1e-4
    assert found["speed"]["tokens_per_second"] > 0
    # Linear in the chunk, and a small part of whole logits.
    sizes = [entry["ratio"] for entry in found["memory"]]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.1
