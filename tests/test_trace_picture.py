"""`ivl trace`: the picture made of a trace's lines; no engine runs here."""

import html
import re
import warnings

import pytest
import torch
from trace_lines import drawn, line, lines_of, pixels, spans

from ivl_vllm.cli import main
from ivl_vllm.trace_view import MOST_ROWS, MOST_TOKENS, Token, texts


def test_what_each_token_adds_to_the_text(kinds):
    """Alone, first pieces of words lose their space, and parts of characters are no text."""
    text = "The quick brown fox walked to Zürich, 中国 and 😀."
    for name, tokenizer in kinds.items():
        ids = tokenizer(text, add_special_tokens=False).input_ids
        found = texts([Token(i, i, 0.0, {}) for i in ids], tokenizer)
        assert "".join(found) == tokenizer.decode(ids), name
        assert len(found) == len(ids) and sum(map(bool, found)) > 5
        assert found != [tokenizer.decode([i]) for i in ids]


@pytest.mark.parametrize("name, found", [("a", ["a 1", "a 2"]), ("a 2", ["a 2"]), ("b", ["b"])])
def test_a_name_stands_for_all_requests_that_shared_it(models, tmp_path, name, found):
    path, picture = tmp_path / "trace.jsonl", tmp_path / "picture.html"
    path.write_text("\n".join([line(0, 5, None), line(0, 8, None, request="s"), line(0, 3, None, "b")]))
    assert main(["trace", str(path), "--tokenizer", str(models["base"]), "--name", name, "-o", str(picture)]) == 0
    assert re.findall("<h3>(.*?)</h3>", picture.read_text()) == found


def test_a_character_of_several_tokens_has_the_colour_of_the_most_steered(kinds, tmp_path):
    tokenizer = kinds["bytes"]
    ids = tokenizer("ab 😀 cd").input_ids
    assert len(ids) == 10
    lines = lines_of(ids, [0, 0, 0, 5, 0, 0, 0, 0, 0, 0])
    lines[4] = line(4, ids[4], ids[3], base_token=1, kl=0)
    code, page = drawn(tmp_path, tokenizer.name_or_path, lines)
    found = {text: other for text, *other in spans(page) if text.strip()}
    assert code == 0 and set(found) == {"a", "b", "😀", "c", "d"}
    colour, is_other, title = found.pop("😀")
    assert colour == "rgba(214,69,65,1.000)" and is_other
    assert [told.split("; ")[1] for told in title.split("\n")] == ["5 nats", "0 nats", "0 nats", "0 nats"]
    assert all(other[:2] == ["rgba(214,69,65,0.000)", False] for other in found.values())

    assert drawn(tmp_path, tokenizer.name_or_path, lines, "picture.png")[0] == 0
    red = pixels(tmp_path / "picture.png")
    assert (abs(red - torch.tensor([214, 69, 65]).numpy() / 255).max(-1) < 0.005).sum() > 100


@pytest.mark.parametrize("text, shown", [("▁", " "), ("▁ a", "a"), ("a <0xF0>", "\N{REPLACEMENT CHARACTER}")])
def test_steering_of_a_token_without_text_is_seen(kinds, tmp_path, text, shown):
    """Llama's first space is no text; alone it is drawn as one. The last token is drawn whatever it is."""
    tokenizer = kinds["bpe"]
    ids = tokenizer.convert_tokens_to_ids(text.split())
    kls = [0.0] * len(ids)
    kls[-1 if text.startswith("a") else 0] = 3.0
    _, page = drawn(tmp_path, tokenizer.name_or_path, lines_of(ids, kls))
    assert {text: colour for text, colour, *_ in spans(page)}[shown] == "rgba(214,69,65,1.000)"


def test_the_end_of_a_line_has_a_colour(kinds, tmp_path):
    ids = kinds["bytes"]("a\nb").input_ids
    _, page = drawn(tmp_path, kinds["bytes"].name_or_path, lines_of(ids, [0.0, 2.0, 0.0]))
    assert ("⏎\n", "rgba(214,69,65,1.000)") in [found[:2] for found in spans(page)]


@pytest.mark.parametrize("ending", ["html", "png"])
def test_numbers_that_are_not_finite(kinds, tmp_path, capsys, ending):
    ids = kinds["bytes"]("a b c").input_ids
    lines = lines_of(ids, [float("nan"), 2.0, float("inf"), -1.0, 1e-320], weights={"m": float("-inf")})
    code, page = drawn(tmp_path, kinds["bytes"].name_or_path, lines, f"picture.{ending}")
    assert code == 0 and capsys.readouterr().err == ""
    if ending == "html":
        assert "full at 2 nats" in page and "not finite: the KL of 2 of the tokens" in page
        assert [colour for _, colour, *_ in spans(page)] == [f"rgba(214,69,65,{n}.000)" for n in (0, 1, 0, 0, 0)]
        titles = [title for *_, title in spans(page)]
        assert all("m not finite (-inf)" in title for title in titles)
        assert [" not finite (nan) nats" in title for title in titles] == [True, False, False, False, False]
        assert " not finite (inf) nats" in titles[2]


