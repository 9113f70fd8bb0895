"""Tiny value networks that say of themselves how they are joined to the base."""

import dataclasses
import json
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from ivl_vllm.training.ivl_config import CONFIG_NAME, IVLConfig
from ivl_vllm.vocab.fingerprint import vocabulary_fingerprint


def mark_scheme(folder: Path, scheme: str, check: bool = True) -> Path:
    """Writes the `ivl_config.json` that the trainer would write, but for the scheme's name where `check` is off."""
    config = IVLConfig(
        base="base",
        scheme=scheme if check else "residual",
        norm="l1",
        norm_weight=1.0,
        vocab_size=AutoConfig.from_pretrained(folder).vocab_size,
        vocabulary_fingerprint=vocabulary_fingerprint(AutoTokenizer.from_pretrained(folder)),
    )
    config.write(folder)
    if not check:
        (folder / CONFIG_NAME).write_text(json.dumps(dataclasses.asdict(config) | {"scheme": scheme}))
    return folder
