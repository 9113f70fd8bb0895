"""`ivl train`: arguments in, a checked and ready trainer, the trained folder out."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import transformers
import trl
from datasets import Dataset
from transformers import PreTrainedModel
from trl import TrlParser

from ivl_vllm.training import models
from ivl_vllm.training.arguments import ValueArguments
from ivl_vllm.training.data import Example, read_examples, split_examples, to_dataset
from ivl_vllm.training.ivl_config import IVLConfig
from ivl_vllm.training.model_card import Card, serve_command
from ivl_vllm.training.trainer import TrainerArguments, ValueTrainer
from ivl_vllm.vocab.fingerprint import vocabulary_fingerprint


class _Parser(TrlParser):
    """TRL's parser, which also takes aliases (`output`, `lr`, …) in the YAML file and raises instead of exiting."""

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        names = {
            option.lstrip("-").replace("-", "_"): action.dest
            for action in self._actions
            for option in action.option_strings
            if not option.startswith(("--no_", "--no-"))
        }
        for key in kwargs:
            if key.replace("-", "_") not in names:
                raise ValueError(f"--config: unknown setting {key!r}")
        return super().set_defaults_with_config(**{names[key.replace("-", "_")]: v for key, v in kwargs.items()})

    def error(self, message: str) -> None:
        raise ValueError(f"{message} (see: ivl train --help)")


def parse(argv: Sequence[str]) -> tuple[ValueArguments, TrainerArguments]:
    """Read flags, and a YAML file of the same names where `--config FILE` is among them; flags win.

    Raises:
        ValueError: An unknown or missing setting, or a value out of range.
    """
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    parser = _Parser((ValueArguments, TrainerArguments), prog="ivl train")
    try:
        value_args, args = parser.parse_args_and_config(words)
    except OSError as error:
        raise ValueError(f"--config {error.filename}: {error.strerror}") from error
    except IndexError as error:
        raise ValueError("--config needs the path of a YAML file") from error
    return value_args, args


@dataclass
class TrainingRun:
    """A checked run: everything is loaded, no step has been made.

    Args:
        trainer: The trainer, ready.
        output: Folder that the value network goes to.
        save_dtype: `auto` or a dtype's name.
        stored_dtype: Dtype of the model that the value network started from.
    """

    trainer: ValueTrainer
    output: Path
    save_dtype: str
    stored_dtype: Any

    def run(self) -> Path:
        """Train, save, and return the folder."""
        import torch

        args = self.trainer.args
        self.trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        dtype = self.stored_dtype if self.save_dtype == "auto" else getattr(torch, self.save_dtype)
        self.trainer.model.to(dtype)
        self.trainer.save_model(str(self.output))
        if self.trainer.is_world_process_zero():
            print(f"saved {self.output}\nserve: {serve_command('BASE', self.output.resolve())}", flush=True)
        return self.output


