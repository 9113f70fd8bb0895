"""The ways of answering that are compared: which value networks an engine holds, and what each request asks for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transfer_world import NEWS, TASKS

BASE_ALONE, VALUE_ALONE, TUNED = "base alone", "value alone", "fine-tuned"
RESIDUAL, PROXY = "residual", "proxy-tuning"
PROXY_BEST, FUSION = f"{PROXY}, best weight", f"{PROXY}, auto"
EXPERT_ALONE = f"{PROXY}'s expert alone"
# Experts of one task each: all at once, the one of the item's task, all but that one.
ALL, RIGHT, OTHERS = "all four", "right one", "other three"

WEIGHTS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
LIMITS = (1.0, 2.0, 4.0, 8.0, 16.0)

Entry = dict[str, str]


@dataclass(frozen=True)
class Row:
    """One way of answering: a row of the table.

    Attributes:
        label: What the table calls it.
        values: Name → what the engine is told of that value: `model`, perhaps `minus` and `vocab_map`. Rows may share.
        ivl: What each request sends as `extra_args["ivl"]`, anything that the engine takes; None sends nothing.
        by_task: The same where it differs between tasks: task → request.
    """

    label: str
    values: Mapping[str, Entry] = field(default_factory=dict)
    ivl: Any = None
    by_task: Mapping[str, Any] | None = None

    def request(self, task: str) -> dict[str, Any] | None:
        """`extra_args` of a request about a task."""
        asked = self.ivl if self.by_task is None else self.by_task[task]
        return None if asked is None else {"ivl": asked}


def engine_name(label: str) -> str:
    """A label as the name of a value in an engine's settings."""
    return "".join(c if c.isalnum() else "_" for c in label)


def steered(label: str, entry: Entry) -> Row:
    """A row whose requests are steered by a value of the row's own with weight 1."""
    name = engine_name(label)
    return Row(label, {name: entry}, {name: 1.0})


def limited(weights: Mapping[str, float], nats: float) -> str:
    """The request for fixed weights within a trust region."""
    return f"{','.join(f'{name}={weight}' for name, weight in weights.items())};max_kl={nats}"


def sweep_label(weight: float) -> str:
    """What the row of one weight of the sweep is called."""
    return f"weight {weight:g}"


def limit_label(label: str, nats: float | None = None) -> str:
    """What the row of a trust region is called; without `nats`, the one that was chosen on validation."""
    return f"{label}, max_kl" if nats is None else f"{label}, max_kl {nats:g}"


def pair(expert: Path, small: Path, mapped: Entry | None = None) -> Entry:
    """Expert minus small base."""
    return {"model": str(expert), "minus": str(small), **(mapped or {})}


def limit_rows(row: Row) -> list[Row]:
    """A row of weight 1, within each of the trust regions."""
    weights = {name: 1.0 for name in row.values}
    return [Row(limit_label(row.label, nats), row.values, limited(weights, nats)) for nats in LIMITS]


def rows_of(
    values: Mapping[str, Path], expert: Path, small: Path, best_weight: float, vocab_map: Path | None = None
) -> list[Row]:
    """The rows that every target base has.

    Args:
        values: Variant → folder of its value network.
        expert: The small base, fully fine-tuned: the expert of proxy-tuning.
        small: The small base: its anti-expert.
        best_weight: Of proxy-tuning, by the validation split.
        vocab_map: Where the target has another vocabulary.
    """
    mapped = {} if vocab_map is None else {"vocab_map": str(vocab_map)}
    rows = {variant: steered(variant, {"model": str(folder), **mapped}) for variant, folder in values.items()}
    main, proxy = rows[RESIDUAL], steered(PROXY, pair(expert, small, mapped))
    (name,), (proxy_name,) = main.values, proxy.values
    found = [Row(BASE_ALONE), *rows.values(), proxy, Row(PROXY_BEST, proxy.values, {proxy_name: best_weight})]
    if vocab_map is None:
        # Weights that the engine finds at every token: Dynamic Logits Fusion, and a trust region around the base.
        found += [Row(FUSION, proxy.values, f"auto:{proxy_name}"), *limit_rows(main), *limit_rows(proxy)]
    return found + [Row(sweep_label(w), main.values, {name: w}) for w in WEIGHTS]


def expert_rows(
    experts: Mapping[str, Path],
    small: Path,
    weights: Mapping[str, tuple[float, ...]],
    limits: Mapping[str, tuple[float, ...]],
) -> list[Row]:
    """The rows of experts of one task each: all at once, the right one for each item, and all but that one.

    Args:
        experts: Task → folder of the small base, fine-tuned on that task alone.
        small: The small base.
        weights: `ALL`, `RIGHT` and `OTHERS` → fixed weights to ask with.
        limits: The same → nats of their trust region around the base, at weight 1; those that are wanted.
    """
    values = {task: pair(folder, small) for task, folder in experts.items()}
    rows = []
    for label in (ALL, RIGHT, OTHERS):
        # News are facts: the expert of facts is the right one.
        right = {task: "facts" if task == NEWS else task for task in (*TASKS, NEWS)}
        used = {
            task: [name for name in values if label == ALL or (name == known) == (label == RIGHT)]
            for task, known in right.items()
        }
        asked: dict[str, dict[str, Any]] = {
            f"{label}, weight {weight:g}": {task: dict.fromkeys(names, weight) for task, names in used.items()}
            for weight in weights[label]
        }
        asked[f"{label}, auto"] = {task: f"auto:{','.join(names)}" for task, names in used.items()}
        for nats in limits[label]:
            asked[limit_label(label, nats)] = {
                task: limited(dict.fromkeys(names, 1.0), nats) for task, names in used.items()
            }
        rows += [Row(name, values, by_task=by_task) for name, by_task in asked.items()]
    return rows


def map_rows(maps: Mapping[str, Path], value: Path) -> list[Row]:
    """One row for each vocabulary map, all with the same value network."""
    return [steered(label, {"model": str(value), "vocab_map": str(path)}) for label, path in maps.items()]
