"""What an engine starts with, and how the package is put together."""

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from parity import create

import ivl_vllm
from ivl_vllm import plugin
from ivl_vllm.training.ivl_config import IVLConfig

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("spelling", ["ivl", "ivl_vllm:IVLLogitsProcessor", "class"])
def test_spellings(models, spelling):
    processor = ivl_vllm.IVLLogitsProcessor if spelling == "class" else spelling
    config = create(
        models["base"],
        logits_processors=["some.module:Other", processor],
        additional_config={"ivl": {"value_model": str(models["value"])}, "other": 1},
        logprobs_mode="raw_logits",
        load_format="safetensors",
    )
    assert config.model_config.logits_processors == ["some.module:Other", "ivl_vllm:IVLLogitsProcessor"]
    assert config.load_config.load_format == "ivl"
    engine = config.additional_config[plugin.ENGINE_KEY]
    assert (engine["load_format"], engine["dtype"]) == ("safetensors", "float32")
    assert config.additional_config["other"] == 1
    assert config.model_config.logprobs_mode == "raw_logits"


@pytest.mark.parametrize(
    "given, expected",
    [("ivl", ["IVL"]), (["ivl", "ivl"], ["IVL"]), (["a:A", "ivl", "b:B", "ivl"], ["a:A", "IVL", "b:B"])],
)
def test_named_in_a_plain_string_or_twice(models, given, expected):
    settings = ivl_vllm.engine_args(value_model=str(models["value"])) | {"logits_processors": given}
    found = create(models["base"], **settings).model_config.logits_processors
    assert found == [plugin.PROCESSOR if name == "IVL" else name for name in expected]


@pytest.mark.parametrize(
    "engine, said",
    [({"load_format": "tensorizer"}, "tensorizer"), ({"model": "s3://bucket/model"}, "s3://bucket/model")],
)
def test_bases_that_are_streamed_past_loaders_are_refused(models, engine, said):
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"model": str(models["base"])} | ivl_vllm.engine_args(value_model=str(models["value"])) | engine
    with pytest.raises(ValueError, match=f"ivl: .*{said}.*copy it to a folder"):
        EngineArgs(**arguments).create_engine_config()


@pytest.mark.parametrize("key", ["value_model", "IVL"])
def test_settings_in_the_wrong_place_are_told(models, key):
    """Nothing else would be said than that there are none."""
    arguments = {"logits_processors": ["ivl"], "additional_config": {key: str(models["value"])}}
    with pytest.raises(ValueError, match=f"additional_config has '{key}' = .*which nobody reads: put the settings"):
        create(models["base"], **arguments)


def test_the_users_arguments_are_left_as_they_were(models):
    from vllm.engine.arg_utils import EngineArgs

    additional = {"ivl": {"value_model": str(models["value"])}}
    arguments = EngineArgs(
        model=str(models["base"]), logits_processors=["ivl"], additional_config=additional, max_model_len=256
    )
    first, second = arguments.create_engine_config(), arguments.create_engine_config()
    assert arguments.logits_processors == ["ivl"] and arguments.load_format == "auto"
    assert additional == {"ivl": {"value_model": str(models["value"])}}
    assert first.additional_config == second.additional_config


def test_engines_without_ivl_are_left_alone(models, monkeypatch):
    monkeypatch.setenv("IVL_VALUE_MODEL", "/no/such/folder")  # a shorthand, not a switch
    config = create(models["base"])
    assert config.load_config.load_format == "auto" and not config.model_config.logits_processors


def test_environment(models, monkeypatch):
    monkeypatch.setenv("IVL_VALUE_MODEL", str(models["value"]))
    monkeypatch.setenv("IVL_DEFAULT_WEIGHT", "0.25")
    config = create(models["base"], logits_processors=["ivl"])
    assert config.additional_config["ivl"]["values"]["default"]["model"] == str(models["value"])
    assert config.additional_config["ivl"]["default_weight"] == 0.25


def test_sliding_windows_share_one_cache_layout_unless_the_user_says_otherwise(models):
    on = ivl_vllm.engine_args(value_model=str(models["sliding"]))
    assert create(models["base"], **on).scheduler_config.disable_hybrid_kv_cache_manager is True
    assert (
        create(
            models["base"], **on, disable_hybrid_kv_cache_manager=False
        ).scheduler_config.disable_hybrid_kv_cache_manager
        is False
    )
    off = ivl_vllm.engine_args(value_model=str(models["value"]))
    assert create(models["base"], **off).scheduler_config.disable_hybrid_kv_cache_manager is False


