"""`ivl train` as a run: killed and resumed, on several processes, from other starts, with long, packed and bad data."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import flags, make_model, make_tokenizer, next_letter_rows, train, write_rows

from ivl_vllm import cli
from ivl_vllm.training.ivl_config import IVLConfig

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    tokenizer = make_tokenizer()
    make_model(root / "base", tokenizer, hidden=48, seed=1)
    make_model(root / "small", tokenizer, hidden=32, seed=2)
    write_rows(root / "train.jsonl", next_letter_rows(128, 0))
    return root


def uneven_rows(count):
    """Answers of one to five tokens, so that a mean of means is not the mean."""
    return [
        {
            "prompt": f"question : {'abcdefghijkl'[i % 11]} ? answer :",
            "completion": " " + " ".join("abcde"[: 1 + i % 5]),
        }
        for i in range(count)
    ]


def run_process(family, output, *more, start=("-m", "ivl_vllm.cli")):
    """`ivl train` in processes of its own, as a user starts it."""
    words = [sys.executable, *map(str, start), "train", *flags(family, output, *more)]
    return subprocess.run(words, capture_output=True, text=True, timeout=200, env=ENVIRONMENT)


TWO = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")


SHARDED = (*TWO, Path(__file__).with_name("shard_on_cpu.py"))


def logged(folder, name="loss"):
    history = json.loads((folder / "training_log.json").read_text())
    return {entry["step"]: entry[name] for entry in history if name in entry}


def weights(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def assert_close_weights(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


STEPS = ("--save_strategy=steps", "--save_steps=2", "--logging_steps=1", "--max_steps=8", "--save_total_limit=2")

# --- killed and resumed

KILLED_WHILE_SAVING = """
import os, signal, sys
from ivl_vllm import cli
from ivl_vllm.training import saving

flush = saving.flush_folder

def flush_or_die(folder):
    if folder.name == {name!r}:
        os.truncate(folder / "model.safetensors", 100)  # what had not reached the disk is lost
        os.kill(os.getpid(), signal.SIGKILL)
    flush(folder)

saving.flush_folder = flush_or_die
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


# --- several processes


@pytest.fixture(scope="module")
def one_process(family, tmp_path_factory):
    """What two processes must match; neither 70 rows nor 33 held-out ones come out even."""
    root = tmp_path_factory.mktemp("processes")
    write_rows(root / "train.jsonl", uneven_rows(70))
    write_rows(root / "held_out.jsonl", uneven_rows(103)[70:])
    common = [
        f"--data={root / 'train.jsonl'}",
        f"--eval_data={root / 'held_out.jsonl'}",
        "--eval_strategy=steps",
        "--eval_steps=4",
        "--per_device_eval_batch_size=8",
        "--logging_steps=1",
        "--max_steps=8",
        "--lr=0.01",
        # Not so small that Adam turns rounding into steps.
        "--adam_epsilon=0.01",
        "--use_cpu=true",
    ]
    train(family, root / "one", *common, "--batch_size=16")
    return root, common


def assert_same_run(root, output):
    for name in ("loss", "ce", "norm", "eval_loss", "eval_ce", "eval_norm"):
        expected, got = logged(root / "one", name), logged(output, name)
        assert list(got) == list(expected) and expected
        for step in expected:
            assert got[step] == pytest.approx(expected[step], rel=1e-5), (name, step)
    assert_close_weights(weights(output), weights(root / "one"), rtol=1e-4, atol=1e-6)
    names = [set(load_file(folder / "model.safetensors")) for folder in (output, root / "one")]
    assert names[0] == names[1]


