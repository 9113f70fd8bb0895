"""Flags and the YAML file, and what a user reads who got one wrong; `ivl_config.json`; fingerprints."""

import copy
import json
import math
import shutil

import pytest
from training_tools import (
    WORDS,
    flags,
    make_family,
    make_model,
    make_tokenizer,
)

from ivl_vllm import cli
from ivl_vllm.tokenizer import read_tokenizer
from ivl_vllm.training.ivl_config import IVLConfig
from ivl_vllm.vocab.fingerprint import vocabulary_fingerprint


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


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
    message = f"--config {config}: unknown setting 'learning_rte'; did you mean learning_rate"
    with pytest.raises(ValueError, match=message):
        parse(["--config", str(config)])
    for name, given in {"norm": "l3", "norm_positions": "prompt", "base_mix": "sum"}.items():
        config.write_text(f"base: x\ndata: y\noutput: z\n{name}: {given}\n")
        with pytest.raises(ValueError, match=f"--{name} is '{given}'; expected .* or "):
            parse(["--config", str(config)])
    # YAML takes `no` for false.
    off = "save_strategy: no\neval_strategy: no\npacking: no\nreport_to: no\nresume: no\ninit: false\nfsdp: false\n"
    config.write_text(f"base: x\ndata: y\noutput: z\nmore_bases: B1\n{off}")
    value_args, args = parse(["--config", str(config)])
    assert (args.save_strategy, args.eval_strategy, args.packing, value_args.more_bases) == ("no", "no", False, ["B1"])
    assert not any((args.report_to, args.resume_from_checkpoint, value_args.init, args.fsdp))
    config.write_text("base: x\ndata: y\noutput: z\nnorm-positions: all\n")
    assert parse(["--config", str(config)])[0].norm_positions == "all"
    assert parse(["--config", str(config), "--norm_positions=answer"])[0].norm_positions == "answer"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bse", "x"], "unknown flag --bse; did you mean --base?"),
        (["--base", "x", "-lr", "3"], "unknown flag -lr; did you mean --lr?"),
        (["--base", "x", "--norm-position-s=all"], "did you mean --norm-positions?"),
        (["--base", "x", "stray"], "nothing takes the word 'stray'"),
        (["--base", "x"], "the following arguments are required: --data"),
    ],
)
def test_words_that_are_no_flags_are_told_with_the_nearest_flag(words, message):
    from ivl_vllm.training.parsing import parse

    known = ["--output", "z", *([] if "required" in message else ["--data", "y"])]
    with pytest.raises(ValueError) as caught:
        parse([*words, *known])
    assert message in str(caught.value)
    assert "HfArgumentParser" not in str(caught.value)


def test_beginnings_of_flags_and_negative_numbers_are_no_mistyped_flags():
    from ivl_vllm.training.parsing import parse

    value_args, args = parse(["--base=x", "--data=y", "--output=z", "--norm_w", "0.5", "--max_steps", "-1"])
    assert (value_args.norm_weight, args.max_steps) == (0.5, -1)


def test_trackers_that_are_unknown_or_missing_are_told_before_anything_is_loaded(monkeypatch):
    from transformers.integrations import integration_utils

    from ivl_vllm.training.parsing import parse

    words = ["--base=x", "--data=y", "--output=z"]
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    monkeypatch.setattr(integration_utils, "is_comet_available", lambda: False)
    for name, message in {
        "tensorboard": "its package is missing; pip install 'ivl-vllm[train]', or leave the flag out",
        "comet_ml": "its package is missing; pip install comet-ml, or leave the flag out",
        "tensorbord": "no such tracker; did you mean tensorboard?; expected none, all, or one of azure_ml, ",
    }.items():
        with pytest.raises(ValueError) as caught:
            parse([*words, f"--report_to={name}"])
        assert str(caught.value).startswith(f"--report_to {name}: {message}")
    monkeypatch.undo()
    assert parse([*words, "--report_to=tensorboard"])[1].report_to == ["tensorboard"]
    assert parse(words)[1].report_to == []


