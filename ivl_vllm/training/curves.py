"""The curves of a run: `training_log.json` with every logged value, `curves.png` with loss, ce and norm."""

import json
import math
from pathlib import Path
from typing import Any

from ivl_vllm.training.files import read_json

LOG_NAME = "training_log.json"
PNG_NAME = "curves.png"
SHOWN = ("loss", "ce", "norm")
_CURVES = (*SHOWN, *(f"eval_{name}" for name in SHOWN))

Curve = tuple[list[int], list[float]]


def read_curves(history: list[dict[str, Any]]) -> dict[str, Curve]:
    """Sort the trainer's log into curves.

    Args:
        history: The trainer's `state.log_history`.

    Returns:
        `loss`, `ce` and `norm`, and the same with the prefix `eval_` (held out) → steps and values; those that were
        never logged are left out.
    """
    curves: dict[str, Curve] = {}
    for name in _CURVES:
        points = [(entry["step"], entry[name]) for entry in history if name in entry and "step" in entry]
        if points:
            steps, values = zip(*points, strict=True)
            curves[name] = list(steps), list(values)
    return curves


def write_log(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write `training_log.json`: the log's entries as they are, with null for what is not finite."""
    entries = [
        {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in entry.items()}
        for entry in history
    ]
    (folder / LOG_NAME).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def draw_curves(folder: Path, history: list[dict[str, Any]]) -> bool:
    """Draw `curves.png`, one panel each for loss, ce and norm, train and held out.

    Returns:
        Whether it was drawn: not without matplotlib, which one printed line then tells, nor where nothing was logged.
    """
    curves = read_curves(history)
    if not curves:
        return False
    try:
        # Without pyplot: no display is looked for and no global state is touched.
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{PNG_NAME} was not drawn: it needs matplotlib, pip install 'ivl-vllm[train]'", flush=True)
        return False
    figure = Figure(figsize=(10.5, 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
        for key, label in ((name, "train"), (f"eval_{name}", "held out")):
            if key in curves:
                axes.plot(*curves[key], label=label, marker="o" if len(curves[key][0]) < 3 else "")
        axes.set(title={"loss": "loss = ce + λ·norm"}.get(name, name), xlabel="step")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(folder / PNG_NAME, dpi=120)
    return True


def last_values(history: list[dict[str, Any]]) -> dict[str, str]:
    """Readable last values: `train` and `held out` → e.g. `loss 0.91  ce 0.9  norm 0.01 at step 80`."""
    curves = read_curves(history)
    result = {}
    for label, prefix in (("train", ""), ("held out", "eval_")):
        parts = [f"{name} {curves[prefix + name][1][-1]:.4g}" for name in SHOWN if prefix + name in curves]
        if parts:
            last = max(curves[prefix + name][0][-1] for name in SHOWN if prefix + name in curves)
            result[label] = f"{', '.join(parts)} at step {last}"
    return result


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The entries of a folder's `training_log.json`; none where there is no such file.

    Raises:
        ValueError: The file is no list of log entries.
    """
    path = folder / LOG_NAME
    content = read_json(path, list) or []
    if not all(isinstance(entry, dict) for entry in content):
        raise ValueError(f"{path} holds no list of log entries")
    entries = [{name: value for name, value in entry.items() if value is not None} for entry in content]
    for number, entry in enumerate(entries, 1):
        for name in ("step", *_CURVES):
            if not isinstance(entry.get(name, 0), (int, float)):
                raise ValueError(f"{path}: {name} of entry {number} is {entry[name]!r}; expected a number")
    return entries
