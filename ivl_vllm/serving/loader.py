"""The model loader `ivl`: the base by the user's own load format, the value networks beside it, both joined."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import LoadConfig, ModelConfig, VllmConfig, replace
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.offloader import NoopOffloader, get_offloader, set_offloader
from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

from ivl_vllm.plugin import ENGINE_KEY
from ivl_vllm.serving.cached_layers import check_head_sizes, check_states, keep_whole_context, use_own_config
from ivl_vllm.serving.checks import READING_DRAFTERS, engine_settings
from ivl_vllm.serving.joined_model import join
from ivl_vllm.serving.network import Network, StableInput
from ivl_vllm.serving.network_checks import (
    check_inputs,
    is_multimodal,
    network_config,
    network_scheme,
    reads_token_ids,
)
from ivl_vllm.serving.shared_weights import projection_groups, share_equal_weights
from ivl_vllm.serving.solved_weights import warm_up_solvers
from ivl_vllm.serving.stages import built_on_one_stage
from ivl_vllm.serving.steps import Steps, watch_steps
from ivl_vllm.serving.weight_checks import warn_of_broken_weights
from ivl_vllm.settings import NetworkSource, Value
from ivl_vllm.vocab.vocab_map import VocabMap

# vLLM shows what is logged under its own name and nothing else.
logger = init_logger(f"vllm.{__name__}")


class IVLModelLoader(BaseModelLoader):
    """Loads base and value networks and returns the base, whose forward runs them all."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Downloads the base; value networks are downloaded when they are loaded."""
        get_model_loader(self._base_load_config("auto")).download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Loads the base's weights into an existing model; the value networks keep theirs."""
        get_model_loader(self._base_load_config("auto")).load_weights(model, model_config)

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """The base's weights by name as vLLM's own loader reads them, which `reload_weights` asks for."""
        return get_model_loader(self._base_load_config("auto")).get_all_weights(model_config, model)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Loads the base model, and joins the value networks to it.

        A draft model of speculative decoding comes by here too (vLLM loads it with the target's load format): it is
        loaded as the user asked and not joined.
        """
        load_format = vllm_config.additional_config[ENGINE_KEY]["load_format"]
        base_config = copy.copy(vllm_config)
        base_config.load_config = self._base_load_config(load_format)
        loader = get_model_loader(base_config.load_config)
        base = loader.load_model(vllm_config=base_config, model_config=model_config, prefix=prefix)
        if model_config.runner_type == "draft":
            return base
        settings = engine_settings(vllm_config)
        told = "; ".join(f"{name}: {_told(value)}" for name, value in settings.values.items())
        logger.info(
            "ivl: values %s; default_weight %g, max_weight %g, traces %s",
            told,
            settings.default_weight,
            settings.max_weight,
            settings.trace_file or "off",
        )
        is_last_stage = get_pp_group().is_last_rank
        networks: list[Network] = []
        for source in settings.networks if is_last_stage else ():
            networks.append(_load_network(vllm_config, source, networks, load_format))
        if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            for layer in vllm_config.compilation_config.static_forward_context.values():
                keep_whole_context(layer)
        if not is_last_stage:
            return base
        drafter = vllm_config.speculative_config
        most_rows = vllm_config.scheduler_config.max_num_seqs * (1 + (drafter.num_speculative_tokens if drafter else 0))
        # Kernels have the same shapes beyond. Prompt log-probabilities take whole prompts.
        most_rows = 512 if settings.default_weight else min(most_rows, 512)
        for network in networks:
            network.warm_up(most_rows)
        steps = Steps.of(vllm_config)
        steps.rows.networks, steps.rows.groups = networks, projection_groups(networks, settings.networks)
        warm_up_solvers(settings, steps.rows, model_config.get_vocab_size(), base, most_rows)
        watch_steps()
        default_weights = settings.network_weights(settings.steering(None).weights)
        reads = drafter is not None and drafter.method in READING_DRAFTERS
        for_drafter = StableInput(vllm_config.scheduler_config.max_num_batched_tokens) if reads else None
        return join(base, steps, default_weights, for_drafter)

    def get_external_weight_memory(self, vllm_config: VllmConfig) -> int:
        """Bytes of weights that another process holds for the base (vLLM 0.32 and later)."""
        loader = get_model_loader(self._base_load_config(vllm_config.additional_config[ENGINE_KEY]["load_format"]))
        return loader.get_external_weight_memory(vllm_config)

    def _base_load_config(self, load_format: str) -> LoadConfig:
        return replace(self.load_config, load_format=load_format)


def _told(value: Value) -> str:
    parts = [value.model, f"({network_scheme(value.model)})"]
    parts += [f"minus {value.minus}"] if value.minus else []
    return " ".join(parts + ([f"through {value.vocab_map}"] if value.vocab_map else []))


def own_cache_dtype(asked: str, base: torch.dtype, own: torch.dtype) -> str:
    """What a network is told of the KV cache's dtype: where the user named the base's own, the network's own.

    Attention takes keys and values of 16 bits in the dtype of its queries alone.

    Args:
        asked: `--kv-cache-dtype`.
        base: dtype of the base's activations.
        own: dtype of the network's.
    """
    if asked != str(base).removeprefix("torch."):
        return asked
    return str(own).removeprefix("torch.") if own in (torch.float16, torch.bfloat16) else "auto"


def _load_network(
    vllm_config: VllmConfig, source: NetworkSource, others: Sequence[Network], load_format: str
) -> Network:
    """One value network, with its own attention layers in the engine's paged KV cache.

    Args:
        vllm_config: the engine's configuration.
        source: where it comes from.
        others: those loaded before it, with which it shares what is equal. Their count names its layers
            (`ivl_0.model.layers.3.self_attn.attn`).
        load_format: the base's. Random weights there mean random weights here; else safetensors and nothing else.
    """
    number = len(others)
    model_config = network_config(vllm_config, source.model)
    # A request is as long for the value network as for the base.
    model_config.max_model_len = vllm_config.model_config.max_model_len
    if load_format != "dummy" and hasattr(model_config, "maybe_untie_word_embeddings"):
        # vLLM does this for the base when it completes the engine's configuration (0.32 and later).
        model_config.maybe_untie_word_embeddings()
    # Not vLLM's `replace`: that derives everything anew and would change objects that base and value network share.
    config = copy.copy(vllm_config)
    config.model_config = model_config
    config.load_config = LoadConfig(
        load_format="dummy" if load_format == "dummy" else "safetensors",
        download_dir=vllm_config.load_config.download_dir,
    )
    prefix = f"ivl_{number}"
    config.quant_config = quantization(model_config, config.load_config, prefix)
    # Attention takes its window and dtype from the cache configuration, and the base's may have others.
    config.cache_config = copy.copy(vllm_config.cache_config)
    config.cache_config.sliding_window = window_of_all_layers(model_config)
    asked = vllm_config.additional_config[ENGINE_KEY]["kv_cache_dtype"]
    asked = own_cache_dtype(asked, vllm_config.model_config.dtype, model_config.dtype)
    config.cache_config.cache_dtype = resolve_kv_cache_dtype_string(asked, model_config)
    config.lora_config = None
    config.parallel_config = copy.copy(vllm_config.parallel_config)
    has_stages = config.parallel_config.pipeline_parallel_size > 1
    config.parallel_config.pipeline_parallel_size = 1
    use_attention_of_model(config)
    if vllm_config.parallel_config.enable_eplb:
        # Only the base's experts are known to vLLM's balancer.
        config.parallel_config.enable_eplb = False
        config.parallel_config.eplb_config = copy.copy(config.parallel_config.eplb_config)
        config.parallel_config.eplb_config.num_redundant_experts = 0
    # Part of the key under which vLLM keeps compiled code. One folder may be loaded twice, with two maps; its compiled
    # forward knows its layers by name, and takes token ids or embeddings.
    scheme = network_scheme(source.model)
    vocab_map = None if source.vocab_map is None else VocabMap.load(source.vocab_map)
    reads_ids = reads_token_ids(scheme, vocab_map)
    check_inputs(get_model_cls(model_config), model_config, source, reads_ids)
    config.additional_config = {**vllm_config.additional_config, "ivl_network": [number, reads_ids]}

    layers = vllm_config.compilation_config.static_forward_context
    before = set(layers)
    with set_model_tag(prefix), _kept_on_device(), built_on_one_stage():
        loader = get_model_loader(config.load_config)
        try:
            model = loader.load_model(vllm_config=config, model_config=model_config, prefix=prefix)
        except AssertionError as error:
            if "expert parallel group" not in str(error):
                raise
            raise ValueError(
                f"ivl: the value network {source.model!r} is a mixture of experts of a kind "
                f"({', '.join(model_config.architectures)}) for which vLLM needs a process group that it makes only if "
                "the base is a mixture of experts too: use another value network"
            ) from error
    if load_format != "dummy":  # there all that has one shape is equal
        saved = share_equal_weights(model, [other.model for other in others])
        if saved:
            logger.info("ivl: value network %s: %.1f MiB are shared with others", source.model, saved / 2**20)
        warn_of_broken_weights(model, source.model)
    own = [layer for name, layer in layers.items() if name not in before]
    check_head_sizes(own, source.model)
    check_states([layers[name] for name in before], own, vllm_config, source.model)
    use_own_config(own, config, vllm_config, prefix)
    return Network(
        model,
        model_config,
        vllm_config.scheduler_config.max_num_batched_tokens,
        vllm_config.model_config.get_vocab_size(),
        scheme,
        vocab_map,
        is_multimodal(vllm_config.model_config),
        has_stages,
    )


def use_attention_of_model(config: VllmConfig) -> None:
    """Has attention set up as vLLM does for this architecture (Gemma 4's wide heads take other kernels, for example).

    What else vLLM would set for it is the engine's, which is the base's. Its own model configuration may change.
    """
    hook = MODELS_CONFIG_MAP.get(config.model_config.architecture)
    if hook is None:
        return
    tried = copy.copy(config)
    for name, part in vars(config).items():
        if dataclasses.is_dataclass(part) and part is not config.model_config:
            setattr(tried, name, copy.copy(part))
    hook.verify_and_update_config(tried)
    config.attention_config = tried.attention_config


def window_of_all_layers(model_config: ModelConfig) -> int | None:
    """The sliding window in tokens, None where some layers have none: these would take it for theirs.

    Layers of such models bring their own. It is vLLM's rule for the base (`EngineArgs.create_engine_config`).
    """
    kinds = getattr(model_config.hf_text_config, "layer_types", None) or ["sliding_attention"]
    return model_config.get_sliding_window() if set(kinds) == {"sliding_attention"} else None


def quantization(model_config: ModelConfig, load_config: LoadConfig, network: str) -> QuantizationConfig | None:
    """How the checkpoint is quantized, asked for layers whose names begin with the network's; the checkpoint's do not.

    Else a layer that the checkpoint leaves as it is would be quantized.
    """
    config = VllmConfig._get_quantization_config(model_config, load_config)
    if config is not None:
        of_checkpoint = config.get_quant_method

        def get_quant_method(layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
            return of_checkpoint(layer, prefix.removeprefix(f"{network}."))

        config.get_quant_method = get_quant_method
    return config


@contextlib.contextmanager
def _kept_on_device() -> Iterator[None]:
    """Offloads nothing of what is loaded here: vLLM's offloader may be made for a single model, the base."""
    offloader = get_offloader()
    set_offloader(NoopOffloader())
    try:
        yield
    finally:
        set_offloader(offloader)
