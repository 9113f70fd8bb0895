"""`ivl train` with schemes, several bases, temperature, noise and a cache of the base: flags in, folders out."""

import pytest
import torch
from safetensors.torch import load_file
from training_tools import SGD, flags, make_model, make_tokenizer, next_letter_rows, train, write_rows

from ivl_vllm import cli
from ivl_vllm.training.ivl_config import IVLConfig


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("schemes")
    tokenizer = make_tokenizer()
    make_model(root / "base", tokenizer, hidden=48, seed=1)
    make_model(root / "other", tokenizer, hidden=32, seed=4, extra_rows=3, tied=False)
    make_model(root / "small", tokenizer, hidden=32, seed=2)
    write_rows(root / "train.jsonl", next_letter_rows(48, 0))
    return root


def losses(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("scheme", ["cascade", "cascade+text"])
def test_cascades_learn_and_are_recorded(family, tmp_path, scheme):
    output = tmp_path / "value"
    trainer = train(family, output, f"--scheme={scheme}", "--max_steps=40", "--norm_weight=0.1", "--loss_chunk=5")
    assert IVLConfig.read(output).scheme == scheme
    assert scheme in (output / "README.md").read_text()
    found = losses(trainer)
    assert found[-1] < 0.8 * found[0]
    assert trainer.joint_loss.reads_base


def test_the_size_of_a_chunk_changes_nothing(family, tmp_path):
    one = train(family, tmp_path / "one", *SGD, "--loss_chunk=1").model
    many = train(family, tmp_path / "many", *SGD).model
    for left, right in zip(one.parameters(), many.parameters()):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_compiled_training_has_the_same_losses(family, tmp_path):
    common = (*SGD, "--logging_steps=1", "--scheme=cascade+text")
    plain = train(family, tmp_path / "plain", *common)
    compiled = train(family, tmp_path / "c", *common, "--torch_compile=true", "--torch_compile_backend=aot_eager")
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


def test_an_adapter_learns_through_a_frozen_head_and_frozen_embeddings(family, tmp_path):
    trainer = train(family, tmp_path / "v", "--scheme=cascade", "--lora_rank=4", "--norm_weight=0", "--lr=0.02")
    assert trainer.joint_loss.notes() == []
    found = losses(trainer)
    assert found[-1] < 0.9 * found[0]


def test_several_bases_reach_the_loss_and_the_card(family, tmp_path):
    runs = {}
    for name, more in {
        "one": (),
        "draw": (f"--more_bases={family / 'other'}",),
        "average": (f"--more_bases={family / 'other'}", "--base_mix=average"),
        "temperature": ("--base_temperature=3",),
        "noise": ("--base_noise=0.5",),
        "noise again": ("--base_noise=0.5",),
    }.items():
        runs[name] = losses(train(family, tmp_path / name, *SGD, "--logging_steps=1", *more))
    assert runs.pop("noise again") == runs["noise"]
    assert len({tuple(found) for found in runs.values()}) == len(runs)
    card = (tmp_path / "average" / "README.md").read_text()
    assert str(family / "other") in card
    assert "average" in card


def test_cached_epochs_have_the_losses_of_uncached_ones(family, tmp_path, monkeypatch):
    common = (*SGD, "--max_steps=-1", "--epochs=3", "--logging_steps=1", "--eval_fraction=0.25")
    plain = train(family, tmp_path / "plain", *common)
    cached = train(family, tmp_path / "cached", *common, f"--cache_base={tmp_path / 'cache'}")
    for name in ("loss", "ce", "norm", "eval_loss"):
        assert losses(cached, name) == pytest.approx(losses(plain, name), rel=1e-5)
    cache = cached.joint_loss.cache
    # 36 examples train for three epochs, 12 are evaluated after each: the base saw each of the 48 in one pass at most.
    assert 0 < cache.computed <= 48 < cache.read
    assert list((tmp_path / "cache").glob("*.safetensors"))
    again = train(family, tmp_path / "again", *common, f"--cache_base={tmp_path / 'cache'}")
    assert again.joint_loss.cache.computed == 0
    assert losses(again) == pytest.approx(losses(plain), rel=1e-5)


def test_cache_works_on_packed_rows(family, tmp_path):
    common = (*SGD, "--max_steps=-1", "--epochs=2", "--logging_steps=1", "--max_length=32", "--packing")
    plain = train(family, tmp_path / "plain", *common)
    cached = train(family, tmp_path / "cached", *common, f"--cache_base={tmp_path / 'cache'}")
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-5)
    assert cached.joint_loss.cache.read > 0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--scheme=cascading", "cascading"),
        ("--base_mix=sum", "sum"),
        ("--base_temperature=0", "--base_temperature is 0.0"),
        ("--base_temperature=inf", "--base_temperature is inf"),
        ("--base_noise=-1", "--base_noise is -1.0"),
        ("--loss_chunk=0", "--loss_chunk is 0"),
        ("--more_bases=./nowhere", "--more_bases ./nowhere: no such folder"),
        ("--cache_base=x --scheme=cascade", "--cache_base keeps the base at answer tokens alone"),
        ("--cache_base=x --more_bases=y", "leave it or --more_bases out"),
    ],
)
def test_bad_settings_are_told(family, tmp_path, capsys, flag, message):

    assert cli.main(["train", *flags(family, tmp_path / "never", *flag.split())]) == 2
    assert message in capsys.readouterr().err


