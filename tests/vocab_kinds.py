"""Tokenizers of the real kinds, trained on the spot and loaded by transformers' own code."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEXT = [
    "The quick brown fox jumps over the lazy dog, and says: hello world!",
    "She walks; he walked. They were walking to the garden (colour and color).",
    "In 2026 the number 123 plus 45 equals 168.",
    "naïve café, Zürich and 中国, 日本 are far.",
    "def f(x):\n    return x + 1",
    "Alice went to Paris in 1999, Bob to Berlin.",
]


def train_bytes(folder: Path, vocab_size: int = 400, text: list[str] = TEXT) -> PreTrainedTokenizerBase:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text * 4, trainer)
    return _save(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>"), folder)


def train_wordpiece(folder: Path, vocab_size: int = 300) -> PreTrainedTokenizerBase:
    """WordPiece, lower-casing, as BERT's."""
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        TEXT * 4, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    return _save(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names), folder)


def train_sentencepiece(folder: Path, kind: str) -> PreTrainedTokenizerBase:
    """A SentencePiece model as Llama ("bpe", with byte fallback), T5 ("unigram") or GPT-SW3 ("python") has it."""
    import sentencepiece

    folder.mkdir(parents=True)
    name, tokenizer_class = {
        "bpe": ("tokenizer", "LlamaTokenizer"),
        "unigram": ("spiece", "T5Tokenizer"),
        "python": ("spiece", "GPTSw3Tokenizer"),
    }[kind]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in TEXT * 4 for line in text.split("\n")),
        model_prefix=str(folder / name),
        vocab_size=380,
        hard_vocab_limit=False,
        model_type="unigram" if kind == "unigram" else "bpe",
        byte_fallback=kind != "unigram",
        pad_id=3,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    return AutoTokenizer.from_pretrained(folder, **({"extra_ids": 0} if kind == "unigram" else {}))


def from_words(words: Iterable[str], special: Iterable[str] = (), **names: str) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer whose tokens are the 256 bytes, `special` and `words`, in this order."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled = [level.pre_tokenize_str(word) for word in words]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special, *("".join(p for p, _ in s) for s in spelled)]
    ids = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def from_pieces(tokens: Iterable[str], at_punctuation: bool = True) -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer of these tokens, case kept, that cuts words at spaces and, if asked, at punctuation."""
    ids = {token: index for index, token in enumerate(["[UNK]", *tokens])}
    tokenizer = Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer() if at_punctuation else pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def _save(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def all_kinds(root: Path) -> dict[str, PreTrainedTokenizerBase]:
    """One tokenizer of each kind, by name; each has its folder of that name in `root`."""
    return {
        "bytes": train_bytes(root / "bytes"),
        "bpe": train_sentencepiece(root / "bpe", "bpe"),
        "unigram": train_sentencepiece(root / "unigram", "unigram"),
        "wordpiece": train_wordpiece(root / "wordpiece"),
        "python": train_sentencepiece(root / "python", "python"),
    }


def ids_of(tokenizer, *tokens):
    """The ids of tokens, by their spelling."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


def pieces_of(made, index):
    """The value ids as which a map has a base token read."""
    return made.pieces[made.piece_starts[index] : made.piece_starts[index + 1]].tolist()