@pytest.mark.parametrize("load_format", ["dummy", "sharded_state"])
def test_formats_that_tell_nothing_about_tied_embeddings_leave_them_as_configured(models, tmp_path, load_format):
    """The weights say that they are not tied; vLLM does not look at them where these formats are given."""
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(models["base"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    on = ivl_vllm.engine_args(value_model=str(models["value"]))

    def tied(**kwargs):
        made = create(base, **kwargs)
        return made.model_config.hf_config.tie_word_embeddings, made.load_config.load_format

    assert tied(load_format=load_format) == (True, load_format)
    assert tied(load_format=load_format, **on) == (True, "ivl")
    assert tied(**on) == (False, "ivl")


def test_the_compile_cache_key_knows_order_and_content(models):
    """vLLM hashes the settings with sorted keys, and layers are named by the networks' order."""

    def key(*names):
        values = {name: {"model": str(models[name])} for name in names}
        return create(models["base"], **ivl_vllm.engine_args(values=values)).compute_hash()

    assert len({key("value", "anti"), key("anti", "value"), key("value")}) == 3
    assert key("value", "anti") == key("value", "anti")


def test_the_compile_cache_key_knows_what_a_network_reads(models, tmp_path):
    """One folder may hold another scheme at the next start, whose forward takes embeddings in place of token ids."""
    folder = tmp_path / "value"
    shutil.copytree(models["value"], folder)

    def key():
        return create(models["base"], **ivl_vllm.engine_args(value_model=str(folder))).compute_hash()

    before = key()
    assert before == key()
    IVLConfig("base", "cascade", "none", 0.0, 1, "0" * 64).write(folder)
    assert key() != before


def test_settings_of_engines_that_are_gone_admit_nothing(models):
    from vllm.sampling_params import SamplingParams

    def check(ivl):
        ivl_vllm.IVLLogitsProcessor.validate_params(SamplingParams(extra_args={"ivl": ivl}))

    old = create(
        models["base"], **ivl_vllm.engine_args(values={"old": {"model": str(models["value"])}}, max_weight=100.0)
    )
    check({"old": 50.0})
    new = create(models["base"], **ivl_vllm.engine_args(values={"new": {"model": str(models["value"])}}))
    check({"old": 50.0})  # two engines that live side by side
    check({"new": 1.0})
    del old
    gc.collect()
    check({"new": 1.0})
    for bad in ({"old": 50.0}, 50.0, "old=1"):
        with pytest.raises(ValueError, match="ivl: "):
            check(bad)
    del new


def test_renamed_special_tokens_are_the_same_vocabulary(models, tmp_path):
    import shutil

    folder = tmp_path / "renamed"
    shutil.copytree(models["value"], folder)
    tokens = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokens.replace("<|system|>", "<|reserved_3|>"))
    assert create(models["base"], **ivl_vllm.engine_args(value_model=str(folder)))
    swapped = json.loads(tokens)
    vocabulary = swapped["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(swapped))
    with pytest.raises(ValueError, match="different vocabularies"):
        create(models["base"], **ivl_vllm.engine_args(value_model=str(folder)))


def test_registering_twice_wraps_once():
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    once = EngineArgs.create_engine_config
    plugin.register()
    assert EngineArgs.create_engine_config is once


def test_the_kernels_folder_hides_no_package():
    """An importable `kernels` on the path would be taken for Hugging Face's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import transformers, ivl_kernels, sys; from transformers import AutoModel; assert 'kernels' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_imports_are_light():
    """The hook runs in every vLLM process, and the kernels on machines without vLLM."""
    code = "import sys, ivl_vllm, ivl_vllm.plugin; assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = "import sys, ivl_kernels; assert not {'vllm', 'triton', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_wheel_holds_every_package(tmp_path):
    """`pip install .` takes what `pip install -e .` finds in the tree."""
    import zipfile

    copy = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(copy),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = zipfile.ZipFile(wheel).namelist()
    for name in listed:
        if name.endswith(".py") and name.startswith(("ivl_vllm/", "kernels/")):
            assert name.removeprefix("kernels/") in inside, (
                f"{name} is not in the wheel: list its package in pyproject.toml"
            )
