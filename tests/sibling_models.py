"""Experts that are a small base plus a merged LoRA adapter, and what an engine makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import make_model

# Weights as the reference takes them, and what is sent.
SOLVED = [
    ({"one": "auto", "two": "auto"}, "auto:one,two"),
    ({"one": 1.0, "two": -0.5, "max_kl": 0.5}, "one=1.0,two=-0.5;max_kl=0.5"),
    ({"two": "auto"}, "auto:two"),
    ({"other": 1.0, "two": 1.0, "max_kl": 1.0}, "other=1.0,two=1.0;max_kl=1.0"),
    ({"two": 1.0}, {"two": 1.0}),
    ({}, 0),
]


def make_sibling(small: Path, folder: Path, seed: int) -> Path:
    """`small` with an adapter of rank 4 merged into every linear layer but the output layer."""
    folder.mkdir()
    for file in small.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(small / "model.safetensors")
    torch.manual_seed(seed)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            weight += 0.1 * torch.randn(weight.shape[0], 4) @ torch.randn(4, weight.shape[1])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_family(models: dict[str, Path], root: Path, kind: str = "llama") -> tuple[dict, dict]:
    """Two experts of one small base, and a network that is no sibling.

    Returns:
        `values` of the engine's settings, and the same folders for the reference.
    """
    small = make_model(root / "small", kind, seed=61, hidden=64, layers=2, heads=2, kv_heads=2)
    one, two = make_sibling(small, root / "one", 62), make_sibling(small, root / "two", 63)
    folders = {"one": (one, small), "two": (two, small), "other": models["value"]}
    # One folder, whatever way it is named.
    (root / "link").symlink_to(small)
    values = {
        "one": {"model": str(one), "minus": str(small)},
        "two": {"model": str(two), "minus": str(root / "link")},
        "other": {"model": str(models["value"])},
    }
    return values, folders


def value_rows(llm: Any) -> Any:
    """The engine's `ValueRows`."""
    from ivl_vllm.serving.steps import Steps

    return Steps.of(llm.llm_engine.vllm_config).rows
