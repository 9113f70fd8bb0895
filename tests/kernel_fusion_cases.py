"""Adversarial rows for the solvers of weights, and float64 references by SciPy; both backends' tests use them."""

import math

import ivl_kernels
import numpy as np
import pytest
import torch
from kernel_cases import INF, NAN, device
from scipy.optimize import brentq
from scipy.special import logsumexp

MAX_WEIGHT = 2.0


def curve(base: np.ndarray, delta: np.ndarray, weight: float) -> float:
    """KL(softmax(base + weight · delta) ‖ softmax(base)) in float64, over the columns that the base allows."""
    allowed = np.isfinite(base)
    if not allowed.any():
        return 0.0
    logs = base[allowed] - logsumexp(base[allowed])
    moved = weight * (delta[allowed] - np.exp(logs) @ delta[allowed])
    log_ratio = moved - logsumexp(logs + moved)
    # r·log r - r + 1 over the base: terms that are never negative, where the plain sum would cancel.
    small = np.abs(log_ratio) < 1e-4
    with np.errstate(over="ignore", invalid="ignore"):
        terms = np.exp(logs + log_ratio) * (log_ratio - 1) + np.exp(logs)
    return float(np.where(small, np.exp(logs) * log_ratio**2 * (0.5 + log_ratio / 3), terms).sum())


def difference(expert: np.ndarray, anti: np.ndarray) -> np.ndarray:
    """The direction in float64: what is not finite is 0, what is huge is cut."""
    with np.errstate(invalid="ignore"):
        delta = expert - anti
    return np.where(np.isfinite(delta), np.clip(delta, -1e3, 1e3), 0.0)


def divergence_of(expert: np.ndarray, anti: np.ndarray) -> float:
    """KL(softmax(expert) ‖ softmax(anti)) in float64, over the columns where both are finite."""
    return curve(np.where(np.isfinite(expert), anti, -INF), difference(expert, anti), 1.0)


def reference_weight(base: np.ndarray, delta: np.ndarray, target: float, limit: float) -> float:
    """The smallest weight in `[0, limit]` whose divergence is nearest to `target`, by Brent's method."""
    allowed = np.isfinite(base)
    if target <= 0 or not allowed.any() or np.ptp(delta[allowed]) == 0:
        return 0.0
    if curve(base, delta, limit) <= target:
        return limit
    return brentq(lambda weight: curve(base, delta, weight) - target, 0.0, limit, xtol=1e-10)


def arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.double().cpu().numpy() for tensor in tensors]


def assert_solves(base, delta, target, limit, weight, divergence) -> None:
    """Compare one row with the reference: the weight, or where it is ill-conditioned the divergence that it reaches.

    Where the curve is so flat that float32's rounding of the divergence moves the root by more than the tolerance, the
    weight says nothing, and the divergence has to agree instead.
    """
    wanted = reference_weight(base, delta, target, limit)
    reached = curve(base, delta, weight)
    assert divergence == pytest.approx(reached, rel=2e-3, abs=2e-6)
    assert 0.0 <= weight <= limit
    if abs(weight - wanted) <= 1e-3:
        return
    rounding = 1e-5 * target + 1e-9
    flat = (
        abs(curve(base, delta, min(wanted + 1e-3, limit)) - curve(base, delta, max(wanted - 1e-3, 0.0))) < 4 * rounding
    )
    assert flat, f"weight {weight} in place of {wanted}"
    assert abs(reached - curve(base, delta, wanted)) <= 4 * rounding, f"{reached} is not {target}"