@pytest.mark.parametrize("flag", ["--base", "--init", "--more_bases"])
def test_a_name_that_is_neither_folder_nor_on_the_hub_is_told_at_once(family, tmp_path, capsys, monkeypatch, flag):
    """The hub's client would retry for a minute; here its server is a port that nobody listens on."""
    import socket
    import time

    import huggingface_hub

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    asked = []

    def url(name, file):
        asked.append(name)
        return f"{endpoint}/{name}/{file}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_url", url)
    start = time.monotonic()
    assert cli.main(["train", *flags(family, tmp_path / "never", f"{flag}=nope")]) == 2
    assert time.monotonic() - start < 10
    assert f"ivl train: error: {flag} nope: no such folder, and the hub (" in capsys.readouterr().err
    assert asked == ["nope"]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "no model of that name on the hub"),
        (404, "EntryNotFound", None),
        (404, None, None),
        (403, None, "the hub refuses it"),
        (200, None, None),
        (503, None, None),
    ],
)
def test_what_the_hub_says_to_a_name(monkeypatch, status, code, message):
    import http.server
    import threading

    import huggingface_hub

    from ivl_vllm.training.models import locate_model

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("ETag", "x")
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda name, file: f"{endpoint}/{name}/{file}")
        if message is None:
            assert locate_model("some/model", "--base") == "some/model"
        else:
            with pytest.raises(ValueError, match=f"--base some/model: no such folder, and {message}"):
                locate_model("some/model", "--base")
            with pytest.raises(ValueError, match=f"^no such folder, and {message}"):
                read_tokenizer("some/model")
        server.shutdown()


def test_a_folder_without_weights_is_told(family, tmp_path):
    import shutil

    from ivl_vllm.training.command import prepare

    folder = shutil.copytree(family / "small", tmp_path / "weightless")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="--init .*weightless: cannot be loaded"):
        prepare(flags(family, tmp_path / "out", f"--init={folder}"))


