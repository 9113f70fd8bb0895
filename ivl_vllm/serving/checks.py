"""Checks of a whole engine configuration, before any weight is loaded, and the value networks' own configurations."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, NamedTuple

from vllm import envs
from vllm.logger import init_logger

from ivl_vllm.plugin import ENGINE_KEY, LOAD_FORMAT
from ivl_vllm.serving import admission
from ivl_vllm.settings import NetworkSource, Settings, parse_settings
from ivl_vllm.training.ivl_config import CONFIG_NAME, IVLConfig
from ivl_vllm.vocab.vocab_map import VocabMap

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# vLLM shows what is logged under its own name and nothing else.
logger = init_logger(f"vllm.{__name__}")

# Drafters that read nothing from the target model, whose hidden states are joined with the value networks'.
INDEPENDENT_DRAFTERS = ("draft_model", "ngram")


def engine_settings(vllm_config: VllmConfig) -> Settings:
    """The settings of an engine that the plugin has resolved."""
    return parse_settings(vllm_config.additional_config["ivl"])


def check_engine(vllm_config: VllmConfig, hybrid_is_users_choice: bool = False) -> None:
    """Refuses what does not work with value networks, and makes the settings known to request admission.

    Args:
        vllm_config: of the whole engine; how it lays out its KV cache is settled here.
        hybrid_is_users_choice: the user said whether sliding windows get a KV cache of their own.

    Raises:
        ValueError: names the cause and the fix.
    """
    settings = engine_settings(vllm_config)
    _check_features(vllm_config)
    models = [vllm_config.model_config]
    random_weights = vllm_config.additional_config[ENGINE_KEY]["load_format"] == "dummy"
    for source in settings.networks:
        value_config = network_config(vllm_config, source.model)
        _check_network(vllm_config.model_config, value_config, source)
        if not random_weights:
            _check_weights(source.model)
        _check_parallel(vllm_config, value_config, source.model)
        if vllm_config.lora_config is not None and (scheme := network_scheme(source.model)) != "residual":
            raise ValueError(
                f"ivl: enable_lora is on, and the value network {source.model!r} has the scheme {scheme!r}, which "
                "reads the base's logits at every token, where vLLM applies adapters to sampled rows only: start "
                "without --enable-lora, or use a value network of the residual scheme"
            )
        models.append(value_config)
    # Part of vLLM's compile cache key, which by itself knows neither the networks' order nor what their folders hold.
    hashes = [[*source, model.compute_hash()] for source, model in zip(settings.networks, models[1:], strict=True)]
    vllm_config.additional_config[ENGINE_KEY]["networks"] = hashes
    if not hybrid_is_users_choice and any(map(_has_window, models)) and not vllm_config.model_config.is_hybrid:
        # Pages of different models rarely fit each other. vLLM would make groups as small as one layer out of them, or
        # give up; as full attention (the window still holds when attention is computed) all layers share one group.
        vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = True
        # Would look for windows in the group (vLLM before 0.32).
        vllm_config.model_config.disable_cascade_attn = True
    admission.admit_for(settings, vllm_config)


def _has_window(model: ModelConfig) -> bool:
    text = model.hf_text_config
    return any(getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))


def _check_features(config: VllmConfig) -> None:
    model, parallel, drafter = config.model_config, config.parallel_config, config.speculative_config
    if config.load_config.load_format != LOAD_FORMAT:
        raise ValueError(
            f"ivl: vLLM loads {model.model} by {config.load_config.load_format!r} whatever it is told (quantization "
            f"{model.quantization!r}), which leaves the value networks out: use a checkpoint in another format"
        )
    if model.runner_type == "pooling":
        raise ValueError(
            f"ivl: {model.model} runs as a pooling model, which has no logits to add to: use --runner generate"
        )
    _check_text_only(model, f"the base model {model.model}")
    if model.enable_prompt_embeds:
        raise ValueError(
            "ivl: enable_prompt_embeds is on, but a value network reads token ids: start without --enable-prompt-embeds"
        )
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"ivl: pipeline_parallel_size is {parallel.pipeline_parallel_size}, but a value network is not split into "
            "stages: use --pipeline-parallel-size 1 (--tensor-parallel-size works)"
        )
    if getattr(parallel, "enable_batch_sharded_sampling", False):
        raise ValueError(
            "ivl: enable_batch_sharded_sampling is on, which takes logits past the value networks: "
            "start with --no-enable-batch-sharded-sampling"
        )
    if parallel.distributed_executor_backend == "ray" and not envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND:
        raise ValueError(
            "ivl: distributed_executor_backend is 'ray' with VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0, an executor that "
            "calls the model runner past vLLM's worker, where value networks are chosen: unset that variable, or use "
            "--distributed-executor-backend mp"
        )
    if drafter is None:
        return
    if drafter.method not in INDEPENDENT_DRAFTERS:
        raise ValueError(
            f"ivl: the speculative method {drafter.method!r} is not supported (many read the base model's hidden "
            f"states, which are joined with the value network's): use one of {', '.join(INDEPENDENT_DRAFTERS)}"
        )
    if not getattr(config, "use_v2_model_runner", False):
        raise ValueError(
            f"ivl: speculative decoding ({drafter.method!r}) with logits processors needs vLLM's model runner V2, and "
            "this engine runs V1: set VLLM_USE_V2_MODEL_RUNNER=1 (vLLM 0.31 or later, with Triton), or drop the drafter"
        )


def _check_text_only(model: ModelConfig, what: str) -> None:
    if model.is_encoder_decoder:
        raise ValueError(f"ivl: {what} is an encoder-decoder model: use a decoder-only language model")
    if model.is_multimodal_model:
        raise ValueError(
            f"ivl: {what} is multimodal ({', '.join(model.architectures)}), and a value network reads token ids only: "
            "use a text model"
        )


def network_config(vllm_config: VllmConfig, network: str) -> ModelConfig:
    """vLLM's configuration of one value network, as far as it can differ from the base's.

    Args:
        vllm_config: the engine's configuration, with what the plugin stored in it.
        network: folder or hub id.

    Raises:
        ValueError: there is no such model, or vLLM does not know it.
    """
    from vllm.config import ModelConfig

    base = vllm_config.model_config
    is_folder = os.path.isdir(network)
    if not is_folder:  # said first: asking a hub that cannot be reached takes minutes
        logger.info("ivl: value network %r: no such folder here, so it is taken for a hub id", network)
    try:
        return ModelConfig(
            model=network,
            tokenizer=network,
            runner="generate",
            trust_remote_code=base.trust_remote_code,
            dtype=vllm_config.additional_config[ENGINE_KEY]["dtype"],
            seed=base.seed,
            # vLLM turns compilation off for the whole engine when any of its models is eager, and the other way round.
            enforce_eager=base.enforce_eager,
            skip_tokenizer_init=True,
        )
    except (ValueError, OSError) as error:
        # pydantic wraps the reason in a dump of all arguments
        reason = error.errors()[0]["msg"] if hasattr(error, "errors") else error
        kind = "folder" if is_folder else "no folder here, taken for a hub id"
        raise ValueError(
            f"ivl: the value network {network!r} ({kind}) cannot be used: {reason}; "
            "give the folder of a causal LM, such as ivl train writes, or its hub id"
        ) from error


def network_scheme(network: str) -> str:
    """How the value network is joined to the base: what its `ivl_config.json` says, residual where it has none.

    Raises:
        ValueError: the file says what this version does not know.
    """
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    try:
        if os.path.isdir(network):
            config = IVLConfig.read(network)
        else:
            content = get_hf_file_to_dict(CONFIG_NAME, network)
            config = None if content is None else IVLConfig(**content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"ivl: the value network {network!r} cannot be used: {error}") from error
    return "residual" if config is None else config.scheme


def _check_network(base: ModelConfig, value: ModelConfig, source: NetworkSource) -> None:
    what = f"the value network {source.model!r}"
    if value.runner_type != "generate":
        raise ValueError(f"ivl: {what} is no language model: use a causal LM")
    _check_text_only(value, what)
    if value.is_hybrid or value.is_attention_free:
        raise ValueError(
            f"ivl: {what} ({', '.join(value.architectures)}) has layers that are no attention, for which vLLM prepares "
            "the base's cache only: use a transformer"
        )
    if value.max_model_len < base.max_model_len:
        raise ValueError(
            f"ivl: {what} was made for {value.max_model_len} positions, the engine serves max_model_len="
            f"{base.max_model_len}: start with --max-model-len {value.max_model_len} or less"
        )
    scheme = network_scheme(source.model)
    if source.vocab_map is None:
        _check_vocabulary(base, value, what)
        return
    if scheme != "residual":
        raise ValueError(
            f"ivl: {what} was trained with the scheme {scheme!r}, which reads the base's own columns, and cannot have "
            f"a vocab_map ({source.vocab_map!r}): use one that was trained with the residual scheme"
        )
    _check_vocab_map(base, value, source.vocab_map, what)


def _check_parallel(vllm_config: VllmConfig, value: ModelConfig, network: str) -> None:
    parallel = copy.copy(vllm_config.parallel_config)
    # The base's experts are its own affair.
    parallel.enable_expert_parallel = parallel.enable_expert_parallel and value.is_moe
    try:
        value.verify_with_parallel_config(parallel)
    except ValueError as error:
        raise ValueError(
            f"ivl: the value network {network!r} does not fit the engine's parallelism: {error}"
        ) from error


def _check_weights(network: str) -> None:
    if os.path.isdir(network) and not any(name.endswith(".safetensors") for name in os.listdir(network)):
        raise ValueError(
            f"ivl: the value network {network!r} has no *.safetensors file: save it with safetensors, the only format "
            "that is loaded"
        )


def _check_vocabulary(base: ModelConfig, value: ModelConfig, what: str) -> None:
    """The same ids must mean the same tokens; how far each model pads its vocabulary does not matter."""
    sizes = f"the base {base.model!r} has {base.get_vocab_size()} columns, {what} {value.get_vocab_size()}"
    fix = (
        "map one onto the other: ivl map-vocab "
        f"--base {base.tokenizer} --value {value.model} --output map.safetensors, and give the file as `vocab_map`"
    )
    ours, theirs = _tokens(base.tokenizer, base), _tokens(value.model, base)
    if ours is None or theirs is None:
        if base.get_vocab_size() != value.get_vocab_size():
            raise ValueError(f"ivl: {sizes}, and there are no two tokenizers to compare; {fix}")
        return
    clashes = [i for i in sorted(ours.keys() & theirs.keys()) if ours[i].text != theirs[i].text]
    # Releases of one family give reserved special tokens new names: those may differ.
    wrong = [i for i in clashes if not (ours[i].special and theirs[i].special)]
    if wrong:
        raise ValueError(
            f"ivl: different vocabularies: {sizes}, and id {wrong[0]} is {ours[wrong[0]].text!r} in the one and "
            f"{theirs[wrong[0]].text!r} in the other; {fix}"
        )
    if clashes:
        names = f"{ours[clashes[0]].text!r} and {theirs[clashes[0]].text!r}"
        logger.warning("ivl: %d special tokens have two names in base and %s, such as %s", len(clashes), what, names)


def _check_vocab_map(base: ModelConfig, value: ModelConfig, path: str, what: str) -> None:
    from vllm.tokenizers import get_tokenizer

    where = f"vocab_map {path!r} of {what}"
    vocab_map = VocabMap.load(path)
    tokenizers = [
        get_tokenizer(name, trust_remote_code=base.trust_remote_code) for name in (base.tokenizer, value.model)
    ]
    vocab_map.check(*tokenizers, where)
    for side, config, known in (("base", base, vocab_map.base_vocab), ("value", value, vocab_map.value_vocab)):
        if config.get_vocab_size() < known:
            raise ValueError(
                f"ivl: {where} is for {known} {side} tokens, but {config.model!r} has {config.get_vocab_size()} "
                "columns: its tokenizer has tokens that the model lacks"
            )


class _Token(NamedTuple):
    text: str
    special: bool


def _tokens(tokenizer: str | None, base: ModelConfig) -> dict[int, _Token] | None:
    """id -> token of the tokenizer at a path, or None when there is none."""
    from vllm.tokenizers import get_tokenizer

    if tokenizer is None:
        return None
    try:
        loaded = get_tokenizer(tokenizer, trust_remote_code=base.trust_remote_code)
        special = set(loaded.all_special_ids) | set(loaded.get_added_vocab().values())
        return {i: _Token(token, i in special) for token, i in loaded.get_vocab().items()}
    except Exception as error:  # tokenizer libraries raise anything from OSError to pyo3's own
        logger.warning("ivl: no tokenizer at %s to compare vocabularies with (%s)", tokenizer, error)
        return None
