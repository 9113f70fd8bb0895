"""The file that ties two vocabularies together: which value column belongs to which token of the base.

Needs numpy and safetensors only, so the engine's front end can read it too.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ivl_vllm.vocab import INPUTS, METHODS, UNMAPPED
from ivl_vllm.vocab.fingerprint import vocabulary_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = "ivl_vocab_map"
_VERSION = "1"
_TENSORS = ("columns", "pieces", "piece_starts")
_MAKE_AGAIN = "make one with: ivl map-vocab --base BASE --value VALUE --output FILE"


@dataclass(frozen=True, eq=False)
class VocabMap:
    """How a value network of one vocabulary serves a base of another.

    Attributes:
        columns: int32 [base_vocab]. The value column whose logit is added to this base column; −1 for none (the base
            logit stays as it is), `value_vocab`, one past the last column, for the mean of the value row.
        pieces: int32 [n]. Value ids, all base tokens' one after the other.
        piece_starts: int32 [base_vocab + 1]. Base token `i` is read as `pieces[piece_starts[i]:piece_starts[i + 1]]`,
            at least one id; of several the value network reads the mean of their embeddings.
        value_vocab: Size of the value vocabulary, the tokenizer's largest id plus one.
        base_fingerprint: `vocabulary_fingerprint` of the base's tokenizer.
        value_fingerprint: The same of the value network's tokenizer.
        method: How columns were found, one of `ivl_vllm.vocab.METHODS`.
        input: How base tokens are read on the way in, one of `ivl_vllm.vocab.INPUTS`.
        unmapped: What base columns without a partner get, one of `ivl_vllm.vocab.UNMAPPED`.
        coverage: Share of the base's tokens with a partner, before `unmapped` filled any up.

    Raises:
        ValueError: An array has another shape or dtype, an id is out of range, or a base token has no piece.
    """

    columns: np.ndarray
    pieces: np.ndarray
    piece_starts: np.ndarray
    value_vocab: int
    base_fingerprint: str
    value_fingerprint: str
    method: str
    input: str
    unmapped: str
    coverage: float

    def __post_init__(self):
        for name in _TENSORS:
            array = getattr(self, name)
            if array.dtype != np.int32 or array.ndim != 1:
                raise ValueError(f"{name} is {array.dtype} of shape {list(array.shape)}: it must be int32 of one axis")
        for name, choices in (("method", METHODS), ("input", INPUTS), ("unmapped", UNMAPPED)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: use one of {', '.join(choices)}")
        if self.base_vocab == 0 or self.value_vocab < 1:
            raise ValueError(f"a vocabulary is empty: base {self.base_vocab}, value {self.value_vocab}")
        _check_range("columns", self.columns, -1, self.value_vocab)
        _check_range("pieces", self.pieces, 0, self.value_vocab - 1)
        starts = self.piece_starts
        if len(starts) != self.base_vocab + 1 or starts[0] != 0 or starts[-1] != len(self.pieces):
            raise ValueError(
                f"piece_starts has {len(starts)} entries: it must have {self.base_vocab + 1}, one more than columns, "
                f"and go from 0 to {len(self.pieces)}, the length of pieces"
            )
        empty = np.flatnonzero(np.diff(starts.astype(np.int64)) < 1)
        if len(empty):
            raise ValueError(f"base token {empty[0]} has no piece in pieces: each needs at least one value id")

    @property
    def base_vocab(self) -> int:
        """Size of the base's vocabulary, the tokenizer's largest id plus one."""
        return len(self.columns)

    @cached_property
    def single(self) -> bool:
        """Whether every base token is read as exactly one value id; `pieces` is then [base_vocab]."""
        return len(self.pieces) == self.base_vocab

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.numpy import save

        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "method": self.method,
            "input": self.input,
            "unmapped": self.unmapped,
            "base_fingerprint": self.base_fingerprint,
            "value_fingerprint": self.value_fingerprint,
            "base_vocab_size": str(self.base_vocab),
            "value_vocab_size": str(self.value_vocab),
            "coverage": repr(float(self.coverage)),
        }
        content = save({name: np.ascontiguousarray(getattr(self, name)) for name in _TENSORS}, metadata=metadata)
        path = Path(path)
        handle, stage = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            # mkstemp's files are for their owner alone; this one follows the user's umask.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(stage, 0o666 & ~umask)
            os.replace(stage, path)
        except BaseException:
            os.unlink(stage)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike) -> VocabMap:
        """Read what `save` wrote.

        Raises:
            ValueError: There is no such file, or it is no map that this version can read; says what is wrong with it.
        """
        path = Path(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"vocab_map {path}: cannot be read ({error.strerror}); {_MAKE_AGAIN}") from error
        try:
            return cls._parse(content)
        except ValueError as error:
            raise ValueError(f"vocab_map {path}: {error}; {_MAKE_AGAIN}") from error

    @classmethod
    def _parse(cls, content: bytes) -> VocabMap:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors = load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        except (SafetensorError, ValueError, KeyError) as error:
            raise ValueError(f"no safetensors file ({error})") from error
        metadata: dict[str, Any] = header.get("__metadata__") or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
        if metadata.get("version") != _VERSION:
            raise ValueError(f"its version is {metadata.get('version')!r}, this ivl-vllm reads {_VERSION!r}")
        if set(tensors) != set(_TENSORS):
            raise ValueError(f"it holds {', '.join(sorted(tensors)) or 'nothing'}, not {', '.join(_TENSORS)}")
        try:
            sizes = int(metadata["base_vocab_size"]), int(metadata["value_vocab_size"])
            coverage = float(metadata["coverage"])
            strings = {
                name: metadata[name]
                for name in ("base_fingerprint", "value_fingerprint", "method", "input", "unmapped")
            }
        except (KeyError, ValueError) as error:
            raise ValueError(f"its header lacks or garbles {error}") from error
        if len(tensors["columns"]) != sizes[0]:
            raise ValueError(f"columns has {len(tensors['columns'])} entries, its header says {sizes[0]}")
        return cls(**tensors, value_vocab=sizes[1], coverage=coverage, **strings)

    def check(
        self, base_tokenizer: PreTrainedTokenizerBase, value_tokenizer: PreTrainedTokenizerBase, where: str
    ) -> None:
        """Make sure that this map was made for these two tokenizers.

        Args:
            base_tokenizer: Tokenizer of the base that is served.
            value_tokenizer: Tokenizer of the value network.
            where: What to call the map in the message, such as `vocab_map 'map.safetensors' of values['math']`.

        Raises:
            ValueError: A fingerprint differs; names the side and the command that makes the right map.
        """
        sides = {"base": (base_tokenizer, self.base_fingerprint), "value": (value_tokenizer, self.value_fingerprint)}
        found = {side: vocabulary_fingerprint(tokenizer) for side, (tokenizer, _) in sides.items()}
        foreign = [side for side, (_, expected) in sides.items() if found[side] != expected]
        if not foreign:
            return
        names = {side: getattr(sides[side][0], "name_or_path", "") or side.upper() for side in sides}
        if foreign == ["base", "value"] and found == {"base": self.value_fingerprint, "value": self.base_fingerprint}:
            problem = "it was made the other way round, from the value's tokenizer to the base's"
        else:
            problem = " and ".join(
                f"it was made for another {side} tokenizer (fingerprint {sides[side][1][:12]}…) than that of "
                f"{names[side]} ({found[side][:12]}…)"
                for side in foreign
            )
        raise ValueError(
            f"ivl: {where}: {problem}; make the right one with: ivl map-vocab --base {names['base']} "
            f"--value {names['value']} --method {self.method} --input {self.input} --unmapped {self.unmapped} "
            "--output FILE, and set vocab_map to FILE"
        )


def _check_range(name: str, array: np.ndarray, low: int, high: int) -> None:
    wrong = np.flatnonzero((array < low) | (array > high))
    if len(wrong):
        raise ValueError(f"{name}[{wrong[0]}] is {array[wrong[0]]}: it must lie between {low} and {high}")
