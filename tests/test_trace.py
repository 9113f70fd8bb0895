"""The trace of how far tokens were steered, from the engine's file to the picture."""

import json

import pytest
import torch
from parity import Request, engine, mismatches, run
from solved_reference import SolvedReference
from trace_lines import line

import ivl_vllm
from ivl_vllm.cli import main
from ivl_vllm.trace_file import Token, read_trace

PROMPT = list(range(20, 60))


def expected_rows(reference, prompt, output, weights):
    """Per output token: the base's choice and the divergence from it, by the reference."""
    ids = [*prompt, *output]
    before, after = (reference.logits(ids, w)[len(prompt) - 1 : -1].double().log_softmax(-1) for w in ({}, weights))
    return before.argmax(-1).tolist(), (after.exp() * (after - before)).sum(-1).tolist()


def test_traces_of_every_kind_of_weight(models, tmp_path, capsys):
    """Prompts in chunks, beside requests that ask for no trace; the picture is made of the file alone."""
    path = tmp_path / "trace.jsonl"
    values = {
        "math": {"model": str(models["value"])},
        "style": {"model": str(models["sliding"]), "minus": str(models["anti"])},
    }
    folders = {"math": models["value"], "style": (models["sliding"], models["anti"])}
    kinds = {
        "fixed": ({"math": 1.0, "style": -0.5}, "math=1.0,style=-0.5;trace=fixed"),
        "auto": ({"style": "auto"}, "auto:style;trace=auto"),
        "bounded": ({"math": 2.0, "max_kl": 0.25}, "2.0;max_kl=0.25;trace=bounded"),
        "none": ({}, "0;trace=none"),
        "bounded_nothing": ({}, "0;max_kl=0.25;trace=bounded_nothing"),
    }
    settings = ivl_vllm.engine_args(values=values, trace_file=str(path))
    with engine(models["base"], **settings, max_num_batched_tokens=32) as llm:
        run(llm, [Request(PROMPT, {"math": 1.0}, 1.0, {"max_tokens": 4})])
        assert not path.exists()  # nobody has asked
        requests = [Request(PROMPT, weights, ivl, {"max_tokens": 6}) for weights, ivl in kinds.values()]
        outputs = run(llm, [*requests, Request([7, 8], {}, 0, {"max_tokens": 9})])
    reference = SolvedReference(models["base"], **folders)
    assert not mismatches(reference, requests, outputs[:-1])
    traces = read_trace(str(path))
    assert set(traces) == set(kinds)
    for (name, (weights, _)), output in zip(kinds.items(), outputs):
        tokens = list(output.outputs[0].token_ids)
        found = traces[name]
        assert [token.token for token in found] == tokens
        choices, divergences = expected_rows(reference, PROMPT, tokens, weights)
        assert [token.base_token for token in found] == choices
        torch.testing.assert_close([token.kl for token in found], divergences, rtol=1e-3, atol=1e-4)
    assert all(token.weights == {"math": 1.0, "style": -0.5} and token.kl > 0 for token in traces["fixed"])
    assert all(
        token.weights == {} and token.kl < 1e-6 for name in ("none", "bounded_nothing") for token in traces[name]
    )
    assert all(0 < token.weights["math"] <= 2.0 and token.kl < 0.2501 for token in traces["bounded"])
    assert len({round(token.weights["style"], 4) for token in traces["auto"]}) > 3  # found anew for each token
    # No line says what the prompt was.
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line["token_before"] is None for line in lines if line["position"] == 0)

    for ending in ("html", "png"):
        picture = tmp_path / f"picture.{ending}"
        assert main(["trace", str(path), "--tokenizer", str(models["base"]), "-o", str(picture)]) == 0
        assert picture.stat().st_size > 1000
    text = (tmp_path / "picture.html").read_text()
    assert all(name in text for name in kinds) and text.count("; the base: ") == 30
    assert main(["trace", str(path), "--tokenizer", str(models["base"]), "--name", "who", "-o", "x.html"]) == 2
    assert "'who'" in capsys.readouterr().err


def test_the_last_line_of_a_position_counts_and_the_next_one_tells_its_token(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join([line(0, 9, None), line(0, 5, None), line(1, 6, 7), line(0, 3, None, "b")]))
    assert read_trace(str(path)) == {
        "a": [Token(7, 1, 0.5, {"math": 1.0}), Token(6, 1, 0.5, {"math": 1.0})],
        "b": [Token(3, 1, 0.5, {"math": 1.0})],
    }


def test_drafts_of_the_last_step_count_as_far_as_they_are_what_was_chosen(tmp_path):
    path = tmp_path / "trace.jsonl"
    first = [line(0, 5, None), line(1, 6, 9, draft=True), line(2, 7, 6, draft=True)]  # 9 was rejected for 5
    last = [line(1, 4, 5), line(2, 3, 4, draft=True), line(3, 2, 8, draft=True)]  # 4 was right, 8 was not
    path.write_text("\n".join(first + last))
    assert [token.token for token in read_trace(str(path))["a"]] == [5, 4, 3]


def test_requests_of_one_name_are_kept_apart(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join([line(0, 5, None), line(1, 6, 5), line(0, 8, None, request="s")]))
    traces = read_trace(str(path))
    assert {name: [token.token for token in tokens] for name, tokens in traces.items()} == {"a 1": [5, 6], "a 2": [8]}


