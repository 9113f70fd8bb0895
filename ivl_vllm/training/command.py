"""`ivl train`: arguments in, a checked and ready trainer, the trained folder out."""

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import trl

from ivl_vllm.training import curves, models
from ivl_vllm.training.base_cache import META_NAME, fingerprint
from ivl_vllm.training.checks import (
    check_attention,
    check_batches,
    check_checkpoint,
    check_evaluation,
    check_output,
    check_sampling,
    check_sharding,
    fp16_note,
    limit_length,
    loading_options,
)
from ivl_vllm.training.data import read_examples, split_examples, to_dataset
from ivl_vllm.training.divergence import TrainingDivergedError
from ivl_vllm.training.folders import check_writable
from ivl_vllm.training.frozen_bases import load_more_bases
from ivl_vllm.training.ivl_config import IVLConfig, own_version
from ivl_vllm.training.lora import add_lora, warn_rank
from ivl_vllm.training.model_card import Card, serve_command
from ivl_vllm.training.parsing import parse
from ivl_vllm.training.preparation import Limits, check_packing
from ivl_vllm.training.rendering import check_rendered
from ivl_vllm.training.run_record import RunRecord, check_shapes
from ivl_vllm.training.trainer import ValueTrainer
from ivl_vllm.training.turn_ends import ends_of_text, stop_at_other_end
from ivl_vllm.vocab.fingerprint import vocabulary_fingerprint


