"""What each stage of the transfer benchmark does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transfer_choice
import transfer_measure
import transfer_pretrain
import transfer_rows as rows
import transfer_training
from transfer_family import BASES, SMALL, Scale
from transfer_rows import ALL, LIMITS, OTHERS, PROXY, RESIDUAL, RIGHT, TUNED, VALUE_ALONE, WEIGHTS, Row
from transfer_stages import EVERYTHING, Stage, read_result
from transfer_training import VARIANTS
from transfer_world import TASKS, Item, World

# Fixed weights of several experts at once.
TOGETHER = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5)


def run_stage(stage: Stage, scale: Scale, folders: dict[str, Path], output: Path) -> dict[str, Any]:
    """Do one stage's work.

    Args:
        stage: Which.
        scale: Sizes and steps.
        folders: Folders of all finished stages, by name.
        output: The stage's own folder, not there yet.

    Returns:
        What `stage.json` holds.
    """
    seed, which = stage.seed, stage.which
    bases = {name: folders[f"{seed}/base/{name}"] for name in BASES}
    if stage.kind == "base":
        older = bases["L"] if which == "L2" else None
        return transfer_pretrain.make_base(seed, which, scale.bases[which], scale.head, older, output)
    if stage.kind == "search":
        seeds = range(len(stage.needs) // 2)
        every = [{name: folders[f"{seed}/base/{name}"] for name in ("S", "M")} for seed in seeds]
        if which == PROXY:
            return transfer_choice.choose_expert(scale, every, output)
        return transfer_choice.choose_setting(which, scale, every, output)
    if stage.kind == "value":
        setting = read_result(folders[f"0/search/{which}"])["setting"]
        return transfer_training.train_value(seed, which, scale, setting, bases, output)
    if stage.kind == "tuned":
        return transfer_training.tune(seed, bases[which], scale, output)
    if stage.kind == "expert":
        rates = (read_result(folders[f"0/search/{PROXY}"])["setting"]["learning_rate"],)
        tasks = TASKS if which == EVERYTHING else (which,)
        return transfer_training.tune(seed, bases[SMALL], scale, output, rates, tasks)
    if stage.kind == "maps":
        maps = transfer_measure.make_maps(bases["X"], bases[SMALL], seed, output)
        return {"maps": {label: path.name for label, path in maps.items()}}
    base = folders[stage.needs[0]]
    if stage.kind == "map":
        return choose_map(base, seed, scale, folders)
    if stage.kind == "choice":
        return choose_weights(base, seed, scale, folders)
    world = World(seed, scale.test_items)
    asked = (joint_rows if stage.kind == "joint" else answer_rows)(which, seed, folders)
    return {"answers": transfer_measure.ask(base, asked, world.test + world.news, scale.engine)}


def read_maps(folder: Path) -> dict[str, Path]:
    """Label → file of the vocabulary maps in a stage's folder."""
    return {label: folder / name for label, name in read_result(folder)["maps"].items()}


def ask_validation(base: Path, asked: list[Row], seed: int, scale: Scale) -> dict[str, float]:
    """Row → exact match on the validation split."""
    items: list[Item] = World(seed).validation
    answers = transfer_measure.ask(base, asked, items, scale.engine)
    return {label: sum(transfer_measure.hits(items, given)) / len(items) for label, given in answers.items()}


def choose_map(base: Path, seed: int, scale: Scale, folders: dict[str, Path]) -> dict[str, Any]:
    """Ask the validation split through every map; the best is taken for all seeds and variants."""
    maps = read_maps(folders[f"{seed}/maps/X"])
    shares = ask_validation(base, rows.map_rows(maps, folders[f"{seed}/value/{RESIDUAL}"]), seed, scale)
    return {"map": max(shares, key=shares.__getitem__), "validation_accuracy": shares}


def experts_of(seed: int, folders: dict[str, Path]) -> dict[str, Path]:
    """Task → folder of the expert that was trained on it alone."""
    return {task: folders[f"{seed}/expert/{task}"] for task in TASKS}


def choose_weights(base: Path, seed: int, scale: Scale, folders: dict[str, Path]) -> dict[str, Any]:
    """Trust regions, and fixed weights of experts of one task, by exact match on the validation split.

    Between equals the least limit and the weight nearest to 1 are taken.
    """
    small = folders[f"{seed}/base/{SMALL}"]
    main = rows.steered(RESIDUAL, {"model": str(folders[f"{seed}/value/{RESIDUAL}"])})
    proxy = rows.steered(PROXY, rows.pair(folders[f"{seed}/expert/{EVERYTHING}"], small))
    weights, limits = {ALL: TOGETHER, RIGHT: WEIGHTS, OTHERS: TOGETHER}, dict.fromkeys((ALL, RIGHT, OTHERS), LIMITS)
    experts = rows.expert_rows(experts_of(seed, folders), small, weights, limits)
    shares = ask_validation(base, [*rows.limit_rows(main), *rows.limit_rows(proxy), *experts], seed, scale)

    def best(values: tuple[float, ...], label_of: Callable[[float], str]) -> float:
        return max(values, key=lambda value: shares[label_of(value)])

    return {
        "weights": {
            kind: best(sorted(values, key=lambda w: abs(w - 1)), lambda w, kind=kind: f"{kind}, weight {w:g}")
            for kind, values in weights.items()
        },
        "limits": {
            kind: best(LIMITS, lambda nats, kind=kind: rows.limit_label(kind, nats))
            for kind in (RESIDUAL, PROXY, ALL, RIGHT, OTHERS)
        },
        "validation_accuracy": shares,
    }


def joint_rows(base: str, seed: int, folders: dict[str, Path]) -> list[Row]:
    """The rows of experts of one task each: weight 1, the chosen weight, auto, the chosen trust region."""
    chosen = read_result(folders["0/choice/weights"])
    weights = {kind: tuple(sorted({1.0, weight})) for kind, weight in chosen["weights"].items()}
    limits = {kind: (chosen["limits"][kind],) for kind in (ALL, RIGHT, OTHERS)}
    return rows.expert_rows(experts_of(seed, folders), folders[f"{seed}/base/{SMALL}"], weights, limits)


def answer_rows(which: str, seed: int, folders: dict[str, Path]) -> list[Row]:
    """The rows of one served base."""
    if which not in BASES:
        return [Row(TUNED if which.endswith(TUNED) else VALUE_ALONE)]
    values = {variant: folders[f"{seed}/value/{variant}"] for variant in VARIANTS}
    chosen = None
    if which == "X":
        maps = read_maps(folders[f"{seed}/maps/X"])
        chosen = maps[read_result(folders["0/map/chosen"])["map"]]
        # A cascade reads the base's expectation as value embeddings, which takes one vocabulary.
        values = {variant: folder for variant, folder in values.items() if "cascade" not in variant}
    weight = read_result(folders[f"0/search/{PROXY}"])["setting"]["weight"]
    expert, small = folders[f"{seed}/expert/{EVERYTHING}"], folders[f"{seed}/base/{SMALL}"]
    found = rows.rows_of(values, expert, small, weight, chosen)
    return found + (rows.map_rows(maps, values[RESIDUAL]) if which == "X" else [])
