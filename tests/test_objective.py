"""The joint loss in chunks, every scheme, several bases and the cache: each against plain autograd on whole logits."""

import json

import pytest
import torch
from torch.nn import functional

from ivl_vllm.training.base_cache import META_NAME, BaseCache, split_examples
from ivl_vllm.training.frozen_bases import FrozenBases
from ivl_vllm.training.joint_loss import JointLoss
from ivl_vllm.training.objective import chunked_loss, residual_terms, sum_terms, terms_and_gradient
from ivl_vllm.training.schemes import Tap, expected_embedding, reads_base, why_not_chunked

NORMS = ["l1", "l2", "none"]
SCHEMES = ["residual", "cascade", "cascade+text"]
VOCAB = 29


def sizes(vocab, tied, **more):
    return {
        "vocab_size": vocab,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 64,
        **more,
    }


def llama(vocab=VOCAB, tied=False, seed=0, **more):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**sizes(vocab, tied, hidden_size=20, head_dim=8, **more)))


def qwen2(vocab=VOCAB, tied=True, seed=1, **more):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**sizes(vocab, tied, **more)))


def gemma(kind):
    """Gemma's embeddings are scaled, in the layer itself (3) or after it (1, 2); the logits of 2 are capped."""
    import transformers

    torch.manual_seed(2)
    config = getattr(transformers, f"{kind}Config")(**sizes(VOCAB, True, head_dim=8, pad_token_id=0))
    return getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)


def make_batch(seed=5, rows=3, length=11):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 20, (rows, length), generator=generator)
    labels, attention = ids.clone(), torch.ones_like(ids)
    for row in range(rows):
        labels[row, : 3 + row] = -100
        if row:
            labels[row, -row:] = -100
            attention[row, -row:] = 0
    labels[0, 7] = -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def naive(value, base_logits, batch, scheme, norm, weight):
    """Summed loss on whole logits; `base_logits` is [B, T, V_base]."""
    inputs = {"attention_mask": batch["attention_mask"]}
    if scheme == "residual":
        inputs["input_ids"] = batch["input_ids"]
    else:
        layer = value.get_input_embeddings()
        shared = min(layer.num_embeddings, base_logits.shape[-1])
        table = layer(torch.arange(layer.num_embeddings))[:shared]
        inputs["inputs_embeds"] = base_logits.float().softmax(-1)[..., :shared] @ table
        if scheme == "cascade+text":
            inputs["inputs_embeds"] = inputs["inputs_embeds"] + layer(batch["input_ids"])
    logits = value(**inputs).logits[:, :-1]
    keep = batch["labels"][:, 1:] != -100
    labels = batch["labels"][:, 1:][keep]
    return sum_terms(residual_terms(base_logits[:, :-1][keep], logits[keep], labels, norm), labels, weight)


def gradients(value, total):
    value.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in value.named_parameters() if p.grad is not None}


def assert_same(value, sums, expected):
    """Values and gradients of two losses of one network."""
    torch.testing.assert_close(torch.stack(sums).detach(), torch.stack(expected).detach(), rtol=1e-5, atol=1e-5)
    wanted, found = gradients(value, expected.total / 7), gradients(value, sums.total / 7)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


def logits_of(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


# --- the chunked loss on its own


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value_columns", [VOCAB, VOCAB - 4, VOCAB + 6])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_give_the_loss_and_gradients_of_whole_logits(norm, value_columns, chunk):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    base, labels = random(9, VOCAB), torch.randint(VOCAB - 4, (9,), generator=generator)
    leaves = [random(9, 8).requires_grad_(), random(value_columns, 8).requires_grad_(), random(value_columns)]
    leaves[2].requires_grad_()
    found = chunked_loss(
        *leaves, lambda i, j: base[i:j].clone(), VOCAB, labels, norm=norm, norm_weight=0.7, chunk=chunk
    )
    wanted = sum_terms(residual_terms(base, functional.linear(*leaves), labels, norm), labels, 0.7)
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-5, atol=1e-5)
    assert not (found.ce.requires_grad or found.norm.requires_grad or found.correct.requires_grad)
    for left, right in zip(torch.autograd.grad(3 * found.total, leaves), torch.autograd.grad(3 * wanted.total, leaves)):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    weight = torch.eye(2).repeat(3, 1).requires_grad_()
    base = torch.tensor([[0.0, -torch.inf, 5.0, 1.0, -1e30, 0.0]])
    found = chunked_loss(hidden, weight, None, lambda i, j: base[i:j].clone(), 6, torch.tensor([2]))
    found.total.backward()
    assert all(torch.isfinite(t).all() for t in (found.total, hidden.grad, weight.grad))


