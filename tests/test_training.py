"""`ivl train`: the objective, the data, the trainer and the folder that it writes."""

import copy
import json
import math
import random

import pytest
import torch

from ivl_vllm.training.data import read_examples, split_examples
from ivl_vllm.training.ivl_config import IVLConfig
from ivl_vllm.training.objective import answer_positions, join_residual, residual_terms, value_norm
from ivl_vllm.vocab.fingerprint import vocabulary_fingerprint

WORDS = [*"abcdefghijkl", "question", "answer", ":", "?", "."]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}question : {{ m['content'] }} {% else %}"
    "answer : {{ m['content'] }} {{ eos_token }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}answer :{% endif %}"
)


def make_tokenizer(words=WORDS, template=TEMPLATE):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", chat_template=template
    )
    return tokenizer


def make_model(folder, tokenizer, hidden=32, seed=0, extra_rows=0, tied=True):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + extra_rows,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def next_letter_rows(count, seed, kind="messages"):
    """A tiny task: the answer is the letter after the one that is asked for."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        i = rng.randrange(11)
        if kind == "messages":
            turns = [{"role": "user", "content": f"{'abcdefghijkl'[i]} ?"}]
            turns.append({"role": "assistant", "content": "abcdefghijkl"[i + 1]})
            rows.append({"messages": turns})
        else:
            rows.append(
                {
                    "prompt": f"question : {'abcdefghijkl'[i]} ? answer :",
                    "completion": f" {'abcdefghijkl'[i + 1]} <eos>",
                }
            )
    return rows


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    tokenizer = make_tokenizer()
    make_model(root / "base", tokenizer, hidden=48, seed=1)
    make_model(root / "small", tokenizer, hidden=32, seed=2)
    write_rows(root / "train.jsonl", next_letter_rows(128, 0))
    write_rows(root / "held_out.jsonl", next_letter_rows(40, 1))
    return root


def flags(family, output, *more):
    given = {word.split("=")[0] for word in more}
    defaults = {
        "--base": family / "base",
        "--init": family / "small",
        "--data": family / "train.jsonl",
        "--output": output,
        "--batch_size": 16,
        "--lr": 3e-3,
        "--max_steps": 30,
        "--save_strategy": "no",
        "--disable_tqdm": "true",
    }
    return [*(f"{name}={value}" for name, value in defaults.items() if name not in given), *map(str, more)]


def train(family, output, *more):
    from ivl_vllm.training.command import prepare

    run = prepare(flags(family, output, *more))
    run.run()
    return run.trainer


# --- objective


@pytest.mark.parametrize("norm", ["l1", "l2", "none"])
@pytest.mark.parametrize("value_columns", [11, 8, 14])
def test_loss_and_gradient_equal_the_naive_ones(norm, value_columns):
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(5, 11, generator=generator)
    value = torch.randn(5, value_columns, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 3, 7, 2, 5])
    ce, size, joined = residual_terms(base, value, labels, norm)
    (ce.mean() + 0.7 * size.mean()).backward()

    naive = value.detach().double().requires_grad_(True)
    shared = min(11, value_columns)
    total = 0.0
    for row in range(5):
        z = [base[row, j].double() + (naive[row, j] if j < shared else 0.0) for j in range(11)]
        exponentials = torch.stack([torch.exp(entry) for entry in z])
        total = total - torch.log(exponentials[labels[row]] / exponentials.sum()) / 5
        columns = naive[row, :shared]
        if norm == "l1":
            total = total + 0.7 * sum(entry.abs() for entry in columns) / shared / 5
        elif norm == "l2":
            total = total + 0.7 * sum(entry**2 for entry in columns) / shared / 5
    total.backward()
    assert (ce.mean() + 0.7 * size.mean()).item() == pytest.approx(total.item(), rel=1e-5)
    torch.testing.assert_close(value.grad, naive.grad.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(joined[:, :shared], base[:, :shared] + value.detach()[:, :shared])
    assert joined.shape == (5, 11)


def test_join_leaves_the_base_where_the_value_has_no_column_and_works_in_fp32():
    joined = join_residual(torch.ones(2, 4, dtype=torch.bfloat16), torch.full((2, 3), 2.0, dtype=torch.float16))
    assert joined.dtype == torch.float32
    assert joined.tolist() == [[3.0, 3.0, 3.0, 1.0]] * 2


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="'l3'"):
        value_norm(torch.zeros(1, 2), "l3")


def test_answer_positions_are_the_ones_before_an_answer_token():
    labels = torch.tensor([[-100, -100, 5, 6, -100], [-100, 7, -100, -100, -100]])
    columns, mask = answer_positions(labels)
    assert columns.tolist() == [0, 1, 2]
    assert mask.tolist() == [[False, True, True], [True, False, False]]


# --- data and masks


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


def test_plain_completions_learn_to_stop(family, tmp_path):
    from ivl_vllm.training.command import prepare

    data = write_rows(tmp_path / "plain.jsonl", [{"prompt": "question : a ? answer :", "completion": " b"}])
    trainer = prepare(flags(family, tmp_path / "out", f"--data={data}")).trainer
    row = trainer.train_dataset[0]
    assert row["labels"][-1] == trainer.processing_class.eos_token_id


def test_compute_loss_equals_the_naive_loss_over_a_padded_batch(family, tmp_path):
    from ivl_vllm.training.command import prepare

    rows = [*next_letter_rows(3, 7), {"messages": [{"role": "user", "content": "a b c d ?"}]}]
    rows[-1]["messages"].append({"role": "assistant", "content": "e f"})
    data = write_rows(tmp_path / "mixed.jsonl", rows)
    trainer = prepare(flags(family, tmp_path / "out", f"--data={data}", "--norm_weight=0.5")).trainer
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()

    naive = []
    for ids, attention, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(attention.sum())
        base = trainer.base(ids[None, :length]).logits[0]
        value = trainer.model(ids[None, :length]).logits[0]
        for position in range(length - 1):
            if labels[position + 1] != -100:
                log_probability = torch.log_softmax(base[position] + value[position], -1)[labels[position + 1]]
                naive.append(-log_probability + 0.5 * value[position].abs().sum() / value.shape[-1])
    naive_loss = torch.stack(naive).mean()
    naive_loss.backward()
    torch.testing.assert_close(loss, naive_loss, rtol=1e-5, atol=1e-6)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_accumulated_batches_equal_one_large_batch(family, tmp_path):
    # Answers of different lengths: a mean of means would differ.
    rows = [
        {"prompt": "question : a ? answer :", "completion": " " + " ".join("abcdefghijkl"[: 1 + i % 5])}
        for i in range(16)
    ]
    data = write_rows(tmp_path / "uneven.jsonl", rows)
    common = (f"--data={data}", "--max_steps=2", "--lr=0.01", "--seed=3", "--optim=sgd", "--max_grad_norm=0")
    one = train(family, tmp_path / "one", *common, "--batch_size=8").model
    four = train(family, tmp_path / "four", *common, "--batch_size=2", "--gradient_accumulation_steps=4").model
    for left, right in zip(one.parameters(), four.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


# --- training


@pytest.fixture(scope="module")
def trained(family, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "value"
    trainer = train(family, output, f"--eval_data={family / 'held_out.jsonl'}", "--max_steps=80", "--norm_weight=0.1")
    return output, trainer


def joined_loss(folder, base, rows, tokenizer):
    """Held-out cross-entropy of base + value (or of the base alone), computed apart from the trainer."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base)
    value = None if folder is None else AutoModelForCausalLM.from_pretrained(folder)
    losses = []
    with torch.no_grad():
        for row in rows:
            user, answer = (message["content"] for message in row["messages"])
            prompt = tokenizer(f"question : {user} answer :").input_ids
            whole = tokenizer(f"question : {user} answer : {answer} <eos>").input_ids
            z = base(torch.tensor([whole])).logits[0]
            if value is not None:
                z = z + value(torch.tensor([whole])).logits[0]
            scores = torch.log_softmax(z, -1)
            losses += [-scores[i - 1, whole[i]].item() for i in range(len(prompt), len(whole))]
    return sum(losses) / len(losses)