def normal(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def peaked(seed: int, rows: int, columns: int, gap: float) -> torch.Tensor:
    logits = normal(seed, rows, columns)
    logits[torch.arange(rows), torch.arange(rows) * 7 % columns] += gap
    return logits


def rows_of(kind: str, columns: int = 500) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Base, expert and anti-expert logits for several rows of one kind."""
    n = 6
    base, anti, change = normal(1, n, columns, scale=2.0), normal(2, n, columns, scale=2.0), normal(3, n, columns)
    if kind == "flat":
        base, anti = torch.zeros(n, columns), torch.zeros(n, columns)
    elif kind == "peaked":
        base, anti = peaked(1, n, columns, 14.0), peaked(1, n, columns, 11.0)
    elif kind == "certain":
        base, anti = peaked(1, n, columns, 40.0), peaked(2, n, columns, 12.0)
    elif kind == "masked":
        base[:, 5:] = -INF
        base[1, 1:] = -INF  # one token is allowed
        base[2] = -INF  # none is
    elif kind == "tied":
        base, change = normal(1, n, columns).round(), normal(3, n, columns).round()
    elif kind == "tiny":
        change = change * torch.tensor([1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])[:, None]
        anti = base + 0.3
    elif kind == "huge":
        change = change * torch.tensor([10.0, 30.0, 100.0, 300.0, 1000.0, 1e5])[:, None]
    elif kind == "zero":
        change = torch.zeros(n, columns)
        change[3:] = 1.5  # a constant: the distribution is the same
        change[5, 0] = 0.0
    elif kind == "masked-constant":
        change[:, :10] = 0.7
        base[:, 10:] = -INF
    elif kind == "opposed":
        change = -base * torch.linspace(0.2, 2.0, n)[:, None]
    elif kind == "agreed":
        change = base * torch.linspace(0.2, 2.0, n)[:, None]
    elif kind == "beyond":
        anti = base * 0.2
        change = change * 0.1
        base = peaked(1, n, columns, 30.0)
    elif kind == "rare":  # a token that nearly never comes leaps up
        base = peaked(1, n, columns, 12.0)
        change[:, 11] = torch.linspace(10.0, 60.0, n)
        base[:, 11] = -20.0
        anti = base + normal(4, n, columns, scale=0.1)
    elif kind != "normal":
        raise AssertionError(kind)
    return base.to(device()), (anti + change).to(device()), anti.to(device())


KINDS = [
    "normal",
    "flat",
    "peaked",
    "certain",
    "masked",
    "tied",
    "tiny",
    "huge",
    "zero",
    "masked-constant",
    "opposed",
    "agreed",
    "beyond",
    "rare",
]


class FusionCases:
    """Every test here runs for each backend; a subclass says which."""

    backend: str

    @pytest.mark.parametrize("limit", [2.0, 10.0])
    @pytest.mark.parametrize("kind", KINDS)
    def test_fusion_against_scipy(self, kind, limit):
        base, expert, anti = rows_of(kind)
        found = ivl_kernels.fusion_weights(base, expert, anti, max_weight=limit, backend=self.backend)
        for z, e, a, weight, reached, target in zip(*arrays(base, expert, anti, *found)):
            wanted = divergence_of(e, a)
            assert target == pytest.approx(wanted, rel=1e-3, abs=2e-12)  # of differences below 1e-5, float32 keeps less
            assert_solves(z, difference(e, a), target, limit, weight, reached)

    def test_a_row_with_a_root_meets_its_target(self):
        base, expert, anti = rows_of("normal")
        found = ivl_kernels.fusion_weights(base, expert, anti, max_weight=10.0, backend=self.backend)
        assert ((found.weights > 0.2) & (found.weights < 9.0)).all()
        torch.testing.assert_close(found.divergence, found.target, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("kind", ["normal", "peaked", "masked", "huge", "zero", "masked-constant", "rare"])
    @pytest.mark.parametrize("max_kl", [1e-4, 0.05, 2.0])
    def test_trust_region_against_scipy(self, kind, max_kl):
        base, expert, anti = rows_of(kind)
        asked = torch.tensor([1.0, -1.0, 0.3, -2.0, 2.0, 5.0], device=device())
        found = ivl_kernels.trust_region_weights(base, expert, asked, max_kl, minus_logits=anti, backend=self.backend)
        for z, e, a, wish, weight, reached in zip(*arrays(base, expert, anti, asked, *found[:2])):
            delta = difference(e, a) * np.sign(wish)
            assert weight * wish > 0
            if curve(z, delta, abs(wish)) <= max_kl:
                assert weight == pytest.approx(wish, rel=1e-6)
                assert reached == pytest.approx(curve(z, delta, abs(wish)), rel=2e-3, abs=2e-6)
            else:
                assert curve(z, delta, abs(weight)) <= max_kl * (1 + 1e-3)
                assert_solves(z, delta, max_kl, abs(wish), abs(weight), reached)

    def test_trust_region_limits(self):
        base, expert, _ = rows_of("normal")
        asked = torch.full((6,), 1.5, device=device())
        budgets = torch.tensor([0.0, -1.0, NAN, INF, 1e30, 1e-3], device=device())
        found = ivl_kernels.trust_region_weights(base, expert, asked, budgets, backend=self.backend)
        assert found.weights[:3].tolist() == [0.0] * 3
        assert found.weights[3:5].tolist() == [1.5] * 2
        assert 0 < found.weights[5] < 1.5

    def test_row_index_and_skipped_rows(self):
        base, expert, anti = rows_of("normal")
        index = torch.tensor([4, -1, 0, 99, 2, 1], dtype=torch.int32, device=device())
        limits = torch.tensor([2.0, 2.0, 2.0, 2.0, 0.0, 2.0], device=device())
        found = ivl_kernels.fusion_weights(base, expert, anti, max_weight=limits, row_index=index, backend=self.backend)
        for i in (1, 3, 4):
            assert [part[i].item() for part in found] == [0.0] * 3
        for i in (0, 2, 5):
            alone = ivl_kernels.fusion_weights(
                base[index[i]][None], expert[i][None], anti[i][None], backend=self.backend
            )
            assert [part[i].item() for part in found] == [part[0].item() for part in alone]

    @pytest.mark.parametrize("map_dtype", [None, torch.int32, torch.int64])
    @pytest.mark.parametrize("value_columns", [300, 500, 700])
    def test_other_vocabularies(self, value_columns, map_dtype):
        base, _, _ = rows_of("normal")
        _, expert, anti = rows_of("normal", value_columns)
        vocab_map, source = None, torch.arange(500)
        source[value_columns:] = -1
        if map_dtype is not None:
            source = torch.randint(-1, value_columns, (500,), generator=torch.Generator().manual_seed(9))
            vocab_map = source.to(map_dtype).to(device())
        found = ivl_kernels.fusion_weights(base, expert, anti, vocab_map=vocab_map, backend=self.backend)
        for z, e, a, weight, reached, target in zip(*arrays(base, expert, anti, *found)):
            assert target == pytest.approx(divergence_of(e, a), rel=1e-3)
            delta = np.where(source >= 0, difference(e, a)[source], 0.0)
            assert_solves(z, delta, target, MAX_WEIGHT, weight, reached)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_dtypes_and_strides(self, dtype):
        base, expert, anti = (part.to(dtype) for part in rows_of("normal", 333))
        found = ivl_kernels.fusion_weights(base, expert, anti, backend=self.backend)
        wide = [torch.nn.functional.pad(part, (0, 7))[:, :333] for part in (base, expert, anti)]
        strided = ivl_kernels.fusion_weights(*wide, backend=self.backend)
        for z, e, a, weight, reached, target in zip(*arrays(base, expert, anti, *found)):
            assert_solves(z, difference(e, a), target, MAX_WEIGHT, weight, reached)
        torch.testing.assert_close(strided.weights, found.weights, rtol=1e-5, atol=1e-5)

    def test_what_is_not_finite_stays_in_its_column_and_row(self):
        base, expert, anti = rows_of("normal")
        clean = ivl_kernels.fusion_weights(base, expert, anti, backend=self.backend)
        expert[0, 3], expert[0, 4], anti[0, 5], anti[0, 6] = NAN, INF, -INF, NAN
        expert[0, 7] = anti[0, 7] = -INF
        base[1, 8], base[1, 9] = NAN, INF
        expert[2] = NAN
        found = ivl_kernels.fusion_weights(base, expert, anti, backend=self.backend)
        assert torch.equal(torch.stack(found)[:, 3:], torch.stack(clean)[:, 3:])
        assert [part[2].item() for part in found] == [0.0] * 3
        for z, e, a, weight, reached, target in list(zip(*arrays(base, expert, anti, *found)))[:2]:
            assert target == pytest.approx(divergence_of(e, a), rel=1e-3)
            assert_solves(z, difference(e, a), target, MAX_WEIGHT, weight, reached)

    def test_experts_that_are_finite_where_their_small_base_is_not(self):
        """Such columns have no difference, in the weights of several experts no more than in those of one."""
        base, expert, anti = rows_of("normal")
        expert[0, 3], anti[1, 4], expert[2, 5], anti[2, 6] = -INF, -INF, NAN, INF
        other, own = expert + 0.5 * normal(8, 6, 500).to(device()), anti.clone()
        found = ivl_kernels.joint_fusion_weights(
            base, [expert, other], [anti, own], max_weight=4.0, backend=self.backend
        )
        for i, z in enumerate(arrays(base)[0]):
            pairs = [arrays(e[i], a[i]) for e, a in ((expert, anti), (other, own))]
            total = sum(difference(e, a) * found.weights[i, t].item() for t, (e, a) in enumerate(pairs))
            assert curve(z, total, 1.0) == pytest.approx(found.divergence[i].item(), rel=5e-3, abs=1e-6)
            assert found.divergence[i].item() == pytest.approx(found.target[i].item(), rel=5e-3)

    @pytest.mark.parametrize("max_kl", [1e-3, 0.05, 0.5])
    def test_a_rare_token_that_leaps_up_keeps_within_the_divergence(self, max_kl):
        base, delta = torch.zeros(1, 500, device=device()), torch.zeros(1, 500, device=device())
        base[0, 0], delta[0, 0] = -20.0 + math.log(500), 300.0
        found = ivl_kernels.trust_region_weights(
            base, delta, torch.full((1,), 10.0, device=device()), max_kl, backend=self.backend
        )
        assert_solves(*arrays(base[0], delta[0]), max_kl, 10.0, found.weights.item(), found.divergence.item())

    @pytest.mark.parametrize(("n", "columns"), [(0, 20), (3, 0)])
    def test_empty(self, n, columns):
        logits = torch.zeros(n, columns, device=device())
        found = ivl_kernels.fusion_weights(logits, logits, logits, backend=self.backend)
        assert torch.stack(found).tolist() == [[0.0] * n] * 3

    @pytest.mark.parametrize("kinds", [["normal", "flat"], ["agreed", "opposed"], ["normal", "zero", "peaked"]])
    def test_several_experts_reach_the_mean_of_the_divergences(self, kinds):
        base = rows_of("normal")[0]
        experts, antis = zip(*(rows_of(kind)[1:] for kind in kinds))
        found = ivl_kernels.joint_fusion_weights(base, experts, antis, max_weight=4.0, backend=self.backend)
        assert found.weights.shape == (6, len(kinds))
        assert ((found.weights >= 0) & (found.weights <= 4.0 * (1 + 1e-6))).all()
        for i, z in enumerate(arrays(base)[0]):
            pairs = [arrays(e[i], a[i]) for e, a in zip(experts, antis)]
            wanted = np.mean([divergence_of(e, a) for e, a in pairs])
            total = sum(difference(e, a) * found.weights[i, t].item() for t, (e, a) in enumerate(pairs))
            assert found.target[i].item() == pytest.approx(wanted, rel=1e-3)
            assert curve(z, total, 1.0) == pytest.approx(wanted, rel=5e-3, abs=1e-6)

    def test_experts_keep_their_shares_in_any_order(self):
        base, first, anti = rows_of("normal")
        second = anti + 0.5 * normal(8, 6, 500).to(device())
        own = [ivl_kernels.fusion_weights(base, e, anti, backend=self.backend).weights for e in (first, second)]
        found = ivl_kernels.joint_fusion_weights(base, [first, second], [anti, anti], backend=self.backend).weights
        swapped = ivl_kernels.joint_fusion_weights(base, [second, first], [anti, anti], backend=self.backend).weights
        torch.testing.assert_close(found[:, 0] / found[:, 1], own[0] / own[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(swapped.flip(1), found, rtol=1e-3, atol=1e-3)

    def test_experts_share_a_limit_that_one_of_them_alone_would_exceed(self):
        """Neither of two equal experts may go further than three quarters of the way, and half is enough."""
        base, expert, anti = rows_of("normal")
        alone = ivl_kernels.fusion_weights(base, expert, anti, max_weight=100.0, backend=self.backend).weights
        found = ivl_kernels.joint_fusion_weights(
            base, [expert] * 2, [anti] * 2, max_weight=0.75 * alone, backend=self.backend
        )
        assert (alone > 0).all()
        torch.testing.assert_close(found.weights, (alone / 2)[:, None].expand(-1, 2), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.divergence, found.target, rtol=1e-3, atol=1e-6)

    def test_differences_of_several_experts_count_as_1000_at_most(self):
        base, expert, anti = rows_of("normal")
        experts = [
            torch.where(torch.arange(expert.shape[1], device=device()) == 3, anti + d, expert) for d in (1e6, 1e3)
        ]
        huge, largest = (
            ivl_kernels.joint_fusion_weights(base, [e, expert], [anti] * 2, max_weight=4.0, backend=self.backend)
            for e in experts
        )
        torch.testing.assert_close(huge.weights, largest.weights, rtol=1e-3, atol=1e-4)

    def test_experts_whose_sum_is_larger_than_any_difference_may_be(self):
        base, first, second = torch.tensor([[[0.0, -10, -10]], [[-2.0, 0, -10]], [[-10.0, -5, 0]]], device=device())
        changes = torch.tensor([[[0.0, 0, 120]], [[0.0, -1, 2]]], device=device())
        experts, antis = [first + changes[0], second + changes[1]], [first, second]
        found = ivl_kernels.joint_fusion_weights(base, experts, antis, max_weight=10.0, backend=self.backend)
        total = (changes * found.weights.T[:, :, None]).sum(0)
        reached = divergence_of(*arrays(base[0] + total[0], base[0]))
        assert found.divergence.item() == pytest.approx(reached, rel=1e-3)
        assert reached == pytest.approx(found.target.item(), rel=1e-3)

    def test_the_divergence_of_a_tiny_weight(self):
        base, delta = torch.tensor([[[0.0, 0.0]], [[0.0, 7.0]]], device=device())
        found = ivl_kernels.trust_region_weights(
            base, delta, torch.ones(1, device=device()), 1e-6, backend=self.backend
        )
        assert found.divergence.item() == pytest.approx(1e-6, rel=1e-2)
        assert curve(*arrays(base[0], delta[0]), found.weights.item()) == pytest.approx(1e-6, rel=1e-2)

    def test_logits_as_far_from_0_as_can_be(self):
        """Their least number as a mask on all columns: all are equal."""
        delta = torch.linspace(-5, 5, 17, device=device())[None]
        base = torch.full_like(delta, torch.finfo(torch.float32).min)
        found = ivl_kernels.trust_region_weights(base, delta, torch.ones(1, device=device()), 0.1, backend=self.backend)
        wanted = reference_weight(*arrays(torch.zeros(17), delta[0]), 0.1, 1.0)
        assert found.weights.item() == pytest.approx(wanted, abs=1e-3)

    def test_experts_that_cancel_leave_the_first(self):
        base, expert, anti = rows_of("normal")
        single = ivl_kernels.fusion_weights(base, expert, anti, max_weight=8.0, backend=self.backend)
        opposite = 2 * anti - expert
        found = ivl_kernels.joint_fusion_weights(
            base, [expert, opposite], [anti, anti], max_weight=8.0, backend=self.backend
        )
        assert (single.weights > 0).all()
        assert (found.weights.amin(dim=1) == 0).all() or (found.divergence >= 0.999 * found.target).all()
        torch.testing.assert_close(found.divergence, found.target, rtol=1e-3, atol=1e-6)

    def test_one_expert_of_several_is_fusion(self):
        base, expert, anti = rows_of("peaked")
        single = ivl_kernels.fusion_weights(base, expert, anti, backend=self.backend)
        joint = ivl_kernels.joint_fusion_weights(base, [expert], [anti], backend=self.backend)
        torch.testing.assert_close(joint.weights[:, 0], single.weights, rtol=1e-3, atol=1e-3)
