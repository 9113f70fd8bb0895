"""How base tokens are read, what those without a partner get, and what is told of a map."""

import copy

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, GemmaTokenizer
from vocab_kinds import TEXT, from_words, ids_of, pieces_of, train_bytes

from ivl_vllm.vocab import INPUTS
from ivl_vllm.vocab.corpus import read_corpus
from ivl_vllm.vocab.make import fill_unmapped, make_vocab_map
from ivl_vllm.vocab.reading import Reader
from ivl_vllm.vocab.report import describe_map
from ivl_vllm.vocab.vocabulary import _find_turn_end, read_vocabulary


@pytest.mark.parametrize(("name", "given"), [("method", "guess"), ("input", "first"), ("unmapped", "zero")])
def test_unknown_choices_are_refused(name, given):
    tokenizer = from_words(["a"])
    with pytest.raises(ValueError, match=f"--{name} is '{given}': use one of "):
        make_vocab_map(tokenizer, tokenizer, **{name: given})


@pytest.mark.parametrize("value", ["bytes", "bpe", "unigram", "wordpiece", "python"])
def test_tokens_are_read_in_the_value_networks_own_pieces(kinds, value, tmp_path):
    base = train_bytes(tmp_path / "base", 700, [text.upper() for text in TEXT] + TEXT)
    texts, partners = read_vocabulary(base).texts, read_vocabulary(kinds[value]).texts
    made = {choice: make_vocab_map(base, kinds[value], "exact", choice) for choice in INPUTS}
    checked = 0
    for index, text in enumerate(texts):
        if text is None or made["mean"].columns[index] >= 0:
            continue
        pieces = pieces_of(made["mean"], index)
        assert pieces_of(made["last"], index) == pieces[-1:]
        (single,) = pieces_of(made["nearest"], index)
        assert single in pieces
        assert len(partners[single] or b"") == max(len(partners[piece] or b"") for piece in pieces)
        try:
            word = text.decode()
        except UnicodeDecodeError:
            continue
        # What begins with a space can go through the front door too, as the text's first word.
        if word[1:].isalpha() and word[0] == " " and kinds[value].unk_token_id not in pieces:
            front = kinds[value](word if value == "bytes" else word[1:], add_special_tokens=False).input_ids
            assert pieces == front, word
            checked += 1
    assert checked >= 10
    assert not made["mean"].single and made["last"].single and made["nearest"].single


def test_numbers_are_cut_by_the_rules_before_the_model(tmp_path):
    """Digits in threes, as Llama 3 has them, whatever longer numbers were learnt from text."""
    from tokenizers import Regex, pre_tokenizers

    numbers = ",".join(str(number) for number in range(1000, 1400))
    base = train_bytes(tmp_path / "base", 700, [numbers] * 3)
    value = train_bytes(tmp_path / "value", 700, [numbers] * 3)
    threes = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    inner = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    value.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([threes, inner])
    reader, checked = Reader(read_vocabulary(value)), 0
    for text in read_vocabulary(base).texts:
        if text is not None and text.isdigit() and len(text) == 4:
            assert reader.pieces(text) == value(text.decode(), add_special_tokens=False).input_ids
            checked += 1
    assert checked > 50


def test_a_template_without_the_answer_tells_no_end_of_a_turn(kinds):
    """One that takes content as a list begins with a special token, which is no end."""
    tokenizer = copy.deepcopy(kinds["bytes"])
    specials = {index: tokenizer.decode([index]) for index in tokenizer.all_special_ids}
    index, content = next(iter(specials.items()))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}" + content + "{% endfor %}"
    assert _find_turn_end(tokenizer, specials) == index
    tokenizer.chat_template = content + "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"
    assert _find_turn_end(tokenizer, specials) is None


def test_only_exact_partners_spare_a_token_its_pieces():
    base, value = from_words([" gardens"]), from_words([" garden"])
    read = {choice: pieces_of(make_vocab_map(base, value, "nearest", choice), len(base) - 1) for choice in INPUTS}
    spelled = value(" gardens").input_ids
    assert len(spelled) == len(" gardens")
    assert read == {"nearest": [len(value) - 1], "last": spelled[-1:], "mean": spelled}


