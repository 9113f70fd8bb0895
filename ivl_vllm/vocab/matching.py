"""Partners by string: which token of the value's vocabulary says the same as a token of the base's."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein, Prefix
from tqdm import tqdm

from ivl_vllm.vocab.vocabulary import Vocabulary

# One letter in five may differ, and only in the ending: the last third of the letters. Laxer
# limits pair " later" with " latter" and " likely" with " unlikely"; these pair " colour" with " color".
_LETTERS_PER_EDIT = 5
_LETTERS_PER_ENDING = 3
# Entries of one table of distances, two bytes each.
_CHUNK = 1 << 24

# A token's text and its id.
Entry = tuple[str, int]


def exact_columns(base: Vocabulary, value: Vocabulary) -> np.ndarray:
    """For each base token the value token that stands for the same bytes, or has the same role.

    Returns:
        int32 [base_vocab], −1 where there is none.
    """
    columns = np.full(len(base), -1, np.int32)
    by_spelling = {} if base.kind != value.kind else {s: i for i, s in enumerate(value.spellings) if s is not None}
    for index, text in enumerate(base.texts):
        if text is None:
            continue
        # Within one kind the same spelling comes first: "\n" and "<0x0A>" stand for the same byte.
        same = by_spelling.get(base.spellings[index], -1)
        if same < 0 or value.texts[same] != text:
            same = value.by_text.get(text, -1)
        if same < 0 and index in base.variants:
            same = value.by_text.get(base.variants[index], -1)
        columns[index] = same
    for content, index in base.added.items():
        # "<tool_call>" may be special to one of the two only; the same letters typed as text are not it.
        if index not in base.specials and columns[index] < 0:
            columns[index] = value.added.get(content, -1)
    for index in base.specials:
        columns[index] = _special_partner(index, base, value)
    return columns


def _special_partner(index: int, base: Vocabulary, value: Vocabulary) -> int:
    """By role first: "<|endoftext|>" ends the text here and may be mere padding there."""
    roles = [role for role, bearer in base.roles.items() if bearer == index]
    for role in ("turn_end", "eos"):
        if role in roles:
            return value.roles.get(role, value.roles.get("eos", -1))
    for role in roles:
        if role in value.roles:
            return value.roles[role]
    partner = next((i for i, content in value.specials.items() if content == base.specials[index]), None)
    if partner is None:
        partner = value.added.get(base.specials[index], -1)
    # The same name in another role is another token.
    return -1 if partner in value.roles.values() and roles else partner


def nearest_columns(base: Vocabulary, value: Vocabulary, columns: np.ndarray, progress: bool = False) -> np.ndarray:
    """Fills up `columns` with partners at the smallest edit distance, where that is small enough to mean the same.

    Only letters may differ: spaces, digits and punctuation must be the same in both, so no number stands for another
    and "(" not for ")". The same letters in upper and lower case are partners; beyond that, only endings may differ.
    Of partners at the same distance the one that shares the longer beginning wins, then the lower id. Bytes that are no
    valid UTF-8 have no neighbours.

    Args:
        base: The base's vocabulary.
        value: The value network's.
        columns: int32 [base_vocab] from `exact_columns`.
        progress: Show a bar.

    Returns:
        int32 [base_vocab], a new array.
    """
    columns = columns.copy()
    same_letters: dict[str, list[Entry]] = defaultdict(list)
    neighbours: dict[str, list[Entry]] = defaultdict(list)
    for index, text in enumerate(value.texts):
        if (word := _decode(text)) is not None:
            same_letters[word.casefold()].append((word, index))
            neighbours[_frame(word)].append((word, index))
    for entries in neighbours.values():
        entries.sort()
    # By what they share, so that each group meets its own neighbours only.
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for index in np.flatnonzero(columns < 0).tolist():
        word = _decode(base.texts[index])
        if word is None:
            continue
        frame = _frame(word)
        if entries := same_letters.get(word.casefold()):
            columns[index] = _closest(word, entries)
        elif frame in neighbours and (letters := len(word) - len(frame)) >= _LETTERS_PER_EDIT:
            groups[frame, word[: len(word) - letters // _LETTERS_PER_ENDING]].append((word, index))
    hidden = None if progress else True
    for (frame, beginning), asked in tqdm(groups.items(), desc="nearest", unit=" beginnings", disable=hidden):
        entries = neighbours[frame]
        low, high = (bisect_left(entries, (beginning + end,)) for end in ("", "\U0010ffff"))
        for (word, index), near in _within_reach(asked, entries[low:high]):
            columns[index] = _closest(word, near)
    return columns


def _decode(text: bytes | None) -> str | None:
    try:
        return text.decode("utf-8") if text else None
    except UnicodeDecodeError:
        return None


def _frame(word: str) -> str:
    """All of `word` but its letters."""
    return "".join(character for character in word if not character.isalpha())


def _within_reach(asked: list[Entry], entries: list[Entry]) -> Iterator[tuple[Entry, list[Entry]]]:
    """Yields each entry of `asked` that has neighbours within its limit, with those at the smallest distance."""
    if not entries:
        return
    words = [word for word, _ in entries]
    limits = [sum(map(str.isalpha, word)) // _LETTERS_PER_EDIT for word, _ in asked]
    rows = max(1, _CHUNK // len(words))
    for start in range(0, len(asked), rows):
        chunk = asked[start : start + rows]
        distances = process.cdist(
            [word for word, _ in chunk], words, scorer=Levenshtein.distance, score_cutoff=max(limits), dtype=np.uint16
        )
        smallest = distances.min(axis=1)
        for row, question in enumerate(chunk):
            if smallest[row] <= limits[start + row]:
                yield question, [entries[i] for i in np.flatnonzero(distances[row] == smallest[row])]


def _closest(word: str, entries: list[Entry]) -> int:
    def cost(entry: Entry) -> tuple[int, int, int]:
        return Levenshtein.distance(word, entry[0]), -Prefix.similarity(word, entry[0]), entry[1]

    return min(entries, key=cost)[1]
