"""The objective of Inverse Value Learning (Lu et al., NAACL 2025, arXiv 2410.21027), residual scheme.

    z(x)  = B0(x) + V(x)
    loss  = mean over answer positions of  −log softmax(z)[label] + λ · ‖V‖

B0 is the frozen base, V the value network, and ‖V‖ is per position and per column: `l1` is ‖V(x)‖₁ / |vocab|, as in
the paper, `l2` is ‖V(x)‖₂² / |vocab|. It keeps V from taking over what B0 knows, so that V also fits other bases.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

IGNORED = -100


class Terms(NamedTuple):
    """The two terms of the loss for N answer positions, fp32: `ce` and `norm` are [N], `logits` is z, [N, V_base]."""

    ce: torch.Tensor
    norm: torch.Tensor
    logits: torch.Tensor


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
