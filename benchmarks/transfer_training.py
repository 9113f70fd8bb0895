"""Training in the transfer benchmark: value networks through `ivl train`, and the fully fine-tuned bases."""

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from transfer_family import Scale
from transfer_pretrain import count_parameters
from transfer_search import Point, search
from transfer_world import TASKS, World, write_demonstrations

# A value network starts as S, its output layer zeroed: with a norm of any weight it would else unlearn S first.
_ZEROED = "--zero_output_layer=true"
# Every way of training a value network beside S that is compared: flags of `ivl train` on top of the common ones.
# `{S}` and `{M}` are the folders of those bases.
VARIANTS: dict[str, tuple[str, ...]] = {
    "residual": (_ZEROED,),
    "no norm": (_ZEROED, "--norm=none"),
    "base not sharpened": (_ZEROED,),
    "output not zeroed": (),
    "scratch": (_ZEROED, "--init_config={S}/config.json"),
    "two bases": (_ZEROED, "--more_bases", "{M}"),
    "cascade": (_ZEROED, "--scheme=cascade"),
    "cascade+text": (_ZEROED, "--scheme=cascade+text"),
}
# Settings that are what a variant is about, and so not its to choose.
FIXED = {"no norm": {"norm_weight": 0.0}, "base not sharpened": {"base_temperature": 1.0}}
# As for the fine-tuned bases: the best of the checkpoints by validation loss.
COMMON_FLAGS = (
    "--warmup_steps=0.05",
    "--eval_strategy=steps",
    "--eval_steps=10",
    "--save_strategy=steps",
    "--save_steps=10",
    "--save_only_model=true",
    "--load_best_model_at_end=true",
    "--metric_for_best_model=eval_loss",
    "--greater_is_better=false",
    "--per_device_eval_batch_size=128",
)


def write_data(seed: int, folder: Path, tasks: tuple[str, ...] = TASKS) -> tuple[Path, Path]:
    """Write the demonstrations and the validation split of a seed's world, of some tasks, into a folder."""
    world = World(seed)
    folder.mkdir(parents=True, exist_ok=True)
    train, validation = ([i for i in part if i.task in tasks] for part in (world.train, world.validation))
    data = write_demonstrations(train, folder / "demonstrations.jsonl")
    return data, write_demonstrations(validation, folder / "validation.jsonl")


def train_value(
    seed: int, variant: str, scale: Scale, setting: Point, bases: dict[str, Path], output: Path
) -> dict[str, Any]:
    """Train one value network with `ivl train`, in this process.

    Args:
        seed: Of the world and the run.
        variant: One of `VARIANTS`.
        scale: Learning rate, batch and patience.
        setting: What was chosen for the variant: flags of `ivl train`.
        bases: Folders that the flags may name; the frozen base is `S`.
        output: Folder for the value network.

    Returns:
        `setting`, `validation_loss` (with the norm term), `steps` that were made, `parameters` (those of
        `count_parameters`), and `tokens`, `flops` and `seconds` of training.
    """
    from transformers import EarlyStoppingCallback

    from ivl_vllm.training.command import prepare

    data, validation = write_data(seed, output)
    run = prepare(
        [
            f"--base={bases['S']}",
            f"--data={data}",
            f"--eval_data={validation}",
            f"--output={output}",
            f"--learning_rate={scale.value_rate}",
            *(f"--{name}={number}" for name, number in setting.items()),
            f"--batch_size={scale.demonstration_batch}",
            f"--seed={seed}",
            *COMMON_FLAGS,
            *(flag.format(**bases) for flag in VARIANTS[variant]),
        ]
    )
    run.trainer.add_callback(EarlyStoppingCallback(scale.patience))
    start = time.perf_counter()
    run.run()
    parameters = count_parameters(output)
    state = run.trainer.state
    lengths = [len(ids) for ids in run.trainer.train_dataset["input_ids"]]
    tokens = state.global_step * scale.demonstration_batch * statistics.mean(lengths)
    return {
        "setting": setting,
        "validation_loss": float(state.best_metric),
        "steps": state.global_step,
        "parameters": parameters,
        "tokens": tokens,
        # Forward and backward of the value network, forward of the frozen base (one is drawn for each step).
        "flops": tokens * (6 * parameters + 2 * frozen_parameters(VARIANTS[variant], bases)),
        "seconds": time.perf_counter() - start,
    }


def frozen_parameters(flags: tuple[str, ...], bases: dict[str, Path]) -> float:
    """Mean size of the frozen bases of a variant."""
    return statistics.mean(
        count_parameters(folder)
        for name, folder in bases.items()
        if name == "S" or any(f"{{{name}}}" in flag for flag in flags)
    )


def tune(
    seed: int,
    base: Path,
    scale: Scale,
    output: Path,
    rates: tuple[float, ...] | None = None,
    tasks: tuple[str, ...] = TASKS,
) -> dict[str, Any]:
    """Fully fine-tune a base, with early stopping, at the learning rate that is best by validation loss.

    Args:
        seed: Of the world and the run.
        base: The base.
        scale: Steps, patience and learning rates.
        output: Folder for the best model.
        rates: In the place of the scale's.
        tasks: Whose demonstrations and validation items it reads.

    Returns:
        `validation_loss`, `learning_rate`, and `steps`, `tokens`, `flops` and `seconds` of the chosen run alone;
        `tries`, learning rate → its loss, steps and seconds.
    """
    from transformers import AutoTokenizer

    from ivl_vllm.demo.finetune import fine_tune

    data, validation = write_data(seed, output, tasks)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rates = rates or scale.tuning_rates
    tries: dict[str, dict[str, Any]] = {}

    def loss(point: Point) -> float:
        rate = point["learning_rate"]
        found = fine_tune(
            base,
            tokenizer,
            data,
            validation,
            output / f"try {rate:g}",
            learning_rates=(rate,),
            max_steps=scale.tuning_steps,
            seed=seed,
            patience=scale.patience,
            batch=scale.demonstration_batch,
        )
        tries.update(found)
        return found[f"{rate:g}"]["validation_loss"]

    best, _ = search(loss, {"learning_rate": rates}, {"learning_rate": rates[len(rates) // 2]})
    chosen = f"{best['learning_rate']:g}"
    shutil.copytree(output / f"try {chosen}", output, dirs_exist_ok=True)
    for folder in output.glob("try *"):
        shutil.rmtree(folder)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    lengths = [len(tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token).input_ids) for row in rows]
    tokens = tries[chosen]["steps"] * scale.demonstration_batch * statistics.mean(lengths)
    return {
        **tries[chosen],
        "learning_rate": best["learning_rate"],
        "tokens": tokens,
        "flops": 6 * count_parameters(output) * tokens,
        "tries": tries,
    }
