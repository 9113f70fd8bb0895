"""From JSON lines to batches: answers, masks, lengths, packing; bad lines are told with their number."""

import json

import pytest
import torch
from training_tools import (
    WORDS,
    flags,
    make_family,
    make_model,
    make_tokenizer,
    next_letter_rows,
    train,
    uneven_rows,
    write_rows,
)

from ivl_vllm import cli
from ivl_vllm.training.data import read_examples, split_examples


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


def answer_texts(trainer):
    """For each row of the training data: (what is shown, what is trained)."""
    tokenizer = trainer.processing_class
    pairs = []
    for row in trainer.train_dataset:
        trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        pairs.append((tokenizer.decode(row["input_ids"]), tokenizer.decode(trained)))
    return pairs


def test_only_the_answers_are_trained_and_every_assistant_turn_is(family, tmp_path):
    from ivl_vllm.training.command import prepare

    turns = [("user", "a ?"), ("assistant", "b"), ("user", "c ?"), ("assistant", "d e")]
    data = write_rows(tmp_path / "two.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    trainer = prepare(flags(family, tmp_path / "out", f"--data={data}")).trainer
    assert answer_texts(trainer) == [
        ("question : a ? answer : b <eos>", "b <eos>"),
        ("question : a ? answer : b <eos> question : c ? answer : d e <eos>", "d e <eos>"),
    ]


def test_messages_and_prompt_completion_give_the_same_labels(family, tmp_path):
    from ivl_vllm.training.command import prepare

    kinds = {kind: next_letter_rows(12, 5, kind) for kind in ("messages", "plain")}
    kinds["pairs"] = [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in kinds["messages"]]
    rows = {}
    for kind, content in kinds.items():
        data = write_rows(tmp_path / f"{kind}.jsonl", content)
        dataset = prepare(flags(family, tmp_path / "out", f"--data={data}")).trainer.train_dataset
        rows[kind] = [(row["input_ids"], row["labels"]) for row in dataset]
    assert rows["messages"] == rows["plain"] == rows["pairs"]


TOOL_TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t['name'] }} {% endfor %}{% endif %}{% for m in messages %}"
    "{% if 'tool_calls' in m %}answer : {% for c in m['tool_calls'] %}{{ c['function']['name'] }} "
    "{% for k, v in c['function']['arguments'].items() %}{{ k }} {{ v }} {% endfor %}{% endfor %}{{ eos_token }} "
    "{% elif m['role'] == 'assistant' %}answer : {{ m['content'] }} {{ eos_token }} "
    "{% else %}{{ m['role'] }} : {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ lead | default('') }}answer :{% endif %}"
)


def test_tools_calls_and_template_settings_reach_the_template_as_they_are_in_the_line(tmp_path):
    """Nothing is lost that the first line lacks, and no message gets the fields of another."""
    from ivl_vllm.training.command import prepare

    root = make_family(tmp_path)
    words = [*WORDS, "user", "tool", "f", "g", "x", "y", "1", "None", "quick"]
    for name in ("base", "small"):
        make_model(root / name, make_tokenizer(words, TOOL_TEMPLATE))
    ask = {"role": "user", "content": "a"}

    def call(name, arguments):
        function = {"name": name, "arguments": arguments}
        return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}

    empty = {"role": "assistant", "content": "j", "tool_calls": []}
    rows = [
        {"messages": [ask, {"role": "assistant", "content": "b", "tool_calls": None}]},
        {
            "messages": [ask, call("f", {"x": "c"})],
            "tools": [{"name": "f"}],
            "chat_template_kwargs": {"lead": "quick "},
        },
        {
            "prompt": [ask],
            "completion": [
                call("g", {"y": 1}),
                {"role": "tool", "content": "d"},
                {"role": "assistant", "content": "e"},
            ],
            "tools": json.dumps([{"name": "g"}]),
        },
        # As OpenAI's API has them, and as vLLM hands them to the template: arguments as objects, null as empty text.
        {"messages": [ask, call("f", '{"x": "h"}'), {"role": "tool", "content": "i"}, call("g", ""), ask, empty]},
    ]
    data = write_rows(tmp_path / "tools.jsonl", rows)
    texts = answer_texts(prepare(flags(root, tmp_path / "out", f"--data={data}")).trainer)
    assert texts == [
        ("user : a answer : b <eos>", "b <eos>"),
        # The setting is of the prompt alone, so what is trained begins where the two part.
        ("f user : a answer : f x c <eos>", "answer : f x c <eos>"),
        ("g user : a answer : g y 1 <eos>", "g y 1 <eos>"),
        ("g user : a answer : g y 1 <eos> tool : d answer : e <eos>", "e <eos>"),
        ("user : a answer : f x h <eos>", "f x h <eos>"),
        ("user : a answer : f x h <eos> tool : i answer : g <eos>", "g <eos>"),
        ("user : a answer : f x h <eos> tool : i answer : g <eos> user : a answer : j <eos>", "j <eos>"),
    ]