def test_held_out_loss_falls_below_that_of_the_base(family, trained):
    output, trainer = trained
    rows = next_letter_rows(40, 1)
    tokenizer = make_tokenizer()
    alone = joined_loss(None, family / "base", rows, tokenizer)
    steered = joined_loss(output, family / "base", rows, tokenizer)
    assert steered < 0.3 * alone
    # What the trainer logged is what an independent computation finds.
    logged = [entry["eval_ce"] for entry in trainer.state.log_history if "eval_ce" in entry][-1]
    assert logged == pytest.approx(steered, rel=1e-3)


def test_log_has_both_terms_and_the_learning_rate_every_ten_steps(trained):
    entries = [entry for entry in trained[1].state.log_history if "ce" in entry]
    assert [entry["step"] for entry in entries] == [1, *range(10, 81, 10)]
    assert all({"loss", "norm", "learning_rate", "mean_token_accuracy"} <= entry.keys() for entry in entries)
    # The first entry covers one step, so its sum is exact; later ones average over steps.
    assert entries[0]["loss"] == pytest.approx(entries[0]["ce"] + 0.1 * entries[0]["norm"], rel=1e-4)


def test_the_base_is_bit_identical_after_training_and_never_in_train_mode(family, trained):
    from safetensors.torch import load_file

    base = trained[1].base
    stored = load_file(family / "base" / "model.safetensors")
    state = base.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in stored.items())
    assert not base.training
    assert all(not p.requires_grad and p.grad is None for p in base.parameters())
    assert not any(p is q for p in trained[1].model.parameters() for q in base.parameters())


