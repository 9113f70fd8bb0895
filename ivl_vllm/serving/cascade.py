"""Cascade value networks: they read what the base expects next, in place of (or beside) the tokens themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

# Rows of base logits that exist at a time: 512 rows of 152k fp32 columns are 0.3 GB, and their softmax is as much.
ROWS_AT_A_TIME = 512


class ExpectedEmbedding:
    """`softmax(B(x)) · E_V`: the value network's embedding of the next token, in the base's expectation.

    The softmax is over all columns of the base; those that the value network has too take part in the product.

    Args:
        model: the value network, as vLLM loaded it.
        with_text: add the embedding of the token itself (the scheme `cascade+text`).

    Raises:
        ValueError: the model has no plain token embedding.
    """

    def __init__(self, model: nn.Module, with_text: bool):
        tables = [
            module
            for module in model.modules()
            if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
        ]
        if len(tables) != 1:
            raise ValueError(
                f"ivl: a cascade value network needs one table of token embeddings, {type(model).__name__} has "
                f"{len(tables)}: use one that was trained with the residual scheme"
            )
        self._embed = model.embed_input_ids
        self._with_text = with_text
        shard = tables[0].shard_indices
        self._columns = slice(shard.org_vocab_start_index, shard.org_vocab_end_index)
        self._ranks = tables[0].tp_size
        matrix = tables[0].weight[: shard.org_vocab_end_index - shard.org_vocab_start_index]
        # Some models scale their embeddings (Gemma), each in its own way: ask the model by how much.
        with torch.inference_mode():
            ids = torch.arange(4, device=matrix.device)
            plain, scaled = tables[0](ids).float(), self._embed(ids).float()
            scale = ((scaled * plain).sum() / (plain * plain).sum()).item()
        self._matrix = matrix if abs(scale - 1) < 1e-3 else matrix * scale

    def __call__(
        self, base_hidden: torch.Tensor, input_ids: torch.Tensor, base_logits: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Input embeddings for the value network.

        Args:
            base_hidden: `[tokens, hidden of the base]`.
            input_ids: int `[tokens]`.
            base_logits: the base's output projection, `[n, hidden]` to `[n, vocab]`.

        Returns:
            `[tokens, hidden of the value network]` in its dtype.
        """
        parts = []
        for rows in base_hidden.split(ROWS_AT_A_TIME):
            # fp32 although the matrix may be bfloat16: a flat distribution has probabilities far below its resolution.
            probabilities = base_logits(rows.contiguous()).float().softmax(-1)[:, self._columns]
            table = self._matrix[: probabilities.shape[1]]
            parts.append(probabilities.to(table.dtype) @ table)
        expected = torch.cat(parts)
        if self._ranks > 1:
            expected = tensor_model_parallel_all_reduce(expected)
        return expected + self._embed(input_ids) if self._with_text else expected
