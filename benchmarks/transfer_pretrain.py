"""Pre-training the bases of the transfer benchmark."""

import math
import time
from pathlib import Path
from typing import Any

from transfer_family import BASES, TOKENIZERS, Pretraining
from transfer_world import World, build_tokenizer


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