def test_runs_of_spaces_that_sentencepiece_keeps_apart(tmp_path):
    """Gemma's: transformers makes added tokens of them, whose content has the mark for a space, not the space."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁▁", "▁▁▁▁", "▁", "x", "▁x"]
    pieces = GemmaTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[("▁", "▁"), ("▁▁", "▁▁"), ("▁", "x")]
    )
    pieces.add_tokens([AddedToken(token, normalized=False, special=False) for token in ("▁▁", "▁▁▁▁")])
    pieces.save_pretrained(tmp_path)
    pieces = AutoTokenizer.from_pretrained(tmp_path)
    level = from_words(["  ", "    ", " x"])
    assert pieces.tokenize("    x") == ["▁▁▁▁", "x"]
    for marked, spaces in (("▁▁", "ĠĠ"), ("▁▁▁▁", "ĠĠĠĠ"), ("▁x", "Ġx")):
        (here,), (there,) = ids_of(pieces, marked), ids_of(level, spaces)
        for base, value, index, partner in ((pieces, level, here, there), (level, pieces, there, here)):
            made = make_vocab_map(base, value, "exact", "mean")
            assert made.columns[index] == partner
            assert pieces_of(made, index) == [partner]


def test_parts_of_characters_are_read_as_bytes(kinds):
    made = make_vocab_map(kinds["bytes"], kinds["bpe"], "nearest", "mean")
    # "ĠæĹ" is a space and the first two of the three bytes of 日.
    (part,) = ids_of(kinds["bytes"], "ĠæĹ")
    assert made.columns[part] == -1
    assert pieces_of(made, part) == ids_of(kinds["bpe"], "▁", "<0xE6>", "<0x97>")
    # A Unigram model without byte fallback has no way to read it.
    assert kinds["unigram"].unk_token_id in pieces_of(
        make_vocab_map(kinds["bytes"], kinds["unigram"], input="mean"), part
    )


def test_columns_without_partner(kinds):
    base, value = kinds["bytes"], kinds["bpe"]
    kept = make_vocab_map(base, value)
    alone = kept.columns < 0
    assert 0 < alone.sum() < len(alone)
    filled = {name: make_vocab_map(base, value, unmapped=name) for name in ("mean", "first")}
    for name, made in filled.items():
        assert np.array_equal(made.columns[~alone], kept.columns[~alone])
        assert made.coverage == kept.coverage == (~alone).mean()
        assert np.array_equal(fill_unmapped(kept, base, value, name).columns, made.columns)
    assert (filled["mean"].columns[alone] == filled["mean"].value_vocab).all()
    texts, partners = read_vocabulary(base).texts, read_vocabulary(value).texts
    for index in np.flatnonzero(alone):
        assert texts[index].startswith(partners[filled["first"].columns[index]])
    with pytest.raises(ValueError, match="cannot be filled again"):
        fill_unmapped(filled["mean"], base, value, "first")
    with pytest.raises(ValueError, match="another value tokenizer"):
        fill_unmapped(kept, base, kinds["unigram"], "first")


def test_ids_without_a_token_stay_alone():
    base = from_words(["hello"])
    base.add_tokens(["later"])
    holes = from_words(["hello"])
    vocabulary = base.get_vocab()
    # As a tokenizer whose added tokens do not follow one another.
    holes.get_vocab = lambda: {token: index + 5 * (token == "later") for token, index in vocabulary.items()}
    made = make_vocab_map(holes, base, unmapped="mean")
    assert made.base_vocab == len(base) + 5
    assert made.columns[len(base) - 1 : -1].tolist() == [-1] * 5
    assert (np.diff(made.piece_starts) == 1).all()
    assert made.coverage == 1.0


def test_report(kinds):
    base, value = kinds["bytes"], kinds["bpe"]
    made = make_vocab_map(base, value, "exact", "mean")
    corpus = [" walk walk hello"]
    ids = base(corpus[0]).input_ids
    told = dict(line.split("  ", 1) for line in describe_map(made, base, value, corpus).splitlines()[:4])
    told = {name.strip(): text.strip() for name, text in told.items()}
    met = sum(made.columns[index] >= 0 for index in ids)
    assert 0 < met < len(ids)
    assert told["coverage"] == f"{(made.columns >= 0).mean():.1%} of {len(base):,} base tokens have a partner"
    assert told["in the corpus"].startswith(f"{met / len(ids):.1%} of {len(ids)} tokens")
    several = (np.diff(made.piece_starts) > 1).sum()
    assert told["read as"] == f"{len(base) - several} as one value token, {several} as the mean of several"
    assert "' hello' ×1" in told["without partner"] and "walk" not in told["without partner"]
    assert "in the corpus" not in describe_map(made, base, value)
    # Both cut this number into digits; SentencePiece puts a space before it, which is not one of them.
    assert "7301946528" not in describe_map(made, base, value)
    with pytest.raises(ValueError, match="only a map with 'keep'"):
        describe_map(fill_unmapped(made, base, value, "mean"), base, value)


def test_numbers_that_are_cut_differently_are_warned_of():
    whole, split = from_words(["123", "hello"]), from_words(["hello"])
    warned = describe_map(make_vocab_map(whole, split), whole, split)
    assert "warning: the tokenizers group digits differently: 123 is 123 to the base and 1|2|3 to the value" in warned
    other = from_words(["world"])
    assert "warning" not in describe_map(make_vocab_map(split, other), split, other)
    assert "no map is needed" not in describe_map(make_vocab_map(split, other), split, other)
    assert "no map is needed" in describe_map(make_vocab_map(split, split), split, split)


def test_corpus_files(tmp_path):
    plain = tmp_path / "text.txt"
    plain.write_text("one\ntwo " + "x" * 5000)
    assert [len(text) for text in read_corpus(plain)] == [4, 4000, 1004]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "Hi"}], "n": 1}\n\n{"prompt": "a", "end": " b"}\n')
    assert list(read_corpus(rows)) == ["Hi", "a", " b"]
    rows.write_text('{"prompt": "a"}\n{')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: no JSON"):
        list(read_corpus(rows))
    rows.write_text('{"prompt": "a"}\n' + 100_000 * "[")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: too deeply nested"):
        list(read_corpus(rows))
    plain.write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        list(read_corpus(plain))
    with pytest.raises(ValueError, match="cannot be read"):
        list(read_corpus(tmp_path / "absent.txt"))
