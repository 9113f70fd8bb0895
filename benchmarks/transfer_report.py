"""The transfer benchmark's report as plain data, out of the finished stages."""

import itertools
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import transfer_table as table
from tqdm import tqdm
from transfer_bootstrap import INTERVAL, resample
from transfer_family import BASES, SMALL, TOKENIZERS, Scale
from transfer_rows import (
    ALL,
    BASE_ALONE,
    EXPERT_ALONE,
    FUSION,
    OTHERS,
    PROXY,
    PROXY_BEST,
    RESIDUAL,
    RIGHT,
    TUNED,
    VALUE_ALONE,
    limit_label,
)
from transfer_search import edges
from transfer_stages import JOINT, Stage, read_result
from transfer_training import VARIANTS
from transfer_world import NEWS, TASKS, World, told_verbatim

KINDS = {
    "S": "the base that the value networks were trained beside",
    "M": "larger, same family",
    "L": "larger still, same family",
    "L2": "L trained on with newer text",
    "X": "another kind of tokenizer",
}
NOTES = (
    "Exact match of the whole answer, ended by the model itself; greedy, all of it through vLLM. "
    f"Intervals: {INTERVAL}.",
    "Value networks are trained beside S alone (`two bases`: S and M), whose logits are divided by a temperature. "
    "Temperature, λ and steps were chosen for each variant by the cross-entropy of M plus value network on the "
    "validation splits of the first two seeds, and hold for all targets and seeds (`two bases` knows M "
    "from training, the others do not). All value networks have one learning rate. Each fine-tuned base has a "
    "search of learning rates of its own on each seed, by its own validation loss; so value networks have the wider "
    "search (three settings), beside M, which is a target too. Within a run both keep the best "
    "checkpoint by validation loss (a value network's has the norm term in it) and stop early by it, with the same "
    "patience.",
    "Proxy-tuning: the expert is S fine-tuned, at the learning rate that, with the weight of `best weight`, gave the "
    "best exact match beside M on the same splits; the same expert is shown at weight 1. The vocabulary map of X, "
    "the trust regions (`max_kl`) and the weights of several experts were chosen by exact match on the validation "
    "split of seed 0, all but the map beside M. The residual value network has weight 1. Nothing was chosen on "
    "test items.",
    "Share: of the gap between base alone and fine-tuned base. Training, relative to fine-tuning the target: FLOPs "
    "(6 · parameters · tokens, and 2 · parameters · tokens for a frozen base) and seconds (two stages ran side by "
    "side, with some other work at times), of the chosen run, without searches and the pre-training of S on either "
    "side; proxy-tuning's is that of fine-tuning S. Added per token: multiplications that serving the value adds, "
    "relative to the base alone.",
    f"Average: over {', '.join(TASKS)}. `{NEWS}` are facts that only L2's newer text tells; no demonstration is about "
    "them. Words that are the same backwards are never asked or told, and a word and its reversal are in one part of "
    "the split.",
    "These are toy models of a toy world.",
)


def rows_shown(limits: dict[str, float]) -> list[str]:
    """The rows of a target's table, with the trust regions that were chosen."""
    ours = [BASE_ALONE, VALUE_ALONE, *VARIANTS, limit_label(RESIDUAL, limits[RESIDUAL]), EXPERT_ALONE]
    return [*ours, PROXY, PROXY_BEST, FUSION, limit_label(PROXY, limits[PROXY]), TUNED]


def told_note(scale: Scale) -> str:
    """What the raw text of seed 0 that L reads gives away of the test."""
    recipe, world = scale.bases["L"], World(0, scale.test_items)
    texts = list(itertools.islice(world.documents(BASES.index("L")), recipe.steps * recipe.batch))
    parts = []
    for task in TASKS:
        shares = told_verbatim([item for item in world.test if item.task == task], texts)
        parts.append(f"{task} " + ", ".join(f"{share:.0%}" for share in shares.values()))
    return (
        "The bases' raw texts hold facts and sums of the test on purpose: they are the knowledge. Half of their "
        "sentences are questions, 30 % of these answered, and at the end of a text the end follows the answer. Of the "
        "test items of seed 0, L's texts hold word for word the statement, the question with its answer, and that with "
        f"the end of text: {'; '.join(parts)}. So facts and sums test whether known answers are given when asked; "
        f"backwards and dates test skills on items that no text holds."
    )


