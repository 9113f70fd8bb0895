"""The trainer: TRL's `SFTTrainer` with the loss of `objective` and a frozen base beside the model."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from ivl_vllm.training.arguments import CommonArguments
from ivl_vllm.training.objective import answer_positions, residual_terms
from ivl_vllm.training.progress import use_progress_lines


@dataclass
class TrainerArguments(CommonArguments, SFTConfig):
    """All of TRL's `SFTConfig`, with the defaults of `CommonArguments`."""

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("--output is missing: the folder for the trained value network")
        has_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = has_gpu and torch.cuda.is_bf16_supported() and not self.fp16
        self.dataloader_pin_memory = self.dataloader_pin_memory and has_gpu
        super().__post_init__()


class ValueTrainer(SFTTrainer):
    """Trains a value network `V` so that `softmax(B0 + V)` fits demonstrations, `B0` frozen.

    Args:
        value: The network that is trained.
        base: The frozen base; set to eval mode, without gradients, and never changed.
        norm: Norm of the regulariser, see `objective.value_norm`.
        norm_weight: Its weight λ.
        args: Settings of the run.
        processing_class: The tokenizer that both share.
        train_dataset: Prompt/completion examples, or tokenised `input_ids` and `labels`.
        eval_dataset: Held-out examples of the same kind.
        on_save: Called with each folder that was written (checkpoints too), for what belongs beside the weights.
    """

    _tag_names = ("ivl",)
    _name = "IVL"

    def __init__(
        self,
        value: PreTrainedModel,
        base: PreTrainedModel,
        *,
        norm: str,
        norm_weight: float,
        args: SFTConfig,
        processing_class: PreTrainedTokenizerBase,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        on_save: Callable[[Path], None] | None = None,
    ) -> None:
        self.norm, self.norm_weight, self._on_save = norm, norm_weight, on_save
        # Sums since the last log, on the device: the step itself never waits for it.
        self._sums: dict[str, torch.Tensor] = {}
        super().__init__(
            model=value,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
        )
        use_progress_lines(self)
        # Not a submodule of the trained model: neither the optimizer, nor a checkpoint, nor `model.train()` reach it.
        self.base = base.requires_grad_(False).eval().to(self.args.device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Cross-entropy plus λ·norm over the answer tokens of a batch.

        Args:
            model: The value network, possibly wrapped.
            inputs: `input_ids`, `attention_mask` (or `position_ids`) and `labels`, all [B, T].
            return_outputs: Not offered; this trainer takes no `compute_metrics`.
            num_items_in_batch: Answer tokens of the whole optimizer step, over batches and devices.

        Returns:
            A scalar, fp32.
        """
        if return_outputs:
            raise NotImplementedError("ValueTrainer returns no logits; evaluate with its logged eval_ce instead")
        columns, mask = answer_positions(inputs["labels"])
        network_inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        with torch.no_grad():
            base_logits = answer_logits(self.base, self.base, network_inputs, columns)[mask]
        value_logits = answer_logits(model, self.model, network_inputs, columns)[mask]
        labels = inputs["labels"][:, 1:][:, columns][mask]
        ce, norm, joined = residual_terms(base_logits, value_logits, labels, self.norm)

        count = labels.numel() if num_items_in_batch is None else num_items_in_batch
        loss = (ce + self.norm_weight * norm).sum() / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count is of all devices, and their gradients are averaged.
            loss = loss * self.accelerator.num_processes
        with torch.no_grad():
            correct = (joined.argmax(-1) == labels).sum()
            sums = torch.stack([ce.sum(), norm.sum(), correct, ce.new_tensor(labels.numel())])
            mode = "train" if self.model.training else "eval"
            self._sums[mode] = self._sums.get(mode, 0) + sums
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `ce`, `norm` and `mean_token_accuracy`, averaged over all answer tokens since the last log."""
        mode = "train" if self.model.training else "eval"
        prefix = "" if mode == "train" else "eval_"
        if mode in self._sums and "train_runtime" not in logs:
            ce, norm, correct, count = self.accelerator.reduce(self._sums.pop(mode), "sum").tolist()
            ce, norm, accuracy = (total / max(count, 1.0) for total in (ce, norm, correct))
            logs.update({f"{prefix}ce": ce, f"{prefix}norm": norm, f"{prefix}mean_token_accuracy": accuracy})
            if mode == "eval":
                # transformers averages over batches, whatever their number of answer tokens.
                logs["eval_loss"] = ce + self.norm_weight * norm
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card tells of plain fine-tuning; `on_save` writes the one that fits."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        # A pickle that nothing reads back.
        (folder / "training_args.bin").unlink(missing_ok=True)
        if self.args.should_save and self._on_save is not None:
            self._on_save(folder)


def answer_logits(
    model: torch.nn.Module, plain: PreTrainedModel, inputs: dict[str, torch.Tensor], columns: torch.Tensor
) -> torch.Tensor:
    """Logits at some positions of every row.

    Args:
        model: Network to call.
        plain: The same network without wrappers, whose signature tells whether it can leave out positions.
        inputs: Its inputs, [B, T].
        columns: [C] int64, the positions that are wanted.

    Returns:
        [B, C, vocab].
    """
    if "logits_to_keep" in inspect.signature(plain.forward).parameters:
        return model(**inputs, use_cache=False, logits_to_keep=columns).logits
    return model(**inputs, use_cache=False).logits[:, columns]
