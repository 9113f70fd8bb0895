"""Several frozen bases, temperature and noise, and the cache of the base's hidden states."""

import json

import pytest
import torch
from objective_tools import (
    SCHEMES,
    VOCAB,
    assert_same,
    gradients,
    llama,
    logits_of,
    make_batch,
    naive,
    qwen2,
)

from ivl_vllm.training.base_cache import META_NAME, BaseCache, split_examples
from ivl_vllm.training.frozen_bases import FrozenBases
from ivl_vllm.training.joint_loss import JointLoss


def test_averaged_bases_temperature_and_their_padding():
    first, second, value, batch = llama(), qwen2(VOCAB + 3, seed=7), qwen2(), make_batch()
    bases = FrozenBases([first, second], "average", temperature=2.5)
    mean = (logits_of(first, batch) + logits_of(second, batch)[..., :VOCAB]) / 2 / 2.5
    for scheme in SCHEMES:
        value.train()
        sums, _ = JointLoss(value, bases, scheme=scheme, chunk=4)(value, dict(batch), 0)
        assert_same(value, sums, naive(value, mean, batch, scheme, "l1", 1.0))
        # Held-out losses are of the first base as it is.
        value.eval()
        sums, _ = JointLoss(value, bases, scheme=scheme, chunk=4)(value, dict(batch), 0)
        assert_same(value, sums, naive(value, logits_of(first, batch), batch, scheme, "l1", 1.0))


def test_each_step_draws_one_base_that_seed_and_step_alone_decide():
    first, second, value, batch = llama(), qwen2(seed=7), qwen2(), make_batch()
    bases = FrozenBases([first, second], "draw", seed=3)
    drawn = [bases.chosen(step, True) for step in range(60)]
    assert {len(indices) for indices in drawn} == {1}
    assert 15 < sum(index for (index,) in drawn) < 45
    torch.manual_seed(99)
    assert drawn == [FrozenBases([first, second], "draw", seed=3).chosen(step, True) for step in range(60)]
    assert drawn != [FrozenBases([first, second], "draw", seed=4).chosen(step, True) for step in range(60)]
    value.train()
    for step in range(4):
        sums, _ = JointLoss(value, bases, chunk=4)(value, dict(batch), step)
        chosen = (first, second)[drawn[step][0]]
        assert_same(value, sums, naive(value, logits_of(chosen, batch), batch, "residual", "l1", 1.0))


def test_noise_has_its_size_repeats_in_the_backward_pass_and_spares_evaluation():
    base, value, batch = llama(), qwen2(), make_batch()
    bases = FrozenBases([base], noise=0.5)
    mask = torch.ones(3, 11, dtype=torch.bool)
    inputs = {"input_ids": batch["input_ids"]}
    rows = bases.rows(inputs, mask, 0, True)
    clean = bases.rows(inputs, mask, 0, False)(0, 33)
    noise = rows(0, 33) - clean
    assert noise.std().item() == pytest.approx(0.5, rel=0.1)
    assert abs(noise.mean().item()) < 0.05
    assert torch.equal(rows(4, 9), rows(4, 9))
    assert not torch.equal(rows(0, 33), bases.rows(inputs, mask, 0, True)(0, 33))
    assert not torch.equal(rows.at(mask.flatten())(0, 33), rows(0, 33))
    # The same draw from the same state of the host's generator, which checkpoints keep.
    value.train()
    for scheme in SCHEMES:
        loss = JointLoss(value, bases, scheme=scheme, chunk=4)
        torch.manual_seed(5)
        one, _ = loss(value, dict(batch), 0)
        torch.manual_seed(5)
        two, _ = loss(value, dict(batch), 0)
        assert one.total == two.total
    value.eval()
    sums, _ = JointLoss(value, bases, chunk=4)(value, dict(batch), 0)
    assert_same(value, sums, naive(value, logits_of(base, batch), batch, "residual", "l1", 1.0))


def test_gradient_of_a_noisy_cascade_is_that_of_its_own_noise():
    """Finite differences: the backward pass computes the noisy probabilities again."""
    base, value, batch = llama(), qwen2(tied=False).double(), make_batch()
    loss = JointLoss(value.train(), FrozenBases([base.double()], noise=0.5), scheme="cascade", norm="l2", chunk=4)
    parameter = value.get_input_embeddings().weight

    def total():
        torch.manual_seed(5)
        return loss(value, dict(batch), 0)[0].total

    gradient = gradients(value, total())["model.embed_tokens.weight"]
    direction, step = gradient / gradient.norm(), 1e-2
    with torch.no_grad():
        parameter += step * direction
        above = total()
        parameter -= 2 * step * direction
        below = total()
    assert ((above - below) / (2 * step)).item() == pytest.approx(gradient.norm().item(), rel=1e-2)


