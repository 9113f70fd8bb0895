"""The transfer benchmark's report as plain data, out of the finished stages."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import transfer_table as table
from tqdm import tqdm
from transfer_family import BASES, SMALL, TOKENIZERS, Scale
from transfer_measure import BASE_ALONE, FUSION, PROXY, RESIDUAL, TRUST, TUNED, VALUE_ALONE
from transfer_stages import Stage, read_result
from transfer_training import VARIANTS
from transfer_world import NEWS, TASKS, World

ROWS = (BASE_ALONE, VALUE_ALONE, *VARIANTS, *TRUST, table.EXPERT_ALONE, PROXY, FUSION, TUNED)
KINDS = {
    "S": "the base that the value networks were trained beside",
    "M": "larger, same family",
    "L": "larger still, same family",
    "L2": "L trained on with newer text",
    "X": "another kind of tokenizer",
}
NOTES = (
    "Exact match of the whole answer, ended by the model itself; greedy, all of it through vLLM. "
    f"Intervals: {table.INTERVAL}.",
    "Value networks are trained beside S alone (`two bases`: S and M), whose logits are divided by a temperature. It "
    "and λ (by how well base plus value fits M) and the vocabulary map of X were chosen on the validation split of "
    "seed 0, never on test items, for all variants, targets and seeds. Each fine-tuned base has a sweep of learning "
    "rates of its own on each seed. Both keep the best checkpoint by validation loss.",
    "Share: of the gap between base alone and fine-tuned base. Training, relative to fine-tuning the target: FLOPs "
    "(6 · parameters · tokens, and 2 · parameters · tokens for a frozen base) and seconds (on a machine that ran other "
    "work too), of the chosen run, without sweeps and the pre-training of S on either side; proxy-tuning's is that of "
    "fine-tuning S. Added per token: multiplications that serving the value adds, relative to the base alone.",
    f"Average: over {', '.join(TASKS)}. `{NEWS}` are facts that only L2's newer text tells; no demonstration is about "
    "them.",
    "These are toy models of a toy world.",
)


def hardware() -> dict[str, Any]:
    """The machine and the versions that matter."""
    import torch

    names = ("torch", "transformers", "trl", "tokenizers")
    found = {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}
    found["vllm"] = metadata.version("vllm")
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**found, "cpu": processor, "cores": os.cpu_count(), "gpu": gpu}


def build(stages: list[Stage], folders: dict[str, Path], scale: Scale, seeds: int) -> dict[str, Any]:
    """Everything that the report says, from the folders of the finished stages."""
    results = {stage.name: read_result(folders[stage.name]) for stage in stages}

    def of_seed(seed: int) -> dict[str, Any]:
        return {name.split("/", 1)[1]: result for name, result in results.items() if name.startswith(f"{seed}/")}

    by_seed = [of_seed(seed) for seed in range(seeds)]
    worlds = [World(seed, scale.test_items) for seed in range(seeds)]
    answers = [
        {name.removeprefix("answers/"): r["answers"] for name, r in seed.items() if name.startswith("answers/")}
        for seed in by_seed
    ]
    targets = {
        base: table.figures(table.collect(worlds, answers, base), scale.resamples)
        for base in tqdm(BASES, desc="intervals", unit="base")
    }
    small = by_seed[0][f"base/{SMALL}"]["parameters"]
    extra = {**{name: by_seed[0][f"value/{name}"]["parameters"] for name in VARIANTS}, PROXY: 2 * small}
    extra |= {**dict.fromkeys(TRUST, extra[RESIDUAL]), FUSION: extra[PROXY]}
    world = worlds[0]
    return {
        "seeds": seeds,
        "notes": list(NOTES),
        "environment": hardware(),
        "items_of_seed_0": {
            **{task: sum(item.task == task for item in world.test) for task in TASKS},
            NEWS: len(world.news),
            "demonstrations": len(world.train),
            "validation": len(world.validation),
        },
        "bases": {
            base: {
                "parameters": by_seed[0][f"base/{base}"]["parameters"],
                "tokenizer": TOKENIZERS[base],
                "vocabulary": by_seed[0][f"base/{base}"]["vocabulary"],
                "kind": KINDS[base],
            }
            for base in BASES
        },
        "added_parameters": extra,
        "chosen_on_validation_of_seed_0": {
            "value_training": results["0/setting/chosen"],
            "vocabulary_map": results["0/map/chosen"],
        },
        "cpu_seconds": sum(result["cpu_seconds"] for result in results.values()),
        "stage_seconds": {name: round(result["ended"] - result["began"], 1) for name, result in results.items()},
        "training": {
            name: {
                key: r[key] for key in ("validation_loss", "tokens", "flops", "seconds", "learning_rate") if key in r
            }
            for name, r in results.items()
            if "/value/" in name or "/tuned/" in name
        },
        "targets": {
            base: {
                "rows": {label: found[label] for label in ROWS if label in found},
                "sweep": table.sweep(found),
                "costs": table.costs(by_seed, base),
            }
            for base, found in targets.items()
        },
        "maps_on_X": {label: found for label, found in targets["X"].items() if label.count(", ") == 2},
        "goals": table.goals(targets, extra),
    }