def test_another_vocabulary_among_the_bases_is_told(family, tmp_path, capsys):

    strange = make_model(tmp_path / "strange", make_tokenizer(words=["a", "b"]))
    assert cli.main(["train", *flags(family, tmp_path / "never", f"--more_bases={strange}")]) == 2
    told = f"--base {family / 'base'} and --more_bases {strange} have different vocabularies (20 and 5 tokens; "
    err = capsys.readouterr().err
    assert told in err and "choose --more_bases from the base's family" in err


@pytest.mark.parametrize("scheme", ["residual", "cascade", "cascade+text"])
def test_the_bases_are_bit_identical_after_training_in_every_scheme(family, tmp_path, scheme):
    """Tied or not, drawn or averaged: neither in memory nor on disk does a bit of them change."""
    before = {name: (family / name / "model.safetensors").read_bytes() for name in ("base", "other")}
    more = (f"--scheme={scheme}", f"--more_bases={family / 'other'}", "--base_mix=average", "--norm_positions=all")
    trainer = train(family, tmp_path / "value", "--max_steps=3", "--lr=0.1", *more)
    for name, network in zip(("base", "other"), trainer.joint_loss.bases.models):
        assert (family / name / "model.safetensors").read_bytes() == before[name]
        stored, state = load_file(family / name / "model.safetensors"), network.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in stored.items())
        assert not network.training
        assert all(not p.requires_grad and p.grad is None for p in network.parameters())
    # Something was trained all the same.
    start = load_file(family / "small" / "model.safetensors")
    assert not any(torch.equal(tensor, trainer.model.state_dict()[key]) for key, tensor in start.items())


def test_norm_positions_reach_the_loss_the_folder_the_card_and_inspect(family, tmp_path, capsys):
    from ivl_vllm import cli

    common = (*SGD, "--logging_steps=1", "--eval_fraction=0.25", f"--more_bases={family / 'other'}", "--base_noise=0.5")
    runs = {where: train(family, tmp_path / where, *common, f"--norm_positions={where}") for where in ("answer", "all")}
    for name in ("loss", "norm", "eval_norm"):
        assert losses(runs["all"], name) != losses(runs["answer"], name)
    config = IVLConfig.read(tmp_path / "all")
    assert (config.norm_positions, config.base_noise, config.base_mix) == ("all", 0.5, "draw")
    assert config.more_bases == [str((family / "other").resolve())]
    assert IVLConfig.read(tmp_path / "answer").norm_positions == "answer"
    assert "| Norm | l1, λ = 1, at all positions |" in (tmp_path / "all" / "README.md").read_text()
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "all")]) == 0
    out = capsys.readouterr().out
    for part in ("l1, λ = 1, at all positions", f"{family / 'other'} (one drawn for each step)", "base noise"):
        assert part in out
