"""The frozen side of training: one base or several, and what is done to their logits before the value network's.

    B0~(x) = mean over the chosen bases of B(x)  /  temperature  +  noise · N(0, 1)

in training. An evaluation takes the first base as it is, so that held-out losses can be compared between runs.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ivl_vllm.training import models
from ivl_vllm.training.chunked_loss import Shape
from ivl_vllm.training.schemes import Tap, logit_shape

# torch's generator on the CPU looks at the low 32 bits of a seed.
_SEEDS = 1 << 32


@dataclass(frozen=True)
class BaseRows:
    """Base logits at N positions, computed a few rows at a time.

    Args:
        features: For each base [N, H], final hidden states, or [N, V], whole logits where it has no `heads` entry.
        heads: For each base its output matrix [V, H], bias [V] (or None) and what it does to their product; None where
            `features` are the logits.
        temperature: What the logits are divided by.
        noise: Standard deviation of the noise on each logit, after the division.
        seed: Of the noise: the same rows get the same noise whenever they are computed.
    """

    features: tuple[torch.Tensor, ...]
    heads: tuple[tuple[torch.Tensor, torch.Tensor | None, Shape] | None, ...]
    temperature: float = 1.0
    noise: float = 0.0
    seed: int = 0

    @property
    def columns(self) -> int:
        """V_base; bases that are padded differently are averaged over the columns that all have."""
        widths = [f.shape[-1] if h is None else h[0].shape[0] for f, h in zip(self.features, self.heads, strict=True)]
        return min(widths)

    @torch.no_grad()
    def __call__(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop`, [stop − start, V_base], a new tensor in fp32."""
        total = None
        for features, head in zip(self.features, self.heads, strict=True):
            rows = features[start:stop]
            if head is not None:
                weight, bias, shape = head
                rows = shape(functional.linear(rows.to(weight.dtype), weight, bias))
            rows = rows[:, : self.columns]
            # `float` copies nothing where the rows are fp32 already, and whole logits must not be written to.
            rows = rows.clone() if rows.dtype == torch.float32 and head is None else rows.float()
            total = rows if total is None else total.add_(rows)
        divisor = len(self.features) * self.temperature
        if divisor != 1:
            total.div_(divisor)
        if self.noise:
            generator = torch.Generator(total.device).manual_seed((self.seed + start) % _SEEDS)
            total.add_(torch.randn(total.shape, generator=generator, device=total.device), alpha=self.noise)
        return total

    def at(self, mask: torch.Tensor) -> "BaseRows":
        """The rows of some positions, with noise of their own.

        Args:
            mask: [N], bool.
        """
        return replace(self, features=tuple(f[mask] for f in self.features), seed=(self.seed + _SEEDS // 2) % _SEEDS)


class FrozenBases:
    """The base models, in eval mode and without gradients, and which of them a step sees.

    Args:
        networks: The bases, all of one vocabulary; the first is the one that evaluations use.
        mix: `draw` takes one of them for each optimizer step, by a generator that depends on `seed` and the step
            alone, so that all processes and a resumed run draw the same; `average` takes the mean of their logits.
        temperature: Divides the logits.
        noise: Standard deviation of Gaussian noise on the logits, drawn anew for every batch and use.
        seed: Of the draw.
    """

    def __init__(
        self,
        networks: Sequence[PreTrainedModel],
        mix: str = "draw",
        temperature: float = 1.0,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.models = [network.requires_grad_(False).eval() for network in networks]
        self.mix, self.temperature, self.noise, self.seed = mix, temperature, noise, seed
        self._shapes = [logit_shape(model) for model in self.models]
        self.reasons = [shape if isinstance(shape, str) else None for shape in self._shapes]
        self._taps = [
            None if r else Tap(m.get_output_embeddings()) for m, r in zip(self.models, self.reasons, strict=True)
        ]

    def chosen(self, step: int, training: bool) -> list[int]:
        """Which bases a step sees: indices into `models`."""
        if not training or len(self.models) == 1:
            return [0]
        if self.mix == "average":
            return list(range(len(self.models)))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return [int(torch.randint(len(self.models), (1,), generator=generator))]

    def head(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None, Shape] | None:
        """Output matrix and bias of a base in the dtype that its products run in, and what it does to their product.

        None where it needs whole logits.
        """
        if self._taps[index] is None:
            return None
        layer = self._taps[index].layer
        device = layer.weight.device.type
        # autocast would cast the frozen matrix anew for every chunk.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else layer.weight.dtype
        return layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype), self._shapes[index]

    @torch.no_grad()
    def features(self, index: int, inputs: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """Final hidden states of one base at some positions, or its logits where it has no separable head.

        Args:
            index: Which base.
            inputs: What the model is called with, [B, T] each.
            mask: [B, T], bool: the positions that are wanted.

        Returns:
            [N, H] or [N, V].
        """
        model, tap = self.models[index], self._taps[index]
        if tap is None:
            return whole_logits(model, model, inputs, mask)
        found = []

        def keep(hidden: torch.Tensor) -> torch.Tensor:
            found.append(hidden[mask])
            return hidden.new_zeros(1, 1, 1)

        with tap.doing(keep):
            model(**inputs, use_cache=False)
        return found[0]

    def rows(
        self,
        inputs: dict[str, torch.Tensor],
        mask: torch.Tensor,
        step: int,
        training: bool,
        features: Callable[[int, dict[str, torch.Tensor], torch.Tensor], torch.Tensor] | None = None,
    ) -> BaseRows:
        """The base side of a batch.

        Args:
            inputs: What the models are called with, [B, T] each.
            mask: [B, T], bool: the positions that are wanted.
            step: Optimizer steps so far.
            training: Whether several bases, temperature and noise apply.
            features: In place of `self.features`, for instance a cache.
        """
        indices = self.chosen(step, training)
        find = features or self.features
        rows = BaseRows(tuple(find(i, inputs, mask) for i in indices), tuple(self.head(i) for i in indices))
        if not training:
            return rows
        # From the host's generator, which checkpoints keep, and without waiting for the device.
        seed = int(torch.randint(_SEEDS, (1,))) if self.noise else 0
        return replace(rows, temperature=self.temperature, noise=self.noise, seed=seed)


def load_more_bases(
    names: Sequence[str], tokenizer: PreTrainedTokenizerBase, base_name: str, options: dict[str, Any]
) -> list[PreTrainedModel]:
    """The bases of `--more_bases`, each in the dtype that it has on disk.

    Args:
        names: Folders or hub ids, as `models.locate_model` returns them.
        tokenizer: That of `--base`; each must have its vocabulary.
        base_name: The name of `--base`, for messages.
        options: For the loaders, see `models.load_base`.

    Raises:
        ValueError: One cannot be loaded or has another vocabulary.
    """
    found = []
    for name in names:
        other = models.load_tokenizer(name, "--more_bases", options["trust_remote_code"])
        models.check_same_vocabulary(tokenizer, base_name, other, name, "--more_bases")
        found.append(models._load(AutoModelForCausalLM, name, "--more_bases", dtype="auto", **options))
    return found


def whole_logits(
    model: torch.nn.Module, plain: torch.nn.Module, inputs: dict[str, torch.Tensor], mask: torch.Tensor
) -> torch.Tensor:
    """Logits at some positions, for models whose output layer cannot be run apart.

    Args:
        model: Network to call.
        plain: The same network without wrappers, whose signature tells whether it can leave out positions.
        inputs: Its inputs, [B, T].
        mask: [B, T], bool: the positions that are wanted.

    Returns:
        [N, vocab].
    """
    if "logits_to_keep" in inspect.signature(plain.forward).parameters:
        columns = mask.any(0).nonzero().flatten()
        return model(**inputs, use_cache=False, logits_to_keep=columns).logits[mask[:, columns]]
    return model(**inputs, use_cache=False).logits[mask]
