"""What a map is worth: how much of a text it covers, what it leaves out, and where it is known to go wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ivl_vllm.vocab.alignment import places
from ivl_vllm.vocab.corpus import in_batches, read_corpus
from ivl_vllm.vocab.vocab_map import VocabMap
from ivl_vllm.vocab.vocabulary import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORST = 12
_NUMBERS = ("7301946528", "123", "2026", "100", "10")


def describe_map(
    vocab_map: VocabMap,
    base_tokenizer: PreTrainedTokenizerBase,
    value_tokenizer: PreTrainedTokenizerBase,
    corpus: str | Path | Iterable[str] | None = None,
) -> str:
    """A few lines for people: coverage, the worst tokens without a partner, how tokens are read, warnings.

    Args:
        vocab_map: A map with `unmapped="keep"`, which alone tells what has a partner.
        base_tokenizer: The base's.
        value_tokenizer: The value network's.
        corpus: Texts, or a file; with it coverage is also weighted by frequency.
    """
    if vocab_map.unmapped != "keep":
        raise ValueError(f"unmapped is {vocab_map.unmapped!r}: only a map with 'keep' tells what has a partner")
    base, value = read_vocabulary(base_tokenizer), read_vocabulary(value_tokenizer)
    tokens = sum(spelling is not None for spelling in base.spellings)
    alone = [i for i in np.flatnonzero(vocab_map.columns < 0).tolist() if base.spellings[i] is not None]
    counts = _count(base_tokenizer, corpus)
    rows = {"coverage": f"{vocab_map.coverage:.1%} of {tokens:,} base tokens have a partner"}
    if total := counts.total():
        met = total - sum(counts[index] for index in alone)
        rows["in the corpus"] = f"{met / total:.1%} of {total:,} tokens, counted as often as they occur"
    several = int((np.diff(vocab_map.piece_starts) > 1).sum())
    rows["read as"] = f"{vocab_map.base_vocab - several:,} as one value token, {several:,} as the mean of several"
    # Without a corpus by id: most tokenizers give low ids to what is frequent.
    worst = [index for index in sorted(alone, key=lambda index: (-counts[index], index)) if counts[index] or not total]
    if worst:
        shown = (f"{_show(base, i)}{f' ×{counts[i]:,}' if total else ''}" for i in worst[:_WORST])
        rows["without partner"] = ", ".join(shown) + (f", and {len(worst) - _WORST:,} more" if worst[_WORST:] else "")
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {text}" for name, text in rows.items()]
    lines += [f"warning: {text}" for text in _end_warnings(value, vocab_map) + _digit_warnings(base, value)]
    if vocab_map.base_fingerprint == vocab_map.value_fingerprint:
        lines.append("note: both tokenizers give the same ids to the same tokens, so no map is needed")
    return "\n".join(lines)


def _end_warnings(value: Vocabulary, vocab_map: VocabMap) -> list[str]:
    """One line if no base token stands for what ends the value network's answers."""
    role = "turn_end" if "turn_end" in value.roles else "eos"
    index = value.roles.get(role)
    if index is None or (vocab_map.columns == index).any():
        return []
    advice = "; the base's tokenizer has no such end, for want of a chat template" if role == "turn_end" else ""
    return [
        f"no base token stands for {value.spellings[index]!r}, which ends the value network's answers{advice}. Steered "
        "answers will not end where it says so"
    ]


def _digit_warnings(base: Vocabulary, value: Vocabulary) -> list[str]:
    """One line if the two tokenizers cut numbers differently, with the first number that shows it."""
    for number, base_cut, value_cut in zip(_NUMBERS, _cuts(base), _cuts(value), strict=True):
        if base_cut != value_cut:
            return [
                f"the tokenizers group digits differently: {number} is {base_cut} to the base and {value_cut} to the "
                "value network. Expect arithmetic to suffer; a value network that groups digits like the base is better"
            ]
    return []


def _cuts(vocabulary: Vocabulary) -> list[str]:
    found = places(vocabulary, list(_NUMBERS))
    return [
        "|".join(number[start:end] for _, start, end in row if end > start)
        for number, row in zip(_NUMBERS, found, strict=True)
    ]


def _count(tokenizer: PreTrainedTokenizerBase, corpus: str | Path | Iterable[str] | None) -> Counter[int]:
    counts: Counter[int] = Counter()
    for batch in in_batches(read_corpus(corpus) if corpus is not None else ()):
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            counts.update(ids)
    return counts


def _show(vocabulary: Vocabulary, index: int) -> str:
    text = vocabulary.texts[index]
    if text is None:
        return vocabulary.specials.get(index, repr(vocabulary.spellings[index]))
    return repr(text.decode("utf-8", "backslashreplace"))
