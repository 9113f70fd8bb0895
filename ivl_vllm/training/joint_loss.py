"""One training step's loss: the frozen bases' side, the value network's side, and the loss inside its forward."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ivl_vllm.training.base_cache import BaseCache
from ivl_vllm.training.chunked_loss import CHUNK, chunked_loss, terms_and_gradient
from ivl_vllm.training.frozen_bases import BaseRows, FrozenBases, whole_logits
from ivl_vllm.training.objective import Sums, answer_mask, norm_mask, residual_terms, sum_terms, value_norm
from ivl_vllm.training.schemes import Tap, cascade_inputs, logit_shape, reads_base


class JointLoss:
    """Cross-entropy of base plus value over the answer tokens of a batch, and the norm of the value.

    The loss is computed in the place of the value network's output layer, within its forward (see `schemes.Tap`).

    Args:
        value: The value network without wrappers, its weights whole.
        bases: The frozen side.
        scheme: One of `schemes`.
        norm: See `objective.value_norm`.
        norm_weight: λ.
        norm_positions: Where the norm is taken, see `objective.norm_mask`.
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
        norm_positions: str = "answer",
        chunk: int = CHUNK,
        cache: BaseCache | None = None,
        compiled: bool = False,
    ) -> None:
        self.value, self.bases, self.scheme, self.cache = value, bases, scheme, cache
        self.norm, self.norm_weight, self.norm_positions, self.chunk = norm, norm_weight, norm_positions, chunk
        self.reads_base = reads_base(scheme)
        if cache is not None and self.reads_base:
            raise ValueError(f"--cache_base keeps answer positions; --scheme {scheme} reads the base at all of them")
        if cache is not None and bases.reasons[0]:
            raise ValueError(f"--cache_base keeps hidden states, but the base needs whole logits: {bases.reasons[0]}")
        shape = logit_shape(value)
        self.reason, self._shape = (shape, None) if isinstance(shape, str) else (None, shape)
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

    def __call__(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        step: int,
        answers_per_position: float | None = None,
    ) -> tuple[Sums, int]:
        """The loss of a batch, summed over its answer tokens.

        Args:
            model: The value network, possibly wrapped.
            inputs: `labels` and what the networks are called with, [B, T] each.
            step: Optimizer steps so far.
            answers_per_position: Answer tokens over norm positions of the whole optimizer step: what the norm of one
                position counts beside the cross-entropy of one. Left out, that of this batch.

        Returns:
            `Sums`, whose `total`, `ce + λ · answers_per_position · norm`, is differentiable in the value network's
            parameters; divided by the answer tokens it is the mean of one term plus λ times the mean of the other.
            And the number of answer tokens.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        answers = answer_mask(labels)
        labels = labels[:, 1:][answers[:, :-1]]
        further = None
        if self.norm != "none" and self.norm_positions != "answer":
            further = norm_mask(self.norm_positions, answers, inputs) & ~answers
        features = None if self.cache is None else self.cache.features
        wanted = torch.ones_like(answers) if self.reads_base else answers
        rows = self.bases.rows(inputs, wanted, step, self.value.training, features)
        side = _Side(inputs, answers, further, labels, answers_per_position)
        if not self.reads_base:
            return self._value_side(model, side, rows), labels.numel()

        def expected(ids: torch.Tensor) -> torch.Tensor:
            with_text = self.scheme == "cascade+text"
            return cascade_inputs(own, ids, self._tokens, rows, rows.columns, with_text, self.chunk)

        with self._embed.doing(expected) as own:
            return self._value_side(model, side, rows.at(answers.flatten())), labels.numel()

    def _value_side(self, model: torch.nn.Module, side: "_Side", rows: BaseRows) -> Sums:
        if self._head is None:
            return self._whole(model, side, rows)
        found = []

        def loss(hidden: torch.Tensor) -> torch.Tensor:
            head = self._head.layer
            chosen = hidden[side.answers]
            if side.further is not None:
                chosen = torch.cat([chosen, hidden[side.further]])
            sums = chunked_loss(
                chosen,
                head.weight,
                head.bias,
                rows,
                rows.columns,
                side.labels,
                norm=self.norm,
                norm_weight=self.norm_weight * side.share(chosen.shape[0]),
                chunk=self.chunk,
                step=self._step,
                shape=self._shape,
            )
            found.append(sums)
            # 0 with the gradient of the loss: scaled or capped by the model, it stays so but for the scale.
            return (sums.total - sums.total.detach()).view(1, 1, 1)

        with self._head.doing(loss):
            nothing = model(**side.inputs, use_cache=False).logits
        # By way of what the model returned: wrappers hang their work onto its outputs.
        return found[0]._replace(total=found[0].total.detach() + nothing.view(()) / self._shape.scale)

    def _whole(self, model: torch.nn.Module, side: "_Side", rows: BaseRows) -> Sums:
        everywhere = side.answers if side.further is None else side.answers | side.further
        logits = whole_logits(model, self.value, side.inputs, everywhere)
        is_answer = side.answers[everywhere]
        terms = residual_terms(rows(0, side.labels.numel()), logits[is_answer], side.labels, self.norm)
        further = None
        if side.further is not None:
            further = value_norm(logits[~is_answer][:, : rows.columns], self.norm)
        return sum_terms(terms, side.labels, self.norm_weight * side.share(logits.shape[0]), further)


@dataclass(frozen=True)
class _Side:
    """What the value network's side needs of a batch: inputs and masks [B, T], labels [N]."""

    inputs: dict[str, torch.Tensor]
    answers: torch.Tensor
    further: torch.Tensor | None
    labels: torch.Tensor
    answers_per_position: float | None

    def share(self, positions: int) -> float:
        """What the norm of one of `positions` counts beside the cross-entropy of one answer token."""
        if self.further is None:
            return 1.0
        if self.answers_per_position is not None:
            return self.answers_per_position
        return self.labels.numel() / max(positions, 1)
