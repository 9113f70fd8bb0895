"""Partners by use: which tokens of two tokenizers stand at the same places of a corpus."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
from rapidfuzz.distance import Levenshtein
from tqdm import tqdm

from ivl_vllm.vocab.corpus import in_batches
from ivl_vllm.vocab.vocabulary import Vocabulary

# What two tokens must share, of the characters that either covers, over all places of the base's token.
_SHARED = 0.5

# A token's id and where in the text it stands, first character and one past the last, without the space around it.
Place = tuple[int, int, int]


class Meetings:
    """How far the tokens of two tokenizers cover the same characters, over a corpus.

    Only tokens that begin at the same character meet: there, and nowhere else, both networks predict at once.

    Attributes:
        seen: Base id -> how often it occurs.
        shared: Base id -> value id -> sum over the places where they meet of |both| / |either|, in characters.
    """

    def __init__(self, base: Vocabulary, value: Vocabulary, texts: Iterable[str], progress: bool = False):
        self.seen: Counter[int] = Counter()
        self.shared: dict[int, Counter[int]] = {}
        hidden = None if progress else True
        for batch in tqdm(in_batches(texts), desc="aligning", unit=" batches of 256 texts", disable=hidden):
            for base_places, value_places in zip(places(base, batch), places(value, batch), strict=True):
                self._count(base_places, value_places)

    def _count(self, base_places: list[Place], value_places: list[Place]) -> None:
        beginning = defaultdict(list)
        for partner, start, end in value_places:
            beginning[start].append((partner, end - start))
        for index, start, end in base_places:
            self.seen[index] += 1
            for partner, length in beginning[start] if end > start else ():
                shorter, longer = sorted((end - start, length))
                self.shared.setdefault(index, Counter())[partner] += shorter / longer

    def best(self, index: int) -> tuple[int, float] | None:
        """The value id that base token `index` shares most of its places with, and that share, 0 to 1."""
        if index not in self.shared:
            return None
        partner = min(self.shared[index], key=lambda other: (-self.shared[index][other], other))
        return partner, self.shared[index][partner] / self.seen[index]


def aligned_columns(base: Vocabulary, value: Vocabulary, columns: np.ndarray, meetings: Meetings) -> np.ndarray:
    """Fills up `columns` with the tokens that share more than half of a base token's places in the corpus.

    Both must have a space before them or neither, and the same digits, so no number stands for another. Special tokens
    and parts of characters get no partner here.

    Args:
        base: The base's vocabulary.
        value: The value network's.
        columns: int32 [base_vocab] from `exact_columns`.
        meetings: The corpus.

    Returns:
        int32 [base_vocab], a new array.
    """
    columns = columns.copy()
    for index in np.flatnonzero(columns < 0).tolist():
        found = meetings.best(index)
        if found is None or found[1] <= _SHARED:
            continue
        if _comparable(base.texts[index], value.texts[found[0]]):
            columns[index] = found[0]
    return columns


def _comparable(*texts: bytes | None) -> bool:
    try:
        words = [text.decode("utf-8") for text in texts if text]
    except UnicodeDecodeError:
        return False
    marks = {(word[0] == " ", "".join(filter(str.isdigit, word))) for word in words}
    return len(words) == 2 and len(marks) == 1


def places(vocabulary: Vocabulary, texts: list[str]) -> list[list[Place]]:
    """Where the tokens of each text stand, by the tokenizer's own offsets if it has them."""
    tokenizer = vocabulary.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [places_without_offsets(vocabulary, text, ids) for text, ids in zip(texts, encoded, strict=True)]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    return [
        [_trim(vocabulary, text, index, *span) for index, span in zip(ids, spans, strict=True)]
        for text, ids, spans in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _trim(vocabulary: Vocabulary, text: str, index: int, start: int, end: int) -> Place:
    """Tokenizers differ in whether a token's offsets hold the space before it: none do here, unless it is all space."""
    stripped = text[start:end].strip()
    if not stripped:
        return index, start, end
    if not (vocabulary.texts[index] or b"?").strip():
        # A lone "▁" claims the character behind it.
        return index, start, start
    start += text[start:end].index(stripped)
    return index, start, start + len(stripped)


def places_without_offsets(vocabulary: Vocabulary, text: str, ids: list[int]) -> list[Place]:
    """Where tokens stand, found by aligning what they spell with the text.

    The alignment is the one with the fewest edits (Levenshtein's dynamic programming over the bytes, case of ASCII
    letters apart), so it holds through lower-casing, other normalisation and unknown tokens.

    Args:
        vocabulary: That of `ids`.
        text: What was tokenised.
        ids: Its tokens.

    Returns:
        One place per token. A token that no character of the text is aligned with gets an empty one.
    """
    spelled, ends = bytearray(), []
    for index in ids:
        spelled += vocabulary.texts[index] or b""
        ends.append(len(spelled))
    content = text.encode("utf-8", "surrogatepass")
    # Where each byte boundary of the spelled text falls in the text.
    boundary = np.zeros(len(spelled) + 1, np.int64)
    for tag, start, end, text_start, text_end in Levenshtein.opcodes(bytes(spelled).lower(), content.lower()):
        steps = np.arange(end - start + 1)
        boundary[start : end + 1] = text_start + (steps if tag in ("equal", "replace") else 0)
        boundary[end] = text_end
    # From bytes to characters: a byte inside of a character belongs to it.
    character = np.cumsum([(byte & 0xC0) != 0x80 for byte in content] + [True])
    found, start = [], 0
    for index, end in zip(ids, ends, strict=True):
        first, last = int(boundary[start]), int(boundary[end])
        span = (int(character[first]) - 1, int(character[last - 1])) if last > first else (first, first)
        found.append(_trim(vocabulary, text, index, *span))
        start = end
    return found
