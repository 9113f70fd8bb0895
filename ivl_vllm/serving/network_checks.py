"""Checks of one value network against the engine's base, and its own configuration."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vllm import envs
from vllm.logger import init_logger
from vllm.multimodal import MULTIMODAL_REGISTRY

from ivl_vllm.hub import ask_hub
from ivl_vllm.plugin import ENGINE_KEY
from ivl_vllm.serving.weight_checks import check_weights
from ivl_vllm.settings import NetworkSource
from ivl_vllm.training.ivl_config import CONFIG_NAME, IVLConfig
from ivl_vllm.vocab.vocab_map import VocabMap

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# vLLM shows what is logged under its own name and nothing else.
logger = init_logger(f"vllm.{__name__}")


def check_network(vllm_config: VllmConfig, source: NetworkSource) -> ModelConfig:
    """Refuses a value network that does not fit the engine, before any weight is loaded.

    Returns:
        Its configuration.

    Raises:
        ValueError: names the cause and the fix.
    """
    value, scheme = network_config(vllm_config, source.model), network_scheme(source.model)
    _check_model(vllm_config.model_config, value, source, scheme)
    _check_states(vllm_config, value, f"the value network {source.model!r} ({', '.join(value.architectures)})")
    if vllm_config.additional_config[ENGINE_KEY]["load_format"] != "dummy":
        check_weights(source.model)
    _check_parallel(vllm_config, value, source.model)
    _check_scheme(vllm_config, source.model, scheme)
    return value


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
    try:
        if not is_folder and not envs.VLLM_USE_MODELSCOPE:  # first: vLLM tries for minutes where no hub can be reached
            ask_hub(network)
        return ModelConfig(
            model=network,
            tokenizer=network,
            runner="generate",
            trust_remote_code=base.trust_remote_code,
            dtype=vllm_config.additional_config[ENGINE_KEY]["dtype"],
            seed=base.seed,
            # vLLM turns compilation off for the whole engine when any of its models is eager, and the other way round.
            enforce_eager=base.enforce_eager,
            language_model_only=True,
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


def reads_token_ids(scheme: str, vocab_map: VocabMap | None) -> bool:
    """Whether the value network's forward is given token ids, not embeddings."""
    return scheme == "residual" and (vocab_map is None or vocab_map.single)


def check_inputs(kind: type, model: ModelConfig, source: NetworkSource, reads_ids: bool) -> None:
    """Refuses a network that reads more than its tokens (or their embeddings) and their positions.

    Args:
        kind: vLLM's class of it.
        model: its configuration.
        source: where it comes from.
        reads_ids: see `reads_token_ids`.

    Raises:
        ValueError: names what it reads and the fix.
    """
    what, text = f"ivl: the value network {source.model!r} ({kind.__name__})", model.hf_text_config
    # Qwen4 experts have such inputs only if they have layers with embeddings of their own.
    if hasattr(kind, "get_model_state_cls") and getattr(text, "ple_layer_ids", True):
        raise ValueError(
            f"{what} reads inputs that vLLM prepares for the base alone, such as the tokens before each: use another"
        )
    if source.vocab_map and not reads_ids and getattr(text, "hidden_size_per_layer_input", 0):
        raise ValueError(
            f"{what} has embeddings of each token for every layer, which it looks up by ids, and vocab_map "
            f"{source.vocab_map!r} gives it means of embeddings: make the map with ivl map-vocab --input last"
        )


def _check_model(base: ModelConfig, value: ModelConfig, source: NetworkSource, scheme: str) -> None:
    what = f"the value network {source.model!r}"
    if value.runner_type != "generate":
        raise ValueError(f"ivl: {what} is no language model: use a causal LM")
    check_decoder_only(value, what)
    if "Gemma3nForConditionalGeneration" in value.architectures:
        raise ValueError(
            f"ivl: {what} is a Gemma 3n, whose multimodal class in vLLM takes no token ids: use another value network"
        )
    if value.max_model_len < base.max_model_len:
        raise ValueError(
            f"ivl: {what} was made for {value.max_model_len} positions, the engine serves max_model_len="
            f"{base.max_model_len}: start with --max-model-len {value.max_model_len} or less"
        )
    if source.vocab_map is None:
        _check_vocabulary(base, value, what)
        return
    if scheme != "residual":
        raise ValueError(
            f"ivl: {what} was trained with the scheme {scheme!r}, which reads the base's own columns, and cannot have "
            f"a vocab_map ({source.vocab_map!r}): use one that was trained with the residual scheme"
        )
    _check_vocab_map(base, value, source.vocab_map, what)