def test_two_processes_match_one(family, one_process, tmp_path):
    root, common = one_process
    done = run_process(family, tmp_path / "two", *common, "--batch_size=8", start=(*TWO, "-m", "ivl_vllm.cli"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trainable parameters: ") == 1
    assert_same_run(root, tmp_path / "two")


def test_two_sharded_processes_match_one_resume_and_save_in_half_precision(family, one_process, tmp_path):
    root, common = one_process
    sharded = (*common, "--batch_size=8", "--fsdp=full_shard", "--save_strategy=steps", "--save_steps=4")
    two, again = tmp_path / "two", tmp_path / "again"
    done = run_process(family, two, *sharded, "--save_total_limit=2", start=SHARDED)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(root, two)
    # Written only where the model was sharded; the checkpoint beside it is an ordinary model all the same.
    assert (two / "checkpoint-4" / "pytorch_model_fsdp.bin").is_file()
    assert IVLConfig.read(two / "checkpoint-4").scheme == "residual"
    assert_close_weights(weights(two / "checkpoint-8"), weights(two), rtol=0, atol=0)

    resumed = (*sharded, f"--resume={two / 'checkpoint-4'}", "--save_dtype=bfloat16")
    done = run_process(family, again, *resumed, start=SHARDED)
    assert done.returncode == 0, done.stderr[-3000:]
    assert logged(again) == pytest.approx(logged(two), rel=1e-5)
    assert json.loads((again / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = {name: tensor.bfloat16().float() for name, tensor in weights(two).items()}
    assert_close_weights(weights(again), rounded, rtol=2**-7, atol=1e-6)


def test_sharding_that_would_not_happen_is_refused(family, tmp_path, capsys):
    from types import SimpleNamespace

    from ivl_vllm.training.command import _check_sharding

    assert cli.main(["train", *flags(family, tmp_path / "never", "--fsdp=full_shard", "--use_cpu=true")]) == 2
    assert "ivl train: error: Using fsdp only works in distributed training" in capsys.readouterr().err
    # As accelerate leaves it for several processes on the CPU, without a word.
    with pytest.raises(ValueError, match="--fsdp: nothing would be sharded"):
        _check_sharding(SimpleNamespace(args=SimpleNamespace(fsdp=True), is_fsdp_enabled=False))


# --- other starts


def test_from_scratch_by_a_config_that_lacks_the_vocabulary(family, tmp_path):
    content = json.loads((family / "small" / "config.json").read_text())
    own = {**content, "hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8, "dtype": "bfloat16"}
    del own["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(own))
    trained = []
    for given in (tmp_path, tmp_path / "config.json"):
        output = tmp_path / f"out{len(trained)}"
        words = [
            word for word in flags(family, output, f"--init_config={given}", "--max_steps=2") if "--init=" not in word
        ]
        assert cli.main(["train", *words]) == 0
        trained.append(weights(output))
    # The same seed gives the same start.
    assert_close_weights(*trained, rtol=0, atol=0)
    written = json.loads((tmp_path / "out0" / "config.json").read_text())
    assert written["vocab_size"] == len(make_tokenizer())
    assert (written["hidden_size"], written["dtype"]) == (16, "bfloat16")
    assert f"scratch, {tmp_path}" in (tmp_path / "out0" / "README.md").read_text()


def test_starts_that_cannot_be(family, tmp_path, capsys):
    (tmp_path / "text.json").write_text("hello")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "encoder.json").write_text('{"model_type": "vit"}')
    content = json.loads((family / "small" / "config.json").read_text())
    (tmp_path / "narrow.json").write_text(json.dumps({**content, "vocab_size": 6}))
    (tmp_path / "odd.json").write_text(json.dumps({**content, "num_attention_heads": 0}))
    for words, message in {
        (f"--init_config={tmp_path / 'absent.json'}",): "No such file",
        (f"--init_config={tmp_path / 'text.json'}",): "no JSON",
        (f"--init_config={tmp_path / 'list.json'}",): "no model_type",
        (f"--init_config={tmp_path / 'encoder.json'}",): "no causal LM can be built from it",
        (f"--init_config={tmp_path / 'odd.json'}",): "no causal LM can be built from it",
        (f"--init_config={tmp_path / 'narrow.json'}",): "beyond a network's vocabulary of 6",
        (f"--init_config={tmp_path}", f"--init={family / 'small'}"): "--init and --init_config were both given",
        (f"--init_config={tmp_path}", "--lora_rank=2"): "--lora_rank needs a trained model",
        ("--zero_output_layer", "--lora_rank=2"): "the zeroed output layer would never be trained",
        ("--lora_rank=-1",): "--lora_rank is -1",
    }.items():
        given = flags(family, tmp_path / "never", *words)
        if ("--init_config" in words[0] and len(words) == 1) or "--lora_rank=2" in words:
            given = [word for word in given if not word.startswith("--init=")]
        assert cli.main(["train", *given]) == 2, words
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ivl train: error: ")]
        assert len(err) == 1 and message in err[0], (words, err)
    assert not (tmp_path / "never" / "config.json").exists()


def test_lora_is_saved_merged_and_resumes(family, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    more = ("--lora_rank=4", "--lr=0.05", *STEPS)
    trainer = train(family, tmp_path / "whole", *more)
    out = capsys.readouterr().out
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert f"trainable parameters: {count:,} (LoRA of rank 4) of the value network's " in out
    output = tmp_path / "whole"
    for folder in (output, output / "checkpoint-8"):
        names = {path.name for path in folder.iterdir() if path.is_file()}
        assert "model.safetensors" in names and not [name for name in names if "adapter" in name]
        assert IVLConfig.read(folder) is not None
    trainer.model.eval()
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        adapted = trainer.model(ids).logits
        start = AutoModelForCausalLM.from_pretrained(family / "small")(ids).logits
        for folder in (output, output / "checkpoint-8"):
            merged = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
            torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
        assert (adapted - start).abs().max() > 0.1
    # The frozen part did not move.
    before, after = weights(family / "small"), weights(output)
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert "LoRA adapter of rank 4, merged" in (output / "README.md").read_text()

    again = tmp_path / "again"
    train(family, again, *more, f"--resume={output / 'checkpoint-6'}")
    assert logged(again) == pytest.approx(logged(output), rel=1e-5)
    assert_close_weights(weights(again), after, rtol=1e-5, atol=1e-6)
    # The adapter's random half comes from the seed.
    train(family, tmp_path / "repeated", *more)
    assert logged(tmp_path / "repeated") == logged(output)


def test_lora_on_layers_that_keep_their_weight_transposed(family, tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    from ivl_vllm.training.lora import add_lora, merge_state

    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    adapted = add_lora(model, 2, seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.get_base_model().save_pretrained(tmp_path, state_dict=merge_state(adapted, adapted.state_dict()))
    ids = torch.tensor([[1, 2, 3]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)


# --- long, packed and broken data


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
    assert "ivl train: error: --data, line 1: no answer tokens are left after the chat template" in err


def test_packing_gives_the_loss_and_gradient_of_unpacked_examples(family, tmp_path):
    from ivl_vllm.training.command import prepare

    data = write_rows(tmp_path / "uneven.jsonl", uneven_rows(24))
    results = {}
    for packing in ("false", "true"):
        words = (f"--data={data}", f"--packing={packing}", "--max_length=40", "--batch_size=24")
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


# --- a run that diverges


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
    from ivl_vllm.training.saving import TrainingDivergedError

    output = tmp_path / "value"
    trainer = train(family, output, "--max_steps=1")
    before = (output / "model.safetensors").read_bytes()
    with torch.no_grad():
        next(trainer.model.parameters())[0, 0] = float("nan")
    with pytest.raises(TrainingDivergedError, match="weights are not finite at step 1; no checkpoint had been written"):
        trainer.save_result(output, torch.float32)
    assert (output / "model.safetensors").read_bytes() == before


# --- curves and TensorBoard


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
    (checkpoint / "training_log.json").write_text("{}")
    assert cli.main(["inspect", str(checkpoint)]) == 2
    assert "holds no list of log entries" in capsys.readouterr().err


def test_nothing_is_reported_to_anyone(family, tmp_path, monkeypatch):
    import trl.trainer.base_trainer as base_trainer

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda **_: pytest.fail("telemetry was sent"))
    train(family, tmp_path / "out", "--max_steps=1")
