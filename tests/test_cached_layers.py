"""What vLLM is told about the cache of value networks' layers, and of the base's."""

import copy
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from ivl_vllm.serving.cached_layers import keep_whole_context, use_own_config
from ivl_vllm.serving.loader import own_cache_dtype


@pytest.mark.parametrize(
    ("asked", "base", "own", "told"),
    [
        ("auto", torch.bfloat16, torch.float16, "auto"),
        ("fp8", torch.bfloat16, torch.float16, "fp8"),
        ("bfloat16", torch.bfloat16, torch.float16, "float16"),
        ("bfloat16", torch.bfloat16, torch.bfloat16, "bfloat16"),  # not `auto`, by which a folder's own fp8 would win
        ("bfloat16", torch.bfloat16, torch.float32, "auto"),
        ("bfloat16", torch.float32, torch.float32, "bfloat16"),
    ],
)
def test_where_the_bases_dtype_is_asked_for_a_network_keeps_keys_in_its_own(asked, base, own, told):
    assert own_cache_dtype(asked, base, own) == told


@pytest.mark.parametrize("more", [{}, {"state_content_bytes": 96}, {"tokens_per_state": 2}, {"num_kv_heads": 1}])
def test_layers_with_a_window_keep_the_whole_context_in_pages_of_the_same_size(more):
    """Backends say how they pack a page; it is as large as before."""
    fields = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16} | more
    layer = SimpleNamespace(
        sliding_window=24, get_kv_cache_spec=lambda _: SlidingWindowSpec(sliding_window=24, **fields)
    )
    keep_whole_context(layer)
    spec = layer.get_kv_cache_spec(SimpleNamespace(cache_config=SimpleNamespace(block_size=32)))
    assert type(spec) is FullAttentionSpec and spec.sliding_window is None
    assert spec == FullAttentionSpec(**fields)
    assert spec.page_size_bytes == SlidingWindowSpec(sliding_window=24, **fields).page_size_bytes
    # A layer may choose a block size of its own, and pad such blocks; the group has one.
    fields |= {"block_size": 16, "page_size_padded": 1 << 20}
    assert layer.get_kv_cache_spec(SimpleNamespace(cache_config=SimpleNamespace(block_size=64))).block_size == 64


def test_metadata_of_a_network_is_built_from_its_own_models_and_the_engines_cache():
    """vLLM settles layout and size of the cache when the models are loaded; backends ask for them in every step."""

    class Backend:
        @staticmethod
        def get_builder_cls():
            class Plain:
                def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
                    self.vllm_config = vllm_config

                @classmethod
                def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
                    return vllm_config

                def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
                    return common_prefix_len, common_attn_metadata, fast_build

            return Plain

    engine = SimpleNamespace(model_config="base", cache_config=SimpleNamespace(layout=None, cache_dtype="fp8"))
    own = SimpleNamespace(model_config="value", cache_config=SimpleNamespace(layout=None, cache_dtype="auto"))

    class Layer(AttentionLayerBase):
        attn_backend = Backend

        def get_attn_backend(self):
            return self.attn_backend

        def get_kv_cache_spec(self, vllm_config):
            return None

    layer, other = Layer(), Layer()
    other.vllm_config = own
    use_own_config([layer, object(), other], own, engine, "ivl_0")
    assert not hasattr(layer, "vllm_config")
    assert layer.get_attn_backend() is layer.attn_backend is other.get_attn_backend() is not Backend
    engine.cache_config.layout = "NHD"
    builder = layer.attn_backend.get_builder_cls()
    for seen in (builder(None, [], engine, "cpu").vllm_config, builder.get_cudagraph_support(engine, None)):
        assert seen.model_config == "value"
        assert (seen.cache_config.layout, seen.cache_config.cache_dtype) == ("NHD", "auto")
        assert copy.copy(seen.cache_config).layout == "NHD"
    made = builder(None, [], engine, "cpu").vllm_config
    engine.cache_config.num_gpu_blocks = 4  # FlexAttention asks for it later still
    assert made.cache_config.num_gpu_blocks == 4
    # A layer that keeps a configuration (vLLM 0.33's gated delta nets) sees the final block size in it, too.
    engine.cache_config.mamba_block_size = 576
    kept = other.vllm_config
    assert (kept.model_config, kept.cache_config.mamba_block_size, kept.cache_config.cache_dtype) == (
        "value",
        576,
        "auto",
    )
    assert own.cache_config.layout is None and engine.cache_config.cache_dtype == "fp8"
    # Tokens of an image, which see each other in some bases: a network takes them for text.
    common = SimpleNamespace(mm_req_doc_ranges={0: [(2, 7)]}, num_reqs=3)
    prefix, seen, fast = builder(None, [], engine, "cpu").build(5, common_attn_metadata=common, fast_build=True)
    assert (prefix, seen.mm_req_doc_ranges, seen.num_reqs, fast) == (5, None, 3, True)
    assert common.mm_req_doc_ranges == {0: [(2, 7)]}
