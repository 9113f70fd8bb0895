"""The stages of the transfer benchmark: what each makes, and out of what."""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transfer_family
import transfer_measure
import transfer_training
import transfer_world
from transfer_family import BASES, SMALL, Scale
from transfer_measure import RESIDUAL, TUNED, VALUE_ALONE, Row
from transfer_training import VARIANTS

import ivl_vllm.demo

RESULT = "stage.json"
# Read, not imported: these modules import torch and trl, which the process that only starts others does without.
_DEMO = Path(ivl_vllm.demo.__file__).parent
# The code that a stage's result depends on, beside its settings.
SOURCES = {
    "base": (transfer_world, transfer_family.make_base, _DEMO / "family.py"),
    "value": (transfer_training.train_value, transfer_training.write_data),
    "setting": (transfer_training.fit,),
    "tuned": (transfer_training.tune, _DEMO / "finetune.py"),
    "maps": (transfer_measure.make_maps,),
    "map": (transfer_measure.map_rows, transfer_measure.ask),
    "answers": (transfer_measure.rows_of, transfer_measure.map_rows, transfer_measure.ask),
}
ENGINES = ("map", "answers")


@dataclass(frozen=True)
class Stage:
    """One piece of work.

    Attributes:
        name: Such as `0/value/residual`: seed, kind, which.
        needs: Names of the stages whose folders it reads.
        settings: All else that its result depends on, plain data.
    """

    name: str
    needs: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The seed in its name."""
        return int(self.name.split("/")[0])

    @property
    def kind(self) -> str:
        """One of `SOURCES`."""
        return self.name.split("/")[1]

    @property
    def which(self) -> str:
        """The rest of its name."""
        return self.name.split("/", 2)[-1]


def plan(seeds: int, scale: Scale) -> list[Stage]:
    """All stages of a run, each after those that it needs; seed 0, which chooses for all, comes first."""
    stages: list[Stage] = []

    def add(name: str, *needs: str, **settings: Any) -> str:
        stages.append(Stage(name, needs, settings))
        return name

    variants = list(VARIANTS)
    for seed in range(seeds):
        for base in BASES:
            add(f"{seed}/base/{base}", *([f"{seed}/base/L"] if base == "L2" else []))
            if seed == 0 and base == "M":
                tried = [
                    add(
                        f"0/value/norm {norm:g} temperature {temperature:g}",
                        "0/base/S",
                        "0/base/M",
                        setting={"norm_weight": norm, "base_temperature": temperature},
                        flags=VARIANTS[RESIDUAL],
                    )
                    for norm, temperature in itertools.product(scale.norm_weights, scale.base_temperatures)
                ]
                add("0/setting/chosen", *tried, "0/base/M")
        bases = [f"{seed}/base/{name}" for name in ("S", "M")]
        for variant, flags in VARIANTS.items():
            add(f"{seed}/value/{variant}", *bases, "0/setting/chosen", flags=flags)
        for base in BASES:
            add(f"{seed}/tuned/{base}", f"{seed}/base/{base}")
    for seed in range(seeds):
        values = [f"{seed}/value/{variant}" for variant in variants]
        small = (f"{seed}/base/{SMALL}", f"{seed}/tuned/{SMALL}")
        maps = add(f"{seed}/maps/X", f"{seed}/base/X", small[0])
        if seed == 0:
            add("0/map/chosen", "0/base/X", "0/value/residual", maps)
        for base in BASES:
            mapped = (maps, "0/map/chosen") if base == "X" else ()
            add(f"{seed}/answers/{base}", f"{seed}/base/{base}", *values, *small, *mapped)
            add(f"{seed}/answers/{base} {TUNED}", f"{seed}/tuned/{base}")
        add(f"{seed}/answers/{VALUE_ALONE}", f"{seed}/value/{RESIDUAL}")
        add(f"{seed}/answers/{VALUE_ALONE} (proxy)", small[1])
    return stages


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
    if stage.kind == "base":
        older = folders[f"{seed}/base/L"] if which == "L2" else None
        return transfer_family.make_base(seed, which, scale.bases[which], scale.head, older, output)
    if stage.kind == "value":
        bases = {name: folders[f"{seed}/base/{name}"] for name in ("S", "M")}
        setting = stage.settings.get("setting") or read_result(folders["0/setting/chosen"])["setting"]
        return transfer_training.train_value(seed, stage.settings["flags"], scale, setting, bases, output)
    if stage.kind == "setting":
        return choose_setting(stage, folders)
    if stage.kind == "tuned":
        return transfer_training.tune(seed, folders[f"{seed}/base/{which}"], scale, output)
    if stage.kind == "maps":
        maps = transfer_measure.make_maps(*(folders[name] for name in stage.needs), seed, output)
        return {"maps": {label: path.name for label, path in maps.items()}}
    if stage.kind == "map":
        return choose_map(stage, scale, folders)
    return answer(stage, scale, folders)


def choose_setting(stage: Stage, folders: dict[str, Path]) -> dict[str, Any]:
    """λ and the temperature of S, by how a value network does on the validation split beside M.

    Beside S itself the least norm always fits best; what is wanted is a value network that fits a base it never saw.
    """
    base = folders[stage.needs[-1]]
    tried = []
    for name in stage.needs[:-1]:
        accuracy, loss = transfer_training.fit(stage.seed, folders[name], base)
        with_small, _ = transfer_training.fit(stage.seed, folders[name], folders[f"{stage.seed}/base/{SMALL}"])
        setting = read_result(folders[name])["setting"]
        tried.append({"setting": setting, "accuracy": accuracy, "loss": loss, "accuracy_beside_S": with_small})
    best = max(tried, key=lambda one: (one["accuracy"], -one["loss"]))
    return {"setting": best["setting"], "tried": tried}


def read_maps(folder: Path) -> dict[str, Path]:
    """Label → file of the vocabulary maps in a stage's folder."""
    return {label: folder / name for label, name in read_result(folder)["maps"].items()}


def choose_map(stage: Stage, scale: Scale, folders: dict[str, Path]) -> dict[str, Any]:
    """Ask the validation split of seed 0 through every map; the best is taken for all seeds and variants."""
    base, value, maps = (folders[name] for name in stage.needs)
    items = transfer_world.World(0).validation
    rows = transfer_measure.map_rows(read_maps(maps), value)
    answers = transfer_measure.ask(base, rows, items, scale.engine)
    shares = {label: sum(transfer_measure.hits(items, given)) / len(items) for label, given in answers.items()}
    return {"map": max(shares, key=shares.__getitem__), "validation_accuracy": shares}


def answer(stage: Stage, scale: Scale, folders: dict[str, Path]) -> dict[str, Any]:
    """Ask the test items of one served base through all of its rows."""
    seed, which = stage.seed, stage.which
    world = transfer_world.World(seed, scale.test_items)
    if which not in BASES:
        rows = [Row(TUNED if which.endswith(TUNED) else VALUE_ALONE)]
    else:
        values = {variant: folders[f"{seed}/value/{variant}"] for variant in VARIANTS}
        chosen = None
        if which == "X":
            maps = read_maps(folders[f"{seed}/maps/X"])
            chosen = maps[read_result(folders["0/map/chosen"])["map"]]
            # A cascade reads the base's expectation as value embeddings, which takes one vocabulary.
            values = {variant: folder for variant, folder in values.items() if "cascade" not in variant}
        rows = transfer_measure.rows_of(
            values, folders[f"{seed}/tuned/{SMALL}"], folders[f"{seed}/base/{SMALL}"], chosen
        )
        if which == "X":
            rows += transfer_measure.map_rows(maps, values[RESIDUAL])
    items = world.test + world.news
    return {
        "rows": [row.label for row in rows],
        "answers": transfer_measure.ask(folders[stage.needs[0]], rows, items, scale.engine),
    }


def read_result(folder: Path) -> dict[str, Any]:
    """What a finished stage left."""
    return json.loads((folder / RESULT).read_text())
