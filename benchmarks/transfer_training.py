"""Training in the transfer benchmark: value networks through `ivl train`, and the fully fine-tuned bases."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

from transfer_family import Scale, count_parameters
from transfer_world import World, prompt, write_demonstrations

# A value network starts as S, its output layer zeroed: with a norm of any weight it would else unlearn S first.
_ZEROED = "--zero_output_layer=true"
# Every way of training a value network beside S that is compared: flags of `ivl train` on top of the common ones.
# `{S}` and `{M}` are the folders of those bases.
VARIANTS: dict[str, tuple[str, ...]] = {
    "residual": (_ZEROED,),
    "no norm": (_ZEROED, "--norm=none"),
    "base not sharpened": (_ZEROED, "--base_temperature=1"),
    "output not zeroed": (),
    "scratch": (_ZEROED, "--init_config={S}/config.json"),
    "two bases": (_ZEROED, "--more_bases", "{M}"),
    "cascade": (_ZEROED, "--scheme=cascade"),
    "cascade+text": (_ZEROED, "--scheme=cascade+text"),
}
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


def write_data(seed: int, folder: Path) -> tuple[Path, Path]:
    """Write the demonstrations and the validation split of a seed's world into a folder."""
    world = World(seed)
    folder.mkdir(parents=True, exist_ok=True)
    train = write_demonstrations(world.train, folder / "demonstrations.jsonl")
    return train, write_demonstrations(world.validation, folder / "validation.jsonl")


def train_value(
    seed: int, flags: tuple[str, ...], scale: Scale, setting: dict[str, float], bases: dict[str, Path], output: Path
) -> dict[str, Any]:
    """Train one value network with `ivl train`, in this process.

    Args:
        seed: Of the world and the run.
        flags: Those of its variant.
        scale: Steps and batch.
        setting: `norm_weight` and `base_temperature`, as `ivl train` takes them.
        bases: Folders that the flags may name; the frozen base is `S`.
        output: Folder for the value network.

    Returns:
        `setting`, `validation_loss` (with the norm term), `parameters` (those of `count_parameters`), and `tokens`,
        `flops` and `seconds` of training.
    """
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
            f"--max_steps={scale.value_steps}",
            f"--batch_size={scale.demonstration_batch}",
            f"--seed={seed}",
            *COMMON_FLAGS,
            *(flag.format(**bases) for flag in flags),
        ]
    )
    tokens = scale.value_steps * scale.demonstration_batch * mean_length(run.trainer.train_dataset)
    start = time.perf_counter()
    run.run()
    parameters = count_parameters(output)
    return {
        "setting": setting,
        "validation_loss": float(run.trainer.state.best_metric),
        "parameters": parameters,
        "tokens": tokens,
        # Forward and backward of the value network, forward of the frozen base (one is drawn for each step).
        "flops": tokens * (6 * parameters + 2 * frozen_parameters(flags, bases)),
        "seconds": time.perf_counter() - start,
    }


def fit(seed: int, value: Path, base: Path) -> tuple[float, float]:
    """How well base plus value fits the validation split, without an engine.

    Returns:
        Share of answers that greedy decoding gets right, end of text included (each token is the largest given those
        before it), and mean cross-entropy of their tokens, nats.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (base, value)]
    tokenizer = AutoTokenizer.from_pretrained(base)
    right, losses = [], []
    for item in World(seed).validation:
        start = len(tokenizer(prompt(item)).input_ids)
        ids = torch.tensor([tokenizer(f"{prompt(item)} {item.answer}{tokenizer.eos_token}").input_ids])
        with torch.no_grad():
            logits = sum(model(ids, use_cache=False).logits for model in models)[0, start - 1 : -1]
        right.append(bool((logits.argmax(-1) == ids[0, start:]).all()))
        losses += torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="none").tolist()
    return statistics.mean(right), statistics.mean(losses)


def frozen_parameters(flags: tuple[str, ...], bases: dict[str, Path]) -> float:
    """Mean size of the frozen bases of a variant."""
    return statistics.mean(
        count_parameters(folder)
        for name, folder in bases.items()
        if name == "S" or any(f"{{{name}}}" in flag for flag in flags)
    )


def tune(seed: int, base: Path, scale: Scale, output: Path) -> dict[str, Any]:
    """Fully fine-tune a base: the best of several learning rates, each with early stopping, by validation loss.

    Args:
        seed: Of the world and the run.
        base: The base.
        scale: Steps and learning rates.
        output: Folder for the best model.

    Returns:
        `validation_loss`, `learning_rate`, and `tokens`, `flops` and `seconds` of the chosen run alone; `tries`.
    """
    from transformers import AutoTokenizer

    from ivl_vllm.demo.finetune import fine_tune

    data, validation = write_data(seed, output)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tries = fine_tune(
        base,
        tokenizer,
        data,
        validation,
        output,
        learning_rates=scale.tuning_rates,
        max_steps=scale.tuning_steps,
        seed=seed,
    )
    rate, best = min(tries.items(), key=lambda item: item[1]["validation_loss"])
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    lengths = [len(tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token).input_ids) for row in rows]
    tokens = best["steps"] * scale.demonstration_batch * statistics.mean(lengths)
    return {
        **best,
        "learning_rate": rate,
        "tokens": tokens,
        "flops": 6 * count_parameters(output) * tokens,
        "tries": tries,
    }


def mean_length(dataset: Any) -> float:
    """Mean tokens of a tokenised example."""
    return statistics.mean(len(ids) for ids in dataset["input_ids"])
