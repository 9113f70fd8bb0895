"""Draws the transfer benchmark's JSON: accuracy by target and method, the sweep of the weight, several experts."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # needs no display
import matplotlib.pyplot as plt
from transfer_rows import BASE_ALONE, PROXY_BEST, RESIDUAL, TUNED, VALUE_ALONE
from transfer_table import AVERAGE

METHODS = (BASE_ALONE, VALUE_ALONE, PROXY_BEST, "cascade", "cascade+text", "no norm", RESIDUAL, TUNED)
SHORT = {
    "S": "trained beside it",
    "M": "larger",
    "L": "larger still",
    "L2": "newer release of L",
    "X": "other tokenizer",
}
COLOURS = ("#bbbbbb", "#8c8c8c", "#d95f02", "#a6cee3", "#6a9fcb", "#b2abd2", "#1b7837", "#222222")


def errors(cells: list[dict[str, Any]]) -> list[list[float]]:
    """Distances of interval ends from the means, as matplotlib wants them."""
    return [
        [max(0.0, cell["mean"] - cell["low"]) for cell in cells],
        [max(0.0, cell["high"] - cell["mean"]) for cell in cells],
    ]


def draw_several(targets: dict[str, Any], axes: Any) -> None:
    """Experts of one task each, one bar for each way of asking them and each base."""
    width = 0.85 / len(targets)
    labels = list(next(iter(targets.values())))
    for index, (base, rows) in enumerate(targets.items()):
        cells = [rows[label][AVERAGE] for label in labels]
        places = [number + (index - (len(targets) - 1) / 2) * width for number in range(len(labels))]
        axes.barh(places, [cell["mean"] for cell in cells], width, xerr=errors(cells), label=base, error_kw={"lw": 0.8})
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.05)
    axes.set_xlabel("experts of one task each: average of tasks")
    axes.legend(fontsize=8, title="target", loc="lower right")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the plot."""
    figure, (left, right, several) = plt.subplots(
        1, 3, figsize=(17, 4.8), width_ratios=(2.4, 1, 1), layout="constrained"
    )
    bases = list(report["targets"])
    width = 0.85 / len(METHODS)
    for index, (method, colour) in enumerate(zip(METHODS, COLOURS, strict=True)):
        places, cells = [], []
        for number, base in enumerate(bases):
            if method in report["targets"][base]["rows"]:
                places.append(number + (index - (len(METHODS) - 1) / 2) * width)
                cells.append(report["targets"][base]["rows"][method][AVERAGE])
        means = [cell["mean"] for cell in cells]
        left.bar(places, means, width, yerr=errors(cells), label=method, color=colour, error_kw={"lw": 0.8})
    left.set_xticks(range(len(bases)), [f"{base}\n{SHORT[base]}" for base in bases], fontsize=8)
    left.set_ylabel("exact match, average of tasks")
    left.set_ylim(0, 1.05)
    left.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.17), frameon=False)
    for base in bases:
        sweep = report["targets"][base]["sweep"]
        cells = [cells[AVERAGE] for cells in sweep.values()]
        weights = [float(weight) for weight in sweep]
        right.errorbar(
            weights, [cell["mean"] for cell in cells], errors(cells), label=base, marker="o", ms=3, capsize=2
        )
    right.set_xlabel("weight of the residual value network")
    right.set_ylim(0, 1.05)
    right.legend(fontsize=8, title="target", loc="lower right")
    draw_several(report["several_experts"], several)
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
