"""What an engine refuses to start with."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from cascade_models import mark_scheme
from parity import create, engine
from tiny import make_model, make_tokenizer

import ivl_vllm

RANKS = {"distributed_executor_backend": "mp"}  # else vLLM looks for as many GPUs, where there is one
REFUSED = {
    "settings_without_processor": ({"logits_processors": None}, ["additional_config", "--logits-processor ivl"]),
    "processor_without_settings": ({"additional_config": {}}, ["no value network", "value_model", "IVL_VALUE_MODEL"]),
    "unknown_field": ({"additional_config": {"ivl": {"valuemodel": "x"}}}, ["'valuemodel'", "'x'", "value_model"]),
    "missing_folder": ({"additional_config": {"ivl": {"value_model": "./missing"}}}, ["value_model", "./missing"]),
    "pooling": ({"runner": "pooling"}, ["pooling", "--runner generate"]),
    "prompt_embeds": ({"enable_prompt_embeds": True}, ["enable_prompt_embeds"]),
    "draft_model_on_v1": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        ["speculative", "VLLM_USE_V2_MODEL_RUNNER=1"],
    ),
    "eagle_on_v1": (
        {"speculative_config": {"method": "eagle", "model": "EAGLE", "num_speculative_tokens": 2}},
        ["'eagle'", "VLLM_USE_V2_MODEL_RUNNER=1"],
    ),
    "drafter_that_is_not_supported": (
        {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        ["'ngram_gpu' is not supported", "hidden states", "draft_model, ngram, eagle, eagle3, mtp"],
    ),
    "cascade_and_lora": (
        {"enable_lora": True, "additional_config": {"ivl": {"value_model": "CASCADE"}}},
        ["enable_lora is on", "'cascade'", "residual"],
    ),
    "cascade_and_fast_prefill": (
        {"kv_sharing_fast_prefill": True, "additional_config": {"ivl": {"value_model": "CASCADE"}}},
        ["kv_sharing_fast_prefill is on", "'cascade'", "without --kv-sharing-fast-prefill"],
    ),
    "too_few_positions": (
        {"max_model_len": 512, "additional_config": {"ivl": {"value_model": "SHORT"}}},
        ["128 positions", "--max-model-len 128"],
    ),
    "other_vocabulary": ({"additional_config": {"ivl": {"value_model": "OTHER"}}}, ["320", "290", "vocab_map", "id "]),
    "no_tokenizer_and_other_size": (
        {"additional_config": {"ivl": {"value_model": "BARE"}}},
        ["320", "400", "vocab_map"],
    ),
    "not_a_model": (
        {"additional_config": {"ivl": {"value_model": "EMPTY"}}},
        ["EMPTY", "cannot be used", "give the folder of a causal LM"],
    ),
    "no_safetensors": ({"additional_config": {"ivl": {"value_model": "PICKLED"}}}, ["safetensors"]),
    "tensorizer": ({"load_format": "tensorizer"}, ["load_format='tensorizer'", "copy it to a folder"]),
    "heads_over_ranks": ({"tensor_parallel_size": 4, **RANKS}, ["the value network", "parallelism", "heads"]),
    "connector_of_the_bases_shape": (
        {"kv_transfer_config": {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}},
        ["'LMCacheConnectorV1'", "layers and heads of the base", "OffloadingConnector"],
    ),
    "encoder_and_decoder": (
        {"additional_config": {"ivl": {"value_model": "WHISPER"}}},
        ["encoder-decoder", "WHISPER", "use a decoder-only language model"],
    ),
    "states_beside_none": (
        {"additional_config": {"ivl": {"value_model": "HYBRID"}}},
        ["layers with a state", "GraniteMoeHybridForCausalLM", "use a transformer"],
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders that no engine takes, by the names that the table above uses for them."""
    import torch
    from transformers import LlamaConfig, WhisperConfig

    root = tmp_path_factory.mktemp("refused")
    make_model(root / "SHORT", positions=128)
    mark_scheme(make_model(root / "CASCADE"), "cascade")
    make_model(root / "OTHER", vocab_size=290, tokenizer=False)
    make_tokenizer(root / "OTHER", 290, ["entirely other words make entirely other merges " * 3])
    make_model(root / "BARE", vocab_size=400, tokenizer=False)
    make_model(root / "HYBRID", "hybrid")
    (root / "EMPTY").mkdir()
    make_model(root / "PICKLED")
    (root / "PICKLED" / "model.safetensors").unlink()
    torch.save({}, root / "PICKLED" / "pytorch_model.bin")
    hears = {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2, "max_source_positions": 64}
    config = WhisperConfig(**hears, decoder_layers=1, decoder_attention_heads=2, vocab_size=320)
    config.architectures = ["WhisperForConditionalGeneration"]
    config.save_pretrained(root / "WHISPER")
    make_tokenizer(root / "WHISPER")
    eagle = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        intermediate_size=128,
        vocab_size=320,
        architectures=["LlamaForCausalLM"],
    )
    eagle.save_pretrained(root / "EAGLE")
    return root


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_start(models, folders, case):
    def place(value):
        if isinstance(value, dict):
            return {k: place(v) for k, v in value.items()}
        return str(folders / value) if isinstance(value, str) and value.isupper() else value

    changes, names = REFUSED[case]
    arguments = ivl_vllm.engine_args(value_model=str(models["value"])) | place(changes)
    with pytest.raises(ValueError, match="ivl: ") as error:
        create(models["base"], **arguments)
    for name in names:
        assert name in str(error.value)


