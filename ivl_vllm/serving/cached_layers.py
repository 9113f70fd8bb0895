"""The layers of a model that keep something for later tokens (keys and values, or a state), and their cache layout."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec
from vllm.v1.worker import mamba_utils


def keep_whole_context(layer: nn.Module) -> None:
    """Gives a sliding-window layer the cache layout of full attention, so that one group holds all models' layers.

    vLLM does so itself when its hybrid manager is off, but before 0.32 only if the window's block size, which the layer
    chooses on its own, happens to be the engine's.
    """
    if getattr(layer, "sliding_window", None) is None:
        return
    own_spec = layer.get_kv_cache_spec

    def get_kv_cache_spec(vllm_config: VllmConfig) -> KVCacheSpec | None:
        spec = own_spec(vllm_config)
        if type(spec) is not SlidingWindowSpec:
            return spec
        ours, theirs = ({f.name for f in dataclasses.fields(kind) if f.init} for kind in (spec, FullAttentionSpec))
        # The window itself is left out: a group takes no two different ones. Attention reads it from the layer. Padding
        # was for blocks of the layer's own choice.
        kept = {name: getattr(spec, name) for name in ours & theirs - {"sliding_window", "page_size_padded"}}
        return FullAttentionSpec(**kept | {"block_size": vllm_config.cache_config.block_size})

    layer.get_kv_cache_spec = get_kv_cache_spec


class _OwnDtype:
    """The engine's cache configuration, where vLLM settles layout and size bit by bit, with a network's dtype."""

    def __init__(self, engines: CacheConfig, cache_dtype: str):
        self._engines, self.cache_dtype = engines, cache_dtype

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # which `copy` asks for before there is an `_engines`
            raise AttributeError(name)
        return getattr(self._engines, name)


def use_own_config(layers: Iterable[nn.Module], config: VllmConfig, engines: VllmConfig, prefix: str) -> None:
    """Lets the attention metadata of a value network's layers be built from its own heads and dtype, not the base's.

    Args:
        layers: of the network.
        config: its own.
        engines: the engine's, whose cache configuration vLLM completes once all models are loaded.
        prefix: of the layers' names.
    """
    # One class for all layers that have one backend: vLLM's choice of a block size tries combinations of classes.
    backends: dict[type[AttentionBackend], type[AttentionBackend]] = {}
    for layer in layers:
        if not isinstance(layer, AttentionLayerBase):
            continue
        backend = layer.get_attn_backend()
        if backend not in backends:
            backends[backend] = _own_backend(backend, config, prefix)
        own = backends[backend]
        if hasattr(layer, "vllm_config"):  # vLLM 0.33: gated delta nets ask it for the final block size
            layer.vllm_config = _own_config(layer.vllm_config, engines)
        layer.get_attn_backend = lambda own=own: own
        # Tells backends that join causal attention and that of images that this layer needs the former only.
        layer.mm_prefix_clamp_sliding_window = True
        if hasattr(layer, "attn_backend"):  # layers with a state (Mamba, linear attention) have none
            layer.attn_backend = own
        if isinstance(layer, MambaBase):
            _use_own_page(layer)


def _own_config(config: VllmConfig, engines: VllmConfig) -> VllmConfig:
    found = copy.copy(config)
    found.cache_config = _OwnDtype(engines.cache_config, config.cache_config.cache_dtype)
    return found


def _own_backend(backend: type[AttentionBackend], config: VllmConfig, prefix: str) -> type[AttentionBackend]:
    class Builder(backend.get_builder_cls()):
        def __init__(self, kv_cache_spec, layer_names, vllm_config, *args, **kwargs):
            super().__init__(kv_cache_spec, layer_names, _own_config(config, vllm_config), *args, **kwargs)

        def build(self, common_prefix_len, common_attn_metadata, *args, **kwargs):
            if common_attn_metadata.mm_req_doc_ranges is not None:
                # The tokens of an image see each other in some bases. A value network reads text, from left to right.
                common_attn_metadata = copy.copy(common_attn_metadata)
                common_attn_metadata.mm_req_doc_ranges = None
            return super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)

        @classmethod
        def get_cudagraph_support(cls, vllm_config, *args, **kwargs):
            return super().get_cudagraph_support(_own_config(config, vllm_config), *args, **kwargs)

    # vLLM groups layers by the name of their backend: one name for each network, the same for all its layers.
    members = {"get_builder_cls": staticmethod(lambda: Builder), "__module__": __name__}
    return type(f"{prefix}_{backend.__name__}", (backend,), members)


def _use_own_page(layer: MambaBase) -> None:
    """Lets a network's states be larger than the base's pages, to which vLLM pads those of all layers."""
    own_spec = layer.get_kv_cache_spec

    def get_kv_cache_spec(vllm_config: VllmConfig) -> KVCacheSpec | None:
        spec = own_spec(vllm_config)
        unpadded = dataclasses.replace(spec, page_size_padded=None)
        # vLLM then makes the others' pages as large.
        return unpadded if unpadded.page_size_bytes > (spec.page_size_padded or 0) else spec

    layer.get_kv_cache_spec = get_kv_cache_spec


def check_head_sizes(layers: Iterable[nn.Module], network: str) -> None:
    """Refuses heads that the attention kernels cannot take, which on a CPU vLLM finds in the first step only.

    Args:
        layers: of the network.
        network: its folder or hub id.

    Raises:
        ValueError: names the size and those that there are.
    """
    for layer in layers:
        size = getattr(layer, "head_size", None)
        if size is None or not hasattr(layer, "attn_backend") or layer.attn_backend.supports_head_size(size):
            continue
        known = ", ".join(map(str, layer.attn_backend.get_supported_head_sizes()))
        raise ValueError(
            f"ivl: the value network {network!r} has heads of size {size}, and the attention backend "
            f"{layer.attn_backend.get_name()} does not take it{f', only {known}' if known else ''}: use another value "
            "network, or another --attention-backend"
        )


def check_states(base: Iterable[nn.Module], own: Iterable[nn.Module], config: VllmConfig, network: str) -> None:
    """Refuses a network whose states vLLM could not copy, which it does where cached prefixes end.

    Args:
        base: layers of the base, from which vLLM takes how states are copied.
        own: layers of the network.
        config: of the engine.
        network: its folder or hub id.

    Raises:
        ValueError: names the kinds and the fix.
    """
    kinds, known = ({layer.mamba_type for layer in layers if isinstance(layer, MambaBase)} for layers in (own, base))
    mode, off = config.cache_config.mamba_cache_mode, "start with --no-enable-prefix-caching"
    if not kinds or mode == "none":
        return
    if mode != "align" or not hasattr(mamba_utils, "validate_mamba_state_copy_funcs"):
        raise ValueError(
            f"ivl: the value network {network!r} has layers with a state, and this vLLM keeps the states of cached "
            f"prefixes (mamba_cache_mode {mode!r}) in ways that fit the base's alone: {off}"
        )
    if kinds - known:
        names = " and ".join(sorted(kind.name for kind in kinds - known))
        raise ValueError(
            f"ivl: the value network {network!r} has states of another kind ({names}) than the base "
            f"({' and '.join(sorted(kind.name for kind in known))}), and vLLM copies the base's kind only: {off}"
        )
