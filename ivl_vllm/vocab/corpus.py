"""The text that tells which tokens matter, and where two tokenizers' tokens meet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

# Longer texts are cut: positions are compared within one text, at a cost that grows with its square at worst.
_LONGEST = 4000


def read_corpus(corpus: str | Path | Iterable[str]) -> Iterator[str]:
    """Yields texts of at most 4,000 characters.

    Args:
        corpus: A file, or the texts themselves. Lines of a `.jsonl` file give all strings in them but those of the key
            "role"; of any other file each line is a text.

    Raises:
        ValueError: The file cannot be read, is not UTF-8, or a line of a `.jsonl` file is no JSON, too deeply nested or
            holds half a character; names file and line.
    """
    for text in _read_file(Path(corpus)) if isinstance(corpus, str | Path) else corpus:
        for start in range(0, len(text), _LONGEST):
            yield text[start : start + _LONGEST]


def in_batches(texts: Iterable[str], size: int = 256) -> Iterator[list[str]]:
    """Yields lists of `size` texts, the last one shorter."""
    texts = iter(texts)
    while batch := list(islice(texts, size)):
        yield batch


def _read_file(path: Path) -> Iterator[str]:
    number = 0  # Lines that were read.
    try:
        with path.open(encoding="utf-8") as stream:
            for line in stream:
                number += 1
                if path.suffix == ".jsonl":
                    if line.strip():
                        texts = list(_strings(json.loads(line)))
                        "".join(texts).encode()
                        yield from texts
                else:
                    yield line
    except OSError as error:
        raise ValueError(f"--corpus {path}: cannot be read ({error.strerror}); give a text or .jsonl file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--corpus {path}: not UTF-8 after line {number}; convert it to UTF-8") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(
            f"--corpus {path}, line {number}: {half!r} is half a character (a lone surrogate); mend or remove it"
        ) from error
    except RecursionError:
        raise ValueError(f"--corpus {path}, line {number}: too deeply nested; mend or remove it") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"--corpus {path}, line {number}: no JSON ({error}); mend it or name the file .txt") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "role":
                yield from _strings(item)