@pytest.mark.parametrize("kls", [[float("nan")] * 3, [-2.0, -1.0, 0.0]])
def test_nothing_to_colour(kinds, tmp_path, kls):
    code, page = drawn(tmp_path, kinds["bytes"].name_or_path, lines_of(kinds["bytes"]("a b").input_ids, kls))
    assert code == 0 and {colour for _, colour, *_ in spans(page)} == {"rgba(214,69,65,0.000)"}


@pytest.mark.parametrize(
    "text, told", [("a 中 b", "中"), ("a 😀 b", "😀"), ("a ש b", "ש"), ("a ع b", "ع"), ("a é b", "")]
)
def test_a_png_says_what_it_shows_wrong(kinds, tmp_path, capsys, text, told):
    """Arabic is in the font, but runs the other way."""
    ids = kinds["bytes"](text).input_ids
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code, _ = drawn(tmp_path, kinds["bytes"].name_or_path, lines_of(ids * 2, [0.0] * 2 * len(ids)), "picture.png")
    error = capsys.readouterr().err
    assert code == 0 and error.count("\n") == bool(told)
    if told:
        assert f"characters such as {told!r} (1 in all)" in error and f"-o {tmp_path / 'picture.html'}" in error


def test_a_png_has_a_most(kinds, tmp_path, capsys):
    tokenizer = kinds["bytes"].name_or_path
    many = lines_of([66] * MOST_TOKENS, [0.0] * MOST_TOKENS)
    one_more = line(0, 66, None, "b")
    assert drawn(tmp_path, tokenizer, [*many, one_more], "picture.png")[0] == 2
    error = capsys.readouterr().err
    assert f"{MOST_TOKENS + 1} tokens are too many for a PNG (at most {MOST_TOKENS})" in error
    assert "--name" in error and ".html" in error and error.count("\n") == 1
    assert drawn(tmp_path, tokenizer, [*many, one_more])[0] == 0
    assert drawn(tmp_path, tokenizer, [*many, one_more], "picture.png", ["--name", "b"])[0] == 0


def test_a_png_is_not_too_high(kinds, tmp_path, capsys):
    """Each trace takes two lines; a picture of more than 65,536 pixels is beyond older releases of matplotlib."""
    count = MOST_ROWS // 2 + 1
    lines = [line(0, 66, None, request=str(n)) for n in range(count)]
    assert drawn(tmp_path, kinds["bytes"].name_or_path, lines, "picture.png")[0] == 2
    assert f"{2 * count} lines of text are too many for a PNG" in capsys.readouterr().err


def test_what_lies_behind_the_end_is_grey(kinds, tmp_path):
    """And leaves the scale to the answer, unless that was not steered at all."""
    tokenizer = kinds["bytes"]
    ids = [*tokenizer("ab").input_ids, tokenizer.eos_token_id, *tokenizer("cd").input_ids, tokenizer.eos_token_id]
    end = html.escape(tokenizer.eos_token)
    code, page = drawn(tmp_path, tokenizer.name_or_path, lines_of(ids, [1.0, 0.5, 0.0, 4.0, 0.5, 0.0]))
    assert code == 0 and "grey: behind the first end token" in page and "full at 1 nats" in page
    assert [found[:2] for found in spans(page)] == [
        ("a", "rgba(214,69,65,1.000)"),
        ("b", "rgba(214,69,65,0.500)"),
        (end, "rgba(214,69,65,0.000)"),
        ("c", "rgba(128,128,128,0.800)"),
        ("d", "rgba(128,128,128,0.500)"),
        (end, "rgba(128,128,128,0.200)"),
    ]
    _, page = drawn(tmp_path, tokenizer.name_or_path, lines_of(ids, [0.0, 0.0, 0.0, 4.0, 2.0, 0.0]))
    assert "full at 4 nats" in page
    _, page = drawn(tmp_path, tokenizer.name_or_path, lines_of(ids[:3], [1.0, 0.5, 0.0]))
    assert "grey" not in page

    assert drawn(tmp_path, tokenizer.name_or_path, lines_of(ids, [0.0] * 6), "picture.png")[0] == 0
    grey = pixels(tmp_path / "picture.png")
    light = 1 - 0.2 * (1 - 128 / 255)
    assert (abs(grey - light).max(-1) < 0.005).sum() > 300


def test_a_tokenizer_that_lacks_a_token_is_named(kinds, tmp_path, capsys):
    name = kinds["python"].name_or_path
    assert drawn(tmp_path, name, [line(0, 5000, None)])[0] == 2
    assert f"--tokenizer is {name!r}: not that of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, told",
    [
        (["FILE", "-o", "x.pdf"], "end it in .html or .png"),
        (["/no/such/file", "-o", "x.png"], "cannot be read"),
        (["FILE", "-o", "/no/such/folder/x.html"], "cannot be written"),
    ],
)
def test_what_cannot_be_drawn_is_told(models, tmp_path, capsys, words, told):
    path = tmp_path / "trace.jsonl"
    path.write_text(line(0, 5, None))
    words = [str(path) if word == "FILE" else word for word in words]
    assert main(["trace", *words, "--tokenizer", str(models["base"])]) == 2
    assert told in capsys.readouterr().err
