"""Weights that are solved at every token, beside fixed ones and none: model runner V1."""

from types import SimpleNamespace

import pytest
import torch
from parity import Request, assert_parity, engine, mismatches, run
from solved_reference import SolvedReference, solved_requests
from vocab_map_models import make_other, random_map

import ivl_vllm


def test_solved_fixed_and_unsteered_in_one_batch(models, tmp_path):
    """A pair, a plain value network and a pair of another vocabulary; chunked prefill, prefix caching."""
    other, anti = make_other(tmp_path / "other"), make_other(tmp_path / "other_anti", seed=22)
    vocab_map = random_map(models["base"], other, 3)
    vocab_map.save(tmp_path / "map.safetensors")
    folders = {"math": models["value"], "style": (models["sliding"], models["anti"]), "other": (other, anti)}
    values = {
        "math": {"model": str(models["value"])},
        "style": {"model": str(models["sliding"]), "minus": str(models["anti"])},
        "other": {"model": str(other), "minus": str(anti), "vocab_map": str(tmp_path / "map.safetensors")},
    }
    reference = SolvedReference(models["base"], maps={"other": vocab_map}, **folders)
    with engine(models["base"], **ivl_vllm.engine_args(values=values), max_num_batched_tokens=32) as llm:
        requests = solved_requests(48, seed=81)
        outputs = run(llm, requests)
        assert_parity(reference, requests, outputs)
        assert sum(o.num_cached_tokens for o in outputs) > 0
        # A grammar's forbidden columns stay forbidden, and the divergence is that of what is left.
        allowed = list(range(10, 60))
        masked = Request([5, 6, 7], {}, "auto:style", {"max_tokens": 8, "allowed_token_ids": allowed})
        (output,) = run(llm, [masked])
        assert set(output.outputs[0].token_ids) <= set(allowed)
    # The negative control: weight 1 in place of the solved one says something else, and so does an unbounded weight.
    fixed = [
        Request(r.prompt, {name: 1.0 if weight == "auto" else weight for name, weight in r.weights.items()}, r.ivl)
        for r in requests
    ]
    for request in fixed:
        request.weights.pop("max_kl", None)
    wrong = mismatches(reference, fixed, outputs)
    for kind in ("{'style': 1.0}", "{'math': 1.0}", "{'other': 1.0}", "{'style': 1.0, 'other': 1.0}"):
        assert any(kind in line for line in wrong), kind


def test_a_plain_network_cannot_be_compared(models):
    settings = ivl_vllm.settings.Settings({"math": ivl_vllm.settings.Value(str(models["value"]))})
    with pytest.raises(ValueError, match="'math' has no minus model"):
        settings.steering({"ivl": "auto"})


@pytest.mark.parametrize("offset", [-150.0, 0.0, 150.0])
def test_what_all_value_logits_have_in_common_does_not_count(offset):
    """GPT-2's are around -100: ten times that is more than the solver takes for a difference."""
    from ivl_kernels import value_add

    from ivl_vllm.serving.solved_weights import SolvedWeights
    from ivl_vllm.serving.value_rows import Rows, ValueRows
    from ivl_vllm.settings import parse_settings

    def project(logits, value_logits, weights, row_index):
        value_add(logits, value_logits, weights, row_index=row_index)

    generator = torch.Generator().manual_seed(0)
    before, value = 3 * torch.randn(2, 2, 5000, generator=generator) + torch.tensor([-100.0, offset])[:, None, None]
    after, value_rows = before.clone(), ValueRows()
    value_rows.networks, value_rows.groups = [SimpleNamespace(add_logits=project)], [(0,)]
    bounds = torch.tensor([[10.0, 0.1], [10.0, 0.5]])
    solved = SolvedWeights(parse_settings({"value_model": "x/y"}), value_rows, 2, after.device)
    solved._bound(after, Rows([value]), None, torch.ones(2), bounds, [0])
    before, after = before.double().log_softmax(-1), after.double().log_softmax(-1)
    torch.testing.assert_close((after.exp() * (after - before)).sum(-1).float(), bounds[:, 1], rtol=1e-2, atol=0)
