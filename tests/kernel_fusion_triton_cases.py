"""The solvers' cases on the Triton backend. `test_kernels_triton.py` runs this file in a process of its own."""

import ivl_kernels
import pytest
import torch
from ivl_kernels import torch_fusion, triton_fusion
from kernel_cases import device
from kernel_fusion_cases import FusionCases, rows_of


class TestTriton(FusionCases):
    backend = "triton"

    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch):
        # The interpreter is faster; several blocks have the tests with more columns.
        if not torch.cuda.is_available():
            monkeypatch.setattr(triton_fusion, "CONFIG", triton_fusion.Config(512, 1))


def test_auto_takes_the_kernel(monkeypatch):
    calls = []
    original = triton_fusion.solve_triton
    monkeypatch.setattr(triton_fusion, "solve_triton", lambda *args: calls.append(args) or original(*args))
    monkeypatch.setattr(torch_fusion, "solve_torch", None)
    logits = torch.zeros(1, 4, device=device())
    ivl_kernels.fusion_weights(logits, logits + torch.arange(4.0, device=device()), logits)
    assert len(calls) == 1


def test_backends_agree_at_the_default_block():
    inputs = rows_of("normal", 5000)
    found, wanted = (ivl_kernels.fusion_weights(*inputs, backend=backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's calls")
def test_a_row_ends_once_it_is_solved(monkeypatch):
    evaluations, original = [], triton_fusion.evaluate
    monkeypatch.setattr(triton_fusion, "evaluate", lambda *args: evaluations.append(args) or original(*args))
    ivl_kernels.fusion_weights(*rows_of("normal"), max_weight=8.0, backend="triton")
    assert 6 * 2 <= len(evaluations) <= 6 * 6  # rows; one evaluation for the target, up to five for the weight
