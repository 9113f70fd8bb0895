"""The map file: what is written is read back, and nothing else is accepted."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save
from vocab_kinds import from_words

from ivl_vllm.vocab.fingerprint import vocabulary_fingerprint
from ivl_vllm.vocab.vocab_map import VocabMap


def int32(*numbers):
    return np.array(numbers, np.int32)


def small_map(**changes):
    # Base token 0 has no partner, 1 has one, 2 gets the mean of the row and is read as two pieces.
    content = {
        "columns": int32(-1, 0, 3),
        "pieces": int32(0, 0, 1, 2),
        "piece_starts": int32(0, 1, 2, 4),
        "value_vocab": 3,
        "base_fingerprint": "b" * 64,
        "value_fingerprint": "v" * 64,
        "method": "exact",
        "input": "mean",
        "unmapped": "mean",
        "coverage": 1 / 3,
    }
    return VocabMap(**content | changes)


def test_a_saved_map_is_read_back(tmp_path):
    made = small_map()
    made.save(tmp_path / "map.safetensors")
    read = VocabMap.load(tmp_path / "map.safetensors")
    assert vars(read).keys() == vars(made).keys()
    for name, content in vars(made).items():
        assert np.array_equal(getattr(read, name), content), name
    assert (read.base_vocab, read.value_vocab, read.single) == (3, 3, False)
    assert small_map(pieces=int32(0, 1, 2), piece_starts=int32(0, 1, 2, 3)).single


def test_a_map_replaces_another_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "map.safetensors"
    small_map().save(path)
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        small_map(method="nearest").save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def current_umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": np.zeros(3, np.int64)}, r"columns is int64 of shape \[3\]"),
        ({"columns": np.zeros((3, 1), np.int32)}, r"columns is int32 of shape \[3, 1\]"),
        ({"columns": int32(-1, 0, 4)}, r"columns\[2\] is 4: it must lie between -1 and 3"),
        ({"columns": int32(-2, 0, 3)}, r"columns\[0\] is -2"),
        ({"pieces": int32(0, 0, 1, 3)}, r"pieces\[3\] is 3: it must lie between 0 and 2"),
        ({"pieces": int32(0, -1, 1, 2)}, r"pieces\[1\] is -1"),
        ({"piece_starts": int32(0, 1, 4)}, "piece_starts has 3 entries: it must have 4"),
        ({"piece_starts": int32(0, 1, 2, 3)}, "go from 0 to 4"),
        ({"piece_starts": int32(1, 1, 2, 4)}, "go from 0 to 4"),
        ({"piece_starts": int32(0, 2, 2, 4)}, "base token 1 has no piece"),
        ({"piece_starts": int32(0, 3, 2, 4)}, "base token 1 has no piece"),
        ({"columns": int32(), "piece_starts": int32(0), "pieces": int32()}, "a vocabulary is empty"),
        ({"method": "guess"}, "method is 'guess': use one of exact, nearest, aligned"),
        ({"unmapped": "zero"}, "unmapped is 'zero'"),
    ],
)
def test_impossible_maps_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_map(**changes)


def rewritten(path, tensors=None, metadata=None):
    """The file of `small_map` with other tensors or header entries (None: without)."""
    made = small_map()
    made.save(path)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"] | (metadata or {})
    arrays = {name: getattr(made, name) for name in ("columns", "pieces", "piece_starts")} | (tensors or {})
    path.write_bytes(
        save(
            {name: array for name, array in arrays.items() if array is not None},
            metadata={name: text for name, text in header.items() if text is not None},
        )
    )


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {"format": None}, "its format is None, not 'ivl_vocab_map'"),
        ({}, {"version": "2"}, "its version is '2', this ivl-vllm reads '1'"),
        ({"pieces": None}, {}, "it holds columns, piece_starts, not columns, pieces, piece_starts"),
        ({"other": np.zeros(1)}, {}, "it holds columns, other"),
        ({}, {"method": None}, "lacks or garbles 'method'"),
        ({}, {"value_vocab_size": "many"}, "lacks or garbles"),
        ({}, {"base_vocab_size": "4"}, "columns has 3 entries, its header says 4"),
        ({}, {"value_vocab_size": "2"}, r"columns\[2\] is 3"),
        ({"columns": np.zeros(3, np.float32)}, {}, "columns is float32"),
    ],
)
def test_files_that_are_no_map_are_refused(tmp_path, tensors, metadata, message):
    path = tmp_path / "map.safetensors"
    rewritten(path)
    VocabMap.load(path)
    rewritten(path, tensors, metadata)
    with pytest.raises(ValueError, match=message) as caught:
        VocabMap.load(path)
    assert str(caught.value).startswith(f"vocab_map {path}: ") and "ivl map-vocab --base" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", b"{}"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "map.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no safetensors file"):
        VocabMap.load(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"cannot be read \(No such file"):
        VocabMap.load(path)
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory"):
        VocabMap.load(tmp_path)


def test_a_map_knows_its_tokenizers():
    base, value, other = (from_words(words) for words in (["one"], ["two"], ["three"]))
    marks = {"base_fingerprint": vocabulary_fingerprint(base), "value_fingerprint": vocabulary_fingerprint(value)}
    made = replace(small_map(), **marks)
    made.check(base, value, "the map")
    with pytest.raises(ValueError, match="ivl: the map: it was made for another base tokenizer") as caught:
        made.check(other, value, "the map")
    assert "value tokenizer" not in str(caught.value)
    assert "ivl map-vocab --base BASE --value VALUE --method exact --input mean --unmapped mean" in str(caught.value)
    with pytest.raises(ValueError, match="it was made for another value tokenizer"):
        made.check(base, other, "the map")
    with pytest.raises(ValueError, match=r"another base tokenizer .* and it was made for another value tokenizer"):
        made.check(other, other, "the map")
    with pytest.raises(ValueError, match="made the other way round"):
        made.check(value, base, "the map")


def test_reading_a_map_needs_no_torch():
    code = (
        "import sys; import ivl_vllm.vocab.vocab_map; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'vllm', 'transformers', 'rapidfuzz')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