def has_states(model: ModelConfig) -> bool:
    """Whether some of its layers keep a state (Mamba, linear attention) in place of keys and values."""
    return model.is_hybrid or model.is_attention_free


def _check_states(vllm_config: VllmConfig, value: ModelConfig, what: str) -> None:
    base, cache = vllm_config.model_config, vllm_config.cache_config
    if has_states(value) and not has_states(base):
        raise ValueError(
            f"ivl: {what} has layers with a state (Mamba, linear attention), for which vLLM makes room only if the "
            "base has some too: use a transformer, or such a base"
        )
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if has_states(value) and stages > 1:
        raise ValueError(
            f"ivl: pipeline_parallel_size is {stages}, and {what} has layers with a state (Mamba, linear attention), "
            "which were never run beside a stage of the base alone: use --pipeline-parallel-size 1, or a transformer"
        )
    if has_states(value) and getattr(cache, "use_replayssm", False):
        raise ValueError(
            f"ivl: use_replayssm is on, which counts the steps of all layers with a state together, and {what} has "
            "some that may sit steps out: start without --use-replayssm"
        )
    if base.is_attention_free and not value.is_attention_free and not cache.user_specified_block_size:
        raise ValueError(
            f"ivl: {what} has keys and values, the base {base.model!r} only states, and vLLM would give each few of "
            "the network's tokens a page as large as a whole state: set how many it gets, such as --block-size 1024"
        )


def fingerprint(sources: Iterable[NetworkSource]) -> str:
    """Tells sets of value networks apart by what their folders and maps hold; those of a hub by their ids."""
    digest = hashlib.blake2b(digest_size=12)
    for source in sources:
        folder = Path(source.model)
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]) if folder.is_dir() else []
        names = [file.name for file in files] or [source.model]
        if source.vocab_map is not None:
            files.append(Path(source.vocab_map))
        digest.update(repr((names, source.vocab_map is not None)).encode())
        for file in files:
            digest.update(file.stat().st_size.to_bytes(8, "big"))
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def check_decoder_only(model: ModelConfig, what: str) -> None:
    """Refuses a model that reads another sequence besides the tokens so far, or writes in another order.

    Raises:
        ValueError: says which, and the fix.
    """
    if model.is_encoder_decoder:
        raise ValueError(f"ivl: {what} is an encoder-decoder model: use a decoder-only language model")
    if getattr(model, "is_diffusion", False):
        raise ValueError(
            f"ivl: {what} is a diffusion model, whose sampler asks no logits processor: use an autoregressive one"
        )


def is_multimodal(model: ModelConfig) -> bool:
    """Whether it is given images or the like, for which placeholders stand among its tokens."""
    if hasattr(model, "supports_multimodal_inputs"):
        return model.supports_multimodal_inputs
    return MULTIMODAL_REGISTRY.supports_multimodal_inputs(model)  # vLLM before 0.32


def _check_scheme(config: VllmConfig, folder: str, scheme: str) -> None:
    for is_on, setting, what in (
        (config.lora_config is not None, "enable_lora", "applies adapters to sampled rows only"),
        (config.cache_config.kv_sharing_fast_prefill, "kv_sharing_fast_prefill", "computes sampled rows only"),
    ):
        if is_on and scheme != "residual":
            raise ValueError(
                f"ivl: {setting} is on, and the value network {folder!r} has the scheme {scheme!r}, which "
                f"reads the base's logits at every token, where vLLM {what}: start "
                f"without --{setting.replace('_', '-')}, or use a value network of the residual scheme"
            )


def _check_parallel(vllm_config: VllmConfig, value: ModelConfig, network: str) -> None:
    parallel = copy.copy(vllm_config.parallel_config)
    # The base's experts are its own affair.
    parallel.enable_expert_parallel = parallel.enable_expert_parallel and value.is_moe
    parallel.pipeline_parallel_size = 1  # it is whole on the last stage
    try:
        value.verify_with_parallel_config(parallel)
    except ValueError as error:
        raise ValueError(
            f"ivl: the value network {network!r} does not fit the engine's parallelism: {error}"
        ) from error


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
