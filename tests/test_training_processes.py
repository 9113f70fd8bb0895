"""Two processes on the CPU (gloo), replicated (DDP) and sharded (FSDP), against one process."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from training_tools import (
    SGD,
    SHARDED,
    TWO,
    assert_close_weights,
    flags,
    logged,
    make_family,
    make_tokenizer,
    run_process,
    train,
    uneven_rows,
    weights,
    write_rows,
)
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from ivl_vllm import cli
from ivl_vllm.training.ivl_config import IVLConfig

LINEAR = [*(f"self_attn.{kind}_proj" for kind in "qkvo"), *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down"))]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


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
    ]
    train(family, root / "one", *common, "--batch_size=16", "--use_cpu=true")
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
    # Where there is no accelerator, the processes meet on the CPU by themselves.
    done = run_process(
        family,
        tmp_path / "two",
        *common,
        "--batch_size=8",
        "--use_cpu=false",
        start=(*TWO, "-m", "ivl_vllm.cli"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trainable parameters: ") == 1
    assert_same_run(root, tmp_path / "two")


def test_two_sharded_processes_match_one_resume_and_save_in_half_precision(family, one_process, tmp_path):
    root, common = one_process
    sharded = (
        *common,
        "--use_cpu=true",
        "--batch_size=8",
        "--fsdp=full_shard",
        "--save_strategy=steps",
        "--save_steps=4",
    )
    two, again = tmp_path / "two", tmp_path / "again"
    sharded = (*sharded, "--batch_size=8")
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
    from ivl_vllm.training.checks import check_sharding

    assert cli.main(["train", *flags(family, tmp_path / "never", "--fsdp=full_shard", "--use_cpu=true")]) == 2
    err = capsys.readouterr().err
    assert "ivl train: error: --fsdp full_shard: there is one process (WORLD_SIZE is not set)" in err
    assert "torchrun --nproc_per_node N -m ivl_vllm.cli train" in err and "or leave --fsdp out" in err
    assert not (tmp_path / "never").exists()
    # As accelerate leaves it for several processes on the CPU, without a word.
    told = SimpleNamespace(fsdp=True, device="cpu", world_size=2)
    with pytest.raises(ValueError, match="--fsdp was given, but on the device cpu of 2 processes nothing would be"):
        check_sharding(SimpleNamespace(args=told, is_fsdp_enabled=False))


def test_deepspeed_that_is_missing_or_shards_weights_is_refused(family, tmp_path, capsys, monkeypatch):
    from transformers.integrations import deepspeed

    from ivl_vllm.training import processes

    words = ["train", *flags(family, tmp_path / "never", "--use_cpu=true")]
    with monkeypatch.context() as patch:
        patch.setattr(processes, "find_spec", lambda name: None)
        assert cli.main([*words, "--deepspeed=zero.json"]) == 2
    err = capsys.readouterr().err
    assert "ivl train: error: --deepspeed zero.json: its package is missing; pip install deepspeed" in err

    class Told:  # as transformers keeps what DeepSpeed was told, by its flag or by accelerate
        def is_zero3(self):
            return True

    told = Told()
    deepspeed.set_hf_deepspeed_config(told)
    try:
        assert cli.main(words) == 2
    finally:
        deepspeed.unset_hf_deepspeed_config()
    err = capsys.readouterr().err
    assert "DeepSpeed's zero_optimization.stage is 3: sharded weights are offered with --fsdp full_shard" in err
    assert not (tmp_path / "never").exists()


def test_several_processes_that_form_no_group_are_refused(family, tmp_path, capsys, monkeypatch):
    from ivl_vllm.training import processes, trainer

    words = ["train", *flags(family, tmp_path / "never", "--use_cpu=false")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert "ivl train: error: WORLD_SIZE is 2 in the environment, but not LOCAL_RANK" in err
    assert "torchrun --nproc_per_node 2 " in err and "unset WORLD_SIZE" in err

    monkeypatch.setenv("LOCAL_RANK", "0")
    assert processes.needs_cpu() != torch.accelerator.is_available()
    # As on a machine whose accelerator has no way to talk to the other process.
    monkeypatch.setattr(trainer, "needs_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert "ivl train: error: WORLD_SIZE is 2 in the environment, but the processes formed no group" in err
    assert "--use_cpu true" in err
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert cli.main(words) == 2
    assert "WORLD_SIZE is 'two' in the environment; expected a whole number" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_a_cascade_as_one_does(family, tmp_path, how):
    common = (
        *SGD,
        "--scheme=cascade+text",
        "--loss_chunk=7",
        f"--more_bases={family / 'other'}",
        "--norm_positions=all",
    )
    train(family, tmp_path / "one", *common, "--batch_size=16")
    start, more = (SHARDED, ["--fsdp=full_shard"]) if how == "fsdp" else ((*TWO, "-m", "ivl_vllm.cli"), [])
    done = run_process(family, tmp_path / "two", *common, "--batch_size=8", "--use_cpu=true", *more, start=start)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close_weights(weights(tmp_path / "one"), weights(tmp_path / "two"), rtol=1e-3, atol=1e-5)


def test_two_processes_train_what_text_passes_through_of_a_network_that_sees(family, tmp_path):
    """DDP with gradient checkpointing ends at weights without gradients."""
    seen = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    read = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    read |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32, "max_position_embeddings": 64}
    tokens = {"image_token_index": 31, "boi_token_index": 30, "eoi_token_index": 29, "mm_tokens_per_image": 4}
    see = Gemma3Config(text_config=read, vision_config={**seen, "image_size": 56, "patch_size": 14}, **tokens)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(see).save_pretrained(tmp_path / "sees")
    make_tokenizer().save_pretrained(tmp_path / "sees")
    common = (*SGD, f"--init={tmp_path / 'sees'}", "--gradient_checkpointing=true", "--use_cpu=true")
    train(family, tmp_path / "one", *common, "--batch_size=16")
    train(family, tmp_path / "adapted", *common, "--batch_size=16", "--lora_rank=2")
    done = run_process(family, tmp_path / "two", *common, "--batch_size=8", start=(*TWO, "-m", "ivl_vllm.cli"))
    assert done.returncode == 0, done.stderr[-3000:]
    before, one = weights(tmp_path / "sees"), weights(tmp_path / "one")
    assert_close_weights(one, weights(tmp_path / "two"), rtol=1e-3, atol=1e-5)
    for after in (one, weights(tmp_path / "adapted")):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed and not any("vision" in name or "multi_modal" in name for name in changed)
    # With an adapter: all linear layers of the text, and they alone.
    linear = {f"{name}.weight" for name in LINEAR}
    assert {name.split(".layers.")[1][2:] for name in changed} == linear
    assert len(changed) == 2 * len(linear)


def test_two_processes_stop_together_when_they_diverge(family, tmp_path):
    output = tmp_path / "value"
    more = ("--lr=1e30", "--warmup_steps=3", "--max_steps=50", "--save_strategy=steps", "--save_steps=1")
    more = (*more, "--use_cpu=true", "--logging_steps=1000")
    done = run_process(family, output, *more, start=(*TWO, "-m", "ivl_vllm.cli"))
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "ivl train: error: training diverged: " in line]
    assert told and all("not finite at step" in line and "the last good checkpoint is" in line for line in told)
    for checkpoint in output.glob("checkpoint-*"):
        assert all(torch.isfinite(tensor).all() for tensor in weights(checkpoint).values())
    assert list(output.glob("checkpoint-*")) and not (output / "config.json").exists()


def test_orders_that_would_count_rows_twice_are_refused():
    from ivl_vllm.training.checks import check_sampling

    def check(processes, strategy, drop_last=False):
        told = {"world_size": processes, "train_sampling_strategy": strategy, "dataloader_drop_last": drop_last}
        check_sampling(SimpleNamespace(**told))

    check(1, "sequential")
    check(2, "random")
    check(2, "sequential", True)
    with pytest.raises(ValueError, match="--train_sampling_strategy sequential: 2 processes would be given some rows"):
        check(2, "sequential")


def test_one_process_writes(tmp_path):
    """transformers from 5.23 on asks every process to save; before that it asks the first alone."""
    from ivl_vllm.training.saving import SafeSaving

    trainer = SafeSaving.__new__(SafeSaving)
    trainer.args = SimpleNamespace(should_save=False, output_dir=str(tmp_path / "none"))
    trainer._save(str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
