"""Final hidden states of the frozen base on disk, so that it runs once per example and not once per epoch.

A folder of safetensors shards. Each tensor is one example's answer positions, [n, H] in the dtype that the base
computed; its name is a hash of the example's tokens and of which of them are trained. So the order of the data, the
batch size and the number of processes may change between runs. `base_cache.json` says which base they belong to.
"""

import hashlib
import json
import os
import re
import uuid
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, TrainerCallback

from ivl_vllm.training.folders import check_writable, new_file_mode
from ivl_vllm.training.frozen_bases import FrozenBases

META_NAME = "base_cache.json"
FORMAT_VERSION = 3
SHARD_BYTES = 256 * 2**20
# What a configuration says that changes no hidden state.
_NOT_THE_MODELS = re.compile("name_or_path|transformers_version|architectures|use_cache|_token_id|initializer|dropout")


class BaseCache:
    """Reads what is in the folder; computes, keeps and writes what is not.

    Args:
        folder: Where the shards are; made if need be. Processes of one run share it.
        bases: The frozen side; only a single base is cached.
        dtype: The dtype that the base computes in, where autocast changes it: part of what must agree.
        shard_bytes: Size at which a shard is written. What is pending when a run ends is written by `flush`.

    Raises:
        ValueError: Several bases, a file in the way, or a folder that belongs to another base or dtype.
    """

    def __init__(
        self, folder: str | Path, bases: FrozenBases, dtype: str = "auto", shard_bytes: int = SHARD_BYTES
    ) -> None:
        if len(bases.models) != 1:
            raise ValueError("--cache_base keeps one base's hidden states; leave --more_bases out")
        self.folder, self._bases, self._shard_bytes = Path(os.path.expanduser(folder)), bases, shard_bytes
        check_writable(self.folder, "--cache_base", unless=META_NAME)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_meta({"format_version": FORMAT_VERSION, "base": fingerprint(bases.models[0]), "dtype": dtype})
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._where: dict[str, Any] = {}
        self._shards: set[str] = set()
        self.computed = self.read = 0
        self._find_shards()

    def _check_meta(self, meta: dict[str, Any]) -> None:
        path = self.folder / META_NAME
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if any(self.folder.glob("*.safetensors")):
                raise ValueError(
                    f"--cache_base {self.folder}: holds safetensors files but no {META_NAME}, so it is no cache; "
                    "name another folder"
                ) from None
            _write_atomically(path, lambda target: target.write_text(json.dumps(meta, indent=2) + "\n"))
            return
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}; delete the folder") from error
        differing = [name for name in meta if not isinstance(found, dict) or found.get(name) != meta[name]]
        if differing:
            raise ValueError(
                f"--cache_base {self.folder}: was made with another {' and '.join(differing)}; "
                "delete it or name another folder"
            )

    def _find_shards(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._shards:
                try:
                    shard = safe_open(path, framework="pt")
                except SafetensorError as error:
                    raise ValueError(f"{path} is no safetensors file; delete it") from error
                self._shards.add(path.name)
                self._where.update(dict.fromkeys(shard.keys(), shard))

    def features(self, index: int, inputs: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """As `FrozenBases.features`; the base runs only where an example of the batch is new.

        Args:
            index: Which base; there is one.
            inputs: What the base is called with, [B, T] each.
            mask: [B, T], bool: the answer positions.

        Returns:
            [N, H].
        """
        examples = split_examples(inputs, mask)
        names = [name for name, _ in examples]
        if any(name not in self._where and name not in self._pending for name in names):
            # Another process may have written it meanwhile.
            self._find_shards()
        if any(name not in self._where and name not in self._pending for name in names):
            hidden = self._bases.features(index, inputs, mask)
            self.computed += len(names)
            for (name, count), rows in zip(examples, hidden.split([count for _, count in examples]), strict=True):
                if name not in self._where and name not in self._pending:
                    # A copy: a slice would keep the whole batch, and on the device.
                    self._pending[name] = rows.to("cpu", copy=True).contiguous()
                    self._pending_bytes += count * hidden.shape[1] * hidden.element_size()
            if self._pending_bytes >= self._shard_bytes:
                self.flush()
            return hidden
        self.read += len(names)
        kept = [self._pending[n] if n in self._pending else self._where[n].get_tensor(n) for n in names]
        if not kept:
            return self._bases.features(index, inputs, mask)
        return torch.cat(kept).to(mask.device)

    def flush(self) -> None:
        """Write what is pending as one more shard."""
        if self._pending:
            # A name of its own: processes never write to the same file.
            path = self.folder / f"{uuid.uuid4().hex}.safetensors"
            _write_atomically(path, lambda target: save_file(self._pending, target))
            self._pending, self._pending_bytes = {}, 0
            self._find_shards()


class FlushCache(TrainerCallback):
    """Writes what a cache holds in memory after every epoch and evaluation, and at the end."""

    def __init__(self, cache: BaseCache) -> None:
        self._cache = cache

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """See the class."""
        self._cache.flush()

    on_evaluate = on_train_end = on_epoch_end


def split_examples(inputs: dict[str, torch.Tensor], mask: torch.Tensor) -> list[tuple[str, int]]:
    """The examples of a batch that have answer positions, in the order of those positions.

    Packed rows, and batches flattened to one row, hold several examples: each begins where `position_ids` is 0.

    Args:
        inputs: `input_ids` and perhaps `attention_mask` and `position_ids`, [B, T].
        mask: [B, T], bool: the answer positions.

    Returns:
        For each example its name, a hash, and its number of answer positions.
    """
    ids, mask = inputs["input_ids"].cpu(), mask.cpu()
    starts = torch.zeros_like(mask)
    if "position_ids" in inputs:
        starts = inputs["position_ids"].cpu() == 0
    real = inputs["attention_mask"].cpu().bool() if "attention_mask" in inputs else torch.ones_like(mask)
    examples = []
    for row in range(ids.shape[0]):
        edges = sorted({0, *starts[row].nonzero().flatten().tolist(), ids.shape[1]})
        for start, stop in pairwise(edges):
            count = int(mask[row, start:stop].sum())
            if count:
                keep = real[row, start:stop]
                content = torch.stack([ids[row, start:stop][keep], mask[row, start:stop][keep].long()])
                name = hashlib.blake2b(content.contiguous().numpy().tobytes(), digest_size=16).hexdigest()
                examples.append((name, count))
    return examples


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of a model's settings, its layout, and of each tensor the first bytes and sums of 64-bit words, 512 each.

    A model differs of which a single number was trained on, or whose rows are in another order.
    """
    settings = {name: x for name, x in model.config.to_diff_dict().items() if not _NOT_THE_MODELS.search(name)}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        data = tensor.detach().contiguous().flatten().view(torch.uint8)
        if data.storage_offset() % 8:  # a slice of something larger
            data = data.clone()
        rest = len(data) % (8 * 512)
        # Ten times as fast as the numbers one by one, and what overflows is of no matter.
        sums = data[: len(data) - rest].view(torch.int64).view(-1, 512).sum(1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for part in (sums, data[:256], data[len(data) - rest :]):
            digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()


def _write_atomically(path: Path, write: Any) -> None:
    # A name that `glob("*.safetensors")` does not see until it is whole.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        write(partial)
        os.chmod(partial, new_file_mode(path.parent))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
