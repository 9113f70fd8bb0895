"""A tiny value network with a tokenizer of its own, and random maps to the base's: every kind of entry occurs."""

import numpy as np
from tiny import make_model, make_tokenizer
from transformers import AutoTokenizer

from ivl_vllm.vocab.fingerprint import vocabulary_fingerprint
from ivl_vllm.vocab.vocab_map import VocabMap

VALUE_VOCAB = 290


def make_other(folder, seed=21):
    """A value network whose 290 tokens mean something else than the base's 320."""
    make_model(folder, "qwen2", seed=seed, vocab_size=VALUE_VOCAB + 6, tokenizer=False)
    make_tokenizer(folder, VALUE_VOCAB, ["another text altogether, with other words in it: alpha beta gamma delta"])
    return folder


def random_map(base, value, seed, pieces_at_most=3, unmapped=-1):
    """A map between the tokenizers of two folders: most columns have a partner, `unmapped` stands for the others."""
    ours, theirs = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(value)
    rng = np.random.default_rng(seed)
    size, value_vocab = len(ours), len(theirs)
    columns = rng.integers(0, value_vocab, size).astype(np.int32)
    columns[rng.random(size) < 0.3] = unmapped if unmapped >= 0 else -1
    counts = rng.integers(1, pieces_at_most + 1, size)
    return VocabMap(
        columns=columns,
        pieces=rng.integers(0, value_vocab, counts.sum()).astype(np.int32),
        piece_starts=np.concatenate([[0], counts.cumsum()]).astype(np.int32),
        value_vocab=value_vocab,
        base_fingerprint=vocabulary_fingerprint(ours),
        value_fingerprint=vocabulary_fingerprint(theirs),
        method="exact",
        input="mean" if pieces_at_most > 1 else "nearest",
        unmapped="keep" if unmapped < 0 else "mean",
        coverage=0.7,
    )
