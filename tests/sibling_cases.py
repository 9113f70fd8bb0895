"""Siblings on model runner V2 in Triton's interpreter; `test_siblings.py` runs this file in a process of its own."""

import pytest
from parity import assert_parity, engine, metric, random_requests, run
from sibling_models import SOLVED, make_family, value_rows
from solved_reference import SolvedReference, solved_requests
from tiny import make_model

import ivl_vllm


@pytest.mark.parametrize("drafts", [False, True], ids=["alone", "with_drafts"])
def test_siblings(models, tmp_path, drafts):
    """Projected together by the fused kernel; with drafts only the device knows whose rows are whose."""
    values, folders = make_family(models, tmp_path)
    options = {}
    if drafts:
        draft = make_model(tmp_path / "draft", seed=1, hidden=128, layers=3, heads=4, kv_heads=2)
        speculation = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}
        options = {"speculative_config": speculation, "disable_log_stats": False}
    with engine(models["base"], **ivl_vllm.engine_args(values=values), **options) as llm:
        assert llm.llm_engine.vllm_config.use_v2_model_runner
        rows = value_rows(llm)
        assert rows.groups == [(0, 1, 2), (3,)]
        assert rows.networks[0].head.data_ptr() == rows.networks[1].head.data_ptr()
        requests = random_requests(16, seed=67, names=("one", "two", "other"), last_arrival=8)
        requests += solved_requests(6, seed=71, kinds=SOLVED, spread=8)
        for request in requests:
            request.params["max_tokens"] = min(8, request.params["max_tokens"])
        outputs = run(llm, requests)
        if drafts:
            assert metric(llm, "vllm:spec_decode_num_accepted_tokens") > 0
    assert_parity(SolvedReference(models["base"], **folders), requests, outputs)
