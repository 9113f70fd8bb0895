"""One step's loss for every scheme, on several architectures, against plain autograd on whole logits."""

import pytest
import torch
from objective_tools import (
    NORMS,
    SCHEMES,
    VOCAB,
    assert_same,
    gemma,
    gradients,
    llama,
    logits_of,
    make_batch,
    naive,
    qwen2,
)

from ivl_vllm.training.base_cache import BaseCache
from ivl_vllm.training.frozen_bases import FrozenBases
from ivl_vllm.training.joint_loss import JointLoss
from ivl_vllm.training.schemes import Tap, expected_embedding, logit_shape


def test_bf16_autocast_follows_the_whole_logits():
    base, value, batch = llama(), qwen2(), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums, _ = JointLoss(value, FrozenBases([base]), norm_weight=0.3, chunk=5)(value, dict(batch), 0)
        plain = naive(value, logits_of(base, batch), batch, "residual", "l1", 0.3)
    found, wanted = gradients(value, sums.total), gradients(value, plain.total)
    assert sums.total.dtype == torch.float32
    torch.testing.assert_close(sums.total, plain.total, rtol=2e-3, atol=0)
    for name in wanted:
        difference = (found[name] - wanted[name]).norm() / wanted[name].norm()
        assert difference < 0.02, name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("tied", "padding"), [(True, 0), (False, 7), (True, -3)])
def test_every_scheme_equals_autograd_on_the_naive_loss(scheme, norm, tied, padding):
    base, value, batch = llama(), qwen2(VOCAB + padding, tied=tied), make_batch()
    loss = JointLoss(value, FrozenBases([base]), scheme=scheme, norm=norm, norm_weight=0.7, chunk=4)
    sums, count = loss(value, dict(batch), 0)
    assert count == int((batch["labels"][:, 1:] != -100).sum())
    assert_same(value, sums, naive(value, logits_of(base, batch), batch, scheme, norm, 0.7))
    assert all(p.grad is None for p in base.parameters())
    # The taps are gone: the network is again what it was.
    assert value(batch["input_ids"]).logits.shape == (3, 11, VOCAB + padding)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["Gemma", "Gemma3Text", "Gemma2"])
def test_models_that_scale_embeddings_or_cap_logits(scheme, kind):
    """As base and as value, in chunks."""
    unusual, plain, batch = gemma(kind).eval(), qwen2(), make_batch()
    for base, value in ((plain, unusual), (unusual, plain)):
        value.requires_grad_(True)
        loss = JointLoss(value, FrozenBases([base]), scheme=scheme, chunk=4)
        assert not loss.notes()
        sums, _ = loss(value, dict(batch), 0)
        assert_same(value, sums, naive(value, logits_of(base, batch), batch, scheme, "l1", 1.0))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_checkpointing_changes_nothing(scheme):
    base, value, batch = llama(), qwen2(), make_batch()
    wanted = naive(value, logits_of(base, batch), batch, scheme, "l1", 1.0)
    value.train()
    value.gradient_checkpointing_enable()
    sums, _ = JointLoss(value, FrozenBases([base]), scheme=scheme, chunk=4)(value, dict(batch), 0)
    assert_same(value, sums, wanted)


def test_cascade_never_holds_the_probabilities_of_all_positions():
    table = torch.randn(9, 4, requires_grad=True)
    logits, calls = torch.randn(10, 12), []

    def base_logits(start, stop):
        calls.append(stop - start)
        return logits[start:stop].clone()

    found = expected_embedding(table, base_logits, 12, 10, chunk=4)
    wanted = logits.softmax(-1)[:, :9] @ table
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn(10, 4)
    left, right = torch.autograd.grad(found, table, upstream), torch.autograd.grad(wanted, table, upstream)
    torch.testing.assert_close(left, right)
    assert calls == [4, 4, 2] * 2


def test_output_layers_that_are_not_plain_are_told():
    from transformers import GPT2Config, GPT2LMHeadModel

    assert logit_shape(llama()) == (1.0, None)
    assert logit_shape(GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1))) == (1.0, None)
    assert logit_shape(gemma("Gemma2")) == (1.0, 30.0)
    model = qwen2()

    class Adapter(torch.nn.Linear):
        pass

    model.lm_head = Adapter(16, VOCAB)
    assert "a Adapter" in logit_shape(model)


