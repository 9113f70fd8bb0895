"""Maps between real kinds of tokenizers, trained on the spot: exact partners and special tokens."""

import numpy as np
import pytest
from vocab_kinds import TEXT, from_pieces, from_words, ids_of, pieces_of

from ivl_vllm.vocab import INPUTS, METHODS
from ivl_vllm.vocab.make import make_vocab_map
from ivl_vllm.vocab.report import describe_map
from ivl_vllm.vocab.vocabulary import read_vocabulary

KINDS = ("bytes", "bpe", "unigram", "wordpiece", "python")


def test_the_kinds_are_what_they_are_called(kinds):
    found = {name: read_vocabulary(tokenizer).kind for name, tokenizer in kinds.items()}
    assert found == {"bytes": "bytes", "bpe": "pieces", "unigram": "pieces", "wordpiece": "words", "python": "pieces"}
    assert not kinds["python"].is_fast and kinds["bpe"].is_fast


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_of_tokens_join_to_what_was_tokenised(kinds, kind):
    vocabulary = read_vocabulary(kinds[kind])
    for text in TEXT[:3]:
        ids = kinds[kind](text, add_special_tokens=False).input_ids
        joined = b"".join(vocabulary.texts[index] for index in ids).decode()
        if kind == "wordpiece":
            # It does not say whether a bracket follows a space.
            joined, text = (content.lower().replace(" (", "(").replace("( ", "(") for content in (joined, text))
        # SentencePiece and WordPiece begin every text with a space.
        assert joined == text if kind == "bytes" else joined == f" {text}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_tokenizer_gives_the_identity(kinds, kind, method):
    for choice in INPUTS:
        made = make_vocab_map(kinds[kind], kinds[kind], method, choice, corpus=TEXT)
        everything = np.arange(max(kinds[kind].get_vocab().values()) + 1)
        assert np.array_equal(made.columns, everything)
        assert np.array_equal(made.pieces, everything) and made.single
        assert made.coverage == 1.0
    other = make_vocab_map(kinds[kind], kinds["bytes" if kind != "bytes" else "bpe"], method, corpus=TEXT)
    assert not np.array_equal(other.columns, np.arange(other.base_vocab)) and other.coverage < 1.0


# The same text in each kind's spelling; "ä" is the byte-level alphabet's character for the byte E4.
SAME = {
    "bytes": ["Ġwalk", "Ġthe", "al", ".", "Ċ", "ä", "Ġ", "<|endoftext|>"],
    "bpe": ["▁walk", "▁the", "al", ".", "<0x0A>", "<0xE4>", "▁", "</s>"],
    "python": ["▁walk", "▁the", "al", ".", "<0x0A>", "<0xE4>", "▁", "<|endoftext|>"],
    "unigram": ["▁walk", None, "al", ".", None, None, "▁", "</s>"],
    "wordpiece": ["walk", "the", "##al", ".", None, None, None, "[SEP]"],
}


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("value", KINDS)
def test_exact_partners_across_kinds(kinds, base, value):
    made = make_vocab_map(kinds[base], kinds[value], "exact")
    for left, right in zip(SAME[base], SAME[value]):
        if left is None:
            continue
        (index,) = ids_of(kinds[base], left)
        expected = -1 if right is None else ids_of(kinds[value], right)[0]
        assert made.columns[index] == expected, (left, right)
        if expected >= 0:
            assert pieces_of(made, index) == [expected]


def test_whether_a_words_punctuation_has_a_space_before_it_is_the_tokenizers_to_say():
    value = from_words([" .", " the"])
    dot, spaced, the = ids_of(value, ".", "Ġ.", "Ġthe")
    for at_punctuation, expected in ((True, [dot, dot, the]), (False, [spaced, dot, the])):
        base = from_pieces([".", "##.", "the"], at_punctuation)
        assert make_vocab_map(base, value, "exact").columns[1:].tolist() == expected
        back = make_vocab_map(value, base, "exact").columns[[dot, spaced, the]].tolist()
        assert back == ([1, 1, 3] if at_punctuation else [2, 1, 3])


def test_exact_is_symmetric_and_never_changes_the_text(kinds):
    for left, right in (("bytes", "bpe"), ("bpe", "unigram"), ("bytes", "unigram")):
        there = make_vocab_map(kinds[left], kinds[right], "exact").columns
        back = make_vocab_map(kinds[right], kinds[left], "exact").columns
        texts, partners = (read_vocabulary(kinds[name]).texts for name in (left, right))
        plain = [index for index in np.flatnonzero(there >= 0) if texts[index] is not None]
        assert len(plain) > 15
        for index in plain:
            assert partners[there[index]] == texts[index]
            assert texts[back[there[index]]] == texts[index]


TURNS = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}"