def test_states_of_another_kind_are_refused_where_they_are_copied(monkeypatch):
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
    from vllm.model_executor.layers.mamba.short_conv import ShortConv

    from ivl_vllm.serving.cached_layers import check_states

    mamba, conv = (kind.__new__(kind) for kind in (MambaMixer2, ShortConv))
    keeps, keeps_not = (
        SimpleNamespace(cache_config=SimpleNamespace(mamba_cache_mode=mode)) for mode in ("align", "none")
    )
    check_states([mamba], [mamba], keeps, "VALUE")
    check_states([mamba], [object()], keeps, "VALUE")
    check_states([mamba], [conv], keeps_not, "VALUE")
    everywhere = SimpleNamespace(cache_config=SimpleNamespace(mamba_cache_mode="all"))
    check_states([mamba], [object()], everywhere, "VALUE")
    with pytest.raises(ValueError, match="mamba_cache_mode 'all'.*--no-enable-prefix-caching"):
        check_states([mamba], [mamba], everywhere, "VALUE")
    with pytest.raises(ValueError, match="'VALUE' .*SHORT_CONV.*MAMBA2.*--no-enable-prefix-caching"):
        check_states([mamba], [conv], keeps, "VALUE")
    monkeypatch.delattr("vllm.v1.worker.mamba_utils.validate_mamba_state_copy_funcs")  # as in older releases
    check_states([mamba], [mamba], keeps_not, "VALUE")
    with pytest.raises(ValueError, match="mamba_cache_mode 'align'.*--no-enable-prefix-caching"):
        check_states([mamba], [mamba], keeps, "VALUE")


def test_diffusion_models_are_refused(models):
    from vllm.config import ModelConfig

    from ivl_vllm.serving.network_checks import check_decoder_only

    assert hasattr(ModelConfig, "is_diffusion")  # vLLM's own word for it
    check_decoder_only(create(models["base"]).model_config, "the base model BASE")
    with pytest.raises(ValueError, match="the base model BASE is a diffusion model.*use an autoregressive one"):
        check_decoder_only(SimpleNamespace(is_encoder_decoder=False, is_diffusion=True), "the base model BASE")


def test_the_executor_that_passes_the_worker_by_is_refused(models, monkeypatch):
    from vllm import envs

    from ivl_vllm.serving.checks import _check_features

    config = create(models["base"], **ivl_vllm.engine_args(value_model=str(models["value"])))
    config.parallel_config.distributed_executor_backend = "ray"
    _check_features(config)
    name = "VLLM_USE_RAY_V2_EXECUTOR_BACKEND"
    monkeypatch.delitem(envs.environment_variables, name, raising=False)  # as vLLM 0.33 has it
    _check_features(config)
    monkeypatch.setitem(envs.environment_variables, name, lambda: False)
    with pytest.raises(ValueError, match="VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0.*--distributed-executor-backend mp"):
        _check_features(config)


def test_experts_that_need_the_bases_process_group(models, tmp_path):
    from transformers import MixtralConfig

    experts = MixtralConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=1,
        num_local_experts=2,
        max_position_embeddings=512,
    )
    experts.architectures = ["MixtralForCausalLM"]
    experts.save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    arguments = ivl_vllm.engine_args(value_model=str(tmp_path)) | {"load_format": "dummy"}
    told = "ivl: .* mixture of experts .*MixtralForCausalLM"
    with pytest.raises(ValueError, match=told), engine(models["base"], **arguments):
        pass


def test_ranks_that_join_a_running_engine_are_refused(models):
    from ivl_vllm.serving.checks import _check_features

    config = create(models["base"], **ivl_vllm.engine_args(value_model=str(models["value"])))
    config.parallel_config.enable_elastic_ep = True
    with pytest.raises(ValueError, match="enable_elastic_ep is on.*without --enable-elastic-ep"):
        _check_features(config)


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("enable_dbo", True, "enable_dbo is True.*without --enable-dbo"),
        ("prefill_context_parallel_size", 2, "_size is 2.*--prefill-context-parallel-size 1"),
    ],
)
def test_parts_of_a_step_are_refused(models, name, value, told):
    from ivl_vllm.serving.checks import _check_features

    config = create(models["base"], **ivl_vllm.engine_args(value_model=str(models["value"])))
    setattr(config.parallel_config, name, value)
    with pytest.raises(ValueError, match=told):
        _check_features(config)


