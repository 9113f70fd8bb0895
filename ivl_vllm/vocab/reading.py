"""The way in: as which ids the value network reads a text that the base's tokenizer has cut out."""

from __future__ import annotations

from functools import cached_property

from ivl_vllm.vocab.vocabulary import Vocabulary, spell


class Reader:
    """Cuts single tokens of another vocabulary into this one's, as they would be cut in the middle of a text.

    The tokenizer's front door would put a space before them (SentencePiece), take one away (WordPiece) or refuse half
    of a character. So its model is asked directly, past normalisers and added spaces; where it has none, or knows no
    way, the longest known pieces are taken from left to right, which is WordPiece's own rule.
    """

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        backend = getattr(vocabulary.tokenizer, "backend_tokenizer", None)
        self._model = getattr(backend, "model", None) if vocabulary.kind in ("bytes", "pieces") else None
        self._rules = getattr(backend, "pre_tokenizer", None) if vocabulary.kind == "bytes" else None
        self._normalizer = getattr(backend, "normalizer", None) if vocabulary.kind == "words" else None

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._vocabulary.by_text), default=1)

    def pieces(self, text: bytes) -> list[int]:
        """The ids for `text`, at least one; "unknown" where nothing fits."""
        if self._normalizer is not None:
            text = self._normalise(text)
        return self._ask_model(text) or self._longest_first(text) or [self._vocabulary.blank]

    def _normalise(self, text: bytes) -> bytes:
        try:
            return self._normalizer.normalize_str(text.decode("utf-8")).encode("utf-8")
        except UnicodeDecodeError:
            return text

    def _ask_model(self, text: bytes) -> list[int] | None:
        spelled = spell(text, self._vocabulary.kind) if self._model is not None and text else None
        if spelled is None:
            return None
        return [token.id for part in self._cut(text, spelled) for token in self._model.tokenize(part)]

    def _cut(self, text: bytes, spelled: str) -> list[str]:
        """As the rules cut that come before the model, such as digits in threes; whole where they would add a space."""
        try:
            parts = [part for part, _ in self._rules.pre_tokenize_str(text.decode("utf-8"))] if self._rules else []
        except UnicodeDecodeError:
            parts = []
        return parts if "".join(parts) == spelled else [spelled]

    def _longest_first(self, text: bytes) -> list[int]:
        by_text, ids, start, lost = self._vocabulary.by_text, [], 0, False
        while start < len(text):
            for end in range(min(len(text), start + self._longest), start, -1):
                if (index := by_text.get(text[start:end])) is not None:
                    ids.append(index)
                    start, lost = end, False
                    break
            else:
                # A space alone is no loss: word lists have no token for it.
                if not lost and text[start : start + 1] != b" ":
                    ids.append(self._vocabulary.blank)
                    lost = True
                start += 1
        return ids
