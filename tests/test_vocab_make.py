"""Maps between real kinds of tokenizers, trained on the spot."""

import random

import numpy as np
import pytest
from vocab_kinds import TEXT, all_kinds, from_pieces, from_words, train_bytes

from ivl_vllm.vocab import INPUTS, METHODS
from ivl_vllm.vocab.alignment import places, places_without_offsets
from ivl_vllm.vocab.corpus import read_corpus
from ivl_vllm.vocab.make import fill_unmapped, make_vocab_map
from ivl_vllm.vocab.report import describe_map
from ivl_vllm.vocab.vocabulary import read_vocabulary

KINDS = ("bytes", "bpe", "unigram", "wordpiece", "python")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return all_kinds(tmp_path_factory.mktemp("kinds"))


def ids_of(tokenizer, *tokens):
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


def pieces_of(made, index):
    return made.pieces[made.piece_starts[index] : made.piece_starts[index + 1]].tolist()


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


NEAREST = [
    (" colour", " color", True),
    (" walks", " walk", True),
    (" walk", " walks", False),  # Four letters decide too little.
    (" gardens", " garden", True),
    ("The", "the", True),
    (" PARIS", " Paris", True),
    (" cat", " cats", False),
    (" later", " latter", False),
    (" likely", " unlikely", False),
    (" Colour", " color", False),
    (" garden", "gardens", False),
    (" room12", " room13", False),
    (" room1", " rooms1", False),
    (" garden(", " gardens)", False),
    (" garden.", " gardens.", True),
]


@pytest.mark.parametrize(("left", "right", "partners"), NEAREST)
def test_what_nearest_takes_for_the_same(left, right, partners):
    base, value = from_words([left]), from_words([right])
    made = make_vocab_map(base, value, "nearest")
    index = len(base) - 1
    assert made.columns[index] == (len(value) - 1 if partners else -1)
    assert make_vocab_map(base, value, "exact").columns[index] == -1
    assert made.coverage == (1.0 if partners else pytest.approx(256 / 257))


def test_numbers_never_stand_for_numbers():
    numbers = [str(number) for number in range(100, 400)]
    words = [f"version{number}release" for number in range(100, 400)]
    base, value = from_words(numbers[::2] + words[::2]), from_words(numbers[1::2] + words[1::2])
    corpus = [" ".join(numbers + words)] * 2
    for method in METHODS:
        made = make_vocab_map(base, value, method, corpus=corpus)
        assert (made.columns[256:] == -1).all()


def test_each_word_has_its_own_limit():
    # Both are looked up together: one letter in five is two of fourteen, three of fifteen.
    base = from_words(["abcdefghijklmn", "abcdefghijklmno"])
    for ending, expected in (("xyzno", [-1, 256]), ("xyzn", [-1, -1]), ("xymn", [256, 256])):
        made = make_vocab_map(base, from_words([f"abcdefghij{ending}"]), "nearest")
        assert made.columns[256:].tolist() == expected, ending


def test_nearest_prefers_the_longer_shared_beginning():
    base = from_words([" organised"])
    for near, far in ((" organises", " organized"), (" organized", " organises")):
        value = from_words([near, far])
        assert make_vocab_map(base, value, "nearest").columns[-1] == ids_of(value, "Ġorganises")[0]


def distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, before = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def plain_nearest(word, candidates):
    """The rule, one pair at a time."""
    found = []
    for index, other in candidates:
        edits = distance(word, other)
        letters = sum(map(str.isalpha, word))
        begins = next((i for i, (x, y) in enumerate(zip(word, other)) if x != y), min(len(word), len(other)))
        same_frame = [c for c in word if not c.isalpha()] == [c for c in other if not c.isalpha()]
        if word.casefold() == other.casefold():
            found.append((0, edits, -begins, index))
        elif same_frame and edits <= letters // 5 and begins >= len(word) - letters // 3:
            found.append((1, edits, -begins, index))
    return min(found)[-1] if found else -1


def test_nearest_is_the_rule_for_every_pair():
    draw = random.Random(0)

    def word():
        stem = "".join(draw.choice(["ba", "ban", "da", "ra", "ra", "na", "Na"]) for _ in range(draw.randint(1, 5)))
        return draw.choice(["", " "]) + stem + draw.choice(["", "", "s", "ed", "1", ".", "é"])

    base, value = (from_words(dict.fromkeys(word() for _ in range(700))) for _ in range(2))
    made, exact = (make_vocab_map(base, value, method).columns for method in ("nearest", "exact"))
    texts = [text.decode("utf-8", "replace") for text in read_vocabulary(value).texts]
    candidates = [(index, text) for index, text in enumerate(texts) if "\ufffd" not in text]
    checked = 0
    for index, text in enumerate(read_vocabulary(base).texts):
        if exact[index] < 0:
            assert made[index] == plain_nearest(text.decode(), candidates), text
            checked += 1
    assert checked > 100 and (made >= 0).sum() > (exact >= 0).sum() + 50


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram", "wordpiece"])
def test_places_without_offsets_are_the_tokenizers_own(kinds, kind):
    vocabulary = read_vocabulary(kinds[kind])

    def words(found):
        # Where a lone space stands, tokenizers do not tell alike.
        return [place for place in found if vocabulary.texts[place[0]].strip()]

    # Lower-casing changes whole runs of letters; the Unigram model knows no Q.
    texts = TEXT if kind == "unigram" else [*TEXT, "QUICKER WALKERS"]
    for text, found in zip(texts, places(vocabulary, texts)):
        ids = [index for index, _, _ in found]
        assert words(places_without_offsets(vocabulary, text, ids)) == words(found)
        assert words(places_without_offsets(vocabulary, text, ids[2:])) != words(found)


