"""What a resumed run takes from its checkpoint and what from the flags given now; the best checkpoint of any output."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from training_tools import TEMPLATE, flags, logged, make_family, make_tokenizer, train, write_rows

from ivl_vllm import cli
from ivl_vllm.training.base_cache import fingerprint
from ivl_vllm.training.run_record import RECORD_NAME

TWO_STEPS = ("--save_strategy=steps", "--save_steps=2", "--logging_steps=1", "--save_total_limit=9", "--batch_size=4")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


def refusal(capsys):
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ivl train: error: ")]
    assert len(told) == 1, told
    return told[0]


@pytest.mark.parametrize("course", ["constant", "linear"])
def test_rate_and_decay_are_those_given_now_and_moments_the_checkpoints(family, tmp_path, course):
    output, more = tmp_path / "value", (*TWO_STEPS, f"--lr_scheduler_type={course}", "--warmup_steps=0")
    train(family, output, *more, "--lr=3e-3", "--max_steps=2")
    resumed = train(family, output, *more, "--lr=1e-4", "--weight_decay=0.25", "--max_steps=4", "--resume=last")
    rates = logged(output, "learning_rate")
    expected = {3: 1e-4, 4: 1e-4} if course == "constant" else {3: 5e-5, 4: 2.5e-5}
    assert {step: rates[step] for step in expected} == pytest.approx(expected)
    assert {group["weight_decay"] for group in resumed.optimizer.param_groups} == {0.0, 0.25}
    assert {int(state["step"]) for state in resumed.optimizer.state.values()} == {4}


def test_a_rate_that_follows_the_loss_goes_on_and_the_decay_is_the_one_given_now(family, tmp_path):
    plateau = ("--lr_scheduler_type=reduce_lr_on_plateau", "--eval_fraction=0.2", "--eval_strategy=steps")
    output, more = tmp_path / "value", (*TWO_STEPS, *plateau, "--eval_steps=2", "--warmup_steps=0")
    train(family, output, *more, "--lr=3e-3", "--max_steps=2")
    resumed = train(family, output, *more, "--lr=1e-4", "--weight_decay=0.25", "--max_steps=4", "--resume=last")
    assert {group["weight_decay"] for group in resumed.optimizer.param_groups} == {0.0, 0.25}
    assert {group["lr"] for group in resumed.optimizer.param_groups} == {3e-3}


def test_moments_are_those_of_the_checkpoint(family, tmp_path):
    """What an optimizer keeps beside rate and decay is not set back."""
    output, more = tmp_path / "value", (*TWO_STEPS, "--lr_scheduler_type=constant")
    train(family, output, *more, "--max_steps=2", "--adam_beta1=0.5")
    resumed = train(family, output, *more, "--max_steps=4", "--resume=last")
    assert {group["betas"] for group in resumed.optimizer.param_groups} == {(0.5, 0.999)}


def test_the_best_checkpoint_of_a_relative_output_is_found(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    best = ("--eval_fraction=0.2", "--load_best_model_at_end=true")  # when to evaluate follows from them
    trainer = train(family, "./value", *TWO_STEPS, *best, "--max_steps=4")
    found = Path(trainer.state.best_model_checkpoint)
    assert found.is_dir() and found.resolve().parent == tmp_path / "value"
    written = json.loads((tmp_path / "value" / "checkpoint-4" / "trainer_state.json").read_text())
    assert ".unfinished" not in written["best_model_checkpoint"]
    assert sorted(logged(tmp_path / "value", "eval_loss")) == [2, 4]


def test_checkpoints_may_be_written_when_they_are_the_best(family, tmp_path):
    more = ("--save_strategy=best", "--eval_fraction=0.2", "--max_steps=4", "--num_train_epochs=2", "--batch_size=64")
    trainer = train(family, tmp_path / "value", *more)
    assert trainer.args.metric_for_best_model == "loss" and list((tmp_path / "value").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("--load_best_model_at_end=true", "--load_best_model_at_end true: needs held-out data, --eval_data"),
        ("--save_strategy=best", "--save_strategy best: needs held-out data, --eval_data or --eval_fraction"),
        ("--load_best_model_at_end=true --save_strategy=no", "true: --save_strategy no writes nothing to load"),
    ],
)
def test_the_best_checkpoint_needs_held_out_data(family, tmp_path, capsys, more, told):
    words = [word for word in TWO_STEPS if not word.startswith("--save_strategy")] if "strategy" in more else TWO_STEPS
    assert cli.main(["train", *flags(family, tmp_path / "never", *words, *more.split())]) == 2
    assert told in refusal(capsys)


@pytest.mark.parametrize(("name", "best"), [("ce", min), ("eval_norm", min), ("mean_token_accuracy", max)])
def test_the_best_checkpoint_is_that_with_the_least_loss_or_the_most_right_tokens(family, tmp_path, name, best):
    """transformers would take everything for a score whose name does not end with "loss"."""
    more = ("--eval_fraction=0.2", "--load_best_model_at_end=true", "--max_steps=8", "--lr=3e-3")
    trainer = train(family, tmp_path / "value", *TWO_STEPS, *more, f"--metric_for_best_model={name}")
    found = logged(tmp_path / "value", f"eval_{name.removeprefix('eval_')}")
    assert len(set(found.values())) > 1
    step = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert found[step] == best(found.values())


def test_weights_alone_are_no_checkpoint_to_go_on_from(family, tmp_path, capsys):
    output = tmp_path / "value"
    train(family, output, *TWO_STEPS, "--max_steps=2", "--save_only_model=true")
    assert cli.main(["train", *flags(family, output, *TWO_STEPS, "--max_steps=4", "--resume=last")]) == 2
    told = refusal(capsys)
    assert f"--resume last: {output / 'checkpoint-2'} has weights only (--save_only_model)" in told
    assert f"start a new run with --init {output / 'checkpoint-2'}" in told


def test_another_chat_template_is_another_run(family, tmp_path, capsys):
    output, template = tmp_path / "value", tmp_path / "chat.jinja"
    template.write_text(TEMPLATE.replace("question :", "? :"))
    more = (*TWO_STEPS, "--max_steps=2")
    train(family, output, *more, f"--chat_template_path={template}")
    assert cli.main(["train", *flags(family, output, *more, "--resume=last")]) == 2
    assert f"--chat_template_path was {template} and now is not given" in refusal(capsys)
    moved = shutil.copy(template, tmp_path / "moved.jinja")
    train(family, output, *more, "--max_steps=4", "--resume=last", f"--chat_template_path={moved}")
    template.write_text(TEMPLATE)
    assert cli.main(["train", *flags(family, output, *more, "--resume=last", f"--chat_template_path={template}")]) == 2
    assert "--chat_template_path" in refusal(capsys)


def test_a_base_may_have_several_templates_and_change_them(family, tmp_path, capsys):
    root = shutil.copytree(family, tmp_path / "family")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": TEMPLATE}
    tokenizer.save_pretrained(root / "base")
    more = (*TWO_STEPS, "--max_steps=2")
    train(root, tmp_path / "value", *more)
    train(root, tmp_path / "value", *more, "--max_steps=3", "--resume=last")
    make_tokenizer(template=TEMPLATE.replace("question :", "? :")).save_pretrained(root / "base")
    assert cli.main(["train", *flags(root, tmp_path / "value", *more, "--resume=last")]) == 2
    assert "--chat_template_path is not given, and what it replaces has changed" in refusal(capsys)


def test_a_record_of_another_version_is_refused_and_may_be_deleted(family, tmp_path, capsys):
    output, more = tmp_path / "value", (*TWO_STEPS, "--max_steps=2")
    train(family, output, *more)
    file = output / "checkpoint-2" / RECORD_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 1}))
    assert cli.main(["train", *flags(family, output, *more, "--resume=last")]) == 2
    assert "format_version is 1, expected 3); delete it" in refusal(capsys)
    file.unlink()
    assert train(family, output, *TWO_STEPS, "--max_steps=4", "--resume=last").state.global_step == 4


def test_a_yaml_file_may_say_that_a_run_is_resumed(family, tmp_path):
    output, config = tmp_path / "value", tmp_path / "run.yaml"
    train(family, output, *TWO_STEPS, "--max_steps=2")
    config.write_text("resume: true\n")
    assert train(family, output, *TWO_STEPS, "--max_steps=4", f"--config={config}").state.global_step == 4


def test_answers_count_for_models_that_take_no_count_of_them(family, tmp_path, monkeypatch):
    """Uneven answers in four batches of two are those of one batch of eight, whatever the model's class says."""
    from transformers import LlamaForCausalLM

    rows = [{"prompt": "a b", "completion": " " + " ".join("cdefghijkl"[: 1 + 9 * (i // 4)])} for i in range(8)]
    data = write_rows(tmp_path / "uneven.jsonl", rows)
    more = (f"--data={data}", "--optim=sgd", "--max_grad_norm=0", "--lr=0.05", "--max_steps=2", "--norm_positions=all")
    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
    whole = train(family, tmp_path / "whole", *more, "--batch_size=8")
    parts = train(family, tmp_path / "parts", *more, "--batch_size=2", "--gradient_accumulation_steps=4")
    for left, right in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_any_change_of_a_model_changes_its_fingerprint(family):
    from transformers import AutoModelForCausalLM

    def load():
        return AutoModelForCausalLM.from_pretrained(family / "base")

    model, same = load(), fingerprint(load())
    assert fingerprint(model) == same
    assert fingerprint(load().to(torch.bfloat16)) != same
    model.get_input_embeddings().weight.data[-1, -1] += 1e-3
    assert fingerprint(model) != same
    model = load()
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 123.0}
    assert fingerprint(model) != same
    # Rows in another order.
    same, rows = fingerprint(model), model.get_input_embeddings().weight.data
    assert rows[-2:].numel() < 512 < rows.numel()
    rows[[0, -1]] = rows[[-1, 0]]
    assert fingerprint(model) != same
    # Lengths and places that are no multiple of what is summed at a time.
    model.register_buffer("odd", torch.zeros(5000, dtype=torch.float16)[1:2304])
    same = fingerprint(model)
    for index in [*range(300), *range(2000, 2303)]:
        model.odd.zero_()[index] = 1
        assert fingerprint(model) != same, index
