"""A run that is killed, resumed, ended by a diverging loss, or judged by its best checkpoint."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_tools import (
    ENVIRONMENT,
    STEPS,
    assert_close_weights,
    flags,
    logged,
    make_family,
    make_model,
    make_tokenizer,
    next_letter_rows,
    run_process,
    train,
    weights,
    write_rows,
)

from ivl_vllm import cli
from ivl_vllm.training.divergence import TrainingDivergedError
from ivl_vllm.training.ivl_config import IVLConfig
from ivl_vllm.training.run_record import RECORD_NAME


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


KILLED_WHILE_SAVING = """
import os, signal, sys
from ivl_vllm import cli
from ivl_vllm.training import folders

flush = folders.flush_folder

def flush_or_die(folder):
    if folder.name == {name!r}:
        os.truncate(folder / "model.safetensors", 100)  # what had not reached the disk is lost
        os.kill(os.getpid(), signal.SIGKILL)
    flush(folder)

folders.flush_folder = flush_or_die
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def whole(family, tmp_path_factory):
    """The run that is never killed."""
    output = tmp_path_factory.mktemp("whole") / "value"
    train(family, output, *STEPS)
    return output


@pytest.mark.parametrize(("name", "last"), [("checkpoint-6", 4), ("result", 8)])
def test_killed_while_saving_leaves_the_last_checkpoint_and_resumes_on_the_same_curve(
    family, tmp_path, whole, name, last
):
    output = tmp_path / "value"
    killed = run_process(family, output, *STEPS, start=("-c", KILLED_WHILE_SAVING.format(name=name)))
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    # Nothing that is half written has a name that anything reads.
    assert not (output / "config.json").exists()
    found = sorted(path.name for path in output.iterdir())
    assert found == [".unfinished", f"checkpoint-{last - 2}", f"checkpoint-{last}"]
    for checkpoint in (output / f"checkpoint-{last - 2}", output / f"checkpoint-{last}"):
        assert IVLConfig.read(checkpoint).scheme == "residual"
        assert all(torch.isfinite(tensor).all() for tensor in weights(checkpoint).values())

    train(family, output, *STEPS, "--resume=last")
    assert not (output / ".unfinished").exists()
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    expected, got = logged(whole), logged(output)
    assert list(got) == list(expected) == list(range(1, 9))
    for step in expected:
        assert got[step] == pytest.approx(expected[step], rel=1e-5), step
    assert_close_weights(weights(output), weights(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_follow_the_umask(family, tmp_path, umask):
    before = os.umask(umask)
    try:
        more = ("--max_steps=2", "--save_strategy=steps", "--save_steps=1", f"--cache_base={tmp_path / 'cache'}")
        train(family, tmp_path / "value", *more)
    finally:
        os.umask(before)
    files = [path for folder in ("value", "cache") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert [path for path in files if path.parent.name == "cache" and path.suffix == ".safetensors"]
    assert {"model.safetensors", "ivl_config.json", "optimizer.pt"} <= {path.name for path in files}
    assert {path: oct(path.stat().st_mode & 0o777) for path in files} == dict.fromkeys(files, oct(0o666 & ~umask))


def test_killed_from_outside_in_mid_run(family, tmp_path):
    import time

    output = tmp_path / "value"
    more = ("--save_strategy=steps", "--save_steps=1", "--max_steps=100000", "--save_total_limit=2")
    words = [sys.executable, "-m", "ivl_vllm.cli", "train", *flags(family, output, *more)]
    process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (output / "checkpoint-3").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert found and int(found[-1].name.split("-")[1]) >= 3
    for checkpoint in found:
        assert IVLConfig.read(checkpoint) is not None
        weights(checkpoint)
        assert (checkpoint / "optimizer.pt").stat().st_size and (checkpoint / "trainer_state.json").stat().st_size
    step = int(found[-1].name.split("-")[1])
    trainer = train(family, output, "--resume=last", f"--max_steps={step + 2}")
    assert trainer.state.global_step == step + 2


def test_a_new_run_does_not_mix_with_checkpoints_of_an_earlier_one(family, tmp_path, whole, capsys):
    assert cli.main(["train", *flags(family, whole, *STEPS)]) == 2
    assert "holds checkpoints of an earlier run; go on from there with --resume last" in capsys.readouterr().err
    assert cli.main(["train", *flags(family, tmp_path / "new", "--resume=last")]) == 2
    assert "there is no checkpoint in" in capsys.readouterr().err
    assert cli.main(["train", *flags(family, tmp_path / "new", f"--resume={tmp_path}")]) == 2
    assert "no such checkpoint" in capsys.readouterr().err


OTHER_RUNS = {
    "--gradient_accumulation_steps=2": "--batch_size × --gradient_accumulation_steps × processes was 16 and now is 32",
    "--packing=true": "--packing was False and now is True",
    "--max_length=48": "--max_length was 64 and now is 48",
    "--long_examples=drop": "--long_examples was truncate and now is drop",
    "--scheme=cascade+text": "--scheme was residual and now is cascade+text",
    "--lambda=0.5": "--norm_weight (--lambda) was 1.0 and now is 0.5",
    "--norm=l2": "--norm was l1 and now is l2",
    "--norm_positions=all": "--norm_positions was answer and now is all",
    "--base_noise=0.1": "--base_noise was 0.0 and now is 0.1",
    "--seed=7": "--seed was 42 and now is 7",
    "--lora_rank=2": "--lora_rank was 0 and now is 2",
    "--base={family}/small": "--base was {family}/base and now is {family}/small",
    "--init={family}/base": "--init was {family}/small and now is {family}/base",
    "--more_bases={family}/other": "--more_bases was not given and now is {family}/other",
    "--data={family}/held_out.jsonl": "--data was {family}/train.jsonl and now is {family}/held_out.jsonl",
}


def refusal(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ivl train: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_checkpoint_of_another_run_is_refused_with_flag_values_and_fix(family, whole, capsys):
    for flag, message in OTHER_RUNS.items():
        words = flags(family, whole, *STEPS, "--resume=last", flag.format(family=family))
        assert cli.main(["train", *words]) == 2, flag
        told = refusal(capsys)
        assert f"--resume {whole / 'checkpoint-8'}: that checkpoint is of another run: " in told
        assert message.format(family=family) in told
        assert "Give the earlier values" in told and f"--init {whole / 'checkpoint-8'} starts from" in told
    # The result is no checkpoint.
    assert not (whole / RECORD_NAME).exists()


def test_files_that_moved_are_the_same_run_and_files_that_changed_are_not(family, whole, tmp_path, capsys):
    from ivl_vllm.training.command import prepare

    moved = shutil.copytree(family, tmp_path / "moved")
    output = shutil.copytree(whole, tmp_path / "value")
    more = ("--resume=last", "--lr=1e-4", "--logging_steps=3", "--max_steps=9", "--save_steps=5")
    prepare(flags(moved, output, *more))
    with (moved / "train.jsonl").open("a") as stream:
        stream.write((moved / "held_out.jsonl").read_text())
    assert cli.main(["train", *flags(moved, output, *more)]) == 2
    assert f"--data was {family / 'train.jsonl'} and now is {moved / 'train.jsonl'}" in refusal(capsys)
    shutil.copy(family / "train.jsonl", moved)
    other = make_model(moved / "base", make_tokenizer(), hidden=48, seed=9)
    assert cli.main(["train", *flags(moved, output, *more)]) == 2
    assert f"--base was {family / 'base'} and now is {other}" in refusal(capsys)


def test_a_checkpoint_without_a_record_resumes_with_a_warning(family, whole, tmp_path, capsys):
    output = shutil.copytree(whole, tmp_path / "value")
    for record in output.glob(f"checkpoint-*/{RECORD_NAME}"):
        record.unlink()
    more = (*STEPS, "--max_steps=9", "--resume=last")
    # What its ivl_config.json says is compared nonetheless, and so are the weights' shapes.
    assert cli.main(["train", *flags(family, output, *more, "--scheme=cascade")]) == 2
    assert "--scheme was residual and now is cascade" in refusal(capsys)
    assert cli.main(["train", *flags(family, output, *more, f"--init={family / 'base'}")]) == 2
    told = refusal(capsys)
    assert ".weight has the shape [" in told and "give the --init that the run started with" in told
    trainer = train(family, output, *more)
    assert trainer.state.global_step == 9
    assert f"the checkpoint has no {RECORD_NAME}" in capsys.readouterr().err
    assert (output / "checkpoint-9" / RECORD_NAME).is_file()


def test_resume_continues_with_the_same_weights(family, tmp_path):
    steps = ("--save_strategy=steps", "--save_steps=2", "--save_total_limit=5", "--lr_scheduler_type=constant")
    whole = train(family, tmp_path / "whole", *steps, "--max_steps=4")
    train(family, tmp_path / "parts", *steps, "--max_steps=2")
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    resumed = train(family, tmp_path / "parts", *steps, "--max_steps=4", f"--resume_from_checkpoint={checkpoint}")
    assert resumed.state.global_step == 4
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("strategy", "steps"), [("steps", [1, 5, 7]), ("epoch", [1, 4, 7]), ("no", [])])
def test_the_last_step_is_logged_and_told(family, tmp_path, capsys, strategy, steps):
    data = write_rows(tmp_path / "data.jsonl", next_letter_rows(64, 0))
    output = tmp_path / "value"
    first = f"--logging_first_step={'false' if strategy == 'no' else 'true'}"
    more = (f"--data={data}", f"--logging_strategy={strategy}", first, "--logging_steps=5", "--max_steps=7")
    train(family, output, *more, "--disable_tqdm=false")
    assert list(logged(output)) == list(logged(output, "ce")) == steps
    assert ("step 7: loss " in capsys.readouterr().out) == bool(steps)
    assert cli.main(["inspect", str(output)]) == 0
    for text in (capsys.readouterr().out, (output / "README.md").read_text()):
        assert ("at step 7" in text) == bool(steps)


def test_the_best_checkpoint_is_kept_and_loaded(family, tmp_path):
    trainer = train(
        family,
        tmp_path / "value",
        *STEPS,
        "--eval_fraction=0.2",
        "--eval_strategy=steps",
        "--eval_steps=2",
        "--load_best_model_at_end=true",
        "--save_total_limit=1",
        "--lr=0.5",
    )
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path / "value"
    assert best.is_dir()
    assert_close_weights(weights(tmp_path / "value"), weights(best), rtol=0, atol=0)


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(family, tmp_path, capsys):
    output = tmp_path / "value"
    words = ("--save_strategy=steps", "--save_steps=1", "--logging_steps=1", "--save_total_limit=2", "--max_steps=50")
    # The first step of the warm-up has a learning rate of zero, so its checkpoint is good.
    assert cli.main(["train", *flags(family, output, *words, "--lr=1e30", "--warmup_steps=3")]) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ivl train: error: ")]
    assert len(err) == 1 and "training diverged: " in err[0] and "Lower --learning_rate" in err[0]
    assert not (output / "config.json").exists()
    kept = sorted(output.glob("checkpoint-*"))
    assert kept and str(kept[-1]) in err[0]
    for checkpoint in kept:
        assert all(torch.isfinite(tensor).all() for tensor in weights(checkpoint).values())


def test_weights_that_are_not_finite_are_never_saved(family, tmp_path):
    output = tmp_path / "value"
    trainer = train(family, output, "--max_steps=1")
    before = (output / "model.safetensors").read_bytes()
    with torch.no_grad():
        next(trainer.model.parameters())[0, 0] = float("nan")
    with pytest.raises(TrainingDivergedError, match="weights are not finite at step 1; no checkpoint had been written"):
        trainer.save_result(output, torch.float32)
    assert (output / "model.safetensors").read_bytes() == before


class BreaksAt:
    """Stands in for a trainer's joint loss: from one step on its total is changed."""

    def __init__(self, loss, step, change):
        self.loss, self.step, self.change, self.calls = loss, step, change, 0

    def __getattr__(self, name):
        return getattr(self.loss, name)

    def __call__(self, model, inputs, step, *rest):
        sums, count = self.loss(model, inputs, step, *rest)
        self.calls += 1
        return (sums._replace(total=self.change(sums.total)) if step + 1 == self.step else sums), count


def broken_run(family, output, step, change, *more):
    from ivl_vllm.training.command import prepare

    run = prepare(flags(family, output, "--logging_steps=1000", "--logging_first_step=false", *more))
    run.trainer.joint_loss = BreaksAt(run.trainer.joint_loss, step, change)
    return run


@pytest.mark.parametrize("what", ["the loss is", "the gradients are"])
def test_nothing_is_saved_after_a_broken_step_though_nothing_was_logged(family, tmp_path, what):
    """The weights stay finite here, so it is the step's own mark that is heeded."""

    def infinite_loss(total):
        return total + torch.inf

    def infinite_gradient(total):
        # fp32 gradients whose norm is beyond fp32: clipped, they are zeros.
        return total * 1e30 - (total * 1e30).detach() + total.detach()

    output = tmp_path / "value"
    change = infinite_loss if what == "the loss is" else infinite_gradient
    saves = ("--save_strategy=steps", "--save_steps=1", "--save_total_limit=9", "--max_steps=8")
    run = broken_run(family, output, 4, change, *saves)
    with pytest.raises(TrainingDivergedError, match=f"{what} not finite at step 4; the last good .*/checkpoint-3"):
        run.run()
    assert all(torch.isfinite(p).all() for p in run.trainer.model.parameters())
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [f"checkpoint-{i}" for i in (1, 2, 3)]
    assert not (output / "config.json").exists()
    # The control: the same run goes through where that step is only large.
    broken_run(family, tmp_path / "control", 4, lambda total: total * 2 + 5, "--max_steps=6").run()


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_broken_step_ends_the_run_within_one_step_though_nothing_is_logged_or_saved(family, tmp_path, max_grad_norm):
    run = broken_run(
        family,
        tmp_path / "value",
        3,
        lambda total: total * torch.nan,
        "--max_steps=50",
        f"--max_grad_norm={max_grad_norm}",
    )
    with pytest.raises(TrainingDivergedError, match="not finite at step 3; no checkpoint had been written"):
        run.run()
    assert run.trainer.joint_loss.calls == 4


def test_a_broken_last_step_is_neither_evaluated_nor_saved(family, tmp_path):
    run = broken_run(
        family, tmp_path / "value", 5, lambda total: total + torch.inf, "--max_steps=5", "--eval_fraction=0.1"
    )
    with pytest.raises(TrainingDivergedError, match="loss is inf at step 5; no checkpoint"):
        run.run()
    assert run.trainer.joint_loss.calls == 5
    # A run that wrote nothing leaves nothing, and no file of the user's goes with it.
    assert not (tmp_path / "value").exists()
    (tmp_path / "value").mkdir()
    (tmp_path / "value" / "notes.txt").write_text("mine")
    with pytest.raises(TrainingDivergedError):
        broken_run(family, tmp_path / "value", 1, lambda total: total + torch.inf, "--max_steps=5").run()
    assert [path.name for path in (tmp_path / "value").iterdir()] == ["notes.txt"]
