"""What an engine whose base is split into stages refuses to start with."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from parity import create

import ivl_vllm
from ivl_vllm.serving.checks import _check_block_sizes

RANKS = {"distributed_executor_backend": "mp"}  # else vLLM looks for as many GPUs, where there is one
DRAFTER = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
CONNECTOR = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}


@pytest.mark.parametrize(
    "arguments, what",
    [
        ({"speculative_config": DRAFTER, **RANKS}, "speculative decoding"),
        ({"kv_transfer_config": CONNECTOR, **RANKS}, "a KV connector"),
        ({"distributed_executor_backend": "external_launcher"}, "distributed_executor_backend external_launcher"),
        (RANKS, None),
    ],
    ids=["drafts", "connector", "launcher", "nothing"],
)
def test_what_does_not_run_in_stages(models, arguments, what):
    message = f"^ivl: pipeline_parallel_size is 2 with {what}.* use --pipeline-parallel-size 1, or leave {what} out"
    with nullcontext() if what is None else pytest.raises(ValueError, match=message):
        create(
            models["base"],
            **ivl_vllm.engine_args(value_model=str(models["value"])),
            pipeline_parallel_size=2,
            **arguments,
        )


@pytest.mark.parametrize(
    "latent, stages, has_block_size, is_refused",
    [
        ((False, True), 2, False, True),
        ((True, False), 2, False, True),
        ((False, True), 2, True, False),
        ((False, True), 1, False, False),
        ((True, True), 2, False, False),
    ],
)
def test_stages_that_would_choose_block_sizes_of_their_own(latent, stages, has_block_size, is_refused):
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        cache_config=SimpleNamespace(user_specified_block_size=has_block_size),
    )
    models = [SimpleNamespace(use_mla=is_latent) for is_latent in latent]
    message = "^ivl: pipeline_parallel_size is 2, and only some .* latent attention.*--block-size 64"
    with pytest.raises(ValueError, match=message) if is_refused else nullcontext():
        _check_block_sizes(config, models)
