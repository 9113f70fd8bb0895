"""The objective of Inverse Value Learning (Lu et al., NAACL 2025, arXiv 2410.21027).

    z(x)  = B0(x) + V(x)
    loss  = mean over answer positions of  −log softmax(z)[label] + λ · ‖V‖

B0 is the frozen base, V the value network (what V reads is the matter of `schemes`), and ‖V‖ is per position and per
column: `l1` is ‖V(x)‖₁ / |vocab|, as in the paper, `l2` is ‖V(x)‖₂² / |vocab|. It keeps V from taking over what B0
knows, so that V also fits other bases.

`residual_terms` says it in plain torch, on whole logits. `chunked_loss` computes the same from hidden states, some
positions at a time: neither the logits nor their gradients of all positions ever exist together.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

IGNORED = -100
# Positions whose logits exist at a time: 512 rows of 152k fp32 columns are 0.3 GB, and about four such tensors live.
CHUNK = 512

# Rows `start` to `stop` of the base's logits, [stop − start, V_base] in fp32, in memory that the caller may overwrite.
BaseLogits = Callable[[int, int], torch.Tensor]


class Terms(NamedTuple):
    """The two terms of the loss for N answer positions, fp32: `ce` and `norm` are [N], `logits` is z, [N, V_base]."""

    ce: torch.Tensor
    norm: torch.Tensor
    logits: torch.Tensor


class Sums(NamedTuple):
    """The loss summed over N answer positions, fp32 scalars.

    `total` is `ce + λ · norm` and the only one with a gradient; `correct` counts the positions whose label is the
    largest entry of z.
    """

    total: torch.Tensor
    ce: torch.Tensor
    norm: torch.Tensor
    correct: torch.Tensor


def join_residual(base_logits: torch.Tensor, value_logits: torch.Tensor) -> torch.Tensor:
    """Base plus value over the columns that both have, the base alone in the others (differently padded vocabularies).

    Args:
        base_logits: [..., V_base], any floating dtype.
        value_logits: [..., V_value], any floating dtype.

    Returns:
        [..., V_base] in fp32.
    """
    base_logits, value_logits = base_logits.float(), value_logits.float()
    shared = min(base_logits.shape[-1], value_logits.shape[-1])
    if shared == base_logits.shape[-1]:
        return base_logits + value_logits[..., :shared]
    steered = base_logits[..., :shared] + value_logits[..., :shared]
    return torch.cat([steered, base_logits[..., shared:]], dim=-1)


def value_norm(value_logits: torch.Tensor, norm: str) -> torch.Tensor:
    """Size of the value logits at each position, averaged over the columns.

    Args:
        value_logits: [..., V], any floating dtype.
        norm: `l1` (mean |v|), `l2` (mean v²) or `none` (zeros).

    Returns:
        [...] in fp32.

    Raises:
        ValueError: `norm` is another word.
    """
    value_logits = value_logits.float()
    if norm == "l1":
        return value_logits.abs().mean(-1)
    if norm == "l2":
        return value_logits.square().mean(-1)
    if norm == "none":
        return value_logits.new_zeros(value_logits.shape[:-1])
    raise ValueError(f"norm is {norm!r}; expected l1, l2 or none")


def residual_terms(
    base_logits: torch.Tensor, value_logits: torch.Tensor, labels: torch.Tensor, norm: str = "l1"
) -> Terms:
    """Cross-entropy of the joined logits and norm of the value logits, position by position.

    Args:
        base_logits: [N, V_base] at N answer positions; no gradient flows into them.
        value_logits: [N, V_value] at the same positions.
        labels: [N], int64, the token that follows each position.
        norm: See `value_norm`; it counts the columns that both networks have.

    Returns:
        `Terms`, each differentiable in `value_logits`.
    """
    joined = join_residual(base_logits.detach(), value_logits)
    ce = functional.cross_entropy(joined, labels, reduction="none")
    return Terms(ce, value_norm(value_logits[..., : base_logits.shape[-1]], norm), joined)


def sum_terms(terms: Terms, labels: torch.Tensor, norm_weight: float) -> Sums:
    """`Terms` of whole logits as `Sums`, differentiable in `total`."""
    ce, norm = terms.ce.sum(), terms.norm.sum()
    correct = (terms.logits.argmax(-1) == labels).sum().float()
    return Sums(ce + norm_weight * norm, ce.detach(), norm.detach(), correct)


def terms_and_gradient(
    joined: torch.Tensor,
    value_logits: torch.Tensor,
    labels: torch.Tensor,
    norm: str,
    norm_weight: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Loss of one chunk and its gradient in the value logits; one function so that torch.compile can fuse it.

    With p = softmax(z): ∂(−log p[label])/∂v = p − onehot(label); ∂|v|/∂v = sign v; ∂v²/∂v = 2v.

    Args:
        joined: The base's logits, [n, V_base], fp32; overwritten.
        value_logits: [n, S], any floating dtype, the S columns that both networks have.
        labels: [n], int64.
        norm: `l1`, `l2` or `none`.
        norm_weight: λ.
        with_gradient: Whether the gradient is wanted.

    Returns:
        Sums of ce, norm and correct positions, [3] fp32; the gradient of `Σ ce + λ·norm`, [n, S] in the dtype of
        `value_logits`, or None.
    """
    shared = value_logits.shape[1]
    # No fp32 copy of the value logits: with 152k columns each copy is as large as everything else here.
    joined[:, :shared] += value_logits
    size = joined.new_zeros(())
    if norm != "none":
        order = 1 if norm == "l1" else 2
        dtype = torch.promote_types(value_logits.dtype, torch.float32)
        size = (torch.linalg.vector_norm(value_logits, order, -1, dtype=dtype) ** order).sum().float() / shared
    log_sum = joined.logsumexp(-1, keepdim=True)
    index = labels[:, None]
    ce = (log_sum - joined.gather(1, index)).sum()
    sums = torch.stack([ce, size, (joined.argmax(-1) == labels).sum().float()])
    if not with_gradient:
        return sums, None
    gradient = joined.sub_(log_sum).exp_()
    gradient.scatter_add_(1, index, gradient.new_full((1, 1), -1.0).expand_as(index))
    gradient = gradient[:, :shared]
    if norm == "l1":
        gradient = gradient.add_(value_logits.sign(), alpha=norm_weight / shared)
    elif norm == "l2":
        gradient = gradient.add_(value_logits, alpha=2 * norm_weight / shared)
    return sums, gradient.to(value_logits.dtype)