def test_no_answer_token_gives_a_zero_that_can_be_trained():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    found = chunked_loss(hidden, weight, None, lambda i, j: None, 6, torch.zeros(0, dtype=torch.long))
    found.total.backward()
    assert found.total == 0
    assert weight.grad.abs().sum() == 0


def test_a_frozen_head_gets_no_gradient_and_evaluation_none_at_all():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4)
    arguments = (hidden, weight, None, lambda i, j: torch.zeros(j - i, 6), 6, torch.zeros(5, dtype=torch.long))
    found = chunked_loss(*arguments)
    assert found.total.grad_fn.grads[1] is None
    found.total.backward()
    assert hidden.grad.abs().sum() > 0
    with torch.no_grad():
        assert not chunked_loss(*arguments).total.requires_grad


def test_a_second_backward_is_refused_because_the_first_scaled_in_place():
    hidden, weight = torch.randn(2, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    labels = torch.zeros(2, dtype=torch.long)
    found = chunked_loss(hidden, weight, None, lambda i, j: torch.zeros(j - i, 6), 6, labels)
    found.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        found.total.backward()


def test_unknown_norm_and_scheme_are_refused():
    empty = torch.zeros(0, 4)
    with pytest.raises(ValueError, match="'l3'"):
        chunked_loss(empty, empty, None, lambda i, j: None, 1, empty, norm="l3")
    with pytest.raises(ValueError, match="'cascading'"):
        reads_base("cascading")


def test_only_a_chunk_of_logits_exists_at_a_time():
    seen = []

    def base_logits(start, stop):
        seen.append((start, stop))
        return torch.zeros(stop - start, 50)

    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Watch():
        labels = torch.zeros(64, dtype=torch.long)
        chunked_loss(hidden, weight, None, base_logits, 50, labels, chunk=8).total.backward()
    assert seen == [(i, i + 8) for i in range(0, 64, 8)]
    assert max(largest) <= 8 * 50


@pytest.mark.parametrize("norm", NORMS)
def test_a_chunk_compiles_without_a_graph_break_for_any_number_of_rows(norm):
    compiled = torch.compile(terms_and_gradient, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (7, 3):
        base, value, labels = torch.randn(rows, 12), torch.randn(rows, 9), torch.arange(rows)
        found = compiled(base.clone(), value, labels, norm, 0.5, True)
        wanted = terms_and_gradient(base.clone(), value, labels, norm, 0.5, True)
        for left, right in zip(found, wanted):
            torch.testing.assert_close(left, right)


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


# --- schemes, on two architectures


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
    """As base and as value; a capped network takes the way of whole logits, the other one stays chunked."""
    unusual, plain, batch = gemma(kind).eval(), qwen2(), make_batch()
    for base, value in ((plain, unusual), (unusual, plain)):
        value.requires_grad_(True)
        loss = JointLoss(value, FrozenBases([base]), scheme=scheme, chunk=4)
        assert len(loss.notes()) == (kind == "Gemma2")
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

    assert why_not_chunked(llama()) is None
    assert why_not_chunked(GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1))) is None
    model = qwen2()

    class Adapter(torch.nn.Linear):
        pass

    model.lm_head = Adapter(16, VOCAB)
    assert "a Adapter" in why_not_chunked(model)


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


# --- several bases, temperature, noise


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


# --- the cache


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
    capped = FrozenBases([gemma("Gemma2")])
    with pytest.raises(ValueError, match="whole logits: it scales or caps"):
        JointLoss(value, capped, cache=BaseCache(tmp_path / "e", capped))
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