def hardware() -> dict[str, Any]:
    """The machine, the code and the versions that matter."""
    import torch
    from revision import cpu_model, revision  # here, since tests load this file alone

    names = ("torch", "transformers", "trl", "tokenizers")
    found = {**revision(), "python": platform.python_version(), **{name: metadata.version(name) for name in names}}
    found["vllm"] = metadata.version("vllm")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**found, "cpu": cpu_model(), "cores": os.cpu_count(), "gpu": gpu}


def build(stages: list[Stage], folders: dict[str, Path], scale: Scale, seeds: int) -> dict[str, Any]:
    """Everything that the report says, from the folders of the finished stages."""
    results = {stage.name: read_result(folders[stage.name]) for stage in stages}

    def of_seed(seed: int) -> dict[str, Any]:
        return {name.split("/", 1)[1]: result for name, result in results.items() if name.startswith(f"{seed}/")}

    by_seed = [of_seed(seed) for seed in range(seeds)]
    worlds = [World(seed, scale.test_items) for seed in range(seeds)]
    answers = [
        {name: result["answers"] for name, result in seed.items() if name.startswith(("answers/", "joint/"))}
        for seed in by_seed
    ]
    draws, targets = {}, {}
    for base in tqdm(BASES, desc="intervals", unit="base"):
        target = table.collect(worlds, answers, base)
        draws[base] = resample(target, scale.resamples)
        targets[base] = table.figures(target, draws[base])
    small = by_seed[0][f"base/{SMALL}"]["parameters"]
    choice = results["0/choice/weights"]
    extra = {**{name: by_seed[0][f"value/{name}"]["parameters"] for name in VARIANTS}, PROXY: 2 * small}
    extra |= {PROXY_BEST: extra[PROXY], FUSION: extra[PROXY]}
    extra |= {limit_label(label, choice["limits"][label]): extra[label] for label in (RESIDUAL, PROXY)}
    # Experts share S, which is subtracted from each.
    joint = {ALL: (len(TASKS) + 1) * small, RIGHT: 2 * small, OTHERS: len(TASKS) * small}
    world = worlds[0]
    shown = rows_shown(choice["limits"])
    return {
        "seeds": seeds,
        "notes": [*NOTES[:-1], told_note(scale), NOTES[-1]],
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
        "chosen_on_validation": {
            "value_training": {name: results[f"0/search/{name}"] for name in VARIANTS},
            "proxy_tuning": results[f"0/search/{PROXY}"],
            "weights": choice,
            "vocabulary_map": results["0/map/chosen"],
        },
        "fine_tuning": {base: [chosen_rate(seed[f"tuned/{base}"], scale) for seed in by_seed] for base in BASES},
        "cpu_seconds": sum(result["cpu_seconds"] for result in results.values()),
        "stage_seconds": {name: round(result["ended"] - result["began"], 1) for name, result in results.items()},
        "training": {
            name: {
                key: r[key]
                for key in ("validation_loss", "steps", "tokens", "flops", "seconds", "learning_rate")
                if key in r
            }
            for name, r in results.items()
            if name.split("/")[1] in ("value", "tuned", "expert")
        },
        "targets": {
            base: {
                "rows": {label: found[label] for label in shown if label in found},
                "sweep": table.sweep(found),
                "limits": table.limits(found),
                "costs": table.costs(by_seed, base),
            }
            for base, found in targets.items()
        },
        "several_experts": {
            base: {
                label: {**found, "added_parameters": joint[kind]}
                for kind in joint
                for label, found in targets[base].items()
                if label.startswith(f"{kind}, ")
            }
            for base in JOINT
        },
        "maps_on_X": {label: found for label, found in targets["X"].items() if label.count(", ") == 2},
        "goals": table.goals(targets, draws, extra),
    }


def chosen_rate(tuned: dict[str, Any], scale: Scale) -> dict[str, Any]:
    """The learning rate of a fine-tuned base, whether it lies on the edge of the grid, and what was tried."""
    chosen, grid = {"learning_rate": tuned["learning_rate"]}, {"learning_rate": scale.tuning_rates}
    return {**chosen, "steps": tuned["steps"], "edge": bool(edges(chosen, grid)), "tries": tuned["tries"]}