class _ChunkedLoss(torch.autograd.Function):
    """Sums the loss chunk by chunk and, while a chunk's logits exist, the gradients of hidden states and head.

    So the backward pass only scales them: no logits are kept for it, none are computed twice.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, base_logits, base_columns, labels, norm, norm_weight, options):
        chunk, with_gradient, dtype, step = options
        # Not for a frozen head (LoRA): its gradient is the largest of all.
        for_head = with_gradient and weight.requires_grad
        for_bias = with_gradient and bias is not None and bias.requires_grad
        shared = min(base_columns, weight.shape[0])
        # What autocast would do for each product, done once: the head is the largest matrix of a small network.
        matrix = weight[:shared].to(dtype)
        offset = None if bias is None else bias[:shared].to(dtype)
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
        # fp32 whatever the dtype of the products: many chunks add up in the head's gradients.
        grads = [
            torch.empty_like(hidden) if with_gradient else None,
            torch.zeros_like(weight, dtype=torch.float32) if for_head else None,
            torch.zeros_like(bias, dtype=torch.float32) if for_bias else None,
        ]
        for start in range(0, hidden.shape[0], chunk):
            stop = min(start + chunk, hidden.shape[0])
            rows = hidden[start:stop].to(dtype)
            value_logits = functional.linear(rows, matrix, offset)
            found, gradient = step(
                base_logits(start, stop), value_logits, labels[start:stop], norm, norm_weight, with_gradient
            )
            del value_logits
            sums += found
            if with_gradient:
                grads[0][start:stop] = gradient @ matrix
            if for_head and dtype == torch.float32:
                grads[1][:shared].addmm_(gradient.t(), rows)
            elif for_head:
                grads[1][:shared] += gradient.t() @ rows
            if for_bias:
                grads[2][:shared] += gradient.sum(0, dtype=torch.float32)
            del gradient
        ctx.grads, ctx.dtypes = grads, (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        ce, size, correct = sums.unbind()
        total = ce + norm_weight * size
        ctx.mark_non_differentiable(ce, size, correct)
        return total, ce, size, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, factor, *_):
        if ctx.grads is None:
            raise RuntimeError("chunked_loss: backward runs once; its gradients are scaled in place")
        grads, ctx.grads = ctx.grads, None
        # In place: a second matrix of the vocabulary's size would be the largest tensor of the backward pass.
        scaled = [None if g is None else g.mul_(factor).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        return *scaled, *([None] * 6)


def chunked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    base_logits: BaseLogits,
    base_columns: int,
    labels: torch.Tensor,
    *,
    norm: str = "l1",
    norm_weight: float = 1.0,
    chunk: int = CHUNK,
    step: Callable = terms_and_gradient,
) -> Sums:
    """`residual_terms`, summed, from hidden states: `chunk` rows of logits exist at a time.

    Values and gradients are those of `sum_terms(residual_terms(…))` on `V(x) = hidden · weightᵀ + bias`, but for the
    rounding of fp32 sums. Products run in autocast's dtype where autocast is on, else in the dtype of `weight`.

    Args:
        hidden: [N, H], the value network's final hidden states at the answer positions.
        weight: [V_value, H], its output matrix.
        bias: [V_value], or None.
        base_logits: Rows of the base's logits on demand, see `BaseLogits`.
        base_columns: V_base.
        labels: [N], int64, below V_base.
        norm: See `value_norm`.
        norm_weight: λ.
        chunk: Rows at a time.
        step: `terms_and_gradient`, or a compiled version of it.

    Returns:
        `Sums`; `total` is differentiable, once, in `hidden`, `weight` and `bias`.

    Raises:
        ValueError: `norm` is another word.
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    # Autograd is off inside a Function: whether gradients are wanted has to be asked here.
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if norm not in ("l1", "l2", "none"):
        raise ValueError(f"norm is {norm!r}; expected l1, l2 or none")
    options = (chunk, with_gradient, dtype, step)
    with torch.autocast(device, enabled=False):
        return Sums(
            *_ChunkedLoss.apply(hidden, weight, bias, base_logits, base_columns, labels, norm, norm_weight, options)
        )


def answer_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a batch has answer tokens: a position is where the *next* token's label is not ignored.

    Args:
        labels: [B, T], int64, `-100` where a token is not trained.

    Returns:
        `columns`, [C] int64: the positions that some row needs; `mask`, [B, C] bool: which rows need them.
    """
    mask = labels[:, 1:] != IGNORED
    columns = mask.any(0).nonzero().flatten()
    return columns, mask[:, columns]
