"""Makes the map from one tokenizer's vocabulary to another's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from ivl_vllm.vocab import INPUTS, METHODS, UNMAPPED
from ivl_vllm.vocab.alignment import Meetings, aligned_columns
from ivl_vllm.vocab.corpus import read_corpus
from ivl_vllm.vocab.fingerprint import vocabulary_fingerprint
from ivl_vllm.vocab.matching import exact_columns, nearest_columns
from ivl_vllm.vocab.reading import Reader
from ivl_vllm.vocab.vocab_map import VocabMap
from ivl_vllm.vocab.vocabulary import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_vocab_map(
    base_tokenizer: PreTrainedTokenizerBase,
    value_tokenizer: PreTrainedTokenizerBase,
    method: str = "nearest",
    input: str = "last",
    unmapped: str = "keep",
    corpus: str | Path | Iterable[str] | None = None,
    progress: bool = False,
) -> VocabMap:
    """Ties the vocabulary of a value network to that of a base.

    Args:
        base_tokenizer: The base's; fast tokenizers and those written in Python.
        value_tokenizer: The value network's.
        method: How a base column finds the value column that is added to it. "exact": it stands for the same bytes, or
            has the same role if it is a special token. "nearest": if there is none, the token at a small edit distance,
            see `nearest_columns`. "aligned": if there is none, the token at the same places of `corpus`, see
            `aligned_columns`.
        input: How the value network reads a base token that has no exact partner. "nearest": as the partner that
            `method` found, else as the longest piece of its own tokenisation. "last": as the last piece. "mean": as
            the mean of the embeddings of all pieces.
        unmapped: What is added to base columns without a partner. "keep": nothing. "mean": the mean of the value row.
            "first": the logit of the first piece, nothing for special tokens.
        corpus: Texts, or a file that `read_corpus` reads, for "aligned".
        progress: Show bars.

    Raises:
        ValueError: An unknown choice, or "aligned" without a corpus or with an empty one.
    """
    for name, given, choices in (
        ("method", method, METHODS),
        ("input", input, INPUTS),
        ("unmapped", unmapped, UNMAPPED),
    ):
        if given not in choices:
            raise ValueError(f"--{name} is {given!r}: use one of {', '.join(choices)}")
    if method == "aligned" and corpus is None:
        raise ValueError("--method aligned learns from text: give it with --corpus FILE, or use --method nearest")
    base, value = read_vocabulary(base_tokenizer), read_vocabulary(value_tokenizer)
    exact = columns = exact_columns(base, value)
    if method == "nearest":
        columns = nearest_columns(base, value, exact, progress)
    elif method == "aligned":
        meetings = Meetings(base, value, read_corpus(corpus), progress)
        if not meetings.seen:
            raise ValueError(f"--corpus {corpus} has no text in it: --method aligned learns from text")
        columns = aligned_columns(base, value, exact, meetings)
    read = _read_all(base, value, exact, columns, input, progress)
    columns = _without_false_ends(columns, base, value)
    present = [spelling is not None for spelling in base.spellings]
    made = VocabMap(
        columns=columns,
        pieces=np.array([index for ids in read for index in ids], np.int32),
        piece_starts=np.cumsum([0, *map(len, read)]).astype(np.int32),
        value_vocab=len(value),
        base_fingerprint=vocabulary_fingerprint(base_tokenizer),
        value_fingerprint=vocabulary_fingerprint(value_tokenizer),
        method=method,
        input=input,
        unmapped="keep",
        coverage=float((columns[present] >= 0).mean()),
    )
    return _fill(made, base, value, unmapped)


def fill_unmapped(
    vocab_map: VocabMap,
    base_tokenizer: PreTrainedTokenizerBase,
    value_tokenizer: PreTrainedTokenizerBase,
    unmapped: str,
) -> VocabMap:
    """A map made with `unmapped="keep"`, as `make_vocab_map` would have made it with another choice.

    Args:
        vocab_map: The map; it stays as it is.
        base_tokenizer: The base's.
        value_tokenizer: The value network's.
        unmapped: One of `ivl_vllm.vocab.UNMAPPED`.

    Raises:
        ValueError: The map was made with another choice, which cannot be undone, or for other tokenizers.
    """
    if vocab_map.unmapped != "keep":
        raise ValueError(f"a map with --unmapped {vocab_map.unmapped} cannot be filled again: start from keep")
    vocab_map.check(base_tokenizer, value_tokenizer, "the map to fill")
    return _fill(vocab_map, read_vocabulary(base_tokenizer), read_vocabulary(value_tokenizer), unmapped)


def _read_all(
    base: Vocabulary, value: Vocabulary, exact: np.ndarray, columns: np.ndarray, input: str, progress: bool
) -> list[list[int]]:
    """For each base token the value ids as which it is read."""
    reader = Reader(value)
    # One id per token is what the engine serves fastest, and an exact partner is what the text would be cut into.
    known = columns if input == "nearest" else exact
    read = []
    for index in tqdm(range(len(base)), desc="reading", unit=" tokens", disable=None if progress else True):
        if known[index] >= 0:
            read.append([int(known[index])])
            continue
        pieces = _own_pieces(index, base, value, reader)
        if input == "last":
            pieces = pieces[-1:]
        elif input == "nearest":
            # Of pieces of one length the last, as the value network predicts from where it has read to.
            pieces = [max(reversed(pieces), key=lambda piece: len(value.texts[piece] or b""))]
        read.append(pieces)
    return read


def _without_false_ends(columns: np.ndarray, base: Vocabulary, value: Vocabulary) -> np.ndarray:
    """Leaves base tokens alone that end nothing where the value's partner ends the text (GPT-2's is its padding too).

    They are read as that partner all the same.
    """
    ends = ("eos", "turn_end")
    columns = columns.copy()
    of_value = {value.roles[role] for role in ends if role in value.roles}
    of_base = {base.roles[role] for role in ends if role in base.roles}
    false = [index for index in np.flatnonzero(np.isin(columns, [*of_value])).tolist() if index not in of_base]
    columns[false] = -1
    return columns


def _own_pieces(index: int, base: Vocabulary, value: Vocabulary, reader: Reader) -> list[int]:
    text = base.texts[index]
    if text is not None:
        return reader.pieces(text)
    if index in base.specials and index not in base.roles.values():
        return reader.pieces(base.specials[index].encode("utf-8", "surrogatepass"))
    # No token, or one whose role the value's vocabulary has not: its letters would say nothing.
    return [value.blank]


def _fill(vocab_map: VocabMap, base: Vocabulary, value: Vocabulary, unmapped: str) -> VocabMap:
    columns = vocab_map.columns.copy()
    alone = [index for index in np.flatnonzero(columns < 0).tolist() if base.spellings[index] is not None]
    if unmapped == "mean":
        columns[alone] = len(value)
    elif unmapped == "first":
        reader = Reader(value)
        for index in alone:
            if base.texts[index] is not None:
                columns[index] = reader.pieces(base.texts[index])[0]
    return replace(vocab_map, columns=columns, unmapped=unmapped)
