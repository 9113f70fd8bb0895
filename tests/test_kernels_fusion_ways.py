"""The torch backend's two ways to solve a row: compiled by numba, and torch's passes over columns."""

import importlib
import math
import subprocess
import sys
import threading

import ivl_kernels
import kernel_fusion_cases
import numpy as np
import pytest
import torch
from ivl_kernels import fused_rows
from kernel_fusion_cases import FusionCases, arrays, assert_solves, difference, divergence_of, rows_of

torch_fusion = importlib.import_module("ivl_kernels.torch_fusion")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Numba's rows are there."""
    monkeypatch.setattr(kernel_fusion_cases, "device", lambda: torch.device("cpu"))


def counted(monkeypatch, owner, name):
    """What a function gives from now on."""
    results, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: results.append(original(*args)) or results[-1])
    return results


def solved_by_torch(monkeypatch):
    """The rows for which torch searches the weight from now on."""
    return counted(monkeypatch, torch_fusion, "find")


@pytest.fixture(params=["numba", "torch"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(torch_fusion, "fused_rows", None)
    return request.param


class TestTorchAlone(FusionCases):
    """Rows of every kind where numba is missing."""

    backend = "torch"

    @pytest.fixture(autouse=True)
    def no_numba(self, monkeypatch):
        monkeypatch.setattr(torch_fusion, "fused_rows", None)

    def test_ordinary_rows_need_few_evaluations(self, monkeypatch):
        evaluations = counted(monkeypatch, torch_fusion.Curve, "evaluate")
        ivl_kernels.fusion_weights(*rows_of("normal"), max_weight=8.0, backend="torch")
        assert 6 * 2 <= len(evaluations) <= 6 * 4  # rows; one evaluation for the target, the others for the weight


@pytest.mark.parametrize("kind", ["normal", "masked", "tiny", "zero", "peaked"])
def test_numba_solves_all_ordinary_rows(monkeypatch, kind):
    by_torch = counted(monkeypatch, torch_fusion.Curve, "evaluate")
    searched = counted(monkeypatch, fused_rows, "search")
    ivl_kernels.fusion_weights(*rows_of(kind), max_weight=8.0, backend="torch")
    assert len(searched) == 6
    assert not by_torch


@pytest.mark.parametrize("max_kl", [0.5, 6.0, 9.0, 15.0, 22.0, 35.0])
def test_a_direction_with_plateaus(way, max_kl):
    """Three tokens take over one after another, so that the curve is flat and steep in turns."""
    delta = torch.zeros(1, 500)
    delta[0, :3] = torch.tensor([100.0, 70.0, 40.0])
    base = torch.randn(1, 500, generator=torch.Generator().manual_seed(5))
    base[0, :3] = torch.tensor([-36.0, -16.0, -6.0])
    found = ivl_kernels.trust_region_weights(base, delta, torch.tensor([10.0]), max_kl, backend="torch")
    assert_solves(*arrays(base[0], delta[0]), max_kl, 10.0, found.weights.item(), found.divergence.item())


def test_logits_far_from_0(way):
    base, expert, anti = rows_of("normal")
    near = ivl_kernels.fusion_weights(base, expert, anti, backend="torch")
    for shift in (300.0, -300.0):
        far = ivl_kernels.fusion_weights(base + shift, expert + shift, anti + shift, backend="torch")
        torch.testing.assert_close(far.weights, near.weights, rtol=1e-3, atol=1e-4)


FIRST = torch.arange(50) == 0
BASE, ANTI = torch.zeros(50), torch.linspace(-3, 3, 50)
CHANGE = torch.linspace(2, -2, 50)
# base, anti-expert, difference, largest weight
HARD = {
    "target near 0": (BASE, ANTI, 0.01 * CHANGE, 2.0),
    "target lost in rounding": (BASE, ANTI, 0.2 * CHANGE + 50, 2.0),
    "NaN": (BASE, ANTI, torch.where(FIRST, math.nan, CHANGE), 2.0),
    "infinity": (BASE, torch.where(FIRST, -math.inf, ANTI), CHANGE, 2.0),
    "overflow": (BASE, ANTI, 80 * CHANGE, 2.0),
    "differences beyond 1000": (BASE, torch.where(FIRST, -1e4, 0 * ANTI), torch.where(FIRST, 1e4, 0.0), 2.0),
    "no column allowed": (BASE - math.inf, ANTI, CHANGE, 2.0),
    "the same wherever allowed": (torch.where(FIRST, -math.inf, BASE), ANTI, 3.0 * FIRST, 2.0),
    "huge where forbidden": (torch.where(FIRST, -math.inf, BASE), ANTI, torch.where(FIRST, 900.0, CHANGE), 2.0),
    "NaN and infinity in the base": (torch.cat((torch.tensor([math.nan, math.inf]), BASE[2:])), ANTI, CHANGE, 2.0),
    "hardly moved at the limit": (BASE, ANTI, CHANGE, 0.01),
}


@pytest.mark.parametrize("kind", HARD)
def test_hard_rows(way, kind):
    base, anti, change, limit = HARD[kind]
    expert = anti + change
    found = ivl_kernels.fusion_weights(base[None], expert[None], anti[None], max_weight=limit, backend="torch")
    weight, reached, target = (part.item() for part in found)
    z, e, a = arrays(base, expert, anti)
    assert target == pytest.approx(divergence_of(e, a), rel=1e-3)
    assert_solves(z, difference(e, a), target, limit, weight, reached)


def test_exponents_too_large_for_numba_are_left_to_torch(monkeypatch):
    by_torch = solved_by_torch(monkeypatch)
    base, anti, change, limit = HARD["overflow"]
    ivl_kernels.fusion_weights(base[None], (anti + change)[None], anti[None], max_weight=limit, backend="torch")
    assert len(by_torch) == 1


def test_numba_keeps_no_row_that_it_leaves_to_torch():
    """An exception in compiled code would keep its arrays for good."""
    logits, delta, shares = np.zeros((3, 1000), np.float32)
    delta[0] = 900.0
    before = [sys.getrefcount(array) for array in (logits, delta, shares)]
    for _ in range(5):
        assert math.isnan(fused_rows.divergence(logits, delta, shares))
        assert math.isnan(fused_rows.search(logits, delta, shares, 2.0, 5.0, True)[1])
    assert [sys.getrefcount(array) for array in (logits, delta, shares)] == before


def test_differences_that_are_rounding_alone(way):
    """Their mean may come out larger than all of them, and then exp() of what is left is 0 everywhere."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        base = torch.randn(1, 2000, generator=generator)
        base[0, 0] += 20
        delta = 1000 - torch.rand(1, 2000, generator=generator) * 1e-3
        found = ivl_kernels.trust_region_weights(base, delta, torch.tensor([2e5]), 5.0, backend="torch")
        assert 0 <= found.weights <= 2e5
        assert not found.divergence.isnan()


def test_columns_far_below_the_others_have_no_share(way):
    base, delta = torch.full((1, 150_000), -1e4), torch.full((1, 150_000), 59.0)
    base[0, :5], delta[0, :5] = torch.arange(5) / 5, 0.0
    found = ivl_kernels.trust_region_weights(base, delta, torch.ones(1), 1e-6, backend="torch")
    assert found.weights == 1
    assert found.divergence < 1e-12


def test_torch_shares_wide_rows_among_many_threads(monkeypatch):
    by_torch = solved_by_torch(monkeypatch)
    wide, narrow = rows_of("normal", 33_000), rows_of("normal", 32_000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        ivl_kernels.fusion_weights(*narrow, backend="torch")
        assert not by_torch
        many = ivl_kernels.fusion_weights(*wide, backend="torch")
        assert len(by_torch) == 6
    finally:
        torch.set_num_threads(threads)
    torch.set_num_threads(1)
    try:
        alone = ivl_kernels.fusion_weights(*wide, backend="torch")
    finally:
        torch.set_num_threads(threads)
    assert len(by_torch) == 6
    torch.testing.assert_close(many.weights, alone.weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("limit", [2.0, 10.0, 30.0])
@pytest.mark.parametrize("scale", [1.5, 5.0, 10.0])
def test_steep_directions(way, scale, limit):
    """Around the height where the likeliest token has everything."""
    generator = torch.Generator().manual_seed(7)
    base, delta = 3 * torch.randn(3, 1000, generator=generator), scale * torch.randn(3, 1000, generator=generator)
    for z, d in zip(base, delta):
        plateau = -z.double().log_softmax(0)[d.argmax()].item()
        for max_kl in (plateau - 0.1, plateau - 1e-3, plateau + 1e-3, plateau + 0.1):
            found = ivl_kernels.trust_region_weights(z[None], d[None], torch.tensor([limit]), max_kl, backend="torch")
            assert_solves(*arrays(z, d), max_kl, limit, found.weights.item(), found.divergence.item())


@pytest.mark.parametrize("offset", [0.0, 20.0, 35.0])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_a_token_that_leaps_up(way, offset, share):
    """Far below the plateau that the first step may lead to, where the variance is rounding, or overflows."""
    generator = torch.Generator().manual_seed(11)
    base, delta = torch.randn(40, 300, generator=generator), torch.randn(40, 300, generator=generator)
    base = base.clamp(-2, 2) + offset
    delta *= torch.logspace(-1, 1, 40)[:, None]
    base[:, 7], delta[:, 7] = offset - 4.0, torch.linspace(4, 60, 40)
    for z, d in zip(base, delta):
        max_kl = share * -z.double().log_softmax(0)[7].item()
        for limit in (0.75, 8.0):  # numbers that float32 has
            found = ivl_kernels.trust_region_weights(z[None], d[None], torch.tensor([limit]), max_kl, backend="torch")
            assert_solves(*arrays(z, d), max_kl, limit, found.weights.item(), found.divergence.item())


def test_two_tokens_far_from_the_others(way):
    base, delta = torch.full((1, 500), 23.8), torch.zeros(1, 500)
    base[0, :2], delta[0, :2] = 20.0, torch.tensor([1000.0, -1000.0])
    found = ivl_kernels.trust_region_weights(base, delta, torch.tensor([0.06]), 9.5, backend="torch")
    assert_solves(*arrays(base[0], delta[0]), 9.5, 0.06, found.weights.item(), found.divergence.item())


def test_a_variance_lost_in_rounding(way):
    """Two differences only: where the steered distribution has nearly all on one of them, the variance cancels."""
    base, delta = torch.zeros(1, 1000), torch.full((1, 1000), 17.0)
    base[0, 0], delta[0, 0] = 13.0, -17.0
    max_kl = -math.log(999 / (999 + math.exp(13.0))) - 1e-3
    found = ivl_kernels.trust_region_weights(base, delta, torch.tensor([2.0]), max_kl, backend="torch")
    assert_solves(*arrays(base[0], delta[0]), max_kl, 2.0, found.weights.item(), found.divergence.item())


def test_columns_that_a_direction_lifts_into_sight(way):
    """Each has next to no share, but there are many, and exp() of what is added is large."""
    base, delta = torch.full((1, 151_936), -86.5), torch.full((1, 151_936), 59.9)
    base[0, 0] = delta[0, 0] = 0.0
    found = ivl_kernels.trust_region_weights(base, delta, torch.ones(1), 1e-6, backend="torch")
    assert_solves(*arrays(base[0], delta[0]), 1e-6, 1.0, found.weights.item(), found.divergence.item())


@pytest.mark.parametrize("limit", [1e6, 1e8, 1e12])
def test_weights_beyond_all_reason(way, limit):
    base, delta = torch.tensor([[0.0, -30, -30]]), torch.tensor([[0.0, 900.1, 333.3]])
    found = ivl_kernels.trust_region_weights(base, delta, torch.tensor([limit]), 1e30, backend="torch")
    assert found.weights.item() == pytest.approx(limit)
    assert found.divergence.item() == pytest.approx(30.0, rel=1e-3)


@pytest.mark.parametrize("broken", ["config.DISABLE_JIT = 1", "sys.modules['numba'] = SystemError"])
def test_torch_takes_over_where_numba_does_not_work(broken):
    program = f"""
import sys, numba
from numba import config
{broken}
import ivl_kernels.torch_fusion
from ivl_kernels.checks import load_compiled
assert ivl_kernels.torch_fusion.fused_rows is load_compiled("fused_add") is None
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_weights_around_the_limit(way):
    """The step that is the last one may not lead beyond it."""
    base, expert, anti = rows_of("normal", 3000)
    free = ivl_kernels.fusion_weights(base, expert, anti, max_weight=10.0, backend="torch").weights
    for share in torch.linspace(0.97, 1.03, 31):
        limits = free * share
        found = ivl_kernels.fusion_weights(base, expert, anti, max_weight=limits, backend="torch").weights
        assert (found <= limits * (1 + 1e-6)).all()
        torch.testing.assert_close(found, torch.minimum(free, limits), rtol=1e-3, atol=1e-4)


def test_small_budgets(way):
    base, expert, _ = rows_of("normal")
    found = ivl_kernels.trust_region_weights(base, expert, torch.ones(6), 1e-3, backend="torch")
    torch.testing.assert_close(found.divergence, found.target, rtol=1e-3, atol=0)


def test_memory_is_kept_for_one_width_and_thread():
    first = torch_fusion.FusedRows(40)
    assert torch_fusion.FusedRows(40).shares is first.shares
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(torch_fusion.FusedRows(40)))
    thread.start()
    thread.join()
    assert elsewhere[0].shares is not first.shares
    assert torch_fusion.FusedRows(41).shares is not first.shares
    assert torch_fusion.FusedRows(40).shares is not first.shares


def test_any_default_dtype():
    inputs = rows_of("normal", 322)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = ivl_kernels.fusion_weights(*inputs, backend="torch")
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.weights.dtype == torch.float32
    torch_fusion.FusedRows(1)  # forgets the memory
    assert torch.equal(found.weights, ivl_kernels.fusion_weights(*inputs, backend="torch").weights)


def test_memory_serves_in_every_mode():
    inputs = rows_of("normal", 321)
    with torch.inference_mode():
        inside = ivl_kernels.fusion_weights(*inputs, backend="torch").weights
    outside = ivl_kernels.fusion_weights(*(part.requires_grad_() for part in inputs), backend="torch").weights
    assert torch.equal(inside, outside)
    assert not outside.requires_grad