@pytest.mark.parametrize(
    "text, told",
    [
        ("no json", "no JSON"),
        ('{"trace": "a", ', "no JSON"),  # cut off, but more follows
        ("[" * 100_000, "too deeply nested"),
        ("[]", "no JSON object"),
        ("{}", "has no 'trace'"),
        (line(0, 1, None, kl="x"), "'kl' is 'x': expected a number"),
        (line(0, 1, None, kl=None), "'kl' is None"),
        (line(0, 1, None, kl=10**400), "'kl' is 1000"),
        (line(0, "5", None), "'token' is '5': expected a whole number"),
        (line(0, -1, None), "'token' is -1"),
        (line(0, 10**30, None), "'token' is 1000"),
        (line(0, 1.0, None), "'token' is 1.0"),
        (line(0, 1, None, base_token=True), "'base_token' is True"),
        (line(0, 1, "x"), "'token_before' is 'x'"),
        (line(-1, 1, None), "'position' is -1"),
        (line(0, 1, None, draft=None), "'draft' is None: expected true or false"),
        (line(0, 1, None, weights=None), "'weights' is None: expected an object of names and numbers"),
        (line(0, 1, None, weights=[1.0]), "'weights' is [1.0]"),
        (line(0, 1, None, weights={"math": "1"}), "'weights' is {'math': '1'}"),
        (line(0, 1, None, name=None), "'trace' is None: expected text"),
        (line(0, 1, None, name=5), "'trace' is 5"),
        (line(0, 1, None, name="\ud800"), "'trace' is '\\ud800'"),
        (line(0, 1, None, request=[]), "'request' is []"),
        (line(0, 1, None, name="ä").replace("\\u00e4", "ä"), "not UTF-8"),
    ],
    ids=lambda value: value[:20],
)
def test_a_line_that_is_none_is_named(tmp_path, capsys, text, told):
    path = tmp_path / "trace.jsonl"
    path.write_text(line(0, 1, None) + "\n" + text + "\n" + line(1, 1, 1) + "\n", encoding="latin-1")
    assert main(["trace", str(path), "--tokenizer", "/unread", "-o", str(tmp_path / "x.html")]) == 2
    error = capsys.readouterr().err
    assert f"{path}, line 2: no line of a trace (" in error and told in error and error.count("\n") == 1


@pytest.mark.parametrize("cut", [1, 40, -2])
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, capsys, cut):
    path = tmp_path / "trace.jsonl"
    path.write_text(line(0, 5, None) + "\n\n  \n" + line(1, 6, 7)[:cut])
    assert [token.token for token in read_trace(str(path))["a"]] == [5]
    assert f"{path}, line 4, the last one, is cut off" in capsys.readouterr().err


@pytest.mark.parametrize("last", ["no trace", line(1, "x", 5)])
def test_a_last_line_that_is_not_only_cut_off_is_named(tmp_path, last):
    path = tmp_path / "trace.jsonl"
    path.write_text(line(0, 5, None) + "\n" + last)
    with pytest.raises(ValueError, match=r"trace\.jsonl, line 2: no line of a trace"):
        read_trace(str(path))


def test_blank_lines_are_none(tmp_path, capsys):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n" + line(0, 5, None) + "\n \n" + line(1, 6, 5) + "\n\n")
    assert [token.token for token in read_trace(str(path))["a"]] == [5, 6]
    assert capsys.readouterr().err == ""


def test_a_full_file_takes_no_more(tmp_path):
    from ivl_vllm.serving.trace import Trace, TracedRequest, _Row
    from ivl_vllm.steering import Steering

    path = tmp_path / "trace.jsonl"
    trace = Trace(str(path), max_bytes=400)
    row = _Row(0, TracedRequest(Steering(trace="a"), [], "r"), 0, None)
    logits = torch.zeros(1, 4)
    for _ in range(10):
        trace.write([row], logits, logits, [])
    assert 200 < path.stat().st_size <= 400
    assert all(json.loads(text)["trace"] == "a" for text in path.read_text().splitlines())


def test_a_file_that_cannot_be_written_harms_nobody(tmp_path):
    from ivl_vllm.serving.trace import Trace, TracedRequest, _Row
    from ivl_vllm.steering import Steering

    trace = Trace(str(tmp_path / "gone" / "trace.jsonl"))
    logits = torch.zeros(1, 4)
    for _ in range(2):
        trace.write([_Row(0, TracedRequest(Steering(trace="a"), [], "r"), 0, None)], logits, logits, [])
    (tmp_path / "gone").mkdir()
    trace.write([_Row(0, TracedRequest(Steering(trace="a"), [], "r"), 0, None)], logits, logits, [])
    assert not list((tmp_path / "gone").iterdir())  # it was said that nothing more is traced


def test_forbidden_tokens_have_no_part_in_the_divergence(tmp_path):
    """They are -inf before and after."""
    from ivl_vllm.serving.trace import Trace, TracedRequest, _Row
    from ivl_vllm.steering import Steering

    base, steered = (torch.tensor([[0.0, 1.0, float("-inf")]]) + torch.tensor([[0.0, d, d]]) for d in (0.0, 1.0))
    row = _Row(0, TracedRequest(Steering(trace="a"), [], "r"), 0, None)
    Trace(str(tmp_path / "trace.jsonl")).write([row], base, steered, [])
    found = json.loads((tmp_path / "trace.jsonl").read_text())["kl"]
    before, after = (logits[0, :2].log_softmax(-1) for logits in (base, steered))
    assert found == pytest.approx((after.exp() * (after - before)).sum().item(), rel=1e-5) and found > 0
