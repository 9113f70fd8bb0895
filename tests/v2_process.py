"""Running a file of tests on model runner V2, whose kernels need Triton's interpreter from the first import on."""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def assert_all_pass(file: str, count: int) -> None:
    """Runs a file of this folder in a process of its own: exactly `count` tests pass, none fails or is left out."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE / "v2_on_cpu"), os.environ.get("PYTHONPATH", "")]),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(HERE / file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:]
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)}
    assert counts == {"passed": count}, done.stdout[-500:]