class Shifted(torch.nn.Module):
    """Does what no configuration tells."""

    def __init__(self):
        super().__init__()
        self.inner = llama()
        self.config = self.inner.config

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, **inputs):
        output = self.inner(**inputs)
        output.logits = output.logits + 3.0
        return output


def test_logits_that_are_neither_scaled_nor_capped_stay_whole():
    base, value, batch = Shifted(), qwen2(), make_batch()
    loss = JointLoss(value, FrozenBases([base]), chunk=4)
    assert loss.notes() == [
        "the base's logits are not chunked: it does more to its logits than to scale or to cap them"
    ]
    sums, _ = loss(value, dict(batch), 0)
    assert_same(value, sums, naive(value, logits_of(base, batch), batch, "residual", "l1", 1.0))


def test_tap_restores_what_was_there_even_after_an_error():
    layer = torch.nn.Linear(2, 2)
    own = layer(torch.ones(1, 2))
    with pytest.raises(KeyError), Tap(layer).doing(lambda x: x * 0):
        assert layer(torch.ones(1, 2)).abs().sum() == 0
        raise KeyError
    assert torch.equal(layer(torch.ones(1, 2)), own)
    assert "forward" not in layer.__dict__
    # Another library may have put its own forward there.
    layer.forward = lambda x: x + 1
    with Tap(layer).doing(lambda x: x):
        pass
    assert layer(torch.zeros(1, 2)).tolist() == [[1.0, 1.0]]


# --- the norm at all positions


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("padding", [0, 7, -3])
def test_the_norm_at_all_positions_equals_autograd_on_the_naive_loss(scheme, norm, padding):
    base, value, batch = llama(), qwen2(VOCAB + padding), make_batch()
    wanted = naive(value, logits_of(base, batch), batch, scheme, norm, 0.7, everywhere=True)
    options = {"scheme": scheme, "norm": norm, "norm_weight": 0.7, "chunk": 4}
    loss = JointLoss(value, FrozenBases([base]), norm_positions="all", **options)
    sums, count = loss(value, dict(batch), 0)
    assert (count, int(sums.positions)) == (int((batch["labels"][:, 1:] != -100).sum()), 11 + 10 + 9)
    assert_same(value, sums, wanted)
    # The trainer tells the ratio where the optimizer step has more than this batch.
    sums, _ = loss(value, dict(batch), 0, 0.25)
    assert sums.total.item() == pytest.approx((sums.ce + 0.7 * 0.25 * sums.norm).item(), rel=1e-6)
    # The answers alone give another loss.
    sums, _ = JointLoss(value, FrozenBases([base]), **options)(value, dict(batch), 0)
    assert abs(sums.total - wanted.total) > 1e-4 * wanted.total


@pytest.mark.parametrize("kind", ["Gemma", "Gemma2"])
def test_the_norm_at_all_positions_of_models_that_scale_or_cap(kind):
    base, value, batch = llama(), gemma(kind), make_batch()
    batch["labels"][1] = -100
    loss = JointLoss(value, FrozenBases([base]), norm_positions="all", chunk=4)
    sums, _ = loss(value, dict(batch), 0)
    assert_same(value, sums, naive(value, logits_of(base, batch), batch, "residual", "l1", 1.0, everywhere=True))


def test_a_batch_of_blank_rows_has_no_norm_anywhere():
    value, batch = qwen2(), make_batch()
    batch["labels"][:] = -100
    sums, count = JointLoss(value, FrozenBases([llama()]), norm_positions="all")(value, dict(batch), 0)
    sums.total.backward()
    assert (count, sums.total, sums.positions) == (0, 0, 0)


def test_the_cache_serves_the_norm_at_all_positions(tmp_path, monkeypatch):
    base, value, batch = llama(), qwen2(), make_batch()
    bases = FrozenBases([base])
    wanted = naive(value, logits_of(base, batch), batch, "residual", "l2", 0.7, everywhere=True)
    cache = BaseCache(tmp_path, bases)
    loss = JointLoss(value, bases, norm="l2", norm_weight=0.7, norm_positions="all", chunk=4, cache=cache)
    assert_same(value, loss(value, dict(batch), 0)[0], wanted)
    monkeypatch.setattr(bases, "features", None)
    wanted = naive(value, logits_of(base, batch), batch, "residual", "l2", 0.7, everywhere=True)
    assert_same(value, loss(value, dict(batch), 0)[0], wanted)
