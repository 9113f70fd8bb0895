"""Answers that a chat template drops, with templates that models are published with (as TRL has them)."""

import json
from pathlib import Path

import pytest
import trl
from training_tools import TEMPLATE, WORDS, flags, make_family, make_model, make_tokenizer, write_rows

from ivl_vllm import cli
from ivl_vllm.training.data import read_examples
from ivl_vllm.training.rendering import check_rendered

PUBLISHED = Path(trl.__file__).parent / "chat_templates"
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}


def ask(**answer):
    return {"messages": [{"role": "user", "content": "question"}, {"role": "assistant", **answer}]}


def check(tmp_path, template, *rows):
    text = TEMPLATE if template is None else (PUBLISHED / f"{template}.jinja").read_text()
    examples = read_examples(write_rows(tmp_path / "d.jsonl", list(rows)))
    tokenizer = make_tokenizer(template=text)
    tokenizer.bos_token = "<eos>"  # which Llama's asks for
    return check_rendered(examples, tokenizer, "--data")


@pytest.mark.parametrize("template", ["qwen3", "gemma3", "llama3", "llama3_1", "qwen2_5", "phi3", None])
def test_answers_of_text_are_there(tmp_path, template):
    assert check(tmp_path, template, ask(content="an answer,\n\n  with two lines "), ask(content="b")) == []


@pytest.mark.parametrize("template", ["gemma3", "phi3", "llama3"])
@pytest.mark.parametrize("content", [None, "let me see"])
def test_calls_that_a_template_leaves_out_are_refused(tmp_path, template, content):
    """What is left would teach to say nothing where a tool is wanted."""
    with pytest.raises(ValueError, match="^--data, line 2: .* leaves out the tool call 'get_weather'.*_template_path"):
        check(tmp_path, template, ask(content="b"), ask(content=content, tool_calls=[CALL]))


def test_calls_that_a_template_renders_are_trained(tmp_path):
    assert check(tmp_path, "qwen3", ask(content=None, tool_calls=[CALL])) == []


def test_text_that_a_template_leaves_out_beside_a_call_is_told(tmp_path):
    rows = (ask(content=None, tool_calls=[CALL]), ask(content="let me see", tool_calls=[CALL]))
    what = "the chat template leaves out the text beside a tool call: 1 of 2 answers, the first in line 2"
    assert check(tmp_path, "llama3_1", *rows) == [f"warning: --data: {what}"]
    assert check(tmp_path, "qwen3", *rows) == []


@pytest.mark.parametrize("answer", ["<answer>42</answer>", "<think>because</think><answer>42</answer>", "<"])
def test_answers_that_begin_as_the_served_prompt_ends_are_there(tmp_path, answer):
    """It ends with `<think>`, and the one that is trained with what comes before."""
    check(tmp_path, "deepseek_r1_distill", ask(content=answer))


def test_text_that_a_template_leaves_out_is_refused(tmp_path):
    """Of templates that look for a list of parts."""
    with pytest.raises(ValueError, match="line 1: the chat template leaves out the answer's text, so that an empty"):
        check(tmp_path, "idefics3", ask(content="b"))


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_read_under_either_name(tmp_path, name):
    row = ask(content="therefore", **{name: "because"})
    (example,) = read_examples(write_rows(tmp_path / "d.jsonl", [row]))
    assert example["completion"][0]["reasoning"] == example["completion"][0]["reasoning_content"] == "because"
    assert check(tmp_path, "qwen3", row) == []
    warning = "warning: --data: the chat template leaves out the reasoning: 1 of 2 answers, the first in line 2"
    assert check(tmp_path, "llama3", ask(content="b"), row) == [warning]


def test_a_prompt_that_is_rendered_otherwise_than_when_asked_is_told(tmp_path):
    """The served prompt ends with the beginning of a thought, the trained one does not."""
    found = check(tmp_path, "deepseek_r1_distill", ask(content="<think>because</think>\n\ntherefore"))
    assert [note.split(": ")[2] for note in found] == [
        "the chat template leaves out the reasoning",
        "the chat template renders the prompt otherwise before an answer than where it asks for one",
    ]


def test_settings_that_a_template_does_not_know_are_told(tmp_path):
    row = ask(content="therefore") | {"chat_template_kwargs": {"enable_thinking": False}}
    misspelt = ask(content="therefore") | {"chat_template_kwargs": {"enable_thinkin_": False}}
    assert check(tmp_path, "qwen3", row) == []
    what = "the chat template has no 'enable_thinkin_', of `chat_template_kwargs`"
    assert check(tmp_path, "qwen3", row, misspelt) == [f"warning: --data: {what}: 1 of 2 answers, the first in line 2"]


def test_a_run_tells_and_refuses(tmp_path, capsys):
    family = make_family(tmp_path)
    for name in ("base", "small"):
        make_model(family / name, make_tokenizer([*WORDS, "because"]))
    rows = [ask(content="b"), ask(content="a", reasoning="because")]
    words = flags(family, tmp_path / "out", f"--data={write_rows(tmp_path / 'd.jsonl', rows)}", "--max_steps=1")
    assert cli.main(["train", *words]) == 0
    assert "the chat template leaves out the reasoning: 1 of 2 answers, the first in line 2" in capsys.readouterr().out
    rows.append(ask(content=None, tool_calls=[CALL]))
    held_out = write_rows(tmp_path / "e.jsonl", rows)
    assert cli.main(["train", *flags(family, tmp_path / "never", f"--eval_data={held_out}")]) == 2
    assert "held-out data, line 3: the chat template leaves out the tool call 'get_weather'" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_tools_are_rendered_as_vllm_renders_them(tmp_path):
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam

    tools = [
        {"function": {"parameters": {"b": 1, "a": 2}, "name": "f", "unknown": 1}},
        {"type": "function", "function": {"strict": True, "name": "g", "description": "d"}},
    ]
    (example,) = read_examples(write_rows(tmp_path / "d.jsonl", [ask(content="b") | {"tools": tools}]))
    served = [ChatCompletionToolsParam(**tool).model_dump() for tool in tools]
    assert example["tools"] == json.dumps(served)
