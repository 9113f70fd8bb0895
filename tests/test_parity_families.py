"""Bases that are more than attention over text: token-identical to the reference."""

import pytest
from cascade_models import mark_scheme
from parity import Reference, Request, add_images, assert_parity, engine, metric, mismatches, random_requests, run
from tiny import IMAGE_TOKEN, make_model
from vocab_map_models import make_other, random_map

import ivl_vllm


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {
        "hybrid": make_model(root / "hybrid", "hybrid", seed=21, layers=4),
        # Its states are larger than the pages in which vLLM keeps the base's.
        "large_states": make_model(root / "large_states", "hybrid", seed=22, hidden=128, heads=4),
        "small_states": make_model(root / "small_states", "hybrid", seed=23, hidden=32, heads=1),
        "window": make_model(root / "window", "mistral", seed=26, window=24),
        "multimodal": make_model(root / "multimodal", "multimodal", seed=24, layers=3),
        "multimodal_value": make_model(root / "multimodal_value", "multimodal", seed=25, layers=1),
    }


def test_layers_with_a_state(families):
    """A base with Mamba layers beside value networks with such layers and without; a window has a cache of its own."""
    values = {
        "math": {"model": str(families["large_states"])},
        "style": {"model": str(families["small_states"]), "minus": str(families["window"])},
    }
    reference = Reference(
        families["hybrid"], math=families["large_states"], style=(families["small_states"], families["window"])
    )
    requests = random_requests(24, seed=31, names=("math", "style"), longest=120, last_arrival=4)
    for request in requests:
        request.params["max_tokens"] = 40  # beyond the end of a block
    prompt = [token for request in requests for token in request.prompt][:135]
    for number, weights in enumerate([{}, {}, {"math": 1.0}, {"math": -0.5}]):
        requests.append(Request(prompt, weights, weights or ..., {"max_tokens": 5}, arrives=100 + 20 * number))
    with engine(
        families["hybrid"],
        **ivl_vllm.engine_args(values=values),
        max_num_batched_tokens=64,
        num_gpu_blocks_override=44,
        disable_log_stats=False,
    ) as llm:
        assert llm.llm_engine.vllm_config.cache_config.mamba_cache_mode == "align"  # prefixes are kept
        outputs = run(llm, requests)
        preempted = metric(llm, "vllm:num_preemptions")
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        builders = [group.get_metadata_builder() for groups in runner.attn_groups for group in groups]
    assert_parity(reference, requests, outputs)
    assert any(len(r.prompt) - o.num_cached_tokens > 64 for r, o in zip(requests, outputs))  # in pieces
    assert [o.num_cached_tokens for o in outputs[-4:]] == [0, 128, 0, 128]  # with states of the networks, too
    assert preempted > 0
    # Each model's metadata are made for its own chunks.
    assert {builder.chunk_size for builder in builders if hasattr(builder, "chunk_size")} == {8, 16, 32}


def test_text_only_mode_of_multimodal_models(families, models):
    """Such a base hands out positions with one row for each axis of an image."""
    values = {"math": {"model": str(models["value"])}, "style": {"model": str(families["multimodal_value"])}}
    reference = Reference(families["multimodal"], math=models["value"], style=families["multimodal_value"])
    requests = random_requests(60, seed=32, names=("math", "style"))
    with engine(
        families["multimodal"],
        **ivl_vllm.engine_args(values=values),
        language_model_only=True,
        max_num_batched_tokens=32,
    ) as llm:
        assert llm.llm_engine.vllm_config.model_config.uses_mrope
        outputs = run(llm, requests)
    assert_parity(reference, requests, outputs)
    assert sum(o.num_cached_tokens for o in outputs) > 0


def test_images(families, tmp_path):
    """The base sees images, at positions of three axes; value networks read what stands for them, at its place."""
    other, vocab_map = make_other(tmp_path / "other"), tmp_path / "map.safetensors"
    maps = {"other": random_map(families["multimodal"], other, 1)}
    maps["other"].save(vocab_map)
    folders = {
        "math": mark_scheme(make_model(tmp_path / "cascade", seed=12), "cascade+text"),
        "style": families["multimodal_value"],
        "other": other,
    }
    values = {name: {"model": str(folder)} for name, folder in folders.items()}
    values["other"]["vocab_map"] = str(vocab_map)
    reference = Reference(families["multimodal"], schemes={"math": "cascade+text"}, maps=maps, **folders)
    requests = random_requests(40, seed=33, names=tuple(folders))
    images = add_images(requests)
    prompt = [10, 11, 12, 1, IMAGE_TOKEN, 1, *range(20, 60)]
    for number in range(2):
        weights = {"math": 1.0, "other": -0.5}
        requests.append(Request(prompt, weights, weights, {"max_tokens": 5}, 100 + 20 * number, images=[images[0]]))
    with engine(
        families["multimodal"],
        **ivl_vllm.engine_args(values=values),
        max_num_batched_tokens=32,
        disable_chunked_mm_input=False,
    ) as llm:
        outputs = run(llm, requests)
    assert_parity(reference, requests, outputs)
    assert [o.num_cached_tokens for o in outputs[-2:]] == [0, 32]  # the image is among them
    # Other images, other tokens: else the base would not have seen them.
    for request in requests:
        request.images = [images[2 - images.index(image)] for image in request.images]
    assert mismatches(reference, requests, outputs)
