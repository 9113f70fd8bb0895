"""`ivl inspect` on folders that are broken: one line that names the file, or what could not be checked."""

import dataclasses
import json
import re
import shlex

import pytest
from training_tools import make_model, make_tokenizer

from ivl_vllm import cli
from ivl_vllm.training.curves import write_log
from ivl_vllm.training.ivl_config import IVLConfig
from ivl_vllm.training.model_card import serve_command
from ivl_vllm.vocab.fingerprint import vocabulary_fingerprint


@pytest.fixture
def folder(tmp_path):
    """A value network in several files, in a folder whose name a shell would take apart."""
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer()
    folder = make_model(tmp_path / "it's mine", tokenizer)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()  # the one file that it was
    IVLConfig("some/base", "residual", "l1", 1.0, len(tokenizer), vocabulary_fingerprint(tokenizer)).write(folder)
    write_log(folder, [{"step": 1, "loss": 2.5}])
    return folder


def inspect(folder, capsys):
    assert cli.main(["inspect", str(folder)]) == 0
    rows = (line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    return {name.strip(): value.strip() for name, value in rows}


def test_a_whole_folder_is_told_as_it_is(folder, capsys):
    from transformers import AutoModelForCausalLM

    assert len(list(folder.glob("model-*.safetensors"))) > 1
    rows = inspect(folder, capsys)
    assert rows["parameters"] == f"{AutoModelForCausalLM.from_pretrained(folder).num_parameters():,}"
    assert (rows["dtype"], rows["train"]) == ("float32", "loss 2.5 at step 1")
    assert rows["fingerprint"].endswith(", ok")
    words = shlex.split(rows["serve"])
    assert json.loads(words[words.index("--additional-config") + 1]) == {"ivl": {"value_model": str(folder)}}


def test_the_serve_command_is_that_of_the_model_card(folder, capsys):
    config = dataclasses.replace(IVLConfig.read(folder), takes=["chat-template", "generation-config"])
    config.write(folder)
    words = shlex.split(inspect(folder, capsys)["serve"])
    assert words[-4:] == ["--chat-template", f"{folder}/chat_template.jinja", "--generation-config", str(folder)]
    with pytest.raises(ValueError, match="takes is .*expected a list of chat-template and generation-config"):
        dataclasses.replace(config, takes=["x"])
    # Folders of earlier releases say nothing of it.
    file = folder / "ivl_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "takes"}))
    assert IVLConfig.read(folder).takes == []


def test_every_word_of_the_serve_command_is_read_back_by_a_shell():
    words = shlex.split(serve_command("my base", "/it's/v", ("chat-template", "generation-config")))
    assert words[:3] == ["vllm", "serve", "my base"]
    assert words[-4:] == ["--chat-template", "/it's/v/chat_template.jinja", "--generation-config", "/it's/v"]


def cut_short(folder):
    file = max(folder.glob("model-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])


def remove(folder):
    max(folder.glob("model-*.safetensors")).unlink()


def dangle(folder):
    file = max(folder.glob("model-*.safetensors"))
    file.unlink()
    file.symlink_to(folder / "nowhere")


def make_folder(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_short, r"model-\S+\.safetensors is no safetensors file, or one cut short \(.+\); fetch it again"),
        (remove, r"1 of \d+ weight files are missing, first model-\S+\.safetensors; fetch"),
        (dangle, r"1 of \d+ weight files are missing, first model-\S+\.safetensors; fetch"),
        (write(INDEX, b"{}"), f"{INDEX} has no weight_map"),
        (write(INDEX, b'{"weight_map": {"x": 1}}'), f"{INDEX} has no weight_map"),
        (write("config.json", b"[]"), "config.json holds no JSON object"),
        (write("config.json", b"[" * 100_000), "config.json is no JSON: "),
        (make_folder, "config.json cannot be read: Is a directory"),
        (write("ivl_config.json", b"\xff"), "ivl_config.json is no JSON: "),
        (write("training_log.json", b"{}"), "training_log.json holds no JSON list"),
        (
            write("training_log.json", b'[{"step": 1}, {"step": 1, "loss": "x"}]'),
            "training_log.json: loss of entry 2 is 'x'; expected a number",
        ),
        (
            write("training_log.json", b'[{"step": [], "loss": 1.5}]'),
            r"training_log.json: step of entry 1 is \[\]; expected a number",
        ),
    ],
)
def test_a_broken_file_is_named_in_one_line(folder, capsys, spoil, message):
    spoil(folder)
    assert cli.main(["inspect", str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"ivl inspect: error: {folder}")
    assert re.search(message, captured.err), captured.err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"text_config": None}, "LlamaForCausalLM, 2 layers of 32"),
        ({"text_config": "x"}, "LlamaForCausalLM, 2 layers of 32"),
        ({"architectures": "MyModel"}, "MyModel, 2 layers of 32"),
        ({"architectures": []}, "llama, 2 layers of 32"),
    ],
)
def test_odd_but_readable_configs(folder, capsys, change, told):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert inspect(folder, capsys)["architecture"] == told


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_tokenizer_that_is_broken_is_not_called_absent(folder, capsys, content):
    (folder / "tokenizer.json").write_text(content)
    assert ", not checked: its tokenizer cannot be read (" in inspect(folder, capsys)["fingerprint"]
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert inspect(folder, capsys)["fingerprint"].endswith(", not checked: the folder has no tokenizer")
