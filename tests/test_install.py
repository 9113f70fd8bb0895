"""`requirements/install.sh`: what it does to a `.venv` that is there. Python and pip are a stub that notes words."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parent.parent / "requirements"
STUB = """#!/bin/bash
echo "$@" >> "$CALLS"
case "$*" in
  -c*) echo 3.11 ;;
  "-m venv .venv") mkdir -p .venv/bin; for name in python python3.11; do ln -s "$STUB" .venv/bin/$name; done ;;
  *pip*) [ -z "${BREAK:-}" ] ;;
esac
"""


@pytest.fixture
def install(tmp_path):
    """Runs the script in a project of its own, `.venv` activated; returns its status, output and calls of pip."""
    project = tmp_path / "project"
    shutil.copytree(REQUIREMENTS, project / "requirements", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    (project / "pyproject.toml").write_text("")
    stub, calls = tmp_path / "bin" / "python3.11", tmp_path / "calls"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(build, **more):
        calls.write_text("")
        path = f"{project / '.venv' / 'bin'}:{stub.parent}:/usr/bin:/bin"
        environment = {"PATH": path, "IVL_BUILD": build, "STUB": str(stub), "CALLS": str(calls), **more}
        words = ["bash", project / "requirements" / "install.sh"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)
        return done.returncode, done.stdout, [line for line in calls.read_text().splitlines() if "pip" in line]

    run.venv, run.inputs = project / ".venv", project / "pyproject.toml"
    return run


def test_the_same_build_installs_once_and_again_into_the_same_venv_when_its_inputs_change(install):
    status, out, calls = install("cpu")
    assert status == 0 and "Moving" not in out and any("cpu.txt" in call for call in calls)
    (install.venv / "mine").touch()
    assert install("cpu") == (0, "", [])
    install.inputs.write_text("# changed")
    status, out, calls = install("cpu")
    assert status == 0 and "Moving" not in out and calls
    assert (install.venv / "mine").exists()


@pytest.mark.parametrize("broken", ["", "1"])
@pytest.mark.parametrize(("first", "then"), [("cpu", "gpu"), ("gpu", "cpu")])
def test_another_build_has_a_venv_of_its_own(install, first, then, broken):
    """Even where the first one was not finished: what it had installed is as much in the way."""
    assert (install(first, BREAK=broken)[0] != 0) == bool(broken)
    (install.venv / "mine").touch()
    status, out, calls = install(then)
    assert status == 0 and any(f"{then}.txt" in call for call in calls)
    moved = f"Moving .venv to .venv-{first}: it holds the {first} build, and the {then} build is wanted"
    assert out.splitlines()[0] == moved
    assert not (install.venv / "mine").exists()
    assert os.readlink(install.venv / "bin" / "python").endswith("/bin/python3.11")
    assert install(then) == (0, "", [])
    status, out, calls = install(first)
    assert status == 0 and (install.venv / "mine").exists()
    assert bool(calls) == bool(broken)  # what was whole needs nothing
