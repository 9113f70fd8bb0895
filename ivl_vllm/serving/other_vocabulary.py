"""A value network of another vocabulary: how it reads the base's tokens, and which columns of its logits they get."""

from __future__ import annotations

import torch
from ivl_kernels.checks import check_vocab_map
from torch import nn

from ivl_vllm.vocab.vocab_map import VocabMap

# Token embeddings that are averaged at a time while the table is made.
TOKENS_AT_A_TIME = 4096


class OtherVocabulary:
    """A vocabulary map on the device, for one base and one value network.

    Ids and columns of the base beyond the map are padding: they read as the first token and get nothing.

    Args:
        vocab_map: made for the tokenizers of these two models.
        model: the value network, as vLLM loaded it.
        base_columns: columns of the base's logits.

    Attributes:
        columns: int32 `[base columns]`, as the kernels take it; the column `vocab_map.value_vocab` is the row's mean.
        mean: whether some base column gets the mean of the value row.
        partners: `columns`, with none (-1) in place of the mean.
    """

    def __init__(self, vocab_map: VocabMap, model: nn.Module, base_columns: int):
        device = next(model.parameters()).device
        self._value_columns = vocab_map.value_vocab
        self.mean = bool((vocab_map.columns == vocab_map.value_vocab).any())
        columns = torch.full((base_columns,), -1, dtype=torch.int32)
        columns[: vocab_map.base_vocab] = torch.from_numpy(vocab_map.columns)
        self.columns = check_vocab_map(columns, self._value_columns + self.mean, base_columns).to(device)
        self.partners = torch.where(self.columns < self._value_columns, self.columns, -1).to(torch.int32)
        starts = torch.from_numpy(vocab_map.piece_starts).long()
        pieces = torch.from_numpy(vocab_map.pieces)
        first = torch.zeros(base_columns, dtype=torch.int32)
        first[: vocab_map.base_vocab] = pieces[starts[:-1]]
        self._ids = first.to(device)
        # One row of embeddings for each base token: as large as the base's vocabulary, but nothing to do per step.
        self._embeddings = None if vocab_map.single else _mean_embeddings(model, self._ids, starts, pieces.to(device))

    def read(self, input_ids: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the value network reads for the base's `[tokens]` ids: its own ids, or `[tokens, hidden]` embeddings."""
        if self._embeddings is None:
            return self._ids[input_ids].to(input_ids.dtype), None
        return None, self._embeddings[input_ids]

    def known(self, value_logits: torch.Tensor) -> torch.Tensor:
        """Value logits `[n, columns]` without padding: the columns that have a token."""
        return value_logits[:, : self._value_columns]

    def with_mean(self, value_logits: torch.Tensor) -> torch.Tensor:
        """Value logits `[n, columns]` with their mean as a further column, if some base column wants it.

        Applied to the projection matrix transposed it gives the row whose product is that mean.
        """
        if not self.mean:
            return value_logits
        known = self.known(value_logits)
        return torch.cat([known, known.float().mean(1, keepdim=True).to(known.dtype)], dim=1)


def _mean_embeddings(model: nn.Module, first: torch.Tensor, starts: torch.Tensor, pieces: torch.Tensor) -> torch.Tensor:
    """`[base columns, hidden]`: the mean of the embeddings of each base token's pieces."""
    with torch.inference_mode():
        table = torch.cat([model.embed_input_ids(part) for part in first.split(TOKENS_AT_A_TIME)])
        counts = starts.diff()
        for part in torch.nonzero(counts > 1).flatten().split(TOKENS_AT_A_TIME):
            lengths = counts[part]
            ids = torch.cat([pieces[starts[token] : starts[token + 1]] for token in part.tolist()])
            owner = torch.repeat_interleave(torch.arange(len(part)), lengths).to(table.device)
            summed = torch.zeros(len(part), table.shape[1], device=table.device)
            summed.index_add_(0, owner, model.embed_input_ids(ids).float())
            table[part.to(table.device)] = (summed / lengths[:, None].to(table.device)).to(table.dtype)
    return table
