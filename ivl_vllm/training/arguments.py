"""What can be said to `ivl train`; the dataclasses are the command line and the YAML file alike.

This module imports neither torch nor trl, so that `ivl train --help` is quick. `CommonArguments` repeats, with this
project's defaults, the fields of TRL's `SFTConfig` that most runs touch; `trainer.TrainerArguments` joins them with
all the others.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ivl_vllm.training.ivl_config import BASE_MIXES, NORM_POSITIONS, NORMS, SCHEMES

# The smallest number that each of these takes.
_LEAST = {
    "norm_weight": 0,
    "base_noise": 0,
    "loss_chunk": 1,
    "learning_rate": 0,
    "num_train_epochs": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "logging_steps": 0,
}


def check_numbers(settings: Any) -> None:
    """Refuse NaN in any field of a dataclass of settings, and what `_LEAST` does not allow.

    Raises:
        ValueError: Names the flag, its value, and what is expected.
    """
    for known in fields(settings):
        value, least = getattr(settings, known.name), _LEAST.get(known.name)
        is_nan, is_number = value != value, isinstance(value, (int, float))
        if is_nan or (least is not None and not (is_number and least <= value < math.inf)):
            flag = " ".join([f"--{known.name}", *(f"({alias})" for alias in known.metadata.get("aliases", ()))])
            expected = "a number" if least is None else f"a finite number from {least} up"
            raise ValueError(f"{flag} is {value}; expected {expected}")
    steps = getattr(settings, "max_steps", -1)
    if steps != -1 and steps < 1:
        raise ValueError(f"--max_steps is {steps}; expected 1 or more, or -1 for what the epochs give")


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
            "`prompt` and `completion`, both plain text or both lists of messages; with messages perhaps `tools` and "
            "`chat_template_kwargs`, as the chat template takes them."
        }
    )
    init: str | None = field(
        default=None,
        metadata={
            "help": "Pre-trained small causal LM that the value network starts from: a folder or a hub id with the "
            "base's vocabulary. Left out: the base itself."
        },
    )
    init_config: str | None = field(
        default=None,
        metadata={
            "help": "Start from scratch: a config.json, or the folder that holds one. Without a vocab_size it gets the "
            "base's."
        },
    )
    lora_rank: int = field(
        default=0,
        metadata={
            "help": "Train a LoRA adapter of this rank on the value network instead of all its weights (needs PEFT); "
            "saved merged, as an ordinary model. 0: off."
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
    long_examples: Literal["truncate", "drop"] = field(
        default="truncate", metadata={"help": "What happens to examples longer than --max_length; both are counted."}
    )
    norm: Literal["l1", "l2", "none"] = field(
        default="l1",
        metadata={
            "help": "Norm that keeps the value network small and so lets it fit other bases: mean |V(x)| over "
            "positions and vocabulary (l1), mean V(x)² (l2), or none."
        },
    )
    norm_weight: float = field(
        default=1.0, metadata={"help": "λ, the weight of the norm in the loss.", "aliases": ["--lambda"]}
    )
    norm_positions: Literal["answer", "all"] = field(
        default="answer",
        metadata={
            "help": "Where the norm is taken: at the answer tokens, or at all tokens, prompts too but no padding, "
            "which costs their value logits. The cross-entropy is of the answer tokens in both."
        },
    )
    scheme: Literal["residual", "cascade", "cascade+text"] = field(
        default="residual",
        metadata={
            "help": "What the value network reads: the tokens (residual); what the base expects next, "
            "softmax(B0(x)) times the value network's embeddings (cascade); or both, added (cascade+text)."
        },
    )
    more_bases: list[str] | None = field(
        default=None, metadata={"help": "Further frozen bases with the vocabulary of --base: folders or hub ids."}
    )
    base_mix: Literal["draw", "average"] = field(
        default="draw",
        metadata={"help": "With --more_bases: draw one base for each step, or average the logits of all."},
    )
    base_temperature: float = field(
        default=1.0, metadata={"help": "Divides the base's logits in training; evaluation takes them as they are."}
    )
    base_noise: float = field(
        default=0.0,
        metadata={
            "help": "Standard deviation of Gaussian noise on the base's logits in training, after --base_temperature."
        },
    )
    cache_base: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps the base's final hidden states at the answer tokens, so that the base runs once "
            "per example and not once per epoch. Scheme residual and a single base only."
        },
    )
    loss_chunk: int = field(
        default=512,
        metadata={"help": "Answer tokens whose logits exist at a time: less takes less memory, more is faster."},
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "Dtype of the saved weights; auto is that of the model the value network started from."},
    )

    def __post_init__(self) -> None:
        for name, words in (
            ("norm", NORMS),
            ("norm_positions", NORM_POSITIONS),
            ("scheme", SCHEMES),
            ("base_mix", BASE_MIXES),
            ("long_examples", ("truncate", "drop")),
            ("save_dtype", ("auto", "float32", "bfloat16", "float16")),
        ):
            # argparse checks flags, nobody the YAML file.
            if (given := getattr(self, name)) not in words:
                raise ValueError(f"--{name} is {given!r}; expected {', '.join(words[:-1])} or {words[-1]}")
        check_numbers(self)
        if not math.isfinite(self.base_temperature) or self.base_temperature <= 0:
            raise ValueError(f"--base_temperature is {self.base_temperature}; expected a finite number above 0")
        if self.cache_base and self.scheme != "residual":
            raise ValueError(
                f"--cache_base keeps the base at answer tokens alone, and --scheme {self.scheme} reads it at every "
                "token; leave one of them out"
            )
        if self.cache_base and self.more_bases:
            raise ValueError("--cache_base keeps one base's hidden states; leave it or --more_bases out")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"--eval_fraction is {self.eval_fraction}; expected a share from 0 to below 1")
        if self.init and self.init_config:
            raise ValueError("--init and --init_config were both given; keep one of them")
        if self.lora_rank < 0:
            raise ValueError(f"--lora_rank is {self.lora_rank}; expected 0 (off) or a positive rank")
        if self.lora_rank and self.init_config:
            raise ValueError("--lora_rank needs a trained model under it: give --init in the place of --init_config")
        if self.lora_rank and self.zero_output_layer:
            raise ValueError("--lora_rank and --zero_output_layer: the zeroed output layer would never be trained")
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
        default=2048, metadata={"help": "Longest example in tokens; --long_examples says what happens to longer ones."}
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
    packing: bool = field(
        default=False,
        metadata={"help": "Put several short examples into one row without letting them see each other."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to go on from; `last` is the newest in --output.", "aliases": ["--resume"]},
    )
    report_to: str = field(
        default="none", metadata={"help": "Also log to `tensorboard` (in --output/runs), or to another tracker."}
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "Chat template (a .jinja file or a tokenizer) in place of the base's own."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of everything random."})