def prepare(argv: Sequence[str]) -> TrainingRun:
    """Parse the command line, check data and models against each other, and build the trainer.

    Args:
        argv: The words after `ivl train`.

    Returns:
        A run whose `run()` trains.

    Raises:
        ValueError: Anything that the user can mend; one message that names the cause.
    """
    value_args, args = parse(argv)
    base_name = models.locate_model(value_args.base, "--base")
    flag = "--init" if value_args.init else "--base"
    init_name = models.locate_model(value_args.init or value_args.base, flag)
    output = _check_output(args.output_dir, (base_name, init_name))
    train, held_out = split_examples(read_examples(value_args.data), value_args.eval_fraction, args.seed)
    if value_args.eval_data:
        held_out = read_examples(value_args.eval_data)
        if held_out[0]["plain"] != train[0]["plain"]:
            raise ValueError("--data and --eval_data are of two kinds: one is plain text, the other messages")
    if held_out and args.eval_strategy == "no":
        args.eval_strategy = transformers.trainer_utils.IntervalStrategy.EPOCH

    tokenizer = models.load_tokenizer(base_name, "--base")
    if init_name != base_name:
        models.check_same_vocabulary(tokenizer, models.load_tokenizer(init_name, "--init"), (base_name, init_name))
    if not train[0]["plain"] and tokenizer.chat_template is None and args.chat_template_path is None:
        raise ValueError(
            f"--base {value_args.base}: its tokenizer has no chat template, which messages need; give one with "
            "--chat_template_path, or write the data as plain prompt and completion"
        )
    base = models.load_base(base_name)
    value, stored_dtype = models.load_value(init_name, flag, value_args.zero_output_layer)

    config = IVLConfig(
        base=base_name,
        scheme="residual",
        norm=value_args.norm,
        norm_weight=value_args.norm_weight,
        vocab_size=value.config.get_text_config().vocab_size,
        vocabulary_fingerprint=vocabulary_fingerprint(tokenizer),
        versions=_versions(),
    )
    trained = sum(p.numel() for p in value.parameters() if p.requires_grad)
    card = Card(
        config=config,
        init=init_name,
        zero_output_layer=value_args.zero_output_layer,
        data=value_args.data,
        examples=len(train),
        parameters=trained,
        settings={
            "learning_rate": args.learning_rate,
            "epochs": args.num_train_epochs if args.max_steps < 0 else f"{args.max_steps} steps",
            "batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps,
            "seed": args.seed,
        },
    )
    trainer = ValueTrainer(
        value,
        base,
        norm=value_args.norm,
        norm_weight=value_args.norm_weight,
        args=args,
        processing_class=tokenizer,
        train_dataset=to_dataset(train),
        eval_dataset=to_dataset(held_out) if held_out else None,
        on_save=card.write,
    )
    _check_tokenised(trainer.train_dataset, train, "--data", args.max_length, (base, value))
    if held_out:
        _check_tokenised(trainer.eval_dataset, held_out, "held-out data", args.max_length, (base, value))
    if trainer.is_world_process_zero():
        frozen = sum(p.numel() for p in base.parameters())
        print(
            f"trainable parameters: {trained:,} of {trained + frozen:,} ({trained / (trained + frozen):.1%}); "
            f"the base's {frozen:,} are frozen",
            flush=True,
        )
    return TrainingRun(trainer, output, value_args.save_dtype, stored_dtype)


def _check_output(name: str, inputs: tuple[str, ...]) -> Path:
    output = Path(name).expanduser()
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {name}: a file is in the way")
    if str(output.resolve()) in inputs:
        raise ValueError(f"--output {name}: that is the folder of --base or --init, which would be overwritten")
    return output


def _check_tokenised(
    dataset: Dataset, examples: list[Example], flag: str, max_length: int | None, networks: tuple[PreTrainedModel, ...]
) -> None:
    """Refuse data without answer tokens or with ids beyond a network's vocabulary; tell what was dropped."""
    if len(dataset) == 0:
        raise ValueError(
            f"{flag}: no answer tokens are left; each prompt alone fills --max_length {max_length}. Raise it"
        )
    if "line" in dataset.column_names and len(dataset) < len(examples):
        lost = sorted({example["line"] for example in examples} - set(dataset["line"]))
        where = f", the first in line {lost[0]}" if lost else ""
        print(
            f"{flag}: {len(examples) - len(dataset)} of {len(examples)} answers lie beyond "
            f"--max_length {max_length} and were dropped{where}",
            flush=True,
        )
    width = min(network.config.get_text_config().vocab_size for network in networks)
    for row in dataset:
        if max(row["input_ids"]) >= width:
            line = f" (line {row['line']})" if "line" in row else ""
            raise ValueError(
                f"{flag}: token id {max(row['input_ids'])}{line} is beyond a network's vocabulary of {width}; "
                "the tokenizer does not belong to it"
            )


def _versions() -> dict[str, str]:
    import torch

    try:
        own = metadata.version("ivl-vllm")
    except metadata.PackageNotFoundError:
        own = "source tree"
    return {
        "ivl-vllm": own,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }
