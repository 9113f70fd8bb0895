"""The command `ivl`: help, `inspect`, `map-vocab`, and what a user sees when something is wrong."""

import json
import re
import subprocess
import sys
from importlib import metadata

import pytest
from test_training import make_model, make_tokenizer, next_letter_rows, write_rows
from training_tools import ONE_GPU
from vocab_kinds import TEXT, train_bytes, train_wordpiece

from ivl_vllm import cli
from ivl_vllm.training.ivl_config import IVLConfig
from ivl_vllm.vocab import INPUTS, METHODS, UNMAPPED
from ivl_vllm.vocab.make import make_vocab_map
from ivl_vllm.vocab.vocab_map import VocabMap


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "train" in out and "inspect" in out and "map-vocab" in out


def test_version_is_the_installed_one(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"ivl {metadata.version('ivl-vllm')}\n"


TRACED = {
    "trace": "a",
    "request": "r",
    "position": 0,
    "token_before": None,
    "draft": False,
    "base_token": 5,
    "token": 6,
    "weights": {"math": 1.0},
    "kl": 0.5,
}


def test_trace_reads_a_tilde_as_home_and_tells_a_missing_folder(tokenizers, capsys, monkeypatch):
    root = tokenizers["root"]
    monkeypatch.setenv("HOME", str(root))
    (root / "trace.jsonl").write_text(json.dumps(TRACED) + "\n")
    words = ["trace", "~/trace.jsonl", "-o", "~/trace.html", "--tokenizer"]
    assert cli.main([*words, "~/base"]) == 0
    assert (root / "trace.html").is_file()
    for absent in ("~/absent", "/nosuch"):
        assert cli.main([*words, absent]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and absent in err and "no such folder; give the folder of a model, or" in err


def test_an_error_of_several_lines_is_told_in_one(capsys):
    assert cli.main(["inspect", "no\nfolder"]) == 2
    assert capsys.readouterr().err.startswith("ivl inspect: error: no folder: no such folder")


def test_train_help_is_complete_and_loads_no_torch():
    code = (
        "import sys; from ivl_vllm import cli; status = cli.main(['train', '--help']); "
        "sys.exit(status or ('torch' in sys.modules) or ('trl' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    from dataclasses import fields

    from ivl_vllm.training.arguments import CommonArguments, ValueArguments

    for name in [f.name for f in (*fields(ValueArguments), *fields(CommonArguments))]:
        assert f"--{name}" in done.stdout
    assert "--config" in done.stdout and "--help-all" in done.stdout


def test_help_all_has_the_trainers_own_fields(capsys):
    assert cli.main(["train", "--help-all"]) == 0
    out = capsys.readouterr().out
    assert "--packing" in out and "--fsdp" in out and "--norm_weight" in out


@pytest.mark.parametrize("words", [[], ["no-such-command"], ["inspect"], ["map-vocab", "--base", "x"]])
def test_wrong_words_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert "usage: ivl" in capsys.readouterr().err


@pytest.fixture(scope="module")
def value_folder(tmp_path_factory):
    """Made by the command as a user runs it: a process, a YAML file and flags."""
    root = tmp_path_factory.mktemp("cli")
    make_model(root / "base", make_tokenizer())
    data = write_rows(root / "data.jsonl", next_letter_rows(20, 0))
    (root / "run.yaml").write_text(f"base: {root / 'base'}\ndata: {data}\nmax_steps: 2\nsave-strategy: 'no'\n")
    done = subprocess.run(
        [sys.executable, "-m", "ivl_vllm.cli", "train", "--config", root / "run.yaml", "--output", root / "value"],
        env=ONE_GPU,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "trainable parameters: " in done.stdout and "vllm serve BASE" in done.stdout
    assert re.search(r"step 1: loss \S+  ce \S+  norm \S+  token accuracy \S+  lr \S+", done.stdout)
    return root / "value"


def test_inspect_a_value_network(value_folder, capsys):
    assert cli.main(["inspect", str(value_folder)]) == 0
    out = capsys.readouterr().out
    rows = dict(line.split("  ", 1) for line in out.splitlines())
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["kind"] == "value network, scheme residual"
    assert rows["trained against"] == str(value_folder.parent / "base")
    assert rows["dtype"] == "float32"
    assert rows["norm"] == "l1, λ = 1"
    assert rows["fingerprint"].endswith(", ok")
    assert rows["vocabulary"] == f"{len(make_tokenizer())} columns"
    assert rows["serve"].startswith("vllm serve BASE --logits-processor ivl --additional-config ")
    assert json.loads(rows["serve"].split("'")[1]) == {"ivl": {"value_model": str(value_folder)}}
    from safetensors.torch import load_file

    count = sum(tensor.numel() for tensor in load_file(value_folder / "model.safetensors").values())
    assert rows["parameters"] == f"{count:,}"


def test_inspect_sees_a_tokenizer_that_does_not_belong(value_folder, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(value_folder, tmp_path / "copy")
    make_tokenizer(words=["other"]).save_pretrained(folder)
    config = IVLConfig.read(folder)
    (folder / "ivl_config.json").write_text(json.dumps({**vars(config), "vocab_size": 7}))
    assert cli.main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "MISMATCH with the tokenizer" in out
    assert "ivl_config.json says 7: MISMATCH" in out


def test_inspect_a_plain_causal_lm(value_folder, capsys):
    assert cli.main(["inspect", str(value_folder.parent / "base")]) == 0
    out = capsys.readouterr().out
    assert "plain residual value network" in out
    assert "LlamaForCausalLM, 2 layers of 32" in out
    assert "fingerprint" not in out


def test_inspect_refuses_in_one_line(value_folder, tmp_path, capsys):
    import shutil

    broken = shutil.copytree(value_folder, tmp_path / "broken")
    (broken / "ivl_config.json").write_text("{")
    weightless = shutil.copytree(value_folder, tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    garbage = shutil.copytree(value_folder, tmp_path / "garbage")
    (garbage / "model.safetensors").write_bytes(b"\xff" * 64)
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for folder, message in {
        tmp_path / "absent": "absent: no such folder; give the --output of ivl train, or the folder of any causal LM",
        tmp_path / "empty": "no config.json",
        encoder: "no causal LM",
        weightless: "no model*.safetensors",
        garbage: "no safetensors file",
        broken: "no JSON",
    }.items():
        assert cli.main(["inspect", str(folder)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("ivl inspect: error: ") and err.count("\n") == 1
        assert message in err


def test_map_vocab_help_is_complete_and_quick():
    code = (
        "import sys; from ivl_vllm import cli\n"
        "try: cli.main(['map-vocab', '--help'])\n"
        "finally: print([n for n in ('torch', 'numpy', 'transformers', 'rapidfuzz') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    for flag in ("--base", "--value", "--method", "--input", "--unmapped", "--corpus", "--output"):
        assert f"  {flag} " in done.stdout
    for choice in (*METHODS, *INPUTS, *UNMAPPED):
        assert re.search(rf"^ +{choice}: ", done.stdout, re.MULTILINE)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Folders that hold a tokenizer and nothing else."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {"base": train_bytes(root / "base"), "value": train_wordpiece(root / "value"), "root": root}


@pytest.mark.parametrize(
    ("method", "input", "unmapped"),
    [("exact", "last", "first"), ("nearest", "nearest", "keep"), ("aligned", "mean", "mean")],
)
def test_map_vocab(tokenizers, tmp_path, capsys, method, input, unmapped):
    root = tokenizers["root"]
    corpus, output = tmp_path / "corpus.txt", tmp_path / "map.safetensors"
    corpus.write_text("\n".join(TEXT))
    words = ["map-vocab", "--base", str(root / "base"), "--value", str(root / "value"), "--output", str(output)]
    words += ["--method", method, "--input", input, "--unmapped", unmapped, "--corpus", str(corpus)]
    assert cli.main(words) == 0
    made = VocabMap.load(output)
    expected = make_vocab_map(
        tokenizers["base"],
        tokenizers["value"],
        method,
        input,
        unmapped,
        [f"{line}\n" for t in TEXT for line in t.split("\n")],
    )
    for name, content in vars(expected).items():
        assert (getattr(made, name) == content).all() if hasattr(content, "all") else getattr(made, name) == content
    made.check(tokenizers["base"], tokenizers["value"], "the map")
    out = capsys.readouterr().out
    assert re.search(rf"^coverage +{made.coverage:.1%} of 400 base tokens", out, re.MULTILINE)
    assert re.search(r"^in the corpus +\d+\.\d% of \d+ tokens", out, re.MULTILINE)
    assert "without partner" in out and "warning: the tokenizers group digits differently" in out
    assert out.splitlines()[-1] == f"written to {output}"


def test_map_vocab_reads_a_tilde_as_home(tokenizers, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tokenizers["root"]))
    (tokenizers["root"] / "text.txt").write_text("\n".join(TEXT))
    words = ["--base=~/base", "--value=~/value", "--output=~/map.safetensors", "--corpus=~/text.txt"]
    assert cli.main(["map-vocab", *words]) == 0
    VocabMap.load(tokenizers["root"] / "map.safetensors").check(tokenizers["base"], tokenizers["value"], "the map")


def test_an_output_that_cannot_be_made_is_told_before_the_work(tokenizers, capsys, monkeypatch):
    monkeypatch.setattr("ivl_vllm.vocab.command.read_tokenizer_of", lambda *_: pytest.fail("a tokenizer was loaded"))
    root = tokenizers["root"]
    assert cli.main(["map-vocab", f"--base={root}/base", f"--value={root}/value", "--output=/proc/m.safetensors"]) == 2
    assert "--output /proc: nothing can be written there (" in capsys.readouterr().err


def test_map_vocab_refuses_in_one_line(tokenizers, tmp_path, capsys):
    root = tokenizers["root"]
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "half.jsonl").write_text('{"text": "whole"}\n{"text": ["a", "b\\ud800c"]}\n')
    good = {"--base": root / "base", "--value": root / "value", "--output": tmp_path / "map.safetensors"}
    for changes, message in (
        (
            {"--base": tmp_path / "absent"},
            "--base .*absent: no tokenizer could be loaded: no such folder; give the folder of",
        ),
        ({"--value": tmp_path}, "--value .*: no tokenizer could be loaded: the folder has no tokenizer"),
        ({"--output": tmp_path}, "--output .*: give the name of a file"),
        (
            {"--output": "/proc/map.safetensors"},
            "--output /proc: nothing can be written there .*; choose another folder",
        ),
        ({"--base": "~/absent"}, "--base ~/absent: no tokenizer could be loaded: no such folder; give the folder of"),
        ({"--corpus": tmp_path / "half.jsonl"}, r"--corpus .*half.jsonl, line 2: '\\ud800' is half a character"),
        ({"--output": tmp_path / "no" / "map"}, "--output .*: give the name of a file in a folder that exists"),
        ({"--method": "aligned"}, "--method aligned learns from text"),
        ({"--corpus": tmp_path / "absent.txt"}, "--corpus .*absent.txt: no such file"),
        ({"--corpus": tmp_path / "broken.jsonl"}, "--corpus .*broken.jsonl, line 1: no JSON"),
    ):
        words = [str(word) for pair in (good | changes).items() for word in pair]
        assert cli.main(["map-vocab", *words]) == 2, changes
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("ivl map-vocab: error: ") and re.search(message, err), err
        assert not (tmp_path / "map.safetensors").exists()
