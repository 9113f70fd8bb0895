"""`ivl inspect`: what a folder is, read from its files without loading a weight."""

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from ivl_vllm.training.curves import PNG_NAME, last_values, read_log
from ivl_vllm.training.files import read_header, read_json
from ivl_vllm.training.ivl_config import IVLConfig
from ivl_vllm.training.model_card import serve_command

_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def describe(folder: str | Path) -> str:
    """A few aligned lines on a value network's folder.

    Args:
        folder: A folder as `ivl train` writes it, or that of any causal LM.

    Returns:
        Text with one `name  value` pair a line, and the command that serves it.

    Raises:
        ValueError: No such folder, or one that holds no causal LM, no safetensors, not all of
            them, or a file that is broken.
    """
    path = Path(os.path.expanduser(folder))
    if not path.is_dir():
        raise ValueError(
            f"{folder}: no such folder; give the --output of ivl train, or the folder of "
            "any causal LM; a model on the hub must be downloaded first (hf download)"
        )
    architecture = _read_architecture(path)
    parameters, dtypes = _read_weights(path)
    config = IVLConfig.read(path)
    vocab_size = architecture["vocab_size"]
    rows = {"folder": str(path.resolve())}
    if config is None:
        rows["kind"] = "causal LM without ivl_config.json: served as a plain residual value network"
    else:
        rows["kind"] = f"value network, scheme {config.scheme}"
        rows["trained against"] = config.base
    rows["architecture"] = architecture["name"]
    rows["parameters"] = f"{parameters:,}"
    rows["dtype"] = ", ".join(dtypes)
    rows["vocabulary"] = f"{vocab_size:,} columns"
    if config is not None:
        rows.update(config.describe_training())
        rows["fingerprint"] = _check_fingerprint(path, config)
        if config.vocab_size != vocab_size:
            rows["vocabulary"] += f"; ivl_config.json says {config.vocab_size:,}: MISMATCH"
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in config.versions.items())
    rows.update(last_values(read_log(path)))
    if (path / PNG_NAME).is_file():
        rows["curves"] = str((path / PNG_NAME).resolve())
    rows["serve"] = serve_command("BASE", path.resolve(), () if config is None else config.takes)
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _read_architecture(path: Path) -> dict[str, Any]:
    content = read_json(path / "config.json")
    if content is None:
        hint = "; a LoRA adapter must be merged first" if (path / "adapter_config.json").is_file() else ""
        raise ValueError(f"{path}: no config.json, so this is no model folder{hint}")
    text = content.get("text_config")
    text = text if isinstance(text, dict) else content
    names = content.get("architectures") or content.get("model_type", "unknown")
    name = str(names[0] if isinstance(names, list) else names)
    layers, hidden = text.get("num_hidden_layers", text.get("n_layer")), text.get("hidden_size", text.get("n_embd"))
    if not isinstance(text.get("vocab_size"), int):
        raise ValueError(f"{path}/config.json has no vocab_size, so this is no causal LM")
    if layers is not None and hidden is not None:
        name += f", {layers} layers of {hidden}"
    return {"name": name, "vocab_size": text["vocab_size"]}


def _read_weights(path: Path) -> tuple[int, list[str]]:
    """Count parameters from the headers of all files, which must be there and whole."""
    files = {file.name for file in path.glob("model*.safetensors")} | _read_index(path)
    if not files:
        raise ValueError(f"{path}: no model*.safetensors; weights in other formats are not read")
    if missing := sorted(name for name in files if not (path / name).is_file()):
        count = f"{len(missing)} of {len(files)}"
        raise ValueError(f"{path}: {count} weight files are missing, first {missing[0]}; fetch the model again")
    parameters, dtypes = 0, Counter()
    for name in sorted(files):
        for dtype, shape in read_header(path / name).values():
            count = math.prod(shape)
            parameters += count
            dtypes[_NAMES.get(dtype, dtype)] += count
    return parameters, [name for name, _ in dtypes.most_common()]


def _read_index(path: Path) -> set[str]:
    """The files that the index of a model in several files names."""
    index = path / "model.safetensors.index.json"
    content = read_json(index)
    if content is None:
        return set()
    places = content.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    return set(places.values())


def _check_fingerprint(path: Path, config: IVLConfig) -> str:
    from ivl_vllm.tokenizer import read_tokenizer
    from ivl_vllm.vocab.fingerprint import vocabulary_fingerprint

    short = f"{config.vocabulary_fingerprint[:16]}…"
    try:
        tokenizer = read_tokenizer(path)
    except ValueError as error:
        return f"{short}, not checked: {error}"
    if vocabulary_fingerprint(tokenizer) == config.vocabulary_fingerprint:
        return f"{short}, ok"
    return f"{short}, MISMATCH with the tokenizer in the folder"
