"""The loss of `objective` from hidden states, some positions at a time.

Neither the logits nor their gradients of all positions ever exist together: each chunk's gradients are taken while its
logits exist, and summed.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from ivl_vllm.training.ivl_config import NORMS
from ivl_vllm.training.objective import Sums

# Positions whose logits exist at a time: 512 rows of 152k fp32 columns are 0.3 GB, and about four such tensors live.
CHUNK = 512

# Rows `start` to `stop` of the base's logits, [stop − start, V_base] in fp32, in memory that the caller may overwrite.
BaseLogits = Callable[[int, int], torch.Tensor]


class Shape(NamedTuple):
    """What a network makes of its output layer's numbers: `cap · tanh(scale · x / cap)`, or `scale · x` uncapped."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Shape logits, in place."""
        if self.cap is not None:
            return logits.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        return logits if self.scale == 1.0 else logits.mul_(self.scale)

    def backward(self, gradient: torch.Tensor, shaped: torch.Tensor) -> torch.Tensor:
        """From the gradient in the shaped logits to that in the output layer's numbers; both are overwritten."""
        if self.cap is not None:
            gradient.mul_(shaped.div_(self.cap).square_().neg_().add_(1.0))  # 1 − tanh²
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


def terms_and_gradient(
    joined: torch.Tensor | None,
    value_logits: torch.Tensor,
    labels: torch.Tensor,
    norm: str,
    norm_weight: torch.Tensor,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Loss of one chunk and its gradient in the value logits; one function so that torch.compile can fuse it.

    With p = softmax(z): ∂(−log p[label])/∂v = p − onehot(label); ∂|v|/∂v = sign v; ∂v²/∂v = 2v.

    Args:
        joined: The base's logits, [n, V_base], fp32; overwritten. None where only the norm counts.
        value_logits: [n, S], any floating dtype, the S columns that both networks have.
        labels: [n], int64; not looked at without `joined`.
        norm: `l1`, `l2` or `none`.
        norm_weight: λ, a scalar in fp32; no Python number, for which torch.compile would compile anew.
        with_gradient: Whether the gradient is wanted.

    Returns:
        Sums of ce, norm and correct positions, [3] fp32; the gradient of `Σ ce + λ·norm`, [n, S] in the dtype of
        `value_logits`, or None.
    """
    shared = value_logits.shape[1]
    size = torch.zeros((), dtype=torch.float32, device=value_logits.device)
    if norm != "none":
        order = 1 if norm == "l1" else 2
        dtype = torch.promote_types(value_logits.dtype, torch.float32)
        size = (torch.linalg.vector_norm(value_logits, order, -1, dtype=dtype) ** order).sum().float() / shared
    if joined is None:
        sums = torch.stack([torch.zeros_like(size), size, torch.zeros_like(size)])
        if not with_gradient:
            return sums, None
        if norm == "l1":
            return sums, value_logits.sign().mul_(norm_weight / shared)
        return sums, value_logits * (2 * norm_weight / shared if norm == "l2" else 0)
    # No fp32 copy of the value logits: with 152k columns each copy is as large as everything else here.
    joined[:, :shared] += value_logits
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
        gradient = gradient.addcmul_(value_logits.sign(), norm_weight / shared)
    elif norm == "l2":
        gradient = gradient.addcmul_(value_logits, 2 * norm_weight / shared)
    return sums, gradient.to(value_logits.dtype)


class _ChunkedLoss(torch.autograd.Function):
    """Sums the loss chunk by chunk and, while a chunk's logits exist, the gradients of hidden states and head.

    So the backward pass only scales them: no logits are kept for it, none are computed twice.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, base_logits, base_columns, labels, norm, norm_weight, options):
        chunk, with_gradient, dtype, step, shape = options
        weight_of_norm = torch.full((), norm_weight, dtype=torch.float32, device=hidden.device)
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
        answers, everything = labels.numel(), hidden.shape[0]
        # No chunk holds both kinds of position.
        bounds = [(start, min(start + chunk, answers)) for start in range(0, answers, chunk)]
        bounds += [(start, min(start + chunk, everything)) for start in range(answers, everything, chunk)]
        for start, stop in bounds:
            rows = hidden[start:stop].to(dtype)
            value_logits = shape(functional.linear(rows, matrix, offset))
            base = base_logits(start, stop) if start < answers else None
            found, gradient = step(base, value_logits, labels[start:stop], norm, weight_of_norm, with_gradient)
            del base
            sums += found
            if with_gradient:
                gradient = shape.backward(gradient, value_logits)
                del value_logits
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
    shape: Shape = Shape(),  # noqa: B008  (immutable)
) -> Sums:
    """`residual_terms`, summed, from hidden states: `chunk` rows of logits exist at a time.

    Values and gradients are those of `sum_terms(residual_terms(…))` on `V(x) = shape(hidden · weightᵀ + bias)`, but for
    the rounding of fp32 sums. Products run in autocast's dtype where autocast is on, else in the dtype of `weight`.

    Args:
        hidden: [N + M, H], the value network's final hidden states at N answer positions, and behind them at M
            further ones where only the norm counts.
        weight: [V_value, H], its output matrix.
        bias: [V_value], or None.
        base_logits: Rows of the base's logits on demand, see `BaseLogits`.
        base_columns: V_base.
        labels: [N], int64, below V_base.
        norm: See `value_norm`.
        norm_weight: λ.
        chunk: Rows at a time.
        step: `terms_and_gradient`, or a compiled version of it.
        shape: How the network scales or caps its logits.

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
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; expected {', '.join(NORMS)}")
    options = (chunk, with_gradient, dtype, step, shape)
    with torch.autocast(device, enabled=False):
        found = _ChunkedLoss.apply(hidden, weight, bias, base_logits, base_columns, labels, norm, norm_weight, options)
    return Sums(*found, found[0].new_full((), hidden.shape[0]))
