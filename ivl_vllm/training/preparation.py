"""From tokenised examples to batches: lengths, packing, and held-out rows shared out to several processes."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from ivl_vllm.training.exact_json import exact_numbers
from ivl_vllm.training.objective import IGNORED
from ivl_vllm.training.progress import long_bar

# What is read of a row that has been tokenised.
_KEPT = ("input_ids", "labels", "line", "completion_mask", "seq_lengths")
_FLAGS = {"train": "--data", "eval": "held-out data"}


@dataclass(frozen=True)
class Limits:
    """What a tokenised example must keep to.

    Args:
        max_length: Longest example in tokens; None for no limit.
        drop_long: Leave longer examples out instead of cutting them.
        keep_end: Cut at the start instead of the end.
        vocab_size: Ids must be below this: the columns of the narrowest network.
    """

    max_length: int | None
    drop_long: bool
    keep_end: bool
    vocab_size: int

    def apply(self, dataset: Dataset, flag: str) -> tuple[Dataset, str | None]:
        """Check every example, then cut or drop the long ones.

        Args:
            dataset: Rows with `input_ids`, `labels` and, where known, `line`.
            flag: What to call the data in messages.

        Returns:
            The rows that are trained, and a line on what was cut or dropped (None: nothing was).

        Raises:
            ValueError: An id beyond the vocabulary, an example without answer tokens, or no example left.
        """
        kept, cut, dropped, first = [], 0, 0, None
        for index, row in enumerate(long_bar(dataset, f"checking {flag}", "examples")):
            where = f"{flag}, line {row['line']}" if "line" in row else flag
            ids, labels = row["input_ids"], row["labels"]
            if max(ids, default=-1) >= self.vocab_size:
                raise ValueError(
                    f"{where}: token id {max(ids)} is beyond a network's vocabulary of {self.vocab_size}; "
                    "the tokenizer does not belong to it"
                )
            if not _has_answer(labels):
                raise ValueError(f"{where}: no answer tokens are left after the chat template and the tokenizer")
            if self.max_length is None or len(ids) <= self.max_length:
                kept.append(index)
                continue
            first = first or where
            if not self.drop_long and _has_answer(labels[self._window]):
                kept.append(index)
                cut += 1
            else:
                dropped += 1
        if not kept:
            raise ValueError(
                f"{flag}: no answer tokens are left within --max_length {self.max_length}, not one example of "
                f"{len(dataset)} remains. Raise it"
            )
        if not cut + dropped:
            return dataset, None
        message = (
            f"{flag}: {cut + dropped} of {len(dataset)} examples are longer than --max_length {self.max_length}, the "
            f"first in {first.removeprefix(f'{flag}, ')}: {cut} truncated, {dropped} dropped"
            + (" (no answer token within it)" if dropped and not self.drop_long else "")
        )
        rows = dataset.select(kept)
        window = self._window
        return rows.map(lambda row: {name: row[name][window] for name in ("input_ids", "labels")}), message

    @property
    def _window(self) -> slice:
        return slice(-self.max_length, None) if self.keep_end else slice(None, self.max_length)


def _has_answer(labels: list[int]) -> bool:
    # The first token has no position before it that could be trained to give it.
    return any(label != IGNORED for label in labels[1:])


class Preparation(SFTTrainer):
    """The data half of the trainer."""

    # Set by the trainer before TRL's own set-up runs; None leaves lengths to TRL.
    _limits: Limits | None = None
    # Indices of the blank rows at the end, while the training batches are being made.
    _blanks = range(0)

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: SFTConfig, packing: bool, *rest: Any
    ) -> Dataset:
        if self._limits is None:
            return super()._prepare_dataset(dataset, processing_class, args, packing, *rest)
        # Tokenised first, whole: TRL truncates, and when packing truncates otherwise, without a word on how much.
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        flag = _FLAGS.get(rest[-1], str(rest[-1]))
        with exact_numbers():
            dataset = super()._prepare_dataset(dataset, processing_class, whole, False, *rest)
        # Conversations and tools, of which nothing but time is left to lose.
        dataset = dataset.select_columns([name for name in dataset.column_names if name in _KEPT])
        dataset, message = self._limits.apply(dataset, flag)
        if message and args.process_index == 0:
            print(message, flush=True)
        return super()._prepare_dataset(dataset, processing_class, args, packing, *rest) if packing else dataset

    def get_train_dataloader(self) -> DataLoader:
        """The training batches; over several processes each row counts once an epoch, in one process's order.

        See `get_eval_dataloader`: blank rows fill the epoch's last step.
        """
        size = self._train_batch_size * self.args.world_size
        is_even = self.args.world_size == 1 or self.args.dataloader_drop_last or len(self.train_dataset) % size == 0
        if is_even or self.args.train_sampling_strategy != "random":
            return super().get_train_dataloader()
        rows = self.train_dataset
        try:
            self.train_dataset = pad_rows(rows, size)
            self._blanks = range(len(rows), len(self.train_dataset))
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self._blanks = rows, range(0)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if not self._blanks:
            return super()._get_train_sampler(train_dataset)
        return _BlanksLast(SeedableRandomSampler(range(self._blanks[0]), data_seed=self.args.data_seed), self._blanks)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """The held-out batches; over several processes each row counts once.

        accelerate evens batches out by repeating rows, which the loss would count twice. Blank rows (no answer token)
        make the batches even instead, so every process makes the same number of steps, as FSDP needs.
        """
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.args.world_size > 1:
            rows = pad_rows(rows, self.args.eval_batch_size * self.args.world_size)
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False  # of training rows alone
        try:
            return super().get_eval_dataloader(rows)
        finally:
            self.args.dataloader_drop_last = drops


class _BlanksLast(Sampler):
    """The order that accelerate gives one process, and then the blank rows."""

    def __init__(self, rows: SeedableRandomSampler, blanks: range) -> None:
        self.rows, self.blanks = rows, blanks

    def __iter__(self) -> Iterator[int]:
        yield from self.rows
        yield from self.blanks

    def __len__(self) -> int:
        return len(self.rows) + len(self.blanks)

    def set_epoch(self, epoch: int) -> None:
        """accelerate calls this before each epoch, which is what makes the order another one."""
        self.rows.set_epoch(epoch)


def pad_rows(dataset: Dataset, multiple: int) -> Dataset:
    """Append rows without answer tokens until the number of rows is a multiple of `multiple`."""
    missing = -len(dataset) % multiple
    if not missing:
        return dataset
    blank = {**dataset[0], "labels": [IGNORED] * len(dataset[0]["labels"])}
    return concatenate_datasets([dataset, Dataset.from_list([blank] * missing, features=dataset.features)])


@torch.no_grad()
def check_packing(network: PreTrainedModel, collate: Any, flag: str) -> None:
    """Refuse a network that sees from one packed example into the next; tried out, not guessed from its name.

    Args:
        network: The network, on its device.
        collate: The trainer's collator, which makes a packed batch of rows with `seq_lengths`.
        flag: The flag that the network came from.

    Raises:
        ValueError: Its hidden states differ between an example packed behind another and the same example alone.
    """
    size = min(network.config.get_text_config().vocab_size, 50)
    ids = torch.randint(size, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = collate([{"input_ids": ids, "labels": ids, "seq_lengths": [7, 5]}])
    del batch["labels"]
    device = next(network.parameters()).device
    batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    was_training = network.training
    network.eval()
    try:
        packed = network(**batch, use_cache=False, output_hidden_states=True).hidden_states[-1][0, 7:12].float()
        alone = torch.tensor([ids[7:]], device=device)
        single = network(alone, use_cache=False, output_hidden_states=True).hidden_states[-1][0].float()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--packing: the network of {flag} takes no packed examples ({error}); leave it off"
        ) from error
    finally:
        network.train(was_training)
    # Half-precision rounding is far below this, what a leak does far above.
    if (packed - single).norm() > 0.05 * single.norm():
        raise ValueError(
            f"--packing: the network of {flag}, with attention {network.config._attn_implementation!r}, sees from one "
            "packed example into the next; leave --packing off, or choose another attention"
        )
