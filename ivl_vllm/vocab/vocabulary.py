"""What the tokens of a vocabulary stand for: bytes and roles, which can be compared across kinds of tokenizers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("bos", "eos", "unk", "pad", "cls", "sep", "mask")
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ANSWER = "ANSWER"


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's printable character for each byte, as GPT-2 chose them."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + index): byte for index, byte in enumerate(moved)}


_BYTE_OF = _byte_alphabet()
_CHARACTER_OF = {byte: character for character, byte in _BYTE_OF.items()}


@dataclass(frozen=True)
class Vocabulary:
    """One tokenizer's tokens.

    Attributes:
        tokenizer: The tokenizer itself.
        kind: How tokens are spelled: "bytes" (byte-level alphabet), "pieces" (SentencePiece, ▁ for a space and <0x0A>
            for a byte), "words" (WordPiece and word lists: what begins a word is unmarked) or "plain" (as it is).
        spellings: By id, the token as the vocabulary has it; None where an id has no token.
        texts: By id, the bytes that the token stands for, a leading space included; None for special tokens and where
            an id has no token.
        variants: Id -> a second text that the token stands for too.
        specials: Id -> content of the special tokens.
        roles: Role ("bos", "eos", …, "turn_end") -> id.
    """

    tokenizer: PreTrainedTokenizerBase
    kind: str
    spellings: list[str | None]
    texts: list[bytes | None]
    variants: dict[int, bytes] = field(default_factory=dict)
    specials: dict[int, str] = field(default_factory=dict)
    roles: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.spellings)

    @cached_property
    def by_text(self) -> dict[bytes, int]:
        """Text -> id. Of several ids the lowest, and a byte-fallback token only where there is nothing else."""
        found: dict[bytes, int] = {}
        fallback: dict[bytes, int] = {}
        for index, text in enumerate(self.texts):
            if text is not None:
                is_fallback = self.kind == "pieces" and _BYTE_FALLBACK.fullmatch(self.spellings[index])
                (fallback if is_fallback else found).setdefault(text, index)
        return {text: index for index, text in self.variants.items()} | fallback | found

    @cached_property
    def added(self) -> dict[str, int]:
        """Content -> id of the tokens that were added to the tokenizer's model, special or not."""
        return {token.content: index for index, token in self.tokenizer.added_tokens_decoder.items()}

    @property
    def blank(self) -> int:
        """The id that says least, for want of a better one."""
        for role in ("unk", "bos", "eos", "pad"):
            if role in self.roles:
                return self.roles[role]
        return next(index for index, spelling in enumerate(self.spellings) if spelling is not None)


def read_vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Reads all tokens of `tokenizer`, added ones included."""
    ids = tokenizer.get_vocab()
    spellings: list[str | None] = [None] * (max(ids.values()) + 1)
    for spelling, index in ids.items():
        spellings[index] = spelling
    added = tokenizer.added_tokens_decoder
    special_ids = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    # Those that were declared but never added are no tokens, and SentencePiece's runs of spaces, which transformers may
    # declare, are nothing special.
    specials = {i: spelling for i, spelling in enumerate(spellings) if i in special_ids and (spelling or "").strip("▁")}
    kind, continuation = _find_kind(tokenizer, spellings)
    plain = {index: spelling for index, spelling in enumerate(spellings) if spelling and index not in specials}
    texts: list[bytes | None] = [None] * len(spellings)
    for index, spelling in plain.items():
        # SentencePiece's own pieces of several spaces are added tokens too, and keep its mark for a space.
        is_added = index in added and kind != "pieces"
        texts[index] = _encode(added[index].content) if is_added else _text(spelling, kind, continuation)
    variants: dict[int, bytes] = {}
    if kind == "words":
        for index in _find_unspaced(tokenizer, [index for index in plain if texts[index].startswith(b" ")], spellings):
            variants[index], texts[index] = texts[index], texts[index][1:]
    roles = {role: getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    roles["turn_end"] = _find_turn_end(tokenizer, specials)
    roles = {role: index for role, index in roles.items() if index in specials}
    return Vocabulary(tokenizer, kind, spellings, texts, variants, specials, roles)


def spell(text: bytes, kind: str) -> str | None:
    """`text` in the characters of a "bytes" or "pieces" vocabulary; None where it cannot be written in them."""
    if kind == "bytes":
        return "".join(_CHARACTER_OF[byte] for byte in text)
    try:
        return text.decode("utf-8").replace(" ", "▁")
    except UnicodeDecodeError:
        return None


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(spelling: str, kind: str, continuation: str | None) -> bytes:
    if kind == "bytes" and all(character in _BYTE_OF for character in spelling):
        return bytes(_BYTE_OF[character] for character in spelling)
    if kind == "pieces":
        byte = _BYTE_FALLBACK.fullmatch(spelling)
        return bytes([int(byte[1], 16)]) if byte else _encode(spelling.replace("▁", " "))
    if kind == "words":
        is_continued = continuation and spelling.startswith(continuation) and len(spelling) > len(continuation)
        return _encode(spelling[len(continuation) :] if is_continued else f" {spelling}")
    return _encode(spelling)


def _find_unspaced(tokenizer: PreTrainedTokenizerBase, words: list[int], spellings: list[str | None]) -> list[int]:
    """Which of a "words" vocabulary's words need no space before them: where its tokenizer cuts, as at punctuation."""
    after_letter = tokenizer([f"a{spellings[index]}" for index in words], add_special_tokens=False)["input_ids"]
    return [index for index, ids in zip(words, after_letter, strict=True) if index in ids[1:]]


def _find_kind(tokenizer: PreTrainedTokenizerBase, spellings: list[str | None]) -> tuple[str, str | None]:
    """The kind, and for "words" the mark of a token that goes on with a word, if there is one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _guess_kind(tokenizer, spellings)
    parts = json.loads(backend.to_str())
    model = parts["model"]["type"]
    rest = json.dumps([parts["decoder"], parts["pre_tokenizer"], parts["normalizer"]], ensure_ascii=False)
    if '"ByteLevel"' in rest:
        return "bytes", None
    if "▁" in rest or '"Metaspace"' in rest or '"ByteFallback"' in rest:
        return "pieces", None
    if model == "WordPiece":
        return "words", parts["model"]["continuing_subword_prefix"]
    if model == "WordLevel" and '"Whitespace' in rest:
        return "words", None
    return "plain", None


def _guess_kind(tokenizer: PreTrainedTokenizerBase, spellings: list[str | None]) -> tuple[str, str | None]:
    """For tokenizers written in Python, which do not say how they spell."""
    if hasattr(tokenizer, "sp_model"):
        return "pieces", None
    for mark, found in (("Ġ", ("bytes", None)), ("▁", ("pieces", None)), ("##", ("words", "##"))):
        # A mark of the kind is on a good part of the tokens, of small vocabularies too; a few "▁" or "##" are text.
        if sum(spelling is not None and spelling.startswith(mark) for spelling in spellings) * 50 > len(spellings):
            return found
    return "plain", None


def _find_turn_end(tokenizer: PreTrainedTokenizerBase, specials: dict[int, str]) -> int | None:
    """The special token that the chat template puts after an answer."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    from jinja2 import TemplateError

    turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError):
        # Templates for other kinds of content; then there is no telling.
        return None
    if _ANSWER not in text:  # of templates that take content as a list
        return None
    tail = text.rpartition(_ANSWER)[2].lstrip()
    ends = [index for index, content in specials.items() if content and tail.startswith(content)]
    return max(ends, key=lambda index: len(specials[index]), default=None)