def test_folder_is_an_ordinary_hugging_face_folder_with_provenance(family, trained):
    output, trainer = trained
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "ivl_config.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    config = IVLConfig.read(output)
    assert config.base == str((family / "base").resolve())
    assert (config.scheme, config.norm, config.norm_weight) == ("residual", "l1", 0.1)
    assert config.vocab_size == len(make_tokenizer())
    assert config.vocabulary_fingerprint == vocabulary_fingerprint(make_tokenizer())
    assert {"torch", "transformers", "trl", "ivl-vllm"} <= config.versions.keys()
    card = (output / "README.md").read_text()
    for part in (str(family / "base"), "residual", "λ = 0.1", "train.jsonl", "vllm serve", "--logits-processor ivl"):
        assert part in card
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(output)
    for left, right in zip(loaded.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_zero_output_layer_starts_at_the_base_and_is_saved_untied(family, tmp_path):
    from transformers import AutoModelForCausalLM

    from ivl_vllm.training.command import prepare

    run = prepare(flags(family, tmp_path / "zero", "--zero_output_layer", "--max_steps=5"))
    ids = torch.tensor([[3, 4, 5, 6]])
    before = run.trainer.base(ids).logits
    assert torch.equal(run.trainer.model(ids).logits, torch.zeros_like(before))
    assert run.trainer.model.get_input_embeddings().weight.abs().sum() > 0
    run.run()
    first = next(entry for entry in run.trainer.state.log_history if "ce" in entry)
    assert first["norm"] == 0.0
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "zero")
    assert after(ids).logits.abs().sum() > 0
    torch.testing.assert_close(after(ids).logits, run.trainer.model(ids).logits)


def test_a_huge_norm_weight_keeps_the_value_near_zero(family, tmp_path):
    ids = torch.tensor([[3, 4, 5, 6]])
    sizes = {}
    for weight in (0.0, 1000.0):
        arguments = ("--zero_output_layer", f"--norm_weight={weight}", "--max_steps=60", "--lr=1e-3")
        model = train(family, tmp_path / f"w{weight:g}", *arguments).model
        sizes[weight] = model(ids).logits.abs().mean().item()
    assert sizes[1000.0] < 0.1 * sizes[0.0]


def test_another_start_than_the_base_and_a_differently_padded_vocabulary(family, tmp_path):
    make_model(tmp_path / "padded", make_tokenizer(), extra_rows=5, seed=3, tied=False)
    output = tmp_path / "out"
    train(family, output, f"--init={tmp_path / 'padded'}", "--max_steps=2")
    assert IVLConfig.read(output).vocab_size == len(make_tokenizer()) + 5
    # Without --init the base itself is the start, and stays as it was.
    run_flags = [word for word in flags(family, tmp_path / "own", "--max_steps=2") if not word.startswith("--init")]
    from ivl_vllm.training.command import prepare

    run = prepare(run_flags)
    assert run.trainer.model is not run.trainer.base
    assert run.trainer.model.num_parameters() == run.trainer.base.num_parameters()