def test_cache_gives_the_uncached_losses_and_runs_the_base_once(tmp_path, monkeypatch):
    base, value = llama(), qwen2()
    batches = [make_batch(seed) for seed in (1, 2)]
    bases = FrozenBases([base])
    plain = [JointLoss(value, bases, chunk=4)(value, dict(batch), 0)[0] for batch in batches]
    cache = BaseCache(tmp_path / "c", bases, shard_bytes=700)
    loss = JointLoss(value, bases, chunk=4, cache=cache)
    for _ in range(2):
        for batch, wanted in zip(batches, plain):
            assert torch.equal(torch.stack(loss(value, dict(batch), 0)[0]), torch.stack(wanted))
    assert (cache.computed, cache.read) == (6, 6)
    cache.flush()
    cache.flush()
    assert len(list((tmp_path / "c").glob("*.safetensors"))) >= 1
    assert not list((tmp_path / "c").glob("*.partial"))

    # Another run, other batches of the same examples, and a base that must not run.
    again = BaseCache(tmp_path / "c", bases)
    monkeypatch.setattr(bases, "features", None)
    mixed = {name: torch.stack([batches[1][name][2], batches[0][name][0]]) for name in batches[0]}
    sums, _ = JointLoss(value, bases, chunk=4, cache=again)(value, dict(mixed), 0)
    assert_same(value, sums, naive(value, logits_of(base, mixed), mixed, "residual", "l1", 1.0))
    assert (again.computed, again.read) == (0, 2)


def test_cache_sees_through_padding_and_packing():
    ids = torch.arange(1, 9)
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0]).bool()
    packed = split_examples(
        {"input_ids": ids[None], "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])}, mask[None]
    )
    padded = split_examples(
        {
            "input_ids": torch.tensor([[1, 2, 3, 4, 0], [5, 6, 7, 8, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * 2),
        },
        torch.tensor([[0, 1, 1, 0, 0], [0, 1, 0, 0, 0]]).bool(),
    )
    assert packed == padded
    assert [count for _, count in packed] == [2, 1]
    other_answers = split_examples({"input_ids": ids[None]}, ~mask[None])
    assert {name for name, _ in other_answers}.isdisjoint(name for name, _ in packed)


def test_cache_is_refused_where_it_would_be_wrong(tmp_path):
    base, value = llama(), qwen2()
    bases = FrozenBases([base])
    cache = BaseCache(tmp_path / "c", bases)
    for scheme in SCHEMES[1:]:
        with pytest.raises(ValueError, match=f"--cache_base .*--scheme {scheme.replace('+', '.')}"):
            JointLoss(value, bases, scheme=scheme, cache=cache)
    with pytest.raises(ValueError, match="leave --more_bases out"):
        BaseCache(tmp_path / "d", FrozenBases([base, value]))
    with pytest.raises(ValueError, match="made with another base"):
        BaseCache(tmp_path / "c", FrozenBases([llama(seed=9)]))
    with pytest.raises(ValueError, match="made with another dtype"):
        BaseCache(tmp_path / "c", bases, dtype="bfloat16")
    adapted = llama()
    adapted.lm_head = type("Adapter", (torch.nn.Linear,), {})(16, VOCAB)
    whole = FrozenBases([adapted])
    with pytest.raises(ValueError, match="whole logits: its output layer is a Adapter"):
        JointLoss(value, whole, cache=BaseCache(tmp_path / "e", whole))
    (tmp_path / "f").write_text("")
    with pytest.raises(ValueError, match="a file is in the way"):
        BaseCache(tmp_path / "f", bases)
    (tmp_path / "c" / META_NAME).write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        BaseCache(tmp_path / "c", bases)
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="it is no cache"):
        BaseCache(tmp_path / "g", bases)
    broken = tmp_path / "h"
    BaseCache(broken, bases)
    assert json.loads((broken / META_NAME).read_text())["dtype"] == "auto"
    (broken / "x.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="no safetensors file"):
        BaseCache(broken, bases)
