"""Checks of a value network's weights, on the disk and loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger

from ivl_vllm.training.files import read_header

if TYPE_CHECKING:
    from torch import nn

# vLLM shows what is logged under its own name and nothing else.
logger = init_logger(f"vllm.{__name__}")


def check_weights(network: str) -> None:
    """Refuses files that cannot be read, before anything is loaded.

    Args:
        network: folder or hub id.

    Raises:
        ValueError: names the file and the fix.
    """
    files = sorted(Path(network).glob("*.safetensors"))
    if os.path.isdir(network) and not files:
        raise ValueError(
            f"ivl: the value network {network!r} has no *.safetensors file: save it with safetensors, the only format "
            "that is loaded"
        )
    index = Path(network) / "model.safetensors.index.json"
    if index.is_file():  # vLLM then passes by what else lies there
        named = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        files = [file for file in files if file.name in named] or files
    for file in files:
        try:
            read_header(file)
        except ValueError as error:
            raise ValueError(f"ivl: the value network {network!r} cannot be used: {error}") from error


def warn_of_broken_weights(model: nn.Module, network: str) -> None:
    """Logs weights that are not finite: their logits would not be either, and columns without a finite one stay."""
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    named = [(name, p) for name, p in model.named_parameters() if "sink" not in name]  # padded with -inf on purpose
    broken = [name for name, p in named if p.dtype in kinds and not p.isfinite().all()]
    if broken:
        logger.warning(
            "ivl: value network %s: %d of its weights hold NaN or infinity, such as %s: what it adds may be nothing, "
            "and requests that ask for it run unsteered without an error",
            network,
            len(broken),
            broken[0],
        )