def test_save_dtype_and_checkpoints(family, tmp_path):
    from safetensors.torch import load_file

    output = tmp_path / "out"
    train(family, output, "--save_dtype=bfloat16", "--max_steps=2", "--save_strategy=steps", "--save_steps=1")
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {torch.bfloat16}
    # A checkpoint is a value network too: it can be served and inspected.
    assert IVLConfig.read(output / "checkpoint-2").scheme == "residual"


def test_resume_continues_with_the_same_weights(family, tmp_path):
    steps = ("--save_strategy=steps", "--save_steps=2", "--save_total_limit=5", "--lr_scheduler_type=constant")
    whole = train(family, tmp_path / "whole", *steps, "--max_steps=4")
    train(family, tmp_path / "parts", *steps, "--max_steps=2")
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    resumed = train(family, tmp_path / "parts", *steps, "--max_steps=4", f"--resume_from_checkpoint={checkpoint}")
    assert resumed.state.global_step == 4
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_a_folder_without_weights_is_told(family, tmp_path):
    import shutil

    from ivl_vllm.training.command import prepare

    folder = shutil.copytree(family / "small", tmp_path / "weightless")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="--init .*weightless: cannot be loaded"):
        prepare(flags(family, tmp_path / "out", f"--init={folder}"))


def test_same_seed_same_weights_and_another_seed_others(family, tmp_path):
    models = [
        train(family, tmp_path / f"{i}", "--max_steps=3", f"--seed={seed}").model for i, seed in enumerate((5, 5, 6))
    ]
    flat = [torch.cat([p.flatten() for p in model.parameters()]) for model in models]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])


def test_yaml_file_with_flags_on_top(tmp_path):
    from ivl_vllm.training.command import parse

    config = tmp_path / "run.yaml"
    config.write_text(f"base: some-base\ndata: d.jsonl\noutput: {tmp_path / 'o'}\nlr: 3e-4\nnorm: l2\nepochs: 7\n")
    for words in (["--config", str(config)], [f"--config={config}"]):
        value_args, args = parse([*words, "--epochs", "2"])
        assert (value_args.norm, args.learning_rate, args.num_train_epochs) == ("l2", 3e-4, 2.0)
        assert args.output_dir == str(tmp_path / "o")
    config.write_text(
        "base: x\ndata: y\noutput: z\nlora-rank: 8\npacking: true\nresume: last\nlong_examples: drop\nlambda: 0.5\n"
        "report_to: tensorboard\nbf16: false\nlr_scheduler_type: linear\nadam_beta2: 0.95\n"
    )
    value_args, args = parse(["--config", str(config), "--packing", "false"])
    assert (value_args.lora_rank, value_args.long_examples, value_args.norm_weight) == (8, "drop", 0.5)
    assert (args.packing, args.resume_from_checkpoint, args.bf16, args.adam_beta2) == (False, "last", False, 0.95)
    assert args.report_to == ["tensorboard"]
    config.write_text("base: x\ndata: y\noutput: z\nlearning_rte: 1\n")
    with pytest.raises(ValueError, match="learning_rte"):
        parse(["--config", str(config)])
    config.write_text("base: x\ndata: y\noutput: z\nnorm: l3\n")
    with pytest.raises(ValueError, match="l3"):
        parse(["--config", str(config)])


