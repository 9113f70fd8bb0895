"""Running code of benchmarks/ in a process of its own: the folder must not come into this process's sys.path.

It holds a `kernels.py`, and transformers looks for a package of that name.
"""

import importlib.util
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

# The transfer benchmark's modules in the order in which they import each other.
TRANSFER_MODULES = (
    *("world", "family", "rows", "search", "pretrain", "training", "choice", "measure", "stages", "work", "run"),
    *("bootstrap", "table", "report", "markdown"),
)
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run_python(code: str, *arguments: object) -> str:
    """Runs code that sees benchmarks/, and gives what it printed."""
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n" + code
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def load_module(name: str):
    """A module of benchmarks/ that imports none of its neighbours, loaded from its file."""
    specification = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@contextmanager
def transfer_modules():
    """The transfer benchmark's modules by name, as long as the context lasts."""
    found = {}
    for name in TRANSFER_MODULES:
        specification = importlib.util.spec_from_file_location(f"transfer_{name}", BENCHMARKS / f"transfer_{name}.py")
        found[name] = importlib.util.module_from_spec(specification)
        sys.modules[f"transfer_{name}"] = found[name]
        specification.loader.exec_module(found[name])
    yield type("Modules", (), found)
    for name in TRANSFER_MODULES:
        del sys.modules[f"transfer_{name}"]
