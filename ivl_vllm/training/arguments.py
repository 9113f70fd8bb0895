"""What can be said to `ivl train`; the dataclasses are the command line and the YAML file alike.

This module imports neither torch nor trl, so that `ivl train --help` is quick. `CommonArguments` repeats, with this
project's defaults, the fields of TRL's `SFTConfig` that most runs touch; `trainer.TrainerArguments` joins them with
all the others.
"""

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ValueArguments:
    """What is trained against what, on which data.

    Raises:
        ValueError: A value is out of range; the message names the flag.
    """

    _argument_group_name = "value network and data"

    base: str = field(metadata={"help": "Frozen base model: a folder or a hub id."})
    data: str = field(
        metadata={
            "help": "Demonstrations, JSON lines. Each line has `messages` (every assistant turn is trained), or "
            "`prompt` and `completion`, both plain text or both lists of messages."
        }
    )
    init: str | None = field(
        default=None,
        metadata={
            "help": "Pre-trained small causal LM that the value network starts from: a folder or a hub id with the "
            "base's vocabulary. Left out: the base itself."
        },
    )
    zero_output_layer: bool = field(
        default=False,
        metadata={
            "help": "Start with V(x) = 0, so that training starts at the base exactly. Unties the output layer from "
            "the token embeddings."
        },
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Held-out demonstrations, JSON lines; evaluated after every epoch."}
    )
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Share of the lines of --data that is held out, where --eval_data is not given."}
    )
    norm: Literal["l1", "l2", "none"] = field(
        default="l1",
        metadata={
            "help": "Norm that keeps the value network small and so lets it fit other bases: mean |V(x)| over answer "
            "positions and vocabulary (l1), mean V(x)² (l2), or none."
        },
    )
    norm_weight: float = field(
        default=1.0, metadata={"help": "λ, the weight of the norm in the loss.", "aliases": ["--lambda"]}
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "Dtype of the saved weights; auto is that of the model the value network started from."},
    )

    def __post_init__(self) -> None:
        if self.norm not in ("l1", "l2", "none"):
            raise ValueError(f"--norm is {self.norm!r}; expected l1, l2 or none")
        if self.save_dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"--save_dtype is {self.save_dtype!r}; expected auto, float32, bfloat16 or float16")
        if not math.isfinite(self.norm_weight) or self.norm_weight < 0:
            raise ValueError(f"--norm_weight is {self.norm_weight}; expected a finite number that is not negative")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"--eval_fraction is {self.eval_fraction}; expected a share from 0 to below 1")
        if self.eval_fraction and self.eval_data:
            raise ValueError("--eval_data and --eval_fraction were both given; keep one of them")


@dataclass
class CommonArguments:
    """The trainer's settings that most runs touch; names and meaning are those of TRL's `SFTConfig`."""

    _argument_group_name = "training"

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the trained value network. Required.", "aliases": ["--output"]}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate.", "aliases": ["--lr"]})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the data.", "aliases": ["--epochs"]})
    max_steps: int = field(default=-1, metadata={"help": "Stop after so many steps; overrides the epochs."})
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Examples per step and device.", "aliases": ["--batch_size"]}
    )
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Examples per evaluation step and device."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimizer step."})
    max_length: int | None = field(
        default=2048, metadata={"help": "Longest example in tokens; what is longer is cut at its end."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Course of the learning rate."})
    warmup_steps: float = field(
        default=0.01, metadata={"help": "Steps of warm-up, or, below 1, their share of all steps."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Mixed precision in bfloat16. Left out: wherever a GPU supports it."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, more time."}
    )
    eval_strategy: str = field(
        default="no", metadata={"help": "When to evaluate: steps or epoch; with held-out data, no means epoch."}
    )
    save_strategy: str = field(default="epoch", metadata={"help": "When to write checkpoints: no, steps, epoch, best."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of loss, ce, norm and lr."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too."})
    chat_template_path: str | None = field(
        default=None, metadata={"help": "Chat template (a .jinja file or a tokenizer) in place of the base's own."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of everything random."})
