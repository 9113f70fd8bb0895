"""`ivl train` from flags to a trained folder: the loss that falls, the log, the frozen base, the files."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from training_tools import (
    SGD,
    flags,
    logged,
    make_family,
    make_model,
    make_tokenizer,
    next_letter_rows,
    train,
    write_rows,
)

from ivl_vllm import cli
from ivl_vllm.training.ivl_config import IVLConfig
from ivl_vllm.vocab.fingerprint import vocabulary_fingerprint


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize("where", ["answer", "all"])
def test_compute_loss_equals_the_naive_loss_over_a_padded_batch(family, tmp_path, where):
    from ivl_vllm.training.command import prepare

    rows = [*next_letter_rows(3, 7), {"messages": [{"role": "user", "content": "a b c d ?"}]}]
    rows[-1]["messages"].append({"role": "assistant", "content": "e f"})
    data = write_rows(tmp_path / "mixed.jsonl", rows)
    trainer = prepare(
        flags(family, tmp_path / "out", f"--data={data}", "--norm_weight=0.5", f"--norm_positions={where}")
    ).trainer
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()

    ce, norm = [], []
    for ids, attention, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(attention.sum())
        base = trainer.base(ids[None, :length]).logits[0]
        value = trainer.model(ids[None, :length]).logits[0]
        for position in range(length - 1):
            if labels[position + 1] != -100:
                log_probability = torch.log_softmax(base[position] + value[position], -1)[labels[position + 1]]
                ce.append(-log_probability)
        for position in range(length):
            if where == "all" or (position < length - 1 and labels[position + 1] != -100):
                norm.append(value[position].abs().sum() / value.shape[-1])
    naive_loss = torch.stack(ce).mean() + 0.5 * torch.stack(norm).mean()
    naive_loss.backward()
    torch.testing.assert_close(loss, naive_loss, rtol=1e-5, atol=1e-6)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ["answer", "all"])
def test_accumulated_batches_equal_one_large_batch(family, tmp_path, where):
    # Answers of different lengths: a mean of means would differ.
    rows = [
        {
            "prompt": "question : " + "a " * (i % 7) + "? answer :",
            "completion": " " + " ".join("abcdefghijkl"[: 1 + i % 5]),
        }
        for i in range(16)
    ]
    data = write_rows(tmp_path / "uneven.jsonl", rows)
    common = (f"--data={data}", "--max_steps=2", "--lr=0.01", "--seed=3", "--optim=sgd", "--max_grad_norm=0")
    common += (f"--norm_positions={where}", "--logging_steps=1", "--eval_fraction=0.5")
    one = train(family, tmp_path / "one", *common, "--batch_size=8", "--per_device_eval_batch_size=8")
    small = ("--batch_size=2", "--gradient_accumulation_steps=4", "--per_device_eval_batch_size=3")
    four = train(family, tmp_path / "four", *common, *small)
    for left, right in zip(one.model.parameters(), four.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    for name in ("loss", "ce", "norm", "eval_loss", "eval_norm"):
        assert logged(tmp_path / "four", name) == pytest.approx(logged(tmp_path / "one", name), rel=1e-4), name
    # The loss is what its terms say.
    for step, loss in logged(tmp_path / "four").items():
        parts = (logged(tmp_path / "four", name)[step] for name in ("ce", "norm"))
        assert loss == pytest.approx(sum(parts), rel=1e-4)


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

    output = tmp_path / "out"
    train(family, output, "--save_dtype=bfloat16", "--max_steps=2", "--save_strategy=steps", "--save_steps=1")
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {torch.bfloat16}
    # A checkpoint is a value network too: it can be served and inspected.
    assert IVLConfig.read(output / "checkpoint-2").scheme == "residual"


def test_same_seed_same_weights_and_another_seed_others(family, tmp_path):
    models = [
        train(family, tmp_path / f"{i}", "--max_steps=3", f"--seed={seed}").model for i, seed in enumerate((5, 5, 6))
    ]
    flat = [torch.cat([p.flatten() for p in model.parameters()]) for model in models]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])


def test_without_matplotlib_the_run_says_that_there_is_no_picture(family, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train(family, tmp_path / "value", "--max_steps=2", "--save_strategy=steps", "--save_steps=1")
    out = capsys.readouterr().out
    assert out.count("curves.png was not drawn: it needs matplotlib, pip install 'ivl-vllm[train]'") == 1
    assert (tmp_path / "value" / "model.safetensors").is_file()
    assert not (tmp_path / "value" / "curves.png").exists()


def test_curves_are_drawn_linked_and_inspected(family, tmp_path, capsys):
    output = tmp_path / "value"
    words = ("--eval_fraction=0.2", "--report_to=tensorboard", "--max_steps=12", "--logging_steps=3")
    trainer = train(family, output, *words, "--save_strategy=steps", "--save_steps=6")
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    card = (output / "README.md").read_text()
    assert "](curves.png)" in card
    assert "Last values, held out" in card
    history = json.loads((output / "training_log.json").read_text())
    assert [entry["step"] for entry in history if "ce" in entry] == [1, 3, 6, 9, 12]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (output / "runs").rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert {"train/loss", "train/ce", "train/norm", "eval/loss", "eval/ce"} <= set(accumulator.Tags()["scalars"])
    capsys.readouterr()
    assert cli.main(["inspect", str(output)]) == 0
    out = capsys.readouterr().out
    last = [entry for entry in trainer.state.log_history if "ce" in entry][-1]
    held_out = [entry for entry in trainer.state.log_history if "eval_ce" in entry][-1]
    assert f"ce {last['ce']:.4g}, norm {last['norm']:.4g} at step 12" in out
    assert f"ce {held_out['eval_ce']:.4g}, norm {held_out['eval_norm']:.4g} at step 12" in out
    assert f"{output / 'curves.png'}" in out
    # A checkpoint tells its own curves so far.
    (checkpoint,) = output.glob("checkpoint-*")
    assert cli.main(["inspect", str(checkpoint)]) == 0
    assert "at step 12" in capsys.readouterr().out
    (checkpoint / "training_log.json").write_text("[3]")
    assert cli.main(["inspect", str(checkpoint)]) == 2
    assert "holds no list of log entries" in capsys.readouterr().err


def test_nothing_is_reported_to_anyone(family, tmp_path, monkeypatch):
    import trl.trainer.base_trainer as base_trainer

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda **_: pytest.fail("telemetry was sent"))
    train(family, tmp_path / "out", "--max_steps=1")


def test_gradient_checkpointing_and_bf16_train_through_the_command(family, tmp_path):
    plain = train(family, tmp_path / "plain", *SGD, "--logging_steps=1", "--scheme=cascade+text")
    more = (*SGD, "--logging_steps=1", "--scheme=cascade+text")
    train(family, tmp_path / "checkpointed", *more, "--gradient_checkpointing=true")
    assert logged(tmp_path / "checkpointed") == pytest.approx(logged(tmp_path / "plain"), rel=1e-5)
    half = train(family, tmp_path / "half", *more, "--bf16=true", "--use_cpu=true")
    assert half.args.bf16 and not plain.args.bf16
    found, wanted = logged(tmp_path / "half"), logged(tmp_path / "plain")
    assert found != wanted
    assert found == pytest.approx(wanted, rel=0.02)
    # The master weights stay fp32.
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
