"""How files of a model's folder are read, with every fault told by the file's name. Imports no torch."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path, kind: type = dict) -> Any:
    """What a JSON file holds.

    Args:
        path: The file.
        kind: What it must hold: an object (`dict`) or a list (`list`).

    Returns:
        The content, or None where there is no such file.

    Raises:
        ValueError: The file cannot be read, is no JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds no JSON {'object' if kind is dict else kind.__name__}")
    return content


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor in a safetensors file, by name; no tensor is loaded.

    Raises:
        ValueError: The file cannot be read, or is not whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, as it is no dictionary
            return {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in tensors.items()}
    except (OSError, SafetensorError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ValueError(f"{path} is no safetensors file, or one cut short ({reason}); fetch it again") from error
