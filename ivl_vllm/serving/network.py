"""One value network inside the engine: its forward, and the way in which its logits reach the base's."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
from ivl_kernels import lm_head_value_add, value_add
from ivl_kernels.checks import choose_backend, load_compiled
from torch import nn
from vllm import envs
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from ivl_vllm.serving.cascade import ExpectedEmbedding
from ivl_vllm.serving.other_vocabulary import OtherVocabulary
from ivl_vllm.serving.stages import one_stage
from ivl_vllm.vocab.vocab_map import VocabMap

# vLLM shows what is logged under its own name and nothing else.
logger = init_logger(f"vllm.{__name__}")

# Hidden states that output projections are asked about.
PROBE = 100.0
# How far from 1 a scale of the logits may seem to be by rounding alone.
MOST_SCALE = 0.002


class StableInput:
    """A model input that is computed anew every step, at an address that stays.

    CUDA graphs that were captured in pieces read their inputs where they lay at capture; vLLM's own inputs stay there.

    Attributes:
        buffer: `[most tokens, ...]`; None before the first step.
    """

    def __init__(self, max_tokens: int):
        self._max_tokens = max_tokens
        self.buffer: torch.Tensor | None = None

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` (`[tokens, ...]`), copied to the start of the buffer."""
        if self.buffer is None:
            self.buffer = tensor.new_empty(max(self._max_tokens, tensor.shape[0]), *tensor.shape[1:])
        return self.buffer[: tensor.shape[0]].copy_(tensor)


class Network:
    """A loaded value network.

    Args:
        model: vLLM model; `model(input_ids, positions)` gives hidden states, `model.compute_logits` their logits.
        model_config: its configuration.
        max_tokens: the most tokens of a step.
        base_columns: columns of the base's logits, and the number of token ids that the base knows.
        scheme: how it is joined to the base.
        vocab_map: for a network of another vocabulary.
        multimodal: the base is given images or the like, of which a value network reads the ids that stand for them.
        has_stages: the base is split into stages (pipeline parallelism), and this network is whole on the last one.

    Attributes:
        head: `[vocab, hidden]` projection matrix when one fused kernel can project and add; else None.
    """

    def __init__(
        self,
        model: nn.Module,
        model_config: ModelConfig,
        max_tokens: int,
        base_columns: int,
        scheme: str = "residual",
        vocab_map: VocabMap | None = None,
        multimodal: bool = False,
        has_stages: bool = False,
    ):
        self.model = model
        self._run_whole = one_stage if has_stages else contextlib.nullcontext
        self._ids = StableInput(max_tokens)
        self._embeds = StableInput(max_tokens)
        self._expected = None if scheme == "residual" else ExpectedEmbedding(model, with_text=scheme == "cascade+text")
        self._other = None if vocab_map is None else OtherVocabulary(vocab_map, model, base_columns)
        vocab_size = model_config.get_vocab_size()
        # Ids that it lacks are read as its last one: the base may know more, and images may have ids beyond all tokens.
        known = vocab_size if vocab_map is None else base_columns
        self._last_id = known - 1 if known < base_columns or multimodal else None
        self.head, reason = _plain_head(model, vocab_size)
        if self.head is not None and self._other is not None and self._other.mean:
            self.head = self._other.with_mean(self.head.t()).t().contiguous()
        self._width, self._dtype = model_config.get_hidden_size(), model_config.dtype
        self._base_columns = base_columns
        how = "fused with the weighted add" if self.head is not None else f"by its own compute_logits, as {reason}"
        logger.info("ivl: value network %s: output projection %s", model_config.model, how)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        base_hidden: torch.Tensor,
        base_logits: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Hidden states `[tokens, hidden]` of the same tokens that the base reads.

        Args:
            input_ids: int `[tokens]`.
            positions: int `[tokens]`.
            base_hidden: `[tokens, hidden of the base]`, read by cascade value networks.
            base_logits: the base's output projection, likewise.
        """
        ids, embeds = input_ids, None
        if self._last_id is not None:
            ids = ids.clamp(max=self._last_id)
        if self._other is not None:
            ids, embeds = self._other.read(ids)
        if self._expected is not None:
            embeds = self._expected(base_hidden, ids, base_logits)
        if embeds is not None:
            ids, embeds = None, self._embeds.hold(embeds)
        elif ids is not input_ids:
            ids = self._ids.hold(ids)
        with self._run_whole():
            return self.model(input_ids=ids, positions=positions, intermediate_tensors=None, inputs_embeds=embeds)

    def add_logits(
        self, logits: torch.Tensor, hidden: torch.Tensor, weights: torch.Tensor, row_index: torch.Tensor | None
    ) -> None:
        """`logits[row_index[i]] += weights[i] * value logits of hidden[i]`, in place.

        Args:
            logits: fp32 `[rows, vocab of the base]`.
            hidden: `[n, hidden]` in the network's dtype.
            weights: fp32 `[n]`.
            row_index: int `[n]`; None means row i.
        """
        vocab_map = None if self._other is None else self._other.columns
        if self.head is not None:
            lm_head_value_add(logits, hidden, self.head, weights, row_index=row_index, vocab_map=vocab_map)
            return
        value_logits = self.value_logits(hidden)
        if self._other is not None:
            value_logits = self._other.with_mean(value_logits)
        value_add(logits, value_logits, weights, row_index=row_index, vocab_map=vocab_map)

    def value_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[n, columns of its own vocabulary]` logits of `[n, hidden]`, unweighted and unmapped."""
        # Contiguous: the rows are columns of the joined tensor, and quantized heads want plain ones.
        value_logits = self.model.compute_logits(hidden.contiguous())
        return value_logits if self._other is None else self._other.known(value_logits)

    @property
    def partners(self) -> torch.Tensor | None:
        """Each base column's own column of the value logits, -1 for none; None where both have one vocabulary."""
        return None if self._other is None else self._other.partners

    @torch.inference_mode()
    def warm_up(self, max_rows: int) -> None:
        """Compiles the kernels that `add_logits` will use, so that no request waits for the compiler.

        Rows are powers of two, and as many as there can be: a kernel's tiles depend on how many there are. Weights are
        0, so nothing is computed.
        """
        parameter = next(self.model.parameters())
        if choose_backend("auto", parameter.device) != "triton":
            if parameter.is_cpu:
                load_compiled("fused_add")
            return
        for rows in warm_up_rows(max_rows):
            for logits in no_logits(rows, self._base_columns, parameter.device):
                index = torch.arange(rows, device=parameter.device)
                for row_index in (None, index):
                    self.add_logits(logits, self.no_hidden(rows), logits.new_zeros(rows), row_index)

    def no_hidden(self, rows: int) -> torch.Tensor:
        """Zeros in place of its hidden states, `[rows, hidden]`."""
        return next(self.model.parameters()).new_zeros(rows, self._width, dtype=self._dtype)


