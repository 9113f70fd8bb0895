"""The transfer benchmark's JSON as Markdown."""

from typing import Any

from transfer_rows import ALL, BASE_ALONE, LIMITS, OTHERS, PROXY, RIGHT, TUNED, WEIGHTS
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


def limits_table(targets: dict[str, Any], chosen: dict[str, float]) -> str:
    """Average accuracy within trust regions of several sizes; the one that was chosen on validation is bold."""
    rows = [["", "target", *(f"{nats:g} nats" for nats in LIMITS), "no limit"]]
    for base, target in targets.items():
        for label, cells in target["limits"].items():
            means = {nats: f"{found[AVERAGE]['mean']:.2f}" for nats, found in cells.items()}
            means[f"{chosen[label]:g}"] = f"**{means[f'{chosen[label]:g}']}**"
            rows.append([label, base, *means.values()])
    return markdown_table(rows)


def several_table(rows_of_base: dict[str, Any], targets: dict[str, Any], base: str, parameters: int) -> str:
    """One target base that is asked through experts of one task each."""
    tasks = [*TASKS, *([NEWS] if base == "L2" else [])]
    rows = [["experts", *tasks, AVERAGE, "share of gap", "added per token"]]
    known = {label: targets[base]["rows"][label] for label in (BASE_ALONE, TUNED)}
    for label, cells in {**known, **rows_of_base}.items():
        added = f"{cells['added_parameters'] / parameters:.0%}" if "added_parameters" in cells else "–"
        share = "–" if label in known else figure(cells.get(SHARE), percent=True)
        rows.append([label, *(f"{cells[task]['mean']:.2f}" for task in tasks), figure(cells[AVERAGE]), share, added])
    return markdown_table(rows)


def settings_table(chosen: dict[str, Any]) -> str:
    """What each variant of value network was trained with."""
    rows = [
        ["", "temperature of S", "λ", "steps", "tried", "cross-entropy beside M", "exact match beside M, S", "edge"]
    ]
    for variant, found in chosen.items():
        setting = found["setting"]
        best = next(one for one in found["tried"] if one["setting"] == setting)
        rows.append(
            [
                variant,
                *(f"{setting[name]:g}" for name in ("base_temperature", "norm_weight", "max_steps")),
                str(len(found["tried"])),
                f"{best['loss']:.3f}",
                f"{best['accuracy']:.2f}, {best['beside_S']['accuracy']:.2f}",
                ", ".join(found["edges"]) or "–",
            ]
        )
    return markdown_table(rows)


def tried_table(found: dict[str, Any]) -> str:
    """All settings that one variant tried, in their order."""
    rows = [["temperature of S", "λ", "steps", "cross-entropy beside M, S", "exact match beside M, S", ""]]
    for one in found["tried"]:
        numbers = [f"{one['setting'][name]:g}" for name in ("base_temperature", "norm_weight", "max_steps")]
        beside = [f"{one[name]:.3f}, {one['beside_S'][name]:.3f}" for name in ("loss", "accuracy")]
        rows.append([*numbers, *beside, "taken" if one["setting"] == found["setting"] else ""])
    return markdown_table(rows)


def expert_table(found: dict[str, Any]) -> str:
    """Proxy-tuning beside M: learning rate of the expert and weight; the taken one is bold."""
    rows = [["learning rate", *(f"weight {weight:g}" for weight in WEIGHTS)]]
    for rate in dict.fromkeys(one["setting"]["learning_rate"] for one in found["tried"]):
        row = [one for one in found["tried"] if one["setting"]["learning_rate"] == rate]
        cells = [f"{one['accuracy']:.2f}" for one in row]
        rows.append(
            [
                f"{rate:g}",
                *(
                    f"**{text}**" if one["setting"] == found["setting"] else text
                    for one, text in zip(row, cells, strict=True)
                ),
            ]
        )
    return markdown_table(rows) + f"\n\nOn the edge of what was tried: {', '.join(found['edges']) or 'nothing'}."


def rates_table(tuned: dict[str, list[dict[str, Any]]]) -> str:
    """The learning rate of each fine-tuned base on each seed, and the steps until it stopped early or was done."""
    seeds = len(next(iter(tuned.values())))
    rows = [["base", *(f"seed {seed}" for seed in range(seeds))]]
    for base, found in tuned.items():
        cells = (f"{one['learning_rate']:g}, {one['steps']} steps" for one in found)
        flags = (" (**edge**)" if one["edge"] else "" for one in found)
        rows.append([base, *(cell + flag for cell, flag in zip(cells, flags, strict=True))])
    return markdown_table(rows)


def verdict(goal: dict[str, Any]) -> str:
    """Whether a goal was met, and surely."""
    return ("met" if goal["sure"] else "met, not by the lower bound") if goal["met"] else "**missed**"


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
            [["goal", "measured", "lower bound of the difference", ""]]
            + [
                [goal["goal"], goal["measured"], ", ".join(f"{low:+.3f}" for low in goal["low"]), verdict(goal)]
                for goal in report["goals"]
            ]
        ),
        "Lower bounds: of residual minus that part of fine-tuning (98 %: task by task), or minus proxy-tuning; "
        "the 2.5th percentile, both on the same draws.",
    ]
    for base, target in report["targets"].items():
        about = report["bases"][base]
        parts += [
            f"## {base}: {about['kind']}",
            f"{about['parameters']:,} parameters, {about['tokenizer']} tokenizer of {about['vocabulary']}.",
            target_table(target, report["added_parameters"], about["parameters"], with_news=base == "L2"),
        ]
    chosen = report["chosen_on_validation"]
    weights, limits = chosen["weights"]["weights"], chosen["weights"]["limits"]
    parts += [
        "## Several experts at once",
        "One expert for each task: S fine-tuned on its demonstrations alone, minus S. All four serve every item; or "
        "the right one of each item's task; or all but that one, so that each column is a task that no expert learnt. "
        f"By validation: weight {weights[ALL]:g} of all four, {weights[RIGHT]:g} of the right one, "
        f"{weights[OTHERS]:g} of the other three; max_kl {limits[ALL]:g}, {limits[RIGHT]:g} and {limits[OTHERS]:g} at "
        "weight 1.",
    ]
    for base, rows in report["several_experts"].items():
        parts += [f"### {base}", several_table(rows, report["targets"], base, report["bases"][base]["parameters"])]
    parts += [
        "## Settings of the value networks (validation splits, beside M)",
        settings_table(chosen["value_training"]),
        "All that the residual network tried:",
        tried_table(chosen["value_training"]["residual"]),
        "## Learning rates of the fine-tuned bases, and steps that were made",
        rates_table(report["fine_tuning"]),
        f"## {PROXY.capitalize()} on the validation splits, beside M (exact match)",
        expert_table(chosen["proxy_tuning"]),
        "## Weight of the residual value network (average accuracy)",
        sweep_table(report["targets"]),
        "## Trust region at weight 1 (average accuracy; bold: chosen on validation)",
        limits_table(report["targets"], limits),
        "## Vocabulary maps on X (residual value network)",
        f"Taken, by the validation split of seed 0: {chosen['vocabulary_map']['map']}.",
        maps_table(report["maps_on_X"]),
    ]
    return "\n\n".join(parts) + "\n"
