"""Partners at the same places of a corpus, and the places themselves."""

import numpy as np
import pytest
from vocab_kinds import TEXT, from_pieces, from_words, ids_of

from ivl_vllm.vocab import METHODS
from ivl_vllm.vocab.alignment import places, places_without_offsets
from ivl_vllm.vocab.make import make_vocab_map
from ivl_vllm.vocab.vocabulary import read_vocabulary


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
