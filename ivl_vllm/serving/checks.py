"""Checks of a whole engine configuration, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm import envs

from ivl_vllm.plugin import ENGINE_KEY, LOAD_FORMAT
from ivl_vllm.serving import admission
from ivl_vllm.serving.network_checks import (
    check_decoder_only,
    check_network,
    fingerprint,
    has_states,
    network_scheme,
    reads_token_ids,
)
from ivl_vllm.settings import Settings, parse_settings
from ivl_vllm.vocab.vocab_map import VocabMap

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# Drafters that read nothing from the base, and those that read its last hidden states or some that it returns besides.
INDEPENDENT_DRAFTERS = ("draft_model", "ngram")
READING_DRAFTERS = ("eagle", "eagle3", "mtp")


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
    _check_stages(vllm_config)
    _check_features(vllm_config)
    models = [vllm_config.model_config]
    models += [check_network(vllm_config, source) for source in settings.networks]
    _check_block_sizes(vllm_config, models)
    _check_connectors(vllm_config, models)
    # Part of vLLM's compile cache key, which by itself knows neither the networks' order nor what their folders hold:
    # what is there now may read embeddings where it read token ids before.
    hashes = []
    for source, model in zip(settings.networks, models[1:], strict=True):
        vocab_map = None if source.vocab_map is None else VocabMap.load(source.vocab_map)
        reads_ids = reads_token_ids(network_scheme(source.model), vocab_map)
        hashes.append([*source, reads_ids, model.compute_hash()])
    vllm_config.additional_config[ENGINE_KEY]["networks"] = hashes
    if vllm_config.kv_transfer_config is not None:
        vllm_config.additional_config[ENGINE_KEY]["fingerprint"] = fingerprint(settings.networks)
    if not hybrid_is_users_choice and any(map(_has_window, models)) and not has_states(models[0]):
        # Pages of different models rarely fit each other. vLLM would make groups as small as one layer out of them, or
        # give up; as full attention (the window still holds when attention is computed) all layers share one group.
        vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = True
        # Would look for windows in the group (vLLM before 0.32).
        vllm_config.model_config.disable_cascade_attn = True
    passes = vllm_config.compilation_config.pass_config
    if passes.fuse_allreduce_rms and max(map(_width, models)) > _width(models[0]):
        passes.fuse_allreduce_rms = False  # its buffer is as wide as the base (or a drafter), and all models share it
    admission.admit_for(settings, vllm_config)


def _check_stages(config: VllmConfig) -> None:
    """Refuses what does not work where the base is split and value networks lie on its last stage."""
    stages = config.parallel_config.pipeline_parallel_size
    for is_on, what in (
        (config.speculative_config is not None, "speculative decoding"),
        (config.kv_transfer_config is not None, "a KV connector"),
        # All of its ranks sample, and the last one alone has value networks.
        (
            config.parallel_config.distributed_executor_backend == "external_launcher",
            "distributed_executor_backend external_launcher",
        ),
    ):
        if stages > 1 and is_on:
            raise ValueError(
                f"ivl: pipeline_parallel_size is {stages} with {what}, and value networks do not run with both: use "
                f"--pipeline-parallel-size 1, or leave {what} out"
            )


def _check_block_sizes(config: VllmConfig, models: Sequence[ModelConfig]) -> None:
    """Refuses stages whose blocks may hold different numbers of tokens: each chooses by the layers that it has."""
    stages, is_given = config.parallel_config.pipeline_parallel_size, config.cache_config.user_specified_block_size
    if stages > 1 and not is_given and len({model.use_mla for model in models}) > 1:
        raise ValueError(
            f"ivl: pipeline_parallel_size is {stages}, and only some of the models have multi-head latent attention: "
            "each stage would choose a block size for its own layers; give one, such as --block-size 64"
        )


def _check_connectors(config: VllmConfig, models: Sequence[ModelConfig]) -> None:
    """Refuses what keeps the cache in a shape that it takes from the base, `models[0]`."""
    if config.kv_transfer_config is None:
        return
    kind = config.kv_transfer_config.kv_connector
    several = config.kv_transfer_config.kv_connector_extra_config.get("connectors", [])
    kinds = [one.get("kv_connector") for one in several] if kind == "MultiConnector" else [kind]
    if "LMCacheConnectorV1" in kinds:
        raise ValueError(
            "ivl: kv_connector is 'LMCacheConnectorV1', which makes its buffers for the layers and heads of the base "
            "alone: use another connector, such as OffloadingConnector"
        )
    if "NixlConnector" in kinds and any(map(has_states, models[1:])):
        raise ValueError(
            "ivl: kv_connector is 'NixlConnector', which takes the shape of all states (Mamba, linear attention) from "
            "one layer, and a value network has states of its own: use another connector"
        )
    ranks = config.parallel_config.tensor_parallel_size
    # On how many ranks vLLM has the same heads.
    heads = [1 if model.use_mla else model.get_total_num_kv_heads() for model in models]
    copies = [max(1, ranks // number) if number else 1 for number in heads]  # no heads: states only
    stores = {"MooncakeStoreConnector"} | ({"LMCacheMPConnector"} if models[0].use_mla else set())
    found = stores.intersection(kinds)
    if found and min(copies) < copies[0]:
        raise ValueError(
            f"ivl: kv_connector is {found.pop()!r}, which with tensor_parallel_size={ranks} takes {copies[0]} "
            "ranks of the base to hold the same keys and values, but those of a value network, which has more heads, "
            "differ: use a smaller --tensor-parallel-size, or another connector"
        )


def _width(model: ModelConfig) -> int:
    return model.get_hidden_size()


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
    check_decoder_only(model, f"the base model {model.model}")
    if model.enable_prompt_embeds:
        raise ValueError(
            "ivl: enable_prompt_embeds is on, but a value network reads token ids: start without --enable-prompt-embeds"
        )
    if parallel.prefill_context_parallel_size > 1:
        raise ValueError(
            f"ivl: prefill_context_parallel_size is {parallel.prefill_context_parallel_size}, and value networks were "
            "never run on parts of a prompt: use --prefill-context-parallel-size 1"
        )
    if model.multimodal_config is not None and model.multimodal_config.mm_encoder_only:
        raise ValueError(
            "ivl: mm_encoder_only is on (or implied by the encoder cache's connector), which leaves no language model "
            "to steer: start this instance without --logits-processors ivl and without its settings"
        )
    if parallel.use_ubatching:
        raise ValueError(
            f"ivl: enable_dbo is {parallel.enable_dbo} (ubatch_size {parallel.ubatch_size}), which runs the parts of a "
            "step in threads that would share the value networks' inputs: start without --enable-dbo and --ubatch-size"
        )
    if getattr(parallel, "enable_batch_sharded_sampling", False):
        raise ValueError(
            "ivl: enable_batch_sharded_sampling is on, which takes logits past the value networks: "
            "start with --no-enable-batch-sharded-sampling"
        )
    if parallel.enable_elastic_ep:
        raise ValueError(
            "ivl: enable_elastic_ep is on, but ranks that vLLM adds to a running engine load the base alone: start "
            "without --enable-elastic-ep"
        )
    newer_ray = getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True)  # vLLM 0.33 has no other any more
    if parallel.distributed_executor_backend == "ray" and not newer_ray:
        raise ValueError(
            "ivl: distributed_executor_backend is 'ray' with VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0, an executor that "
            "calls the model runner past vLLM's worker, where value networks are chosen: unset that variable, or use "
            "--distributed-executor-backend mp"
        )
    if drafter is None:
        return
    supported = INDEPENDENT_DRAFTERS + READING_DRAFTERS
    if drafter.method not in supported:
        raise ValueError(
            f"ivl: the speculative method {drafter.method!r} is not supported (the base model's hidden states, which "
            f"many methods read, are joined with the value network's): use one of {', '.join(supported)}"
        )
    if not config.use_v2_model_runner:
        raise ValueError(
            f"ivl: speculative decoding ({drafter.method!r}) with logits processors needs vLLM's model runner V2, and "
            "this engine runs V1: set VLLM_USE_V2_MODEL_RUNNER=1 (vLLM 0.31 or later, with Triton), or drop the drafter"
        )
