"""A fingerprint that tells whether two tokenizers give the same ids to the same tokens."""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def vocabulary_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 over the sorted (id, token) pairs of `tokenizer.get_vocab()`, added tokens included.

    Padded rows of a model's output layer have no token and do not count, so models of one family that are padded
    differently share a fingerprint. Merges and normalisation do not count either: they decide which ids a text gets,
    not what an id means.

    Args:
        tokenizer: Any object with `get_vocab() -> dict[str, int]`.

    Returns:
        64 lower-case hexadecimal digits.
    """
    digest = hashlib.sha256()
    for index, token in sorted((index, token) for token, index in tokenizer.get_vocab().items()):
        encoded = token.encode("utf-8", "surrogatepass")
        # The length keeps the pairs apart: no token can imitate the border between two others.
        digest.update(f"{index}:{len(encoded)}:".encode())
        digest.update(encoded)
    return digest.hexdigest()
