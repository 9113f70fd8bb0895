"""Which code figures were measured with, and when."""

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
