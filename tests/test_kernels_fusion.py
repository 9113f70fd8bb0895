"""The solvers of weights: the torch backend, the errors, and the objective of several experts against a search."""

import importlib

import ivl_kernels
import numpy as np
import pytest
import torch
from kernel_fusion_cases import FusionCases, arrays, curve, difference, divergence_of, rows_of
from scipy.optimize import minimize

torch_fusion = importlib.import_module("ivl_kernels.torch_fusion")


class TestTorch(FusionCases):
    backend = "torch"


def test_auto_on_the_cpu_is_torch(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    calls = []
    original = torch_fusion.solve_torch
    monkeypatch.setattr(torch_fusion, "solve_torch", lambda *args: calls.append(args) or original(*args))
    ivl_kernels.fusion_weights(torch.zeros(1, 4), torch.ones(1, 4), torch.zeros(1, 4))
    assert len(calls) == 1


def test_no_weights_have_a_smaller_objective():
    base, expert, anti = (part[:3] for part in rows_of("normal", 60))
    other = rows_of("peaked", 60)[1][:3]
    found = ivl_kernels.joint_fusion_weights(base, [expert, other], [anti, anti], backend="torch")
    for z, e, o, a, weights in zip(*arrays(base, expert, other, anti, found.weights)):
        deltas, targets = [difference(x, a) for x in (e, o)], [divergence_of(x, a) for x in (e, o)]

        def objective(w, z=z, deltas=deltas, targets=targets):
            reached = curve(z, w[0] * deltas[0] + w[1] * deltas[1], 1.0)
            return sum((reached - target) ** 2 for target in targets)

        starts = [(0.1, 0.1), (1.0, 1.0), (2.0, 0.0), (0.0, 2.0), (2.0, 2.0)]
        best = min(minimize(objective, np.array(start), bounds=[(0, 2)] * 2).fun for start in starts)
        assert objective(weights) <= best * (1 + 1e-4) + 1e-8


WRONG = [
    ({"max_weight": -1.0}, "max_weight is -1.0.*at least 0"),
    ({"max_weight": float("nan")}, "max_weight is nan"),
    ({"max_weight": torch.ones(3)}, r"max_weight has dtype torch.float32 and shape \(3,\).*\(2,\)"),
    ({"max_weight": torch.ones(2).double()}, "max_weight has dtype torch.float64"),
    ({"max_weight": torch.ones(2, device="meta")}, "max_weight is on meta"),
    ({"row_index": torch.zeros(3, dtype=torch.int64)}, r"row_index has shape \(3,\)"),
    ({"vocab_map": torch.zeros(4, dtype=torch.int64)}, r"vocab_map has shape \(4,\)"),
    ({"backend": "cuda"}, "backend='cuda' is unknown"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_arguments(wrong, message):
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=message):
        ivl_kernels.fusion_weights(logits, logits, logits, **wrong)


def test_a_pair_has_to_fit():
    with pytest.raises(ValueError, match=r"expert's logits are \(2, 5\).*\(2, 6\).*cut both"):
        ivl_kernels.fusion_weights(torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, 6))


def test_wrong_budget():
    with pytest.raises(ValueError, match=r"max_kl has dtype torch.float32 and shape \(1,\)"):
        ivl_kernels.trust_region_weights(torch.zeros(2, 5), torch.zeros(2, 5), torch.ones(2), torch.ones(1))


@pytest.mark.parametrize(("experts", "antis", "maps"), [(0, 0, None), (2, 1, None), (2, 2, [None])])
def test_sequences_have_to_fit(experts, antis, maps):
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=f"expert_logits has {experts} entries, anti_logits {antis}"):
        ivl_kernels.joint_fusion_weights(logits, [logits] * experts, [logits] * antis, vocab_maps=maps)
