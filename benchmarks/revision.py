"""Which code figures were measured with, when, and on what processor."""

import platform
import subprocess
import time
from pathlib import Path


def revision() -> dict[str, str]:
    """Today's date, and the commit: with a `+` where files other than results differ from it; "unknown" without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
        commit = git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit}


def cpu_model() -> str:
    """The processor's name, family, model and stepping, as Linux gives them; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    numbers = (f"{key} {found[key]}" for key in ("cpu family", "model", "stepping") if key in found)
    return ", ".join([found.get("model name") or platform.processor() or platform.machine(), *numbers])
