"""Value networks that are refused or warned of for what they are, and keys of requests that are meant to be `ivl`."""

import shutil
import socket
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from parity import create
from vllm import SamplingParams

import ivl_vllm
from ivl_vllm.serving import admission, weight_checks
from ivl_vllm.settings import Settings, Value


def test_gemma_3n_folders_are_refused():
    from ivl_vllm.serving.network_checks import _check_model

    value = SimpleNamespace(
        runner_type="generate",
        is_encoder_decoder=False,
        supports_multimodal_inputs=False,
        architectures=["Gemma3nForConditionalGeneration"],
    )
    with pytest.raises(ValueError, match="'VALUE' is a Gemma 3n.*takes no token ids"):
        _check_model(SimpleNamespace(), value, SimpleNamespace(model="VALUE"), "residual")


def test_networks_that_read_more_than_their_tokens_are_refused():
    from vllm.model_executor.models.gemma4 import Gemma4ForCausalLM
    from vllm.model_executor.models.longcat_flash_ngram import LongcatFlashNgramForCausalLM

    from ivl_vllm.serving.network_checks import check_inputs

    def check(kind, vocab_map=None, reads_ids=True, **text):
        check_inputs(kind, SimpleNamespace(hf_text_config=SimpleNamespace(**text)), source(vocab_map), reads_ids)

    def source(vocab_map):
        return SimpleNamespace(model="VALUE", vocab_map=vocab_map)

    check(LongcatFlashNgramForCausalLM, ple_layer_ids=[])
    with pytest.raises(ValueError, match=r"'VALUE' \(LongcatFlashNgramForCausalLM\) reads inputs .* base alone"):
        check(LongcatFlashNgramForCausalLM)
    check(Gemma4ForCausalLM, "map", hidden_size_per_layer_input=256)
    check(Gemma4ForCausalLM, "map", reads_ids=False, hidden_size_per_layer_input=0)
    with pytest.raises(ValueError, match="embeddings of each token for every layer.*'map'.*--input last"):
        check(Gemma4ForCausalLM, "map", reads_ids=False, hidden_size_per_layer_input=256)


def test_a_name_that_is_neither_folder_nor_on_the_hub_is_told_without_trying_again(models, monkeypatch):
    """Here the hub's server is a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *path: asked.append(path) or "/".join([endpoint, *path]))
    with pytest.raises(ValueError, match="ivl: .*'values/math' .*no such folder, and the hub .* cannot be asked"):
        create(models["base"], **ivl_vllm.engine_args(value_model="values/math"))
    assert asked == [("values/math", "config.json")]


def test_weights_that_were_cut_off_are_told_before_anything_is_loaded(models, tmp_path):
    folder = shutil.copytree(models["value"], tmp_path / "value")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"^ivl: the value network .*model.safetensors is no safetensors file, or one"):
        create(models["base"], **ivl_vllm.engine_args(value_model=str(folder)))
    # What an index does not name is not loaded either.
    (folder / "whole.safetensors").write_bytes(whole)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "whole.safetensors"}}')
    weight_checks.check_weights(str(folder))


def test_heads_that_the_attention_cannot_take_are_refused():
    """On a CPU vLLM finds them in the first step only, which ends the engine."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from ivl_vllm.serving.cached_layers import check_head_sizes

    def layer(size):
        return SimpleNamespace(head_size=size, attn_backend=CPUAttentionBackend)

    check_head_sizes([layer(64), SimpleNamespace()], "VALUE")
    with pytest.raises(ValueError, match=r"'VALUE' has heads of size 16, .* backend \w+ does not take it, only 32, 64"):
        check_head_sizes([layer(64), layer(16)], "VALUE")


@pytest.mark.parametrize("number", [0.0, float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_warned_of(monkeypatch, number):
    """A column without a finite value logit stays as it is: nobody would notice."""
    told = []
    monkeypatch.setattr(weight_checks.logger, "warning", lambda text, *given: told.append(text % given))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight.data[0, 1] = number
    weight_checks.warn_of_broken_weights(model, "VALUE")
    assert [("VALUE: 1 of its weights" in text, "1.weight" in text) for text in told] == [(True, True)] * (number != 0)


@pytest.mark.parametrize("key", ["IVL", "Ivl", "ivl_weight", "ivl-auto"])
def test_keys_that_are_meant_to_be_ivl_are_refused(monkeypatch, key):
    """vLLM ignores what it does not know, and the request would run unsteered."""
    monkeypatch.setattr(admission, "_engines", [(Settings({"math": Value("a")}), lambda: None)])
    with pytest.raises(ValueError, match=f"^ivl: {key!r} is not read: .* stands under 'ivl'"):
        SamplingParams.from_optional(extra_args={key: 1.0})
    admission.check_request({"ivl": 1.0, "other": 2, admission.TRACE_ID: "a"})
    monkeypatch.setattr(admission, "_engines", [])
    admission.check_request({key: 1.0})  # not this process's affair
