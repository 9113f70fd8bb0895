"""Partners at a small edit distance."""

import random

import pytest
from vocab_kinds import from_words, ids_of

from ivl_vllm.vocab import METHODS, matching
from ivl_vllm.vocab.make import make_vocab_map
from ivl_vllm.vocab.vocabulary import read_vocabulary

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


@pytest.mark.parametrize("chunk", [1 << 24, 1, 2000])
def test_nearest_is_the_rule_for_every_pair(monkeypatch, chunk):
    """However many words are compared at a time."""
    monkeypatch.setattr(matching, "_CHUNK", chunk)
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