@dataclass
class TrainingRun:
    """A checked run: everything is loaded, no step has been made.

    Args:
        trainer: The trainer, ready.
        output: Folder that the value network goes to.
        save_dtype: `auto` or a dtype's name.
        stored_dtype: Dtype of the model that the value network started from.
        takes: What a server takes from the folder, see `model_card.serve_command`.
    """

    trainer: ValueTrainer
    output: Path
    save_dtype: str
    stored_dtype: Any
    takes: tuple[str, ...] = ()

    def run(self) -> Path:
        """Train, save, and return the folder.

        Raises:
            TrainingDivergedError: Loss or weights are not finite; what was saved before is kept.
        """
        dtype = self.stored_dtype if self.save_dtype == "auto" else getattr(torch, self.save_dtype)
        try:
            self.trainer.train(resume_from_checkpoint=self.trainer.args.resume_from_checkpoint)
            self.trainer.save_result(self.output, dtype)
        except TrainingDivergedError:
            # Nothing was written; what is not empty stays.
            with contextlib.suppress(OSError):
                self.output.rmdir()
            raise
        if self.trainer.is_world_process_zero():
            command = serve_command("BASE", self.output.resolve(), self.takes)
            positions = getattr(self.trainer.model.config.get_text_config(), "max_position_embeddings", None)
            more = f"\n(a BASE with more positions: --max-model-len {positions})" if positions else ""
            print(f"saved {self.output}\nserve: {command}{more}", flush=True)
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
    init_name = models.locate_model(value_args.init, flag) if value_args.init else base_name
    more_names = [models.locate_model(name, "--more_bases") for name in value_args.more_bases or ()]
    output = check_output(args.output_dir, (base_name, init_name, *more_names))
    if value_args.cache_base:  # here too, before anything is loaded
        check_writable(Path(os.path.expanduser(value_args.cache_base)), "--cache_base", unless=META_NAME)
    args.resume_from_checkpoint = check_checkpoint(output, args.resume_from_checkpoint)
    train, held_out = split_examples(read_examples(value_args.data, "--data"), value_args.eval_fraction, args.seed)
    if value_args.eval_data:
        held_out = read_examples(value_args.eval_data, "--eval_data")
        if held_out[0]["plain"] != train[0]["plain"]:
            raise ValueError("--data and --eval_data are of two kinds: one is plain text, the other messages")
    if held_out and args.eval_strategy == "no":
        args.eval_strategy = transformers.trainer_utils.IntervalStrategy.EPOCH

    if (args.packing or args.eval_packing) and args.packing_strategy == "wrapped":
        raise ValueError("--packing_strategy wrapped lets examples see each other; leave it at bfd")

    check_evaluation(args, bool(held_out))
    check_sampling(args)
    options = loading_options(args)
    tokenizer = models.load_tokenizer(base_name, "--base", args.trust_remote_code)
    if init_name != base_name:
        other = models.load_tokenizer(init_name, "--init", args.trust_remote_code)
        models.check_same_vocabulary(tokenizer, base_name, other, init_name, "--init")
    takes, template_path = [], args.chat_template_path
    if template_path:
        tokenizer.chat_template = models.read_chat_template(template_path, args.trust_remote_code)
        takes.append("chat-template")
        # TRL would give the value network that tokenizer's vocabulary too.
        args.chat_template_path = None
    if not train[0]["plain"] and tokenizer.chat_template is None:
        raise ValueError(
            f"--base {value_args.base}: its tokenizer has no chat template, which messages need; give one with "
            "--chat_template_path, or write the data as plain prompt and completion"
        )
    notes = check_rendered(train, tokenizer, "--data") + check_rendered(held_out, tokenizer, "held-out data")
    base = models.load_base(base_name, options)
    more_bases = load_more_bases(more_names, tokenizer, base_name, options)
    if value_args.init_config:
        value, stored_dtype = models.build_value(
            value_args.init_config, base, args.seed, value_args.zero_output_layer, options
        )
    else:
        value, stored_dtype = models.load_value(init_name, flag, value_args.zero_output_layer, options)
    start = f"--init_config {value_args.init_config}" if value_args.init_config else f"{flag} {init_name}"
    others = {f"--more_bases {name}": other for name, other in zip(more_names, more_bases, strict=True)}
    limit_length(args, {f"--base {base_name}": base, **others, start: value})
    check_attention({f"--base {base_name}": base, **others}, value, args.bf16 or args.fp16)
    vocab_size = value.config.get_text_config().vocab_size
    columns = min(vocab_size, *(b.config.get_text_config().vocab_size for b in (base, *more_bases)))
    notes += fp16_note(args, value_args.norm, value_args.norm_weight, columns)
    models.check_padding(args.pad_token or tokenizer.pad_token, tokenizer, columns, f"--base {base_name}")
    record = _record(value_args, args.seed, (base_name, base), (init_name, value), (more_names, more_bases))
    record.add_batches(args)
    if not train[0]["plain"]:
        record.add_text("chat_template_path", template_path, json.dumps(tokenizer.chat_template, sort_keys=True))
    if args.resume_from_checkpoint:
        record.check_resume(Path(args.resume_from_checkpoint))
        check_shapes(value, Path(args.resume_from_checkpoint), "--init_config" if value_args.init_config else flag)
    plain = value
    if value_args.lora_rank:
        if args.process_index == 0:
            warn_rank(value, value_args.lora_rank)
        value = add_lora(value, value_args.lora_rank, args.seed)

    config = IVLConfig(
        base=base_name,
        scheme=value_args.scheme,
        norm=value_args.norm,
        norm_weight=value_args.norm_weight,
        norm_positions=value_args.norm_positions,
        more_bases=more_names,
        base_mix=value_args.base_mix,
        base_temperature=value_args.base_temperature,
        base_noise=value_args.base_noise,
        vocab_size=vocab_size,
        vocabulary_fingerprint=vocabulary_fingerprint(tokenizer),
        versions=_versions(),
    )
    trained = sum(p.numel() for p in value.parameters() if p.requires_grad)
    card = Card(
        config=config,
        init=f"scratch, {value_args.init_config}" if value_args.init_config else init_name,
        lora_rank=value_args.lora_rank,
        zero_output_layer=value_args.zero_output_layer,
        data=value_args.data,
        examples=len(train),
        parameters=trained,
        settings={
            "learning_rate": args.learning_rate,
            "epochs": args.num_train_epochs if args.max_steps < 0 else f"{args.max_steps} steps",
            "batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "seed": args.seed,
        },
    )
    ends = ends_of_text(tokenizer, base)  # --eos_token changes the tokenizer, but no server
    trainer = ValueTrainer(
        value,
        base,
        norm=value_args.norm,
        norm_weight=value_args.norm_weight,
        norm_positions=value_args.norm_positions,
        scheme=value_args.scheme,
        more_bases=more_bases,
        base_mix=value_args.base_mix,
        base_temperature=value_args.base_temperature,
        base_noise=value_args.base_noise,
        cache_base=value_args.cache_base,
        loss_chunk=value_args.loss_chunk,
        args=args,
        processing_class=tokenizer,
        train_dataset=to_dataset(train),
        eval_dataset=to_dataset(held_out) if held_out else None,
        limits=Limits(
            max_length=args.max_length,
            drop_long=value_args.long_examples == "drop",
            keep_end=args.truncation_mode == "keep_end",
            vocab_size=columns,
        ),
        on_save=lambda folder, place: _describe(trainer, card, record, folder, place),
    )
    check_sharding(trainer)
    check_batches(trainer)
    warning, has_other_end = stop_at_other_end(trainer.train_dataset, tokenizer, ends, plain)
    if has_other_end:
        takes.append("generation-config")
    card = replace(card, config=replace(config, takes=takes))
    if args.packing or args.eval_packing:
        for network in (trainer.base, *more_bases):
            check_packing(network, trainer.data_collator, "--base")
        with trainer.accelerator.autocast():
            check_packing(trainer.model, trainer.data_collator, flag)
    if trainer.is_world_process_zero():
        for note in (*notes, *([warning] if warning else [])):
            print(note, flush=True)
        frozen = sum(p.numel() for p in base.parameters())
        own = sum(p.numel() for p in value.parameters())
        adapter = f" (LoRA of rank {value_args.lora_rank})" if value_args.lora_rank else ""
        print(
            f"trainable parameters: {trained:,}{adapter} of the value network's {own:,} ({trained / own:.1%}); "
            f"the base's {frozen:,} are frozen",
            flush=True,
        )
    return TrainingRun(trainer, output, value_args.save_dtype, stored_dtype, tuple(takes))


def _record(args: Any, seed: int, base: tuple, init: tuple, more: tuple[list, list]) -> RunRecord:
    names = {"base": base[0], "init": None if args.init_config else init[0], "more_bases": more[0]}
    prints = {"base": fingerprint(base[1]), "more_bases": " ".join(map(fingerprint, more[1]))}
    if not args.init_config:
        prints["init"] = fingerprint(init[1])
    return RunRecord.of(args, seed, names, prints)


def _describe(trainer: ValueTrainer, card: Card, record: RunRecord, folder: Path, place: Path) -> None:
    """Write what lies beside the weights; the picture only beside the result, as drawing takes about a second."""
    history = trainer.state.log_history
    curves.write_log(folder, history)
    if place == Path(trainer.args.output_dir):
        curves.draw_curves(folder, history)
    else:
        record.write(folder)
    card.write(folder, place)


def _versions() -> dict[str, str]:
    return {
        "ivl-vllm": own_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }
