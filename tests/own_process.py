"""Running tests in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent

# Model runner V2, whose kernels need Triton's interpreter, from the first import on, where there is no GPU.
ON_V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
if not torch.cuda.is_available():
    ON_V2["PYTHONPATH"] = os.pathsep.join([str(HERE / "v2_on_cpu"), os.environ.get("PYTHONPATH", "")])
    ON_V2["TRITON_INTERPRET"] = "1"


def assert_all_pass(cases: str, count: int, variables: dict[str, str] | None = None) -> None:
    """Runs a file of this folder, or one test of it: exactly `count` tests pass, none fails or is left out."""
    environment = os.environ | (variables or {})
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--numprocesses", "0", str(HERE / cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:]
    assert count_results(done.stdout) == {"passed": count}, done.stdout[-500:]


def count_results(text: str) -> dict[str, int]:
    """What pytest's last line says: "passed" → how many, and so on."""
    return {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", text)}