def test_aligned_pairs_what_stands_at_the_same_place():
    base = from_words([" walking", " PARIS", " xyz", " 12", " 1234", " unseen"])
    value = from_pieces(["walki", "##ng", "PAR", "##IS", "x", "##yz", "1", "##2", "123", "##4", "unsee", "##n"])
    assert value("walking PARIS xyz 12 1234").input_ids == ids_of(
        value, "walki", "##ng", "PAR", "##IS", "x", "##yz", "1", "##2", "123", "##4"
    )
    made = make_vocab_map(base, value, "aligned", corpus=["a walking in PARIS xyz", "in 12 or 1234 walking"])
    columns = dict(zip([" walking", " PARIS", " xyz", " 12", " 1234", " unseen"], made.columns[256:].tolist()))
    walking, paris = ids_of(value, "walki", "PAR")
    # The first piece holds a third of xyz, half of 12; of 1234 it holds more, but is another number.
    assert columns == {" walking": walking, " PARIS": paris, " xyz": -1, " 12": -1, " 1234": -1, " unseen": -1}
    exact = make_vocab_map(base, value, "exact")
    assert (exact.columns[256:] == -1).all() and np.array_equal(exact.columns[:256], made.columns[:256])
    # Another corpus, another map.
    assert (make_vocab_map(base, value, "aligned", corpus=[" xyz unseen"]).columns[256:-1] == -1).all()


def test_places_hold_where_the_text_was_changed():
    tokenizer = from_words(["ab", "cd"])
    first, second = ids_of(tokenizer, "ab", "cd")
    vocabulary = read_vocabulary(tokenizer)
    assert places_without_offsets(vocabulary, "wxyz", [first, second]) == [(first, 0, 2), (second, 2, 4)]
    assert places_without_offsets(vocabulary, "abé cd", [first, second]) == [(first, 0, 3), (second, 4, 6)]
    assert places_without_offsets(vocabulary, "ab", [first, second]) == [(first, 0, 2), (second, 2, 2)]


class Slow:
    """A tokenizer as if it were written in Python: no Rust behind it that tells how it spells, no offsets."""

    is_fast = False

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        if name == "backend_tokenizer":
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def __call__(self, text, **settings):
        assert not settings.get("return_offsets_mapping")
        return self._tokenizer(text, **settings)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "wordpiece"])
@pytest.mark.parametrize("method", METHODS)
def test_tokenizers_written_in_python_give_the_same_map(kinds, kind, method):
    other = kinds["bpe" if kind == "bytes" else "bytes"]
    fast = make_vocab_map(other, kinds[kind], method, corpus=TEXT)
    slow = make_vocab_map(Slow(other), Slow(kinds[kind]), method, corpus=TEXT)
    assert np.array_equal(slow.columns, fast.columns)
    # Pieces are cut longest first there, which for byte pairs is another rule.
    assert (slow.pieces == fast.pieces).mean() > 0.9


def test_aligned_sees_through_normalisation(kinds):
    made = make_vocab_map(kinds["bytes"], kinds["wordpiece"], "aligned", corpus=TEXT)
    upper, lower = ids_of(kinds["bytes"], "ĠPar")[0], ids_of(kinds["wordpiece"], "paris")[0]
    assert made.columns[upper] == lower
    assert make_vocab_map(kinds["bytes"], kinds["wordpiece"], "exact").columns[upper] == -1


def test_aligned_wants_a_space_before_both_or_neither(kinds):
    # To the one the space belongs to the word, to the other it is a token that comes before it.
    (spaced,) = ids_of(kinds["bytes"], "Ġqu")
    assert kinds["bytes"]("a qu").input_ids[-1] == spaced
    assert kinds["bpe"].tokenize("a qu")[-2:] == ["▁", "qu"]
    assert make_vocab_map(kinds["bytes"], kinds["bpe"], "aligned", corpus=["a qu"]).columns[spaced] == -1


def test_aligned_needs_text(tmp_path):
    tokenizer = from_words(["a"])
    with pytest.raises(ValueError, match="--method aligned learns from text: give it with --corpus"):
        make_vocab_map(tokenizer, tokenizer, "aligned")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="has no text in it"):
        make_vocab_map(tokenizer, tokenizer, "aligned", corpus=tmp_path / "empty.txt")


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


def test_only_exact_partners_spare_a_token_its_pieces():
    base, value = from_words([" gardens"]), from_words([" garden"])
    read = {choice: pieces_of(make_vocab_map(base, value, "nearest", choice), len(base) - 1) for choice in INPUTS}
    spelled = value(" gardens").input_ids
    assert len(spelled) == len(" gardens")
    assert read == {"nearest": [len(value) - 1], "last": spelled[-1:], "mean": spelled}


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
    plain.write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        list(read_corpus(plain))
    with pytest.raises(ValueError, match="cannot be read"):
        list(read_corpus(tmp_path / "absent.txt"))
