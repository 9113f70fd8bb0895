"""One training step's loss: the frozen bases' side, the value network's side, and the loss inside its forward."""

import torch
from transformers import PreTrainedModel

from ivl_vllm.training.base_cache import BaseCache
from ivl_vllm.training.frozen_bases import FrozenBases, whole_logits
from ivl_vllm.training.objective import (
    CHUNK,
    IGNORED,
    Sums,
    chunked_loss,
    residual_terms,
    sum_terms,
    terms_and_gradient,
)
from ivl_vllm.training.schemes import Tap, cascade_inputs, reads_base, why_not_chunked


class JointLoss:
    """Cross-entropy of base plus value, and the norm of the value, over the answer tokens of a batch.

    The loss is computed in the place of the value network's output layer, within its forward (see `schemes.Tap`).

    Args:
        value: The value network without wrappers, its weights whole.
        bases: The frozen side.
        scheme: One of `schemes`.
        norm: See `objective.value_norm`.
        norm_weight: λ.
        chunk: Positions whose logits exist at a time.
        cache: Final hidden states of the base, kept on disk.
        compiled: Fuse each chunk's arithmetic with torch.compile.

    Raises:
        ValueError: An unknown scheme, or a cache where it cannot be right.
    """

    def __init__(
        self,
        value: PreTrainedModel,
        bases: FrozenBases,
        *,
        scheme: str = "residual",
        norm: str = "l1",
        norm_weight: float = 1.0,
        chunk: int = CHUNK,
        cache: BaseCache | None = None,
        compiled: bool = False,
    ) -> None:
        self.value, self.bases, self.scheme, self.cache = value, bases, scheme, cache
        self.norm, self.norm_weight, self.chunk = norm, norm_weight, chunk
        self.reads_base = reads_base(scheme)
        if cache is not None and self.reads_base:
            raise ValueError(f"--cache_base keeps answer positions; --scheme {scheme} reads the base at all of them")
        if cache is not None and bases.reasons[0]:
            raise ValueError(f"--cache_base keeps hidden states, but the base needs whole logits: {bases.reasons[0]}")
        self.reason = why_not_chunked(value)
        self._head = None if self.reason else Tap(value.get_output_embeddings())
        self._embed = Tap(value.get_input_embeddings()) if self.reads_base else None
        # Now: a wrapper may reshape the weight later.
        self._tokens = value.get_input_embeddings().weight.shape[0]
        self._step = torch.compile(terms_and_gradient, dynamic=True) if compiled else terms_and_gradient

    def notes(self) -> list[str]:
        """What keeps a network from the chunked path, one line each; whole logits of that network exist then."""
        names = ["value network", *("base" if i == 0 else f"base {i + 1}" for i in range(len(self.bases.models)))]
        reasons = [self.reason, *self.bases.reasons]
        return [f"the {n}'s logits are not chunked: {r}" for n, r in zip(names, reasons, strict=True) if r]

    def __call__(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], step: int) -> tuple[Sums, int]:
        """The loss of a batch, summed.

        Args:
            model: The value network, possibly wrapped.
            inputs: `labels` and what the networks are called with, [B, T] each.
            step: Optimizer steps so far.

        Returns:
            `Sums`, `total` differentiable in the value network's parameters; the number of answer tokens.
        """
        inputs = dict(inputs)
        following = inputs.pop("labels")[:, 1:]
        # A position is trained where the next token is an answer's; the last one has no next token.
        mask = torch.nn.functional.pad(following != IGNORED, (0, 1))
        labels = following[mask[:, :-1]]
        features = None if self.cache is None else self.cache.features
        wanted = torch.ones_like(mask) if self.reads_base else mask
        rows = self.bases.rows(inputs, wanted, step, self.value.training, features)
        if not self.reads_base:
            return self._value_side(model, inputs, mask, labels, rows), labels.numel()

        def expected(ids: torch.Tensor) -> torch.Tensor:
            with_text = self.scheme == "cascade+text"
            return cascade_inputs(own, ids, self._tokens, rows, rows.columns, with_text, self.chunk)

        with self._embed.doing(expected) as own:
            return self._value_side(model, inputs, mask, labels, rows.at(mask.flatten())), labels.numel()

    def _value_side(self, model, inputs, mask, labels, rows) -> Sums:
        if self._head is None:
            logits = whole_logits(model, self.value, inputs, mask)
            return sum_terms(
                residual_terms(rows(0, labels.numel()), logits, labels, self.norm), labels, self.norm_weight
            )
        found = []

        def loss(hidden: torch.Tensor) -> torch.Tensor:
            head = self._head.layer
            sums = chunked_loss(
                hidden[mask],
                head.weight,
                head.bias,
                rows,
                rows.columns,
                labels,
                norm=self.norm,
                norm_weight=self.norm_weight,
                chunk=self.chunk,
                step=self._step,
            )
            found.append(sums)
            return sums.total.view(1, 1, 1)

        with self._head.doing(loss):
            total = model(**inputs, use_cache=False).logits
        # As the model returned it: wrappers hang their work onto its outputs.
        return found[0]._replace(total=total.view(()))
