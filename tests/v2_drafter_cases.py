"""Speculative decoding on model runner V2. `test_parity_drafters.py` runs this file in a process of its own."""

import pytest
from parity import Reference, Request, assert_parity, engine, metric, random_requests, run
from tiny import make_eagle, make_model, make_mtp

import ivl_vllm


@pytest.mark.parametrize("chunk_logits", [None, 7], ids=["one_piece", "in_pieces"])
def test_speculative_decoding_with_a_draft_model(models, tmp_path, monkeypatch, chunk_logits):
    """Drafts of a third model are checked against the joined distribution; weights of every kind in one batch.

    In pieces: vLLM hands the processor large logits in chunks; a limit of 7 rows makes that happen here.
    """
    if chunk_logits is not None:
        from vllm.v1.worker.gpu.spec_decode import rejection_sampler

        monkeypatch.setattr(rejection_sampler, "get_max_chunk_logits", lambda vocab_size: chunk_logits)
    # A draft model that often agrees with the base: the base's own first layers would do as well.
    draft = make_model(tmp_path / "draft", seed=1, hidden=128, layers=3, heads=4, kv_heads=2)
    with engine(
        models["base"],
        **ivl_vllm.engine_args(value_model=str(models["value"])),
        speculative_config={"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3},
        disable_log_stats=False,
    ) as llm:
        requests = random_requests(20, seed=23, last_arrival=8)
        for request in requests:
            request.params["max_tokens"] = min(12, request.params["max_tokens"])
        outputs = run(llm, requests)
        assert metric(llm, "vllm:spec_decode_num_draft_tokens") > 0
        assert metric(llm, "vllm:spec_decode_num_accepted_tokens") > 0
    assert_parity(Reference(models["base"], default=models["value"]), requests, outputs)


def drafts_of(llm, requests):
    """The tokens that the drafter proposes, step by step."""
    speculator = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.speculator
    seen, propose = [], speculator.propose

    def watched(*args, **kwargs):
        drafts = propose(*args, **kwargs)
        seen.append(drafts.tolist())
        return drafts

    speculator.propose = watched
    run(llm, requests)
    del speculator.propose
    return seen


@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp"])
def test_drafters_that_read_the_bases_hidden_states(models, tmp_path, method):
    """They get those of the base alone: beside a value network that runs in every step they propose the same tokens."""
    if method == "mtp":
        base, head = make_mtp(tmp_path / "base"), {"num_speculative_tokens": 1}
    else:
        base = models["base"]
        head = {"num_speculative_tokens": 2, "model": str(make_eagle(tmp_path / "head", base, method))}
    speculation = {"speculative_config": {"method": method, **head}}
    requests = random_requests(5, seed=23, last_arrival=3, longest=40)
    for request in requests:
        request.params["max_tokens"] = 5
    unsteered = [Request(r.prompt, {}, ..., r.params, r.arrives) for r in requests]
    with engine(base, **speculation) as llm:
        expected = drafts_of(llm, unsteered)
    value = ivl_vllm.engine_args(value_model=str(models["value"]), skip_unsteered=False)
    with engine(base, **value, **speculation, disable_log_stats=False) as llm:
        assert drafts_of(llm, unsteered) == expected
        outputs = run(llm, requests)
        assert metric(llm, "vllm:spec_decode_num_draft_tokens") > 0
    assert_parity(Reference(base, default=models["value"]), requests, outputs)
    assert len({token for step in expected for row in step for token in row}) > 10  # no constant
