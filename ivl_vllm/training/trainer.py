"""The trainer: TRL's `SFTTrainer` with the loss of `objective` and a frozen base beside the model."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ivl_vllm.training.arguments import CommonArguments, check_numbers
from ivl_vllm.training.base_cache import BaseCache, FlushCache
from ivl_vllm.training.chunked_loss import CHUNK
from ivl_vllm.training.frozen_bases import FrozenBases
from ivl_vllm.training.joint_loss import JointLoss
from ivl_vllm.training.objective import answer_mask, norm_mask
from ivl_vllm.training.preparation import Limits, Preparation
from ivl_vllm.training.processes import check_deepspeed, check_group, check_launch, check_stage, needs_cpu
from ivl_vllm.training.progress import LogsLastStep, use_progress_lines
from ivl_vllm.training.saving import SafeSaving

# What is measured on held-out data.
METRICS = ("loss", "ce", "norm", "mean_token_accuracy")


@dataclass
class TrainerArguments(CommonArguments, SFTConfig):
    """All of TRL's `SFTConfig`, with the defaults of `CommonArguments`."""

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("--output is missing: the folder for the trained value network")
        check_numbers(self)
        check_launch(self.fsdp)
        check_deepspeed(self.deepspeed)
        self.use_cpu = self.use_cpu or needs_cpu()
        has_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = has_gpu and torch.cuda.is_bf16_supported() and not self.fp16
        self.dataloader_pin_memory = self.dataloader_pin_memory and has_gpu
        # It would log a plausible number in the place of NaN, and waits for the device at each step to do so.
        self.logging_nan_inf_filter = False
        self._refuse_what_is_replaced()
        self._look_for_the_best()
        super().__post_init__()
        check_stage()
        check_group(self.world_size, self.n_gpu)

    def _look_for_the_best(self) -> None:
        """Where the best checkpoint is wanted, held-out data are evaluated whenever one is written, by their loss."""
        writes = getattr(self.save_strategy, "value", self.save_strategy)
        if not self.load_best_model_at_end and writes != "best":
            return
        if writes == "no":
            raise ValueError(
                "--load_best_model_at_end true: --save_strategy no writes nothing to load; use epoch or steps there"
            )
        if getattr(self.eval_strategy, "value", self.eval_strategy) == "no":
            self.eval_strategy = writes if writes in ("steps", "epoch") else "epoch"
            self.eval_steps = self.eval_steps or (self.save_steps if writes == "steps" else None)
        self.metric_for_best_model = self.metric_for_best_model or "loss"
        name = self.metric_for_best_model.removeprefix("eval_")
        if name not in METRICS:
            raise ValueError(
                f"--metric_for_best_model is {self.metric_for_best_model}; expected {', '.join(METRICS[:-1])} or "
                f"{METRICS[-1]}"
            )
        if self.greater_is_better is None:  # transformers takes every name but those that end with "loss" for a score
            self.greater_is_better = name == "mean_token_accuracy"

    def _refuse_what_is_replaced(self) -> None:
        """Flags of `SFTConfig` that would change nothing here, or do what they should not."""
        loss = "the loss is that of base plus value (--norm, --norm_positions, --base_temperature)"
        upload = f"upload the finished folder: hf upload NAME {self.output_dir}"
        defaults = {field.name: field.default for field in fields(self)}
        for name, usual, instead in (
            ("label_smoothing_factor", (0.0,), loss),
            ("loss_type", ("nll", "chunked_nll"), loss),
            ("router_aux_loss_coef", (0.0,), loss),
            ("completion_only_loss", (True,), "only answers are trained"),
            ("assistant_only_loss", (False,), "only answers are trained, with any chat template"),
            ("push_to_hub", (False,), upload),
            ("dataset_kwargs", (None,), "demonstrations are prepared in one way"),
            ("dataset_text_field", ("text",), "demonstrations are prepared in one way"),
        ):
            # The defaults are other ones in other releases of TRL.
            if name in defaults and (given := getattr(self, name)) not in (*usual, defaults[name]):
                raise ValueError(f"--{name} {given}: not offered, leave it out; {instead}")
        if self.padding_free and not self.packing:
            raise ValueError("--padding_free true: not offered alone; --packing true leaves padding out too")
        if "router_aux_loss_coef" in defaults:
            self.router_aux_loss_coef = None if defaults["router_aux_loss_coef"] is None else 0.0


# What a network's configuration says of the loss that balances its experts.
ROUTING = ("output_router_logits", "router_aux_loss_coef")


