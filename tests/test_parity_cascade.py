"""Cascade value networks, which read the base's expectation of the next token: model runner V1."""

import pytest
from cascade_models import mark_scheme
from parity import Reference, assert_parity, engine, mismatches, random_requests, run
from tiny import VOCAB, make_model

import ivl_vllm


def test_both_schemes_beside_a_residual_value(models, tmp_path):
    """Three values at once; chunked prefill, prefix-cache hits and few columns in common."""
    folders = {
        "plain": models["value"],
        "cascade": mark_scheme(make_model(tmp_path / "cascade", "qwen2", seed=11, vocab_size=VOCAB - 8), "cascade"),
        "text": mark_scheme(make_model(tmp_path / "text", seed=12, vocab_size=VOCAB + 24), "cascade+text"),
    }
    schemes = {"cascade": "cascade", "text": "cascade+text"}
    values = {name: {"model": str(folder)} for name, folder in folders.items()}
    with engine(models["base"], **ivl_vllm.engine_args(values=values), max_num_batched_tokens=32) as llm:
        requests = random_requests(40, seed=51, names=("text", "cascade", "plain"))
        for request in requests:
            if request.ivl is not ... and not isinstance(request.ivl, dict | str | bool):
                request.ivl = dict(request.weights)  # a plain number would mean the first value, `plain`
        outputs = run(llm, requests)
    reference = Reference(models["base"], schemes, **folders)
    assert_parity(reference, requests, outputs)
    assert any(len(r.prompt) - o.num_cached_tokens > 32 for r, o in zip(requests, outputs))
    assert sum(o.num_cached_tokens for o in outputs) > 0
    # Served as if it were residual, the same network says something else.
    assert len(mismatches(Reference(models["base"], {}, **folders), requests, outputs)) > 10


def test_scaled_embeddings(models, tmp_path):
    """Gemma multiplies its embeddings by the square root of its width."""
    value = mark_scheme(make_model(tmp_path / "value", "gemma", seed=13), "cascade+text")
    with engine(models["base"], **ivl_vllm.engine_args(value_model=str(value))) as llm:
        requests = random_requests(16, seed=53, last_arrival=5)
        outputs = run(llm, requests)
    assert_parity(Reference(models["base"], {"default": "cascade+text"}, default=value), requests, outputs)


def test_an_unknown_scheme_is_refused_at_start(models, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    value = mark_scheme(make_model(tmp_path / "value"), "sideways", check=False)
    arguments = EngineArgs(model=str(models["base"]), **ivl_vllm.engine_args(value_model=str(value)), max_model_len=256)
    with pytest.raises(ValueError, match="ivl: .*scheme is 'sideways'"):
        arguments.create_engine_config()