def test_an_encoder_without_its_language_model_is_refused(models, tmp_path):
    base = make_model(tmp_path / "base", "multimodal")
    steered = ivl_vllm.engine_args(value_model=str(models["value"]))
    with pytest.raises(ValueError, match="mm_encoder_only is on.*no language model"):
        create(base, **steered, mm_encoder_only=True)


def model_config(heads=2, is_mla=False, is_hybrid=False, is_attention_free=False):
    return SimpleNamespace(
        use_mla=is_mla,
        get_total_num_kv_heads=lambda: heads,
        is_hybrid=is_hybrid,
        is_attention_free=is_attention_free,
        model="FOLDER",
    )


TRANSFORMER, HYBRID, STATES_ONLY = model_config(), model_config(is_hybrid=True), model_config(0, is_attention_free=True)


@pytest.mark.parametrize(
    ("base", "value", "cache", "message"),
    [
        (TRANSFORMER, HYBRID, {}, "only if the base has some too"),
        (TRANSFORMER, STATES_ONLY, {}, "only if the base has some too"),
        (HYBRID, HYBRID, {"use_replayssm": True}, "without --use-replayssm"),
        (HYBRID, HYBRID, {"stages": 2}, "--pipeline-parallel-size 1"),
        (HYBRID, TRANSFORMER, {"stages": 2}, None),
        (STATES_ONLY, TRANSFORMER, {}, "--block-size 1024"),
        (STATES_ONLY, TRANSFORMER, {"user_specified_block_size": True}, None),
        (STATES_ONLY, STATES_ONLY, {}, None),
        (HYBRID, STATES_ONLY, {}, None),
        (HYBRID, HYBRID, {}, None),
        (HYBRID, TRANSFORMER, {"use_replayssm": True}, None),
    ],
)
def test_layers_with_a_state_beside_each_other(base, value, cache, message):
    from ivl_vllm.serving.network_checks import _check_states

    cache_config = SimpleNamespace(**{"user_specified_block_size": False, "use_replayssm": False} | cache)
    parallel_config = SimpleNamespace(pipeline_parallel_size=cache.get("stages", 1))
    config = SimpleNamespace(model_config=base, cache_config=cache_config, parallel_config=parallel_config)
    with nullcontext() if message is None else pytest.raises(ValueError, match=f"^ivl: .*VALUE .*{message}"):
        _check_states(config, value, "VALUE")


@pytest.mark.parametrize(
    ("models", "is_refused"),
    [
        ([HYBRID, HYBRID], True),
        ([HYBRID, STATES_ONLY], True),
        ([HYBRID, TRANSFORMER], False),
        ([STATES_ONLY, TRANSFORMER], False),
    ],
)
def test_a_connector_that_takes_all_states_for_alike(models, is_refused):
    from ivl_vllm.serving.checks import _check_connectors

    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector="NixlConnector", kv_connector_extra_config={}),
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
    )
    with pytest.raises(ValueError, match="'NixlConnector'.*another connector") if is_refused else nullcontext():
        _check_connectors(config, models)


@pytest.mark.parametrize("kind", ["MooncakeStoreConnector", "MultiConnector"])
@pytest.mark.parametrize("value_heads, ranks, is_refused", [(8, 8, True), (4, 8, False), (8, 4, False), (2, 8, False)])
def test_stores_that_take_ranks_for_equal(kind, value_heads, ranks, is_refused):
    """By the base's 4 heads two of 8 ranks hold the same, and one of them is stored."""
    from ivl_vllm.serving.checks import _check_connectors

    several = {"connectors": [{"kv_connector": "MooncakeStoreConnector"}]} if kind == "MultiConnector" else {}
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector=kind, kv_connector_extra_config=several),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )
    models = [model_config(heads) for heads in (4, value_heads)]
    with pytest.raises(ValueError, match=f"tensor_parallel_size={ranks} takes 2") if is_refused else nullcontext():
        _check_connectors(config, models)


@pytest.mark.parametrize(
    "base_is_mla, value_is_mla, ranks, is_refused",
    [(True, False, 2, True), (True, True, 2, False), (True, False, 1, False), (False, False, 2, False)],
)
def test_a_store_that_keeps_latents_once(base_is_mla, value_is_mla, ranks, is_refused):
    """Latents are alike on all ranks; a value network's heads are not."""
    from ivl_vllm.serving.checks import _check_connectors

    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector="LMCacheMPConnector", kv_connector_extra_config={}),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )
    kinds = base_is_mla, value_is_mla
    models = [model_config(is_mla=is_mla) for is_mla in kinds]
    with pytest.raises(ValueError, match="'LMCacheMPConnector'.*another connector") if is_refused else nullcontext():
        _check_connectors(config, models)
