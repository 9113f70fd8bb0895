"""What is chosen on the validation splits of the first seeds, beside M, by teacher forcing and without an engine.

Beside S itself the least norm always fits best; what is wanted is a value network that fits a base it never saw.
"""

import shutil
import statistics
from pathlib import Path
from typing import Any

from transfer_family import Scale
from transfer_rows import WEIGHTS
from transfer_search import Point, edges, search
from transfer_training import FIXED, train_value, tune
from transfer_world import World, prompt


def validation_batch(seed: int, tokenizer: Any) -> tuple[Any, Any]:
    """The validation split as one batch.

    Returns:
        Token ids, int64 [items, T], padded on the right, and a mask of the answers' tokens, end of text included.
    """
    import torch

    items = World(seed).validation
    texts = [f"{prompt(item)} {item.answer}{tokenizer.eos_token}" for item in items]
    starts = torch.tensor([len(tokenizer(prompt(item)).input_ids) for item in items])
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    return batch.input_ids, (torch.arange(batch.input_ids.shape[1]) >= starts[:, None]) & batch.attention_mask.bool()


def score(logits: Any, ids: Any, mask: Any) -> tuple[float, float]:
    """How well logits [items, T, vocabulary] fit the answers.

    Returns:
        Share of answers of which each token is the largest given those before it, as greedy decoding would find it, and
        mean cross-entropy of the answers' tokens, nats.
    """
    import torch

    logits, wanted, mask = logits[:, :-1], ids[:, 1:], mask[:, 1:]
    right = ((logits.argmax(-1) == wanted) | ~mask).all(1).float().mean()
    return float(right), float(torch.nn.functional.cross_entropy(logits[mask], wanted[mask]))


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def fit(seed: int, value: Path, base: Path, scheme: str = "residual") -> tuple[float, float]:
    """`score` of base plus value network."""
    import torch
    from transformers import AutoTokenizer

    ids, mask = validation_batch(seed, AutoTokenizer.from_pretrained(base))
    network = _load(value)
    with torch.no_grad():
        logits = _load(base)(ids, use_cache=False).logits
        if scheme == "residual":
            added = network(ids, use_cache=False).logits
        else:
            embed = network.get_input_embeddings()
            read = logits.softmax(-1) @ embed.weight + (embed(ids) if scheme == "cascade+text" else 0)
            added = network(inputs_embeds=read, use_cache=False).logits
    return score(logits + added, ids, mask)


def _mean(found: list[tuple[float, float]]) -> dict[str, float]:
    accuracies, losses = zip(*found, strict=True)
    return {"accuracy": statistics.mean(accuracies), "loss": statistics.mean(losses)}


def choose_setting(variant: str, scale: Scale, bases: list[dict[str, Path]], output: Path) -> dict[str, Any]:
    """The settings of `ivl train` for a variant, by the cross-entropy of M plus value network.

    Args:
        variant: One of `VARIANTS`.
        scale: The grid and where to begin.
        bases: For each seed that takes part, name → folder; figures are means over them.
        output: Folder for the networks that are tried.

    Returns:
        `setting`; `edges`, those of its settings that lie on the edge of their grid; `tried`, each with its `setting`,
        `accuracy` and `loss` beside M, and the same `beside_S`.
    """
    grid = {**scale.value_grid, **{name: (value,) for name, value in FIXED.get(variant, {}).items()}}
    start = {**scale.value_start, **FIXED.get(variant, {})}
    scheme = variant if variant.startswith("cascade") else "residual"
    tried = []

    def loss(point: Point) -> float:
        beside: dict[str, list[tuple[float, float]]] = {"M": [], "S": []}
        for seed, of_seed in enumerate(bases):
            shutil.rmtree(output, ignore_errors=True)
            train_value(seed, variant, scale, point, of_seed, output)
            for name, found in beside.items():
                found.append(fit(seed, output, of_seed[name], scheme))
        tried.append({"setting": point, **_mean(beside["M"]), "beside_S": _mean(beside["S"])})
        return tried[-1]["loss"]

    setting, _ = search(loss, grid, start)
    return {"setting": setting, "edges": edges(setting, grid), "tried": tried}


def choose_expert(scale: Scale, bases: list[dict[str, Path]], output: Path) -> dict[str, Any]:
    """Learning rate of proxy-tuning's expert and its weight: by exact match of M plus weight · (expert - S).

    Returns:
        `setting`, `edges` and `tried`, as those of `choose_setting`; cross-entropy decides between equals.
    """
    import torch
    from transformers import AutoTokenizer

    found: dict[tuple[float, float], list[tuple[float, float]]] = {}
    for seed, of_seed in enumerate(bases):
        ids, mask = validation_batch(seed, AutoTokenizer.from_pretrained(of_seed["M"]))
        with torch.no_grad():
            base, small = (_load(of_seed[name])(ids, use_cache=False).logits for name in ("M", "S"))
        for rate in scale.expert_rates:
            shutil.rmtree(output, ignore_errors=True)
            tune(seed, of_seed["S"], scale, output, rates=(rate,))
            with torch.no_grad():
                expert = _load(output)(ids, use_cache=False).logits
            for weight in WEIGHTS:
                fitted = score(base + weight * (expert - small), ids, mask)
                found.setdefault((rate, weight), []).append(fitted)
    tried = [{"setting": {"learning_rate": r, "weight": w}, **_mean(fitted)} for (r, w), fitted in found.items()]
    setting = max(tried, key=lambda one: (one["accuracy"], -one["loss"]))["setting"]
    grid = {"learning_rate": scale.expert_rates, "weight": WEIGHTS}
    return {"setting": setting, "edges": edges(setting, grid), "tried": tried}
