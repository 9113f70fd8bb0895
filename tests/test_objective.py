"""The objective on whole logits, and the same from hidden states in chunks: values, gradients, memory."""

import pytest
import torch
from objective_tools import NORMS, VOCAB
from torch.nn import functional

from ivl_vllm.training.chunked_loss import chunked_loss, terms_and_gradient
from ivl_vllm.training.objective import answer_mask, join_residual, norm_mask, residual_terms, sum_terms, value_norm
from ivl_vllm.training.schemes import reads_base


@pytest.mark.parametrize("norm", ["l1", "l2", "none"])
@pytest.mark.parametrize("value_columns", [11, 8, 14])
def test_loss_and_gradient_equal_the_naive_ones(norm, value_columns):
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(5, 11, generator=generator)
    value = torch.randn(5, value_columns, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 3, 7, 2, 5])
    ce, size, joined = residual_terms(base, value, labels, norm)
    (ce.mean() + 0.7 * size.mean()).backward()

    naive = value.detach().double().requires_grad_(True)
    shared = min(11, value_columns)
    total = 0.0
    for row in range(5):
        z = [base[row, j].double() + (naive[row, j] if j < shared else 0.0) for j in range(11)]
        exponentials = torch.stack([torch.exp(entry) for entry in z])
        total = total - torch.log(exponentials[labels[row]] / exponentials.sum()) / 5
        columns = naive[row, :shared]
        if norm == "l1":
            total = total + 0.7 * sum(entry.abs() for entry in columns) / shared / 5
        elif norm == "l2":
            total = total + 0.7 * sum(entry**2 for entry in columns) / shared / 5
    total.backward()
    assert (ce.mean() + 0.7 * size.mean()).item() == pytest.approx(total.item(), rel=1e-5)
    torch.testing.assert_close(value.grad, naive.grad.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(joined[:, :shared], base[:, :shared] + value.detach()[:, :shared])
    assert joined.shape == (5, 11)


def test_join_leaves_the_base_where_the_value_has_no_column_and_works_in_fp32():
    joined = join_residual(torch.ones(2, 4, dtype=torch.bfloat16), torch.full((2, 3), 2.0, dtype=torch.float16))
    assert joined.dtype == torch.float32
    assert joined.tolist() == [[3.0, 3.0, 3.0, 1.0]] * 2


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="'l3'"):
        value_norm(torch.zeros(1, 2), "l3")


def test_answer_positions_are_the_ones_before_an_answer_token():
    labels = torch.tensor([[-100, -100, 5, 6, -100], [-100, 7, -100, -100, -100]])
    assert answer_mask(labels).tolist() == [[False, True, True, False, False], [True, False, False, False, False]]


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
        found = compiled(base.clone(), value, labels, norm, torch.tensor(0.5), True)
        wanted = terms_and_gradient(base.clone(), value, labels, norm, torch.tensor(0.5), True)
        for left, right in zip(found, wanted):
            torch.testing.assert_close(left, right)


# --- where the norm is taken


def test_norm_positions_are_the_answers_or_all_but_padding_and_blank_rows():
    labels = torch.tensor([[-100, -100, 5, 6, -100, -100], [-100, 7, -100, -100, -100, -100], [-100] * 6])
    attention = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    answers = answer_mask(labels)
    assert norm_mask("answer", answers, {"attention_mask": attention}) is answers
    found = norm_mask("all", answers, {"attention_mask": attention})
    assert found.int().tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [0] * 6]
    # One packed row: an example of four tokens, a blank one of three, one of two, and padding.
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, 5, 6, -100, -100, -100, -100, 7, -100, -100]])
    found = norm_mask("all", answer_mask(labels), {"position_ids": position_ids})
    assert found.int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0]]
    with pytest.raises(ValueError, match="'prompt'.*answer or all"):
        norm_mask("prompt", answers, {})


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value_columns", [VOCAB - 4, VOCAB + 6])
@pytest.mark.parametrize("chunk", [2, 100])
def test_further_positions_count_in_the_norm_alone(norm, value_columns, chunk):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    base, labels = random(5, VOCAB), torch.randint(VOCAB - 4, (5,), generator=generator)
    leaves = [leaf.requires_grad_() for leaf in (random(12, 8), random(value_columns, 8), random(value_columns))]
    found = chunked_loss(
        *leaves, lambda i, j: base[i:j].clone(), VOCAB, labels, norm=norm, norm_weight=0.7, chunk=chunk
    )
    logits = functional.linear(*leaves)
    columns = logits[:, : min(VOCAB, value_columns)]
    ce = functional.cross_entropy(join_residual(base, logits[:5]), labels, reduction="sum")
    size = {"l1": columns.abs(), "l2": columns**2, "none": columns * 0}[norm].mean(-1).sum()
    torch.testing.assert_close(torch.stack(found[:3]), torch.stack([ce + 0.7 * size, ce, size]), rtol=1e-5, atol=1e-5)
    assert found.positions == 12
    gradients = torch.autograd.grad(ce + 0.7 * size, leaves)
    for left, right in zip(torch.autograd.grad(found.total, leaves), gradients):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    assert (gradients[0][5:].abs().sum() > 0) == (norm != "none")


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_chunk_of_further_positions_compiles_and_is_not_compiled_anew_for_another_weight(norm):
    """The weight of the norm at all positions differs from step to step."""
    count = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(terms_and_gradient, fullgraph=True, dynamic=True, backend=count)
    labels = torch.arange(4)
    for weight in map(torch.tensor, (0.5, 0.25, 0.7, 0.3)):
        value = torch.randn(4, 9)
        for base in (None, torch.randn(4, 12)):
            copies = (None, None) if base is None else (base.clone(), base.clone())
            found = compiled(copies[0], value, labels, norm, weight, True)
            wanted = terms_and_gradient(copies[1], value, labels, norm, weight, True)
            for left, right in zip(found, wanted):
                torch.testing.assert_close(left, right)
    assert count.frame_count <= 4
