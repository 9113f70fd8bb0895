"""The objective of Inverse Value Learning (Lu et al., NAACL 2025, arXiv 2410.21027).

    z(x)  = B0(x) + V(x)
    loss  = mean over answer positions of −log softmax(z)[label]  +  λ · mean over norm positions of ‖V‖

B0 is the frozen base, V the value network (what V reads is the matter of `schemes`), and ‖V‖ is per position and per
column: `l1` is ‖V(x)‖₁ / |vocab|, as in the paper, `l2` is ‖V(x)‖₂² / |vocab|. It keeps V from taking over what B0
knows, so that V also fits other bases. Its positions are the answers' or all but the padding, see `norm_mask`.

This module says it in plain torch, on whole logits; `chunked_loss` computes the same without ever holding them.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

from ivl_vllm.training.ivl_config import NORM_POSITIONS

IGNORED = -100


class Terms(NamedTuple):
    """The two terms of the loss for N answer positions, fp32: `ce` and `norm` are [N], `logits` is z, [N, V_base]."""

    ce: torch.Tensor
    norm: torch.Tensor
    logits: torch.Tensor


class Sums(NamedTuple):
    """The loss summed over positions, fp32 scalars.

    `ce` and `correct` (positions whose label is the largest entry of z) are of the N answer positions, `norm` is of
    the `positions` that the norm is taken at. `total` is `ce + λ · norm` and the only one with a gradient.
    """

    total: torch.Tensor
    ce: torch.Tensor
    norm: torch.Tensor
    correct: torch.Tensor
    positions: torch.Tensor


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


def sum_terms(terms: Terms, labels: torch.Tensor, norm_weight: float, further_norm: torch.Tensor | None = None) -> Sums:
    """`Terms` of whole logits as `Sums`, differentiable in `total`.

    Args:
        terms: Of N answer positions.
        labels: [N], int64.
        norm_weight: λ.
        further_norm: [M] in fp32, the norm at positions that are no answer's.
    """
    ce, norm = terms.ce.sum(), terms.norm.sum()
    positions = terms.norm.numel()
    if further_norm is not None:
        norm, positions = norm + further_norm.sum(), positions + further_norm.numel()
    correct = (terms.logits.argmax(-1) == labels).sum().float()
    return Sums(ce + norm_weight * norm, ce.detach(), norm.detach(), correct, ce.new_full((), positions))


def answer_mask(labels: torch.Tensor) -> torch.Tensor:
    """Where answers are trained: a position is where the *next* token's label is not ignored.

    Args:
        labels: [B, T], int64, `-100` where a token is not trained.

    Returns:
        [B, T], bool; the last column is False, as no token follows it.
    """
    return functional.pad(labels[:, 1:] != IGNORED, (0, 1))


def norm_mask(which: str, answers: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where the norm is taken.

    Args:
        which: `answer`, the positions of `answers`; or `all`, every position of an example that has answers, so
            prompts too, but no padding (and no blank row, which fills up the batches of several processes).
        answers: [B, T], bool, see `answer_mask`.
        inputs: What the network is called with, [B, T] each: `attention_mask` tells padding, `position_ids` where an
            example of a packed row begins.

    Returns:
        [B, T], bool; all of `answers` is in it.

    Raises:
        ValueError: `which` is another word.
    """
    if which == "answer":
        return answers
    if which != "all":
        raise ValueError(f"norm_positions is {which!r}; expected {' or '.join(NORM_POSITIONS)}")
    if "position_ids" in inputs:
        # Padding has position 0 too: each such token is an example of its own here, one without answers.
        example = (inputs["position_ids"] == 0).long().cumsum(1)
        counts = answers.new_zeros(answers.shape[0], answers.shape[1] + 1, dtype=torch.long)
        has_answer = counts.scatter_add_(1, example, answers.long()).gather(1, example) > 0
    else:
        has_answer = answers.any(1, keepdim=True).expand_as(answers)
    if "attention_mask" in inputs:
        return has_answer & inputs["attention_mask"].bool()
    return has_answer
