"""Runs `v2_cases.py`: model runner V2 needs Triton's interpreter switched on before anything is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_model_runner_v2():
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE / "v2_on_cpu"), os.environ.get("PYTHONPATH", "")]),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(HERE / "v2_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.search(r"\b13 passed", done.stdout) and "skipped" not in done.stdout, done.stdout[-500:]