def special_pair():
    """A chat model's tokenizer, whose text ends with padding's name elsewhere, and a plain one."""
    chat = from_words(
        ["hello"],
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|tool|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    chat.chat_template = TURNS
    plain = from_words(["hello"], ["<s>", "<|tool|>", "<|endoftext|>"], bos_token="<s>", eos_token="<|endoftext|>")
    return chat, plain


def test_special_tokens_map_by_role():
    chat, plain = special_pair()
    made = make_vocab_map(plain, chat, "nearest", unmapped="first")
    start, tool, end = ids_of(plain, "<s>", "<|tool|>", "<|endoftext|>")
    # What ends the text here is named like the padding there: the role wins over the name.
    assert made.columns[end] == chat.eos_token_id != ids_of(chat, "<|endoftext|>")[0]
    assert made.columns[tool] == ids_of(chat, "<|tool|>")[0]
    assert made.columns[start] == -1
    back = make_vocab_map(chat, plain, "nearest", unmapped="first")
    turn_end, pad, turn_start = ids_of(chat, "<|im_end|>", "<|endoftext|>", "<|im_start|>")
    assert back.columns[turn_end] == plain.eos_token_id
    # Padding without a partner must not be raised together with the end of the text.
    assert back.columns[pad] == -1 and back.columns[turn_start] == -1
    # A marker that the value network does not have is read as its letters; one with a role is not.
    assert plain.decode(back.pieces[back.piece_starts[turn_start] : back.piece_starts[turn_start + 1]]) != ""
    assert make_vocab_map(chat, plain, input="mean").single is False
    assert pieces_of(make_vocab_map(chat, plain, input="mean"), pad) == [plain.bos_token_id]


def test_an_added_token_has_the_same_name_where_only_one_side_calls_it_special():
    special, plain = (from_words(["hello", "<tool_call>"][:n], ["<e>"], eos_token="<e>") for n in (1, 2))
    special.add_special_tokens({"additional_special_tokens": ["<tool_call>", "<e2>"]})
    added = from_words(["hello"], ["<e>"], eos_token="<e>")
    added.add_tokens(["<tool_call>", "<e2>"])
    for base, value in ((special, added), (added, special)):
        made = make_vocab_map(base, value, "exact")
        for token in ("<tool_call>", "<e2>"):
            assert made.columns[ids_of(base, token)[0]] == ids_of(value, token)[0]
    # The same letters as a word of the text are no marker.
    for base, value in ((special, plain), (plain, special)):
        assert make_vocab_map(base, value, "nearest").columns[ids_of(base, "<tool_call>")[0]] == -1
    # Nor does a mere name raise the end of the text.
    named = from_words(["hello"], ["<f>"], eos_token="<f>")
    named.add_tokens(["<e>"])
    made = make_vocab_map(named, added, "exact")
    assert made.columns[ids_of(named, "<e>")[0]] == -1 and made.columns[named.eos_token_id] == added.eos_token_id


def test_an_end_of_answers_that_no_base_token_stands_for_is_warned_of():
    chat, plain = special_pair()
    other = from_words(["hello", ""], ["<end_of_turn>", "<eos>"], eos_token="<eos>")
    other.chat_template = "{% for m in messages %}{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    told = describe_map(make_vocab_map(plain, other), plain, other)
    assert "warning: no base token stands for '<end_of_turn>', which ends the value network's answers" in told
    for base, value in ((chat, other), (chat, plain), (plain, chat)):
        assert "no base token stands for" not in describe_map(make_vocab_map(base, value), base, value)
    # A vocabulary may have a token without a letter.
    assert "without partner" in describe_map(make_vocab_map(other, plain), other, plain)


def test_one_token_of_many_roles_ends_the_text_for_the_end_alone():
    """GPT-2's manner: one token begins, ends and pads; its logit is the end's."""
    many = from_words(["hello"], ["<|e|>"], bos_token="<|e|>", eos_token="<|e|>", pad_token="<|e|>", unk_token="<|e|>")
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    base = from_words(["hello"], list(names.values()), **names)
    for method in ("exact", "nearest"):
        made = make_vocab_map(base, many, method)
        assert made.columns[base.eos_token_id] == many.eos_token_id
        for index in (base.bos_token_id, base.pad_token_id, base.unk_token_id):
            assert made.columns[index] == -1
            assert pieces_of(made, index) == [many.eos_token_id]  # read as what stands in its place there


def test_the_end_of_a_turn_is_its_own_role():
    chat, _ = special_pair()
    other = from_words(["hello"], ["<end_of_turn>", "<eos>", "<bos>"], bos_token="<bos>", eos_token="<eos>")
    other.chat_template = "{% for m in messages %}{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    made = make_vocab_map(other, chat)
    assert made.columns[ids_of(other, "<end_of_turn>", "<eos>")].tolist() == [chat.eos_token_id] * 2
    back = make_vocab_map(chat, other)
    assert back.columns[chat.eos_token_id] == ids_of(other, "<end_of_turn>")[0]
    # Without the template nothing tells, and the end of the text is the next best.
    other.chat_template = None
    assert make_vocab_map(chat, other).columns[chat.eos_token_id] == other.eos_token_id