def bad_inputs(family, tmp_path):
    other = make_model(tmp_path / "other", make_tokenizer(words=[*WORDS, "extra"]))
    mute = make_model(tmp_path / "mute", make_tokenizer(template=None))
    empty = tmp_path / "empty"
    empty.mkdir()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    pointer = shutil.copytree(family / "base", tmp_path / "pointer")
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    padded = make_model(tmp_path / "padded", make_tokenizer())
    padding = make_tokenizer()
    padding.add_special_tokens({"pad_token": "[PAD]"})
    padding.save_pretrained(padded)
    narrow = make_model(tmp_path / "narrow", make_tokenizer(words=WORDS[:6]))
    make_tokenizer().save_pretrained(narrow)
    readme = tmp_path / "project"
    readme.mkdir()
    (readme / "README.md").write_text("mine")
    broken, listed, nested = tmp_path / "broken.yaml", tmp_path / "listed.yaml", tmp_path / "nested.yaml"
    nested.write_text("model_init_kwargs: '{\"a'")
    broken.write_text("base: [x")
    listed.write_text("- base")
    return {
        "--base=./nowhere": "--base ./nowhere: no such folder; give the folder of a model, or its id on the hub",
        "--init=/nowhere/at/all": "--init /nowhere/at/all: no such folder",
        f"--base={empty}": "no config.json",
        f"--init={adapter}": "merge it first",
        f"--init={other}": "different vocabularies",
        f"--base={mute}": "no chat template",
        f"--base={pointer}": f"--base {pointer}: cannot be loaded: ",
        f"--base={padded}\n--init={padded}": "pads with '[PAD]', whose id 20 is beyond a network's 20 tokens: give one",
        "--padding_free=true": "--padding_free true: not offered alone; --packing true",
        f"--init={narrow}": "beyond a network's vocabulary",
        f"--output={family / 'small'}": "would be overwritten",
        f"--output={family / 'other'}": "its config.json is not of `ivl train` and would be overwritten",
        f"--output={readme}": "its README.md is not of `ivl train` and would be overwritten",
        "--label_smoothing_factor=0.1": "--label_smoothing_factor 0.1: not offered, leave it out; the loss is",
        "--loss_type=dft": "--loss_type dft: not offered",
        "--push_to_hub=true": "hf upload NAME",
        '--model_init_kwargs={"revision"': "--model_init_kwargs {\"revision\": no JSON (Expecting ':'",
        '--model_init_kwargs={"revision": "x"}': "--model_init_kwargs: revision is not offered",
        "--chat_template_path=absent.jinja": "--chat_template_path absent.jinja: no such file",
        f"--chat_template_path={mute}": "that tokenizer has no chat template",
        f"--output={family / 'train.jsonl'}": "a file is in the way",
        f"--data={tmp_path / 'absent'}": f"--data {tmp_path / 'absent'}: no such file; give the path of a file of JSON",
        f"--eval_data={tmp_path / 'absent'}": f"--eval_data {tmp_path / 'absent'}: no such file; give the path of",
        f"--data={tmp_path}": f"--data {tmp_path} is a folder; expected one file of JSON lines",
        "--max_length=4": "no answer tokens are left",
        "--max_steps=0": "--max_steps is 0; expected 1 or more, or -1 for what the epochs give",
        "--dataset_kwargs={}": "--dataset_kwargs {}: not offered, leave it out; demonstrations are prepared in one way",
        "--dataset_text_field=prompt": "--dataset_text_field prompt: not offered",
        "--completion_only_loss=false": "--completion_only_loss False: not offered, leave it out; only answers",
        "--assistant_only_loss=true": "--assistant_only_loss True: not offered, leave it out; only answers",
        "--eval_on_start=true": "--eval_on_start true: needs held-out data, --eval_data or --eval_fraction",
        "--eval_fraction=0.2\n--save_strategy=best\n--metric_for_best_model=acc": "--metric_for_best_model is "
        "acc; expected loss, ce, norm or mean_token_accuracy",
        "--dataloader_drop_last=true\n--batch_size=999": "rows make no whole batch of 999 (--batch_size × processes)",
        # transformers finds these when it makes optimizer and scheduler.
        "--lr_scheduler_type=cosine_with_min_lr": "min_lr",
        "--optim_args=nonsense": "nothing was trained: not enough values to unpack (expected 2, got 1); look at "
        "--optim, --optim_args",
        "--optim=lomo": "lomo",
        "--norm=l3": "l3",
        "--norm_positions=prompt": "prompt",
        "--lambda=-1": "--norm_weight (--lambda) is -1.0; expected a finite number from 0 up",
        "--norm_weight=nan": "--norm_weight (--lambda) is nan",
        "--eval_fraction=1.5": "--eval_fraction is 1.5",
        "--no_such_flag=1": "unknown flag --no_such_flag (see: ivl train --help)",
        "--normweight=1": "unknown flag --normweight; did you mean --norm_weight?",
        "--lr=fast": "invalid float value",
        f"--config={tmp_path / 'absent.yaml'}": f"--config {tmp_path / 'absent.yaml'}: No such file or directory; give "
        "the path of a YAML file",
        f"--config={broken}": f"--config {broken}: no YAML: ",
        f"--config={nested}": f'--config {nested}: {{"a: no JSON (Unterminated string',
        f"--config={listed}": f"--config {listed}: its content is no mapping of names to values",
        "--config": "--config has no value; give the path of a YAML file",
    }


def test_bad_input_is_one_line_and_exit_status_2(family, tmp_path, capsys):

    for flag, message in bad_inputs(family, tmp_path).items():
        output = tmp_path / "never"
        assert cli.main(["train", *flags(family, output, *flag.split("\n"))]) == 2, flag
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ivl train: error: ")]
        assert len(err) == 1, flag
        assert message in err[0], err
        assert not (output / "model.safetensors").exists()


GOOD = {
    "format_version": 2,
    "scheme": "residual",
    "base": "some/base",
    "norm": "l1",
    "norm_weight": 1.0,
    "norm_positions": "all",
    "more_bases": ["another/base"],
    "base_mix": "average",
    "base_temperature": 1.5,
    "base_noise": 0.25,
    "vocab_size": 100,
    "vocabulary_fingerprint": "0" * 64,
    "takes": ["chat-template"],
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
        ({"format_version": 3, "new_field": 1}, "format_version is 3; this ivl-vllm reads version 2: install"),
        ({"format_version": "2"}, "format_version is '2'"),
        ({"norm_positions": "prompt"}, "norm_positions is 'prompt'"),
        ({"more_bases": "another/base"}, "more_bases is 'another/base'"),
        ({"base_mix": "sum"}, "base_mix is 'sum'"),
        ({"base_temperature": 0}, "base_temperature is 0"),
        ({"base_noise": "much"}, "base_noise is 'much'"),
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
    for content, message in (("{", "no JSON"), ("[]", "no JSON object"), ('{"format_version": 2}', "lacks the field")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            IVLConfig.read(tmp_path)


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
