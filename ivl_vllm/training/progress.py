"""Progress bars, and one readable line per log of the trainer in place of a printed dictionary."""

import os
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy

# Logged name → shown name; what is not listed goes to the history and to TensorBoard alone.
SHOWN = {
    "loss": "loss",
    "ce": "ce",
    "norm": "norm",
    "mean_token_accuracy": "token accuracy",
    "learning_rate": "lr",
    "epoch": "epoch",
}


def long_bar(rows: Iterable, what: str, unit: str) -> Iterable:
    """`rows` with a bar, if going through them takes more than a second, on the first process's terminal."""
    is_first = os.environ.get("RANK", "0") == "0"
    return tqdm(rows, desc=what, unit=f" {unit}", delay=1.0, leave=False, disable=None if is_first else True)


def log_line(logs: dict[str, Any], step: int) -> str | None:
    """One line for one log.

    Args:
        logs: What the trainer logs: training metrics, or held-out ones with the prefix `eval_`.
        step: Optimizer steps so far.

    Returns:
        The line, or None for logs that hold neither loss (the run's closing summary).
    """
    held_out = "eval_loss" in logs
    if not held_out and "loss" not in logs:
        return None
    parts = []
    for name, shown in SHOWN.items():
        value = logs.get(f"eval_{name}" if held_out and name != "epoch" else name)
        if isinstance(value, (int, float)):
            parts.append(f"{shown} {value:.4g}")
    return f"step {step}{', held out' if held_out else ''}: {'  '.join(parts)}"


class ProgressLines(ProgressCallback):
    """transformers' progress bar; only what a log looks like differs."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the line above the bar."""
        line = log_line(logs or {}, state.global_step)
        if line and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(line)


class LogsLastStep(TrainerCallback):
    """Logs the last step too, wherever `logging_steps` ends; the model card and `ivl inspect` tell its values."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a log where no step follows, unless nothing is to be logged at all."""
        if control.should_training_stop and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True
        return control


def use_progress_lines(trainer: Trainer) -> None:
    """Put `ProgressLines` in the place of transformers' bar, where the trainer has that one (not in notebooks)."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressLines())
