"""The comparison: a base itself, fully fine-tuned on the same demonstrations."""

import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from ivl_vllm.training.data import read_examples, to_dataset
from ivl_vllm.training.progress import use_progress_lines


def fine_tune(
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    data: Path,
    validation: Path,
    output: Path,
    *,
    learning_rates: tuple[float, ...],
    max_steps: int,
    seed: int,
    patience: int = 4,
    batch: int = 32,
) -> dict[str, dict[str, Any]]:
    """Fine-tune with TRL once per learning rate, each with early stopping, and keep the best by validation loss.

    Args:
        base: Folder of the model to fine-tune.
        tokenizer: Its tokenizer, with a chat template.
        data: Demonstrations, JSON lines of messages.
        validation: Items that are neither trained nor tested, in the same form.
        output: Folder for the best model.
        learning_rates: Peak learning rates to try.
        max_steps: Most steps of one try.
        seed: Seed of the batches' order.
        patience: Evaluations without progress, 10 steps apart, after which a try ends.
        batch: Examples in a step.

    Returns:
        Learning rate → `validation_loss` (the best), `steps` that were made and their `seconds`, evaluations included.
    """
    train: Dataset = to_dataset(read_examples(data)).remove_columns("line")
    held_out: Dataset = to_dataset(read_examples(validation)).remove_columns("line")
    tries: dict[str, dict[str, Any]] = {}
    for learning_rate in learning_rates:
        print(f"fine-tune {base.name}, learning rate {learning_rate:g}", flush=True)
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(base),
            args=SFTConfig(
                output_dir=str(output / "checkpoints"),
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                max_steps=max_steps,
                per_device_train_batch_size=batch,
                per_device_eval_batch_size=128,
                eval_strategy="steps",
                eval_steps=10,
                save_strategy="steps",
                save_steps=10,
                save_total_limit=1,
                save_only_model=True,
                load_best_model_at_end=True,
                metric_for_best_model="eval_loss",
                logging_steps=10,
                max_length=64,
                gradient_checkpointing=False,
                bf16=False,
                dataloader_pin_memory=False,
                seed=seed,
            ),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=[EarlyStoppingCallback(early_stopping_patience=patience)],
        )
        use_progress_lines(trainer)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        loss = float(trainer.state.best_metric)
        if not tries or loss < min(done["validation_loss"] for done in tries.values()):
            trainer.model.save_pretrained(output)
            tokenizer.save_pretrained(output)
        tries[f"{learning_rate:g}"] = {"validation_loss": loss, "steps": trainer.state.global_step, "seconds": seconds}
    return tries
