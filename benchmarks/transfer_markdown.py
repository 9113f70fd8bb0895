"""The transfer benchmark's JSON as Markdown."""

from typing import Any

from transfer_measure import BASE_ALONE, TUNED
from transfer_table import AVERAGE, SHARE
from transfer_world import NEWS, TASKS


def markdown_table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is the heading."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def figure(cell: dict[str, Any] | None, percent: bool = False) -> str:
    """A mean with its interval."""
    if cell is None:
        return "–"
    if percent:
        return f"{cell['mean']:.0%} [{cell['low']:.0%}, {cell['high']:.0%}]"
    return f"{cell['mean']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"


def target_table(target: dict[str, Any], added: dict[str, int], base_parameters: int, with_news: bool) -> str:
    """One target base: a row for each way of answering."""
    tasks = [*TASKS, *([NEWS] if with_news else [])]
    heading = ["", *tasks, AVERAGE, "share of gap", "training FLOPs", "training s", "added per token"]
    rows = [heading]
    for label, cells in target["rows"].items():
        cost = target["costs"].get(label)
        rows.append(
            [
                label,
                *(f"{cells[task]['mean']:.2f}" for task in tasks),
                figure(cells[AVERAGE]),
                "–" if label in (BASE_ALONE, TUNED) else figure(cells.get(SHARE), percent=True),
                f"{cost['flops_share']:.3f}" if cost else "–",
                f"{cost['seconds_share']:.2f}" if cost else "–",
                f"{added[label] / base_parameters:.0%}" if label in added else "–",
            ]
        )
    return markdown_table(rows)


def maps_table(maps: dict[str, Any]) -> str:
    """The vocabulary maps of X; methods that gave the same figures share a row."""
    methods: dict[tuple[str, ...], list[str]] = {}
    figures = {}
    for label, cells in maps.items():
        method, settings = label.split(", ", 1)
        shown = (settings, *(f"{cells[task]['mean']:.2f}" for task in TASKS), figure(cells[AVERAGE]))
        methods.setdefault(shown, []).append(method)
        figures[shown] = cells[AVERAGE]["mean"]
    rows = [["input, unmapped", "method", *TASKS, AVERAGE]]
    for shown in sorted(methods, key=lambda shown: -figures[shown]):
        rows.append([shown[0], ", ".join(methods[shown]), *shown[1:]])
    return markdown_table(rows)


def sweep_table(targets: dict[str, Any]) -> str:
    """Average accuracy of the main value network over weights."""
    weights = list(next(iter(targets.values()))["sweep"])
    rows = [["weight", *weights]]
    rows += [
        [base, *(f"{target['sweep'][weight][AVERAGE]['mean']:.2f}" for weight in weights)]
        for base, target in targets.items()
    ]
    return markdown_table(rows)


def settings_table(chosen: dict[str, Any]) -> str:
    """The settings of value training that were tried, and the one that was taken."""
    rows = [["λ", "temperature of S", "beside M", "beside S", "cross-entropy beside M", ""]]
    for one in chosen["tried"]:
        norm, temperature = one["setting"]["norm_weight"], one["setting"]["base_temperature"]
        taken = "taken" if one["setting"] == chosen["setting"] else ""
        shares = (f"{one[name]:.2f}" for name in ("accuracy", "accuracy_beside_S", "loss"))
        rows.append([f"{norm:g}", f"{temperature:g}", *shares, taken])
    return markdown_table(rows)


def render(report: dict[str, Any]) -> str:
    """The whole report."""
    environment = report["environment"]
    parts = [
        "# Transfer of value networks",
        "Made by `benchmarks/transfer.py` from `transfer.json`; do not edit. "
        f"`{report['command']}`: {report['seeds']} seeds, {report['wall_seconds'] / 60:.0f} minutes "
        f"({report['cpu_seconds'] / 60:.0f} core minutes) on "
        f"{environment['cores']} cores ({environment['gpu'] or environment['cpu']}), vLLM {environment['vllm']}, "
        f"torch {environment['torch']}.",
        "\n".join(f"* {note}" for note in report["notes"]),
        "## Goals",
        markdown_table(
            [["goal", "measured", ""]]
            + [[goal["goal"], goal["measured"], "met" if goal["met"] else "**missed**"] for goal in report["goals"]]
        ),
    ]
    for base, target in report["targets"].items():
        about = report["bases"][base]
        parts += [
            f"## {base}: {about['kind']}",
            f"{about['parameters']:,} parameters, {about['tokenizer']} tokenizer of {about['vocabulary']}.",
            target_table(target, report["added_parameters"], about["parameters"], with_news=base == "L2"),
        ]
    chosen = report["chosen_on_validation_of_seed_0"]
    parts += [
        "## λ and temperature in training the value network (exact match on the validation split of seed 0)",
        settings_table(chosen["value_training"]),
        "## Weight of the residual value network (average accuracy)",
        sweep_table(report["targets"]),
        "## Vocabulary maps on X (residual value network)",
        f"Taken, by the validation split of seed 0: {chosen['vocabulary_map']['map']}.",
        maps_table(report["maps_on_X"]),
    ]
    return "\n\n".join(parts) + "\n"