class ValueTrainer(SafeSaving, Preparation):
    """Trains a value network `V` so that `softmax(B0 + V)` fits demonstrations, `B0` frozen.

    Args:
        value: The network that is trained.
        base: The frozen base; set to eval mode, without gradients, and never changed.
        norm: Norm of the regulariser, see `objective.value_norm`.
        norm_weight: Its weight λ.
        norm_positions: Where it is taken, see `objective.norm_mask`.
        scheme: What the value network reads, see `schemes`.
        more_bases: Further frozen bases of the same vocabulary.
        base_mix: `draw` or `average`, see `frozen_bases.FrozenBases`.
        base_temperature: Divides the bases' logits in training.
        base_noise: Standard deviation of Gaussian noise on the bases' logits in training.
        cache_base: Folder for the base's hidden states, see `base_cache`.
        loss_chunk: Positions whose logits exist at a time.
        args: Settings of the run.
        processing_class: The tokenizer that both share.
        train_dataset: Prompt/completion examples, or tokenised `input_ids` and `labels`.
        eval_dataset: Held-out examples of the same kind.
        on_save: Called with each folder that is written (checkpoints too) and the folder that it becomes, for what
            belongs beside the weights.
        limits: What every example must keep to; left out, TRL truncates at `args.max_length`.
    """

    # Whether the first batch has come: optimizer and scheduler are made by then.
    has_begun = False
    _tag_names = ("ivl",)
    _name = "IVL"

    def __init__(
        self,
        value: PreTrainedModel,
        base: PreTrainedModel,
        *,
        norm: str,
        norm_weight: float,
        norm_positions: str = "answer",
        scheme: str = "residual",
        more_bases: Sequence[PreTrainedModel] = (),
        base_mix: str = "draw",
        base_temperature: float = 1.0,
        base_noise: float = 0.0,
        cache_base: str | Path | None = None,
        loss_chunk: int = CHUNK,
        args: SFTConfig,
        processing_class: PreTrainedTokenizerBase,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        on_save: Callable[[Path, Path], None] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.norm, self.norm_weight, self._on_save = norm, norm_weight, on_save
        self._limits = limits
        # Answer tokens over norm positions of the present optimizer step; None where they are the same positions.
        self._answers_per_position: float | None = None
        # Sums since the last log, on the device: the step itself never waits for it.
        self._sums: dict[str, torch.Tensor] = {}
        config = value.config.get_text_config()
        self._use_cache = getattr(config, "use_cache", None)
        routing = {name: getattr(config, name) for name in ROUTING if hasattr(config, name)}
        super().__init__(
            model=value,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
        )
        # Some models and code of one's own take no count of tokens; the loss here is not theirs, and divides by it.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        # TRL asks networks with experts for a loss of theirs, those too that have none of the experts.
        for name, setting in routing.items():
            setattr(config, name, setting)
        use_progress_lines(self)
        self.add_callback(LogsLastStep())
        # Not a submodule of the trained model: neither the optimizer, nor a checkpoint, nor `model.train()` reach it.
        self.base = base.to(self.args.device)
        everyone = [self.base, *(other.to(self.args.device) for other in more_bases)]
        bases = FrozenBases(everyone, base_mix, base_temperature, base_noise, self.args.seed)
        cache = None
        if cache_base is not None:
            products = "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else "auto"
            cache = BaseCache(cache_base, bases, products)
            self.add_callback(FlushCache(cache))
        with self.accelerator.autocast():  # it runs the value network
            self.joint_loss = JointLoss(
                self.model,
                bases,
                scheme=scheme,
                norm=norm,
                norm_weight=norm_weight,
                norm_positions=norm_positions,
                chunk=loss_chunk,
                cache=cache,
                compiled=self.args.torch_compile,
            )
        if self.is_world_process_zero():
            for note in self.joint_loss.notes():
                print(note, flush=True)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The share of a batch in the loss of its optimizer step.

        Args:
            model: The value network, possibly wrapped.
            inputs: `input_ids`, `attention_mask` (or `position_ids`) and `labels`, all [B, T].
            return_outputs: Not offered; this trainer takes no `compute_metrics`.
            num_items_in_batch: Answer tokens of the whole optimizer step, over batches and devices.

        Returns:
            A scalar, fp32.
        """
        self.has_begun = True
        if return_outputs:
            raise NotImplementedError("ValueTrainer returns no logits; evaluate with its logged eval_ce instead")
        is_whole_step = num_items_in_batch is not None and self.model.training
        answers_per_position = self._answers_per_position if is_whole_step else None
        sums, answers = self.joint_loss(model, inputs, self.state.global_step, answers_per_position)
        count = answers if num_items_in_batch is None else num_items_in_batch
        loss = sums.total / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count is of all devices, and their gradients are averaged.
            loss = loss * self.accelerator.num_processes
        with torch.no_grad():
            logged = torch.stack([sums.ce, sums.norm, sums.correct, sums.positions, sums.ce.new_full((), answers)])
            mode = "train" if self.model.training else "eval"
            if mode == "train":
                self.watch_loss(loss)
            self._sums[mode] = self._sums.get(mode, 0) + logged
        return loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The batches of one optimizer step and their answer tokens; counts the norm's positions likewise."""
        batches, answers = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._answers_per_position = None
        if self.joint_loss.norm_positions != "answer" and answers is not None:
            positions = torch.zeros((), dtype=torch.long, device=device)
            for batch in batches:
                mask = norm_mask(self.joint_loss.norm_positions, answer_mask(batch["labels"]), batch)
                positions += mask.sum().to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                positions = self.accelerator.gather(positions).sum()
            self._answers_per_position = float(answers) / max(float(positions), 1.0)
        return batches, answers

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `ce`, `norm` and `mean_token_accuracy`, averaged over all their positions since the last log."""
        mode = "train" if self.model.training else "eval"
        prefix = "" if mode == "train" else "eval_"
        if mode in self._sums and "train_runtime" not in logs:
            ce, norm, correct, positions, count = self.accelerator.reduce(self._sums.pop(mode), "sum").tolist()
            ce, norm, accuracy = ce / max(count, 1.0), norm / max(positions, 1.0), correct / max(count, 1.0)
            logs.update({f"{prefix}ce": ce, f"{prefix}norm": norm, f"{prefix}mean_token_accuracy": accuracy})
            if mode == "eval":
                # transformers averages over batches, whatever their number of answer tokens.
                logs["eval_loss"] = ce + self.norm_weight * norm
        super().log(logs, start_time)
        # The same on every process, since all of these are means over all of them.
        broken = [
            name for name in (f"{prefix}loss", f"{prefix}ce", f"{prefix}norm") if not math.isfinite(logs.get(name, 0))
        ]
        if broken:
            self.stop_diverged(f"{broken[0]} is {logs[broken[0]]}")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card tells of plain fine-tuning; `on_save` writes the one that fits."""

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""
