"""Sizes and recipes of the transfer benchmark, and the pre-training of its bases."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transfer_world import World, build_tokenizer

# S, M and L are one family; L2 is L, trained on with newer text; X is as large as L and has another kind of tokenizer.
BASES = ("S", "M", "L", "L2", "X")
TOKENIZERS = {"S": "bpe", "M": "bpe", "L": "bpe", "L2": "bpe", "X": "wordpiece"}
SMALL = "S"


@dataclass(frozen=True)
class Pretraining:
    """How one base is made: its width and depth, and its steps."""

    hidden: int
    layers: int
    steps: int
    learning_rate: float
    batch: int = 16


@dataclass(frozen=True)
class Scale:
    """All that a run's size decides.

    Attributes:
        bases: Name → recipe; `L2` goes on from `L` and takes its shape.
        head: Size of an attention head.
        value_steps: Steps of a value network's training.
        value_rate: Its peak learning rate.
        norm_weights: λ that seed 0's validation split chooses from, for all seeds and variants.
        base_temperatures: What the logits of S are divided by in training, chosen likewise.
        tuning_steps: Most steps of fine-tuning a base.
        tuning_rates: Learning rates that each fine-tuned base chooses from, on its own seed's validation split.
        demonstration_batch: Demonstrations in a step, of either.
        test_items: Most test items of a task.
        resamples: Of the bootstrap.
        engine: Arguments of vLLM that depend on the machine.
    """

    bases: dict[str, Pretraining]
    head: int = 32
    value_steps: int = 200
    value_rate: float = 2e-3
    norm_weights: tuple[float, ...] = (1.0, 4.0, 16.0)
    base_temperatures: tuple[float, ...] = (1.0, 0.35)
    tuning_steps: int = 200
    tuning_rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3)
    demonstration_batch: int = 32
    test_items: int = 60
    resamples: int = 2000
    engine: dict[str, Any] = field(default_factory=lambda: {"enforce_eager": True, "kv_cache_memory_bytes": 512 << 20})


CPU = Scale(
    {
        "S": Pretraining(64, 2, 500, 8e-3),
        "M": Pretraining(96, 3, 600, 6e-3),
        "L": Pretraining(160, 4, 600, 4e-3),
        "L2": Pretraining(160, 4, 250, 1.5e-3),
        "X": Pretraining(160, 4, 600, 4e-3),
    }
)
SCALES = {
    "cpu": CPU,
    "gpu": Scale(
        {
            "S": Pretraining(128, 4, 3000, 4e-3, batch=64),
            "M": Pretraining(384, 8, 3000, 2e-3, batch=64),
            "L": Pretraining(768, 12, 3000, 1e-3, batch=64),
            "L2": Pretraining(768, 12, 1000, 4e-4, batch=64),
            "X": Pretraining(768, 12, 3000, 1e-3, batch=64),
        },
        head=64,
        value_rate=1e-3,
        tuning_rates=(5e-5, 1e-4, 2e-4, 5e-4),
        engine={"gpu_memory_utilization": 0.4},
    ),
    "quick": Scale(
        {
            "S": Pretraining(32, 1, 8, 8e-3),
            "M": Pretraining(32, 2, 8, 6e-3),
            "L": Pretraining(64, 2, 8, 4e-3),
            "L2": Pretraining(64, 2, 4, 3e-3),
            "X": Pretraining(64, 2, 8, 4e-3),
        },
        value_steps=10,
        norm_weights=(1.0, 4.0),
        base_temperatures=(1.0,),
        tuning_steps=10,
        tuning_rates=(5e-4, 1e-3),
        test_items=5,
        resamples=100,
    ),
}


def make_base(seed: int, name: str, recipe: Pretraining, head: int, start: Path | None, output: Path) -> dict[str, Any]:
    """Pre-train a base on raw text and save it with its tokenizer.

    Args:
        seed: Of the world, the model and the text.
        name: One of `BASES`.
        recipe: Its shape and steps.
        head: Size of an attention head.
        start: Base to go on from; the text is then that of the newer release.
        output: Folder for the model.

    Returns:
        `parameters`, `vocabulary` (its size) and `seconds`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from ivl_vllm.demo.family import new_model, train_on_text

    world = World(seed)
    tokenizer = build_tokenizer(world, TOKENIZERS[name], seed)
    newer = start is not None
    if newer:
        model = AutoModelForCausalLM.from_pretrained(start)
    else:
        shape = {
            "hidden_size": recipe.hidden,
            "intermediate_size": round(recipe.hidden * 8 / 3 / 8) * 8,
            "num_hidden_layers": recipe.layers,
            "num_attention_heads": recipe.hidden // head,
        }
        model = new_model(shape, tokenizer, seed)
    start_time = time.perf_counter()
    model = train_on_text(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        tokenizer,
        # Each base reads other texts of the same world.
        world.documents(100 * seed + BASES.index(name), newer),
        steps=recipe.steps,
        batch=recipe.batch,
        learning_rate=recipe.learning_rate,
        title=f"pre-train {name}, seed {seed}",
        row_tokens=96,
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    seconds = time.perf_counter() - start_time
    return {"parameters": count_parameters(output), "vocabulary": len(tokenizer), "seconds": seconds}


def count_parameters(folder: Path) -> int:
    """Parameters of a saved model that each token is multiplied with: token embeddings only where they are the head."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if "lm_head.weight" in sizes:
        del sizes["model.embed_tokens.weight"]
    return sum(sizes.values())