# --- bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a",\n', "line 2: no JSON"),
        ("[1, 2]\n", "line 1: expected a JSON object"),
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
    ],
)
def test_bad_lines_are_told_with_their_number(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        read_examples(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


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


def bad_inputs(family, tmp_path):
    other = make_model(tmp_path / "other", make_tokenizer(words=[*WORDS, "extra"]))
    mute = make_model(tmp_path / "mute", make_tokenizer(template=None))
    empty = tmp_path / "empty"
    empty.mkdir()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    narrow = make_model(tmp_path / "narrow", make_tokenizer(words=WORDS[:6]))
    make_tokenizer().save_pretrained(narrow)
    return {
        "--base=./nowhere": "--base ./nowhere: no such folder",
        "--init=/nowhere/at/all": "--init /nowhere/at/all: no such folder",
        f"--base={empty}": "no config.json",
        f"--init={adapter}": "merge it first",
        f"--init={other}": "different vocabularies",
        f"--base={mute}": "no chat template",
        f"--init={narrow}": "beyond a network's vocabulary",
        f"--output={family / 'small'}": "would be overwritten",
        f"--output={family / 'train.jsonl'}": "a file is in the way",
        f"--data={tmp_path / 'absent'}": "no such file",
        "--max_length=4": "no answer tokens are left",
        "--norm=l3": "l3",
        "--norm_weight=-1": "--norm_weight is -1.0",
        "--norm_weight=nan": "--norm_weight is nan",
        "--eval_fraction=1.5": "--eval_fraction is 1.5",
        "--no_such_flag=1": "no_such_flag",
        "--lr=fast": "invalid float value",
        f"--config={tmp_path / 'absent.yaml'}": "absent.yaml",
    }


def test_bad_input_is_one_line_and_exit_status_2(family, tmp_path, capsys):
    from ivl_vllm import cli

    for flag, message in bad_inputs(family, tmp_path).items():
        output = tmp_path / "never"
        assert cli.main(["train", *flags(family, output, flag)]) == 2, flag
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ivl train: error: ")]
        assert len(err) == 1, flag
        assert message in err[0]
        assert not (output / "model.safetensors").exists()


def test_answers_that_are_cut_off_are_counted_and_told(family, tmp_path, capsys):
    rows = [*next_letter_rows(3, 0), {"messages": [{"role": "user", "content": "a " * 30}]}]
    rows[-1]["messages"].append({"role": "assistant", "content": "b"})
    data = write_rows(tmp_path / "long.jsonl", rows)
    train(family, tmp_path / "out", f"--data={data}", "--max_length=16", "--max_steps=1")
    out = capsys.readouterr().out
    assert "--data: 1 of 4 examples are longer than --max_length 16, the first in line 4: 0 truncated, 1 dropped" in out
    assert "trainable parameters: " in out


# --- ivl_config.json


GOOD = {
    "format_version": 1,
    "scheme": "residual",
    "base": "some/base",
    "norm": "l1",
    "norm_weight": 1.0,
    "vocab_size": 100,
    "vocabulary_fingerprint": "0" * 64,
    "versions": {"torch": "2"},
}


def test_ivl_config_round_trip_and_absence(tmp_path):
    assert IVLConfig.read(tmp_path) is None
    config = IVLConfig(**GOOD)
    config.write(tmp_path)
    assert IVLConfig.read(tmp_path) == config
    assert json.loads((tmp_path / "ivl_config.json").read_text()) == GOOD


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2, "new_field": 1}, "format_version is 2"),
        ({"scheme": "cascading"}, "scheme is 'cascading'"),
        ({"base": ""}, "base is ''"),
        ({"norm": "l0"}, "norm is 'l0'"),
        ({"norm_weight": "1"}, "norm_weight is '1'"),
        ({"norm_weight": -1}, "norm_weight is -1"),
        ({"norm_weight": math.inf}, "norm_weight is inf"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"vocabulary_fingerprint": "abc"}, "vocabulary_fingerprint is 'abc'"),
        ({"versions": []}, "versions is []"),
        ({"surplus": 1}, "unknown field: surplus"),
        ({"norm": None}, "norm is None"),
    ],
)
def test_ivl_config_names_the_field_that_is_wrong(tmp_path, change, message):
    (tmp_path / "ivl_config.json").write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(ValueError) as caught:
        IVLConfig.read(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_ivl_config_that_is_no_object_or_lacks_a_field(tmp_path):
    path = tmp_path / "ivl_config.json"
    for content, message in (("{", "no JSON"), ("[]", "no JSON object"), ('{"format_version": 1}', "lacks the field")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            IVLConfig.read(tmp_path)


# --- fingerprint


def test_fingerprint_sees_ids_and_tokens_and_nothing_else():
    tokenizer = make_tokenizer()
    assert vocabulary_fingerprint(tokenizer) == vocabulary_fingerprint(copy.deepcopy(tokenizer))
    assert vocabulary_fingerprint(tokenizer) == vocabulary_fingerprint(make_tokenizer(template=None))
    assert vocabulary_fingerprint(tokenizer) != vocabulary_fingerprint(make_tokenizer(words=WORDS[::-1]))
    assert vocabulary_fingerprint(tokenizer) != vocabulary_fingerprint(make_tokenizer(words=[*WORDS, "m"]))

    class Two:
        def __init__(self, vocab):
            self.get_vocab = lambda: vocab

    # Without the lengths these two would be one byte string.
    assert vocabulary_fingerprint(Two({"a1:b": 0})) != vocabulary_fingerprint(Two({"a": 0, "b": 1}))
