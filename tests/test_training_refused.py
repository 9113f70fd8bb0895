"""`ivl train` refuses numbers, folders and files that cannot be used, before it loads a model."""

import pytest
from training_tools import flags, make_family, train

from ivl_vllm import cli
from ivl_vllm.training import models


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = make_family(tmp_path_factory.mktemp("family"))
    (root / "latin.jinja").write_bytes(b"\xff")
    return root


FINITE = "expected a finite number from 0 up"
POSITIVE = "expected a finite number from 1 up"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--lr=nan", f"--learning_rate (--lr) is nan; {FINITE}"),
        ("--lr=-1", f"--learning_rate (--lr) is -1.0; {FINITE}"),
        ("--lr=inf", f"--learning_rate (--lr) is inf; {FINITE}"),
        ("--epochs=nan", f"--num_train_epochs (--epochs) is nan; {FINITE}"),
        ("--epochs=-1", f"--num_train_epochs (--epochs) is -1.0; {FINITE}"),
        ("--batch_size=0", f"--per_device_train_batch_size (--batch_size) is 0; {POSITIVE}"),
        ("--per_device_eval_batch_size=0", f"--per_device_eval_batch_size is 0; {POSITIVE}"),
        ("--gradient_accumulation_steps=0", f"--gradient_accumulation_steps is 0; {POSITIVE}"),
        ("--logging_steps=nan", f"--logging_steps is nan; {FINITE}"),
        ("--warmup_steps=nan", f"--warmup_steps is nan; {FINITE}"),
        ("--weight_decay=-1", f"--weight_decay is -1.0; {FINITE}"),
        ("--adam_beta1=nan", "--adam_beta1 is nan; expected a number"),
        ("--base_temperature=nan", "--base_temperature is nan; expected a number"),
        ("--output=/proc/o", "--output /proc/o: nothing can be written there (No such file or directory); choose"),
        ("--cache_base=/proc/x", "--cache_base /proc/x: nothing can be written there (No such file or directory); "),
        ("--cache_base={family}/train.jsonl", "--cache_base {family}/train.jsonl: a file is in the way; choose"),
        ("--output={family}/train.jsonl/o", "--output {family}/train.jsonl/o: nothing can be written there (Not a d"),
        ("--chat_template_path={family}/latin.jinja", "--chat_template_path {family}/latin.jinja: not UTF-8 (invalid "),
        ("--base=~/nowhere", "--base ~/nowhere: no such folder; give the folder of a model, or its id on the hub"),
    ],
)
def test_what_cannot_be_used_is_one_line_before_anything_is_loaded(
    family, tmp_path, monkeypatch, capsys, flag, message
):
    monkeypatch.setattr(models, "load_base", lambda *_: pytest.fail("a model was loaded"))
    assert cli.main(["train", *flags(family, tmp_path / "never", flag.format(family=family))]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ivl train: error: ")]
    assert len(err) == 1 and message.format(family=family) in err[0], err
    assert not (tmp_path / "never").exists()


def test_a_number_of_the_yaml_file_that_is_none(tmp_path):
    from ivl_vllm.training.parsing import parse

    (tmp_path / "run.yaml").write_text("base: x\ndata: y\noutput: z\nlr: null\n")
    with pytest.raises(ValueError, match=r"--learning_rate \(--lr\) is None; expected a finite number"):
        parse(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(("rank", "is_told"), [(32, False), (33, True)])
def test_an_adapter_larger_than_what_it_adapts_is_warned_of(family, tmp_path, capsys, rank, is_told):
    train(family, tmp_path / "value", "--max_steps=1", f"--lora_rank={rank}")
    told = f"warning: --lora_rank {rank} is above the value network's hidden size of 32"
    assert (told in capsys.readouterr().out) == is_told


def test_a_resumed_checkpoint_that_was_cut_short_is_named(family, tmp_path, capsys):
    steps = ("--save_strategy=steps", "--save_steps=1", "--max_steps=1")
    train(family, tmp_path / "value", *steps)
    file = tmp_path / "value" / "checkpoint-1" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert cli.main(["train", *flags(family, tmp_path / "value", *steps, "--resume=last")]) == 2
    assert f"error: {file} is no safetensors file, or one cut short" in capsys.readouterr().err


def test_paths_may_begin_with_a_tilde(family, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("max_steps: 2\nsave_strategy: steps\nsave_steps: 1\nsave_total_limit: 3\n")
    less = [word for word in flags(family, "~/value") if not word.startswith(("--max_steps", "--save_strategy"))]
    for config in (["--config=~/run.yaml"], ["--config", "~/run.yaml", "--resume=~/value/checkpoint-1"]):
        assert cli.main(["train", *less, *config]) == 0
        assert (tmp_path / "value" / "checkpoint-2").is_dir()
