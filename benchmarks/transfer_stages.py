"""The stages of the transfer benchmark: what each is made out of, other stages, settings and code."""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from transfer_family import BASES, SMALL, Scale
from transfer_rows import PROXY, RESIDUAL, TUNED, VALUE_ALONE
from transfer_training import VARIANTS
from transfer_world import TASKS

RESULT = "stage.json"
ROOT = Path(__file__).parent.parent
ENGINES = ("map", "choice", "answers", "joint")
EVERYTHING = "all"  # the expert of all tasks
# Targets that are asked through several experts: larger bases of S's vocabulary.
JOINT = ("L", "L2")

_WORLD = ("benchmarks/transfer_world.py", "ivl_vllm/demo/world.py")
_TRAINING = (*_WORLD, "benchmarks/transfer_training.py", "benchmarks/transfer_search.py", "ivl_vllm/training")
_TUNING = (*_TRAINING, "ivl_vllm/demo/finetune.py")
_PACKAGE = ("ivl_vllm/steering.py", "ivl_vllm/settings.py", "ivl_vllm/plugin.py", "ivl_vllm/serving")
_ASKING = (
    *_WORLD,
    *(f"benchmarks/transfer_{name}.py" for name in ("rows", "measure", "work")),
    *_PACKAGE,
    "ivl_vllm/training/ivl_config.py",
    "ivl_vllm/vocab",
    "kernels",
)
# Files and folders, from the root, whose code a stage's result depends on.
SOURCES: dict[str, tuple[str, ...]] = {
    "base": (*_WORLD, "benchmarks/transfer_pretrain.py", "ivl_vllm/demo/family.py"),
    "search": (*_TUNING, "benchmarks/transfer_choice.py", "benchmarks/transfer_rows.py"),
    "value": _TRAINING,
    "tuned": _TUNING,
    "expert": _TUNING,
    "maps": (*_WORLD, "benchmarks/transfer_measure.py", "ivl_vllm/vocab"),
    **dict.fromkeys(ENGINES, _ASKING),
}
_FITTING = ("patience", "demonstration_batch")
# Fields of the scale, beside its base's recipe.
SETTINGS: dict[str, tuple[str, ...]] = {
    "base": ("head",),
    "search": ("value_rate", "value_grid", "value_start", "expert_rates", "tuning_steps", *_FITTING),
    "value": ("value_rate", *_FITTING),
    "tuned": ("tuning_steps", "tuning_rates", *_FITTING),
    "expert": ("tuning_steps", *_FITTING),
    "maps": (),
    "map": ("engine",),
    "choice": ("engine",),
    "answers": ("engine", "test_items"),
    "joint": ("engine", "test_items"),
}


@dataclass(frozen=True)
class Stage:
    """One piece of work.

    Attributes:
        name: Such as `0/value/residual`: seed, kind, which.
        needs: Names of the stages whose folders it reads.
    """

    name: str
    needs: tuple[str, ...] = ()

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
    """All stages of a run, each after those that it needs; the seeds that choose for all come first."""
    stages: list[Stage] = []

    def add(name: str, *needs: str) -> str:
        stages.append(Stage(name, needs))
        return name

    first = [add(f"{seed}/base/{name}") for seed in range(min(seeds, scale.search_seeds)) for name in ("S", "M")]
    for which in (*VARIANTS, PROXY):
        add(f"0/search/{which}", *first)
    for seed in range(seeds):
        for base in BASES:
            if f"{seed}/base/{base}" not in first:
                add(f"{seed}/base/{base}", *([f"{seed}/base/L"] if base == "L2" else []))
        bases = [f"{seed}/base/{name}" for name in ("S", "M")]
        for variant in VARIANTS:
            add(f"{seed}/value/{variant}", *bases, f"0/search/{variant}")
        for which in (EVERYTHING, *TASKS):
            add(f"{seed}/expert/{which}", bases[0], f"0/search/{PROXY}")
        for base in BASES:
            add(f"{seed}/tuned/{base}", f"{seed}/base/{base}")
    for seed in range(seeds):
        values = [f"{seed}/value/{variant}" for variant in VARIANTS]
        small = f"{seed}/base/{SMALL}"
        expert, *experts = [f"{seed}/expert/{which}" for which in (EVERYTHING, *TASKS)]
        if seed == 0:
            add("0/choice/weights", "0/base/M", f"0/value/{RESIDUAL}", small, expert, *experts)
        maps = add(f"{seed}/maps/X", f"{seed}/base/X", small)
        if seed == 0:
            add("0/map/chosen", "0/base/X", f"0/value/{RESIDUAL}", maps)
        for base in BASES:
            mapped = (maps, "0/map/chosen") if base == "X" else ()
            add(f"{seed}/answers/{base}", f"{seed}/base/{base}", *values, small, expert, f"0/search/{PROXY}", *mapped)
            add(f"{seed}/answers/{base} {TUNED}", f"{seed}/tuned/{base}")
        for base in JOINT:
            add(f"{seed}/joint/{base}", f"{seed}/base/{base}", small, *experts, "0/choice/weights")
        add(f"{seed}/answers/{VALUE_ALONE}", f"{seed}/value/{RESIDUAL}")
        add(f"{seed}/answers/{VALUE_ALONE} (proxy)", expert)
    return stages


def fingerprint(sources: tuple[str, ...], root: Path) -> str:
    """Hash of the code in files and folders, names and contents."""
    code = hashlib.sha256()
    for source in sorted(set(sources)):
        path = root / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            code.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return code.hexdigest()


def folder_names(stages: list[Stage], scale: Scale, scale_name: str, root: Path = ROOT) -> dict[str, str]:
    """Stage → its folder's name; the hash covers all that went into it, versions of the libraries included."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "trl", "tokenizers", "vllm")}
    code = {kind: fingerprint(SOURCES[kind], root) for kind in {stage.kind for stage in stages}}
    names: dict[str, str] = {}
    for stage in stages:
        common = {name: value for name, value in asdict(scale).items() if name in SETTINGS[stage.kind]}
        if stage.kind == "base":
            common["recipe"] = asdict(scale.bases[stage.which])
        parts = [stage.name, [names[need] for need in stage.needs], common, code[stage.kind], versions]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]
        readable = "".join(c if c.isalnum() else "-" for c in stage.name)
        names[stage.name] = f"{scale_name}-{readable}-{key}"
    return names


def read_result(folder: Path) -> dict[str, Any]:
    """What a finished stage left."""
    return json.loads((folder / RESULT).read_text())