def warm_up_rows(most: int) -> list[int]:
    """The powers of two below `most`, and `most`."""
    return [1 << power for power in range((most - 1).bit_length())] + [most]


def no_logits(rows: int, columns: int, device: torch.device) -> list[torch.Tensor]:
    """Zeros `[rows, columns]` with the row strides that a step's fp32 logits may have.

    vLLM pads a vocabulary to a multiple of 64 and hands over a view without the padding; a single row of it keeps its
    stride when it is converted, and all rows do where they were fp32 before. Triton compiles anew for a stride that 16
    divides.
    """
    found = [torch.zeros(rows, columns, device=device)]
    if columns % 16:
        found.append(torch.zeros(rows, -(-columns // 64) * 64, device=device)[:, :columns])
    return found


def _plain_head(model: nn.Module, vocab_size: int) -> tuple[torch.Tensor | None, str]:
    """The projection matrix, when the value logits are `hidden @ matrix.T` and nothing else; or why it is not used."""
    head = getattr(model, "lm_head", None)
    weight = getattr(head, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return None, "the model has no plain lm_head"
    if choose_backend("auto", weight.device) != "triton":
        return None, f"there is no Triton for {weight.device}"
    if getattr(head, "tp_size", 1) > 1:
        return None, "its vocabulary is split over tensor-parallel ranks"
    method = getattr(head, "quant_method", None)
    if not isinstance(method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
        return None, f"its head is quantized ({type(method).__name__})"
    if envs.VLLM_BATCH_INVARIANT:
        return None, "VLLM_BATCH_INVARIANT asks for vLLM's own kernels"
    matrix = weight[:vocab_size]
    # Scales, soft caps, biases and dtypes live in as many places as there are models: ask the model itself.
    with torch.inference_mode():
        probe = head_probe(torch.zeros(2, matrix.shape[1], dtype=matrix.dtype, device=matrix.device))
        theirs, ours = model.compute_logits(probe).float(), (probe @ matrix.t()).float()
    tolerance = torch.finfo(matrix.dtype).eps * 8 * ours.abs().max().item() + 1e-6
    if not (
        is_linear(model.compute_logits, probe)
        and theirs.shape == ours.shape
        and math.isfinite(tolerance)
        and torch.allclose(theirs, ours, rtol=0.0, atol=tolerance)
        # A scale near 1 is within rounding of each number, but not of all together.
        and abs((theirs * ours).sum() - (ours * ours).sum()) <= MOST_SCALE * (ours * ours).sum()
    ):
        return None, "its logits are more than a projection (a bias, a scale or a soft cap)"
    return matrix, ""


def head_probe(hidden: torch.Tensor) -> torch.Tensor:
    """Numbers of both signs for hidden states of this form, so large that a soft cap of the logits shows."""
    numbers = torch.linspace(-PROBE, PROBE, hidden.numel(), device=hidden.device)
    return numbers.view_as(hidden).to(hidden.dtype)


@torch.inference_mode()
def is_linear(logits_of: Callable[[torch.Tensor], torch.Tensor], probe: torch.Tensor) -> bool:
    """Whether logits are a projection of hidden states: to double these is exact in every dtype, rounding or not.

    A bias or a soft cap is within rounding of 16 bits, if small hidden states are asked once. Only numbers below the
    normal ones, which float16 has, are rounded otherwise when they are doubled.
    """
    once, twice, nothing = logits_of(probe), logits_of(2 * probe), logits_of(0 * probe)
    kind = torch.finfo(once.dtype)
    step = kind.smallest_normal * kind.eps  # between those numbers
    return torch.allclose(twice.double(), 2 * once.double(), rtol=0.0, atol=2 * step) and not nothing.any().item()