def test_a_conversation_that_the_template_refuses_is_told_with_its_line(family, tmp_path, capsys):
    template = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    make_model(tmp_path / "base", make_tokenizer(template=template + "{{ m['content'] }} {% endfor %}"))
    rows = next_letter_rows(3, 0)
    rows[2]["messages"].insert(0, {"role": "system", "content": "a"})
    words = (f"--base={tmp_path / 'base'}", f"--data={write_rows(tmp_path / 'd.jsonl', rows)}")
    assert cli.main(["train", *flags(family, tmp_path / "never", *words)]) == 2
    error = capsys.readouterr().err
    assert (
        "ivl train: error: --data, line 3: the chat template does not take this conversation: no system role" in error
    )


def test_a_conversation_that_the_template_stumbles_over_is_told_with_its_line(family, tmp_path, capsys):
    template = "{% for m in messages %}{{ m['role'] + m['content'] + m['name'] }}{% endfor %}"
    make_model(tmp_path / "base", make_tokenizer(template=template))
    rows = [{"messages": [{**m, "name": "a"} for m in row["messages"]]} for row in next_letter_rows(3, 0)]
    rows[1]["messages"][0]["name"] = 7
    words = (f"--base={tmp_path / 'base'}", f"--data={write_rows(tmp_path / 'd.jsonl', rows)}")
    assert cli.main(["train", *flags(family, tmp_path / "never", *words)]) == 2
    assert "--data, line 2: the chat template does not take this conversation: " in capsys.readouterr().err


def test_plain_completions_learn_to_stop(family, tmp_path):
    from ivl_vllm.training.command import prepare

    data = write_rows(tmp_path / "plain.jsonl", [{"prompt": "question : a ? answer :", "completion": " b"}])
    trainer = prepare(flags(family, tmp_path / "out", f"--data={data}")).trainer
    row = trainer.train_dataset[0]
    assert row["labels"][-1] == trainer.processing_class.eos_token_id


CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], %s}\n'
CALL = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": %s}]}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a",\n', "line 2: no JSON"),
        ("[1, 2]\n", "line 1: expected a JSON object"),
        ('{"prompt": ' + 100_000 * "[", "line 1: too deeply nested"),
        ('{"text": "a"}\n', "line 1: expected `messages`, or `prompt` and `completion`; got text"),
        ('{"prompt": "a", "completion": " "}\n', "line 1: the completion is empty"),
        ('{"prompt": "", "completion": "b"}\n', "line 1: the prompt is empty"),
        ('{"prompt": "a", "completion": 3}\n', "line 1: prompt and completion must both be"),
        ('\n{"messages": [{"role": "user", "content": "a"}]}\n', "line 2: no assistant message"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "line 1: the first message is the assistant's"),
        ('{"messages": [{"role": "user"}]}\n', "line 1: the user message of `messages` needs `content`"),
        ('{"messages": [{"content": "a"}]}\n', "needs a `role`"),
        ('{"messages": []}\n', "must be a list of at least one message"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}\n',
            "line 1: the assistant's message is empty",
        ),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "user", "content": "b"}]}\n',
            "starts with role 'user'",
        ),
        (
            '{"prompt": "a", "completion": "b"}\n'
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
            "line 2: messages, but line 1 is plain text",
        ),
        ('{"prompt": "a", "completion": 3}\n', "the prompt is text and the completion is the number 3"),
        ('{"prompt": ["a"], "completion": null}\n', "the prompt is a list and the completion is null"),
        ('{"prompt": "a", "completon": "b"}\n', "; got completon, prompt; did you mean 'completion' by 'completon'?"),
        (
            '{"prompt": "a", "completion": "b", "chat_template_kwargs": 1}\n',
            "line 1: `chat_template_kwargs` must be an object, not the number 1",
        ),
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a \\ud83d", "completion": "b"}\n',
            "line 2: '\\ud83d' is half a",
        ),
        ('{"message": []}\n', "; got message; did you mean 'messages' by 'message'?"),
        ('{"prompt": "a", "completion": "b", "tools": [{}]}\n', "line 1: `tools` is for a chat template"),
        (CHAT % '"tool": [], "id": 7', "line 1: a field that is not read; did you mean 'tools' by 'tool'? Rename it"),
        (CHAT % '"chat_template_args": {}', "did you mean 'chat_template_kwargs' by 'chat_template_args'?"),
        (CHAT % '"system": "be kind"', "line 1: `system` is not read beside messages: make it the first of them"),
        (CHAT.replace("assistant", "assitant") % '"id": 1', "the role 'assitant'; did you mean 'assistant'?"),
        (
            CHAT.replace('"content": "b"', '"content": "b", "tool_call": []') % '"id": 1',
            "line 1: a field of a message that is not read; did you mean 'tool_calls' by 'tool_call'?",
        ),
        (CHAT.replace('"b"', '"b", "weight": 0') % '"id": 1', "no assistant message with a `weight` other than 0"),
        (CHAT.replace('"b"', '"b", "weight": 0.5') % '"id": 1', "the `weight` of a message is 0.5; expected 0 or 1"),
        (CALL % '[{"name": "f", "arguments": {"n": NaN}}]', "line 1: nan is no number that JSON has: write it as text"),
        (CHAT % '"chat_template_kwargs": {"n": Infinity}', "line 1: inf is no number that JSON has: write it as text"),
        (CHAT % '"tools": [{"n": 1e999}]', "line 1: inf is no number that JSON has: write it as text"),
        (CHAT % f'"id": {"9" * 5000}', "line 1: no JSON (Exceeds the limit"),
        (CALL % '[{"function": "f"}]', "line 1: a tool call's `function` must be an object with the `name` of a tool"),
        (CALL % '[{"function": {"name": 5}}]', "line 1: a tool call's `function` must be an object with the `name`"),
        (CHAT % '"tools": "get_weather"', "line 1: `tools` is text, but no JSON: Expecting value"),
        (CHAT % '"tools": {"a": 1}', "line 1: `tools` must be a list of tools, not an object"),
        (
            CHAT % '"chat_template_kwargs": {"add_generation_prompt": true}',
            "line 1: `chat_template_kwargs` has 'add_generation_prompt', which is set for every line",
        ),
        (
            CHAT.replace('"b"', "5") % '"tools": []',
            "line 1: the assistant message of `messages` needs `content` as text",
        ),
        (CALL % "3", "line 1: `tool_calls` must be a list of objects"),
        (CALL % '[{"function": {"name": "f", "arguments": "{"}}]', "of the tool call 'f' are text, but no JSON"),
        (
            CALL % '[{"name": "f", "arguments": [1]}]',
            "line 1: the arguments of the tool call 'f' must be an object, not",
        ),
    ],
)
def test_bad_lines_are_told_with_their_number(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        read_examples(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_turns_of_weight_0_are_read_and_not_trained(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    turns += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1}]
    (example,) = read_examples(write_rows(tmp_path / "d.jsonl", [{"messages": turns}]))
    assert [message["content"] for message in example["prompt"]] == ["a", "b", "c"]
    assert example["completion"][0]["content"] == "d"


def test_fields_for_other_tools_may_stand_in_a_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(CHAT % '"tools": [], "tool_names": [], "message_id": 1, "source": 18446744073709551616')
    assert [example["line"] for example in read_examples(path)] == [1]


def test_bytes_that_are_not_utf8_and_missing_files(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        read_examples(path)
    with pytest.raises(ValueError, match="no such file"):
        read_examples(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        read_examples(tmp_path)


def test_split_keeps_the_turns_of_a_conversation_together(tmp_path):
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    examples = read_examples(write_rows(tmp_path / "d.jsonl", [{"messages": turns}] * 10))
    train_part, held_out = split_examples(examples, 0.3, seed=0)
    assert (len(train_part), len(held_out)) == (14, 6)
    assert not {e["line"] for e in train_part} & {e["line"] for e in held_out}
    with pytest.raises(ValueError, match="leaves one side empty"):
        split_examples(examples, 0.01, seed=0)


def test_answers_that_are_cut_off_are_counted_and_told(family, tmp_path, capsys):
    rows = [*next_letter_rows(3, 0), {"messages": [{"role": "user", "content": "a " * 30}]}]
    rows[-1]["messages"].append({"role": "assistant", "content": "b"})
    data = write_rows(tmp_path / "long.jsonl", rows)
    train(family, tmp_path / "out", f"--data={data}", "--max_length=16", "--max_steps=1")
    out = capsys.readouterr().out
    assert "--data: 1 of 4 examples are longer than --max_length 16, the first in line 4: 0 truncated, 1 dropped" in out
    assert "trainable parameters: " in out


def long_rows():
    rows = [{"prompt": "question : a ? answer :", "completion": " b"} for _ in range(3)]
    rows.append({"prompt": "question : a ? answer :", "completion": " " + "c " * 20})
    rows.append({"prompt": "question : " + "a " * 20 + "? answer :", "completion": " d"})
    return rows


@pytest.mark.parametrize(
    ("more", "told", "lengths"),
    [
        ((), "1 truncated, 1 dropped (no answer token within it)", [8, 8, 8, 12]),
        (("--truncation_mode=keep_end",), "2 truncated, 0 dropped", [8, 8, 8, 12, 12]),
        (("--long_examples=drop",), "0 truncated, 2 dropped", [8, 8, 8]),
    ],
)
def test_long_examples_are_counted_and_cut_or_dropped(family, tmp_path, capsys, more, told, lengths):
    from ivl_vllm.training.command import prepare

    data = write_rows(tmp_path / "long.jsonl", long_rows())
    trainer = prepare(flags(family, tmp_path / "out", f"--data={data}", "--max_length=12", *more)).trainer
    assert [len(row["input_ids"]) for row in trainer.train_dataset] == lengths
    assert all(len(row["input_ids"]) == len(row["labels"]) for row in trainer.train_dataset)
    expected = f"--data: 2 of 5 examples are longer than --max_length 12, the first in line 4: {told}"
    assert expected in capsys.readouterr().out


def test_a_template_that_leaves_no_answer_is_told_with_its_line(family, tmp_path, capsys):
    template = "{% for m in messages %}{{ m['role'] == 'user' and m['content'] or '' }}{% endfor %}"
    make_model(tmp_path / "base", make_tokenizer(template=template))
    words = flags(family, tmp_path / "never", f"--base={tmp_path / 'base'}")
    assert cli.main(["train", *words]) == 2
    err = capsys.readouterr().err
    assert "ivl train: error: --data, line 1: the chat template leaves out the answer's text" in err


@pytest.mark.parametrize("where", ["answer", "all"])
def test_packing_gives_the_loss_and_gradient_of_unpacked_examples(family, tmp_path, where):
    from ivl_vllm.training.command import prepare

    data = write_rows(tmp_path / "uneven.jsonl", uneven_rows(24))
    results = {}
    for packing in ("false", "true"):
        words = (
            f"--data={data}",
            f"--packing={packing}",
            "--max_length=40",
            "--batch_size=24",
            f"--norm_positions={where}",
        )
        trainer = prepare(flags(family, tmp_path / packing, *words)).trainer
        trainer.model.eval()
        batch = trainer.data_collator(list(trainer.train_dataset))
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        results[packing] = (len(trainer.train_dataset), loss, [p.grad for p in trainer.model.parameters()])
    assert (results["false"][0], results["true"][0]) == (24, 7)
    torch.testing.assert_close(results["true"][1], results["false"][1], rtol=1e-5, atol=1e-6)
    for packed, plain in zip(results["true"][2], results["false"][2]):
        torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5)


def test_packed_training_and_evaluation_run_through(family, tmp_path, capsys):
    words = ("--packing=true", "--max_length=40", "--eval_fraction=0.2", "--max_steps=2", "--logging_steps=1")
    trainer = train(family, tmp_path / "packed", *words)
    plain = train(family, tmp_path / "plain", *words[1:])
    first = [next(e["eval_loss"] for e in t.state.log_history if "eval_loss" in e) for t in (trainer, plain)]
    assert all(torch.isfinite(torch.tensor(first)))
    assert cli.main(["train", *flags(family, tmp_path / "x", "--packing=true", "--packing_strategy=wrapped")]) == 2
    assert "--packing_strategy wrapped lets examples see each other" in capsys.readouterr().err


def test_packed_rows_may_be_padded(family, tmp_path):
    train(family, tmp_path / "out", "--packing=true", "--pad_to_multiple_of=8", "--max_steps=1")


def test_packing_is_refused_for_a_network_that_sees_the_example_before(family, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from ivl_vllm.training.command import prepare
    from ivl_vllm.training.preparation import check_packing

    trainer = prepare(flags(family, tmp_path / "out", "--packing=true", "--max_length=40")).trainer

    class Leaky(GPT2LMHeadModel):
        """As a network behaves that goes by the order of the row alone, e.g. a recurrent one."""

        def forward(self, input_ids, position_ids=None, **kwargs):
            return super().forward(input_ids, output_hidden_states=True)

    with pytest.raises(ValueError, match="the network of --init, .* sees from one packed example into the next"):
        check_packing(Leaky(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2)), trainer.data_collator, "--init")


def test_nulls_and_fields_of_other_tools_are_no_faults(tmp_path):
    row = {
        "messages": [
            {"role": "system", "content": "be kind", "weight": None, "tool_calls": None, "reason": "x"},
            {"role": "user", "content": "a", "weight": None, "tool_calls": None, "logprob": -1.5},
            {"role": "assistant", "content": "b", "weight": None, "tool_calls": None, "thinking": None},
        ],
        "system": "be kind",
        "tool": None,
        "toolset": "x",
    }
    (example,) = read_examples(write_rows(tmp_path / "rows.jsonl", [row]))
    assert example["prompt"] == [
        {"role": "system", "content": "be kind", "reason": "x"},
        {"role": "user", "content": "a", "logprob": -1.5},
    ]
    assert example["completion"] == [{"role": "assistant", "content": "b"}]
    assert read_examples(write_rows(tmp_path / "plain.jsonl", [{"prompt": "a", "completion": "b", "tool": "x"}]))


@pytest.mark.parametrize("processes", [1, 2])
def test_numbers_reach_the_template_as_they_are(family, tmp_path, processes):
    """`datasets` would round them to ten decimals."""
    from ivl_vllm.training.command import prepare

    numbers = [2.5e-12, 3.141592653589793, 6.02214076e23, 12345678901234567890123, -0.0, 0.1, 7]
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{% if m['role'] == 'user' %}question : {% else %}answer : "
        "{% for part in (n, m['tool_calls'][0]['arguments']['n']) %}{{ 'a' if part | string == s else 'b' }} "
        "{% endfor %}{{ m['tool_calls'][0]['name'] }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}answer :{% endif %}"
    )
    rows = [
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": None, "tool_calls": [{"name": "c", "arguments": {"n": number}}]},
            ],
            "chat_template_kwargs": {"n": number, "s": str(number)},
        }
        for number in numbers
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    more = (f"--data={data}", f"--chat_template_path={tmp_path / 't.jinja'}", f"--dataset_num_proc={processes}")
    trainer = prepare(flags(family, tmp_path / "out", *more)).trainer
    assert [trained for _, trained in answer_texts(trainer)] == ["a a c"] * len(numbers)


def test_held_out_rows_all_count_where_training_drops_its_last_batch(family, tmp_path):
    held_out, data = (
        write_rows(tmp_path / "e.jsonl", uneven_rows(13)),
        write_rows(tmp_path / "d.jsonl", uneven_rows(32)),
    )
    more = (f"--data={data}", f"--eval_data={held_out}", "--max_steps=2", "--eval_strategy=steps", "--eval_steps=2")
    whole = train(family, tmp_path / "whole", *more, "--per_device_eval_batch_size=4")
    more = (*more, "--dataloader_drop_last=true", "--load_best_model_at_end=true", "--save_strategy=steps")
    for size in (4, 64):
        found = train(family, tmp_path / str(size), *more, "--save_steps=2", f"--per_device_eval_batch_size={size}")
        (losses, expected) = (
            [log["eval_loss"] for log in run.state.log_history if "eval_loss" in log] for run in (found, whole)
        )
        assert losses == pytest.approx(expected, rel=1e-5) and losses
