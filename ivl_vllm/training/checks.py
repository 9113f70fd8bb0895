"""Flags, networks and folders of a training run, checked against each other."""

import os
from pathlib import Path
from typing import Any

import torch

from ivl_vllm.training.folders import UNFINISHED, check_writable, list_checkpoints
from ivl_vllm.training.ivl_config import CONFIG_NAME
from ivl_vllm.training.trainer import ValueTrainer


def check_evaluation(args: Any, has_held_out: bool) -> None:
    """Refuse flags that need held-out data where there are none."""
    for flag, is_on in (
        ("--load_best_model_at_end true", args.load_best_model_at_end),
        ("--save_strategy best", args.save_strategy == "best"),
        ("--eval_on_start true", args.eval_on_start),
    ):
        if is_on and not has_held_out:
            raise ValueError(f"{flag}: needs held-out data, --eval_data or --eval_fraction")


def check_sampling(args: Any) -> None:
    """Refuse orders of rows in which some would count twice."""
    strategy = getattr(args, "train_sampling_strategy", "random")
    if args.world_size > 1 and strategy != "random" and not args.dataloader_drop_last:
        raise ValueError(
            f"--train_sampling_strategy {strategy}: {args.world_size} processes would be given some rows twice, "
            "to make their batches even: leave it at random, or add --dataloader_drop_last true"
        )


def loading_options(args: Any) -> dict[str, Any]:
    """What every loader of a model is given; `--model_init_kwargs` may choose the attention."""
    chosen, args.model_init_kwargs = args.model_init_kwargs or {}, None
    if more := sorted(set(chosen) - {"attn_implementation"}):
        raise ValueError(f"--model_init_kwargs: {', '.join(more)} is not offered here, only attn_implementation")
    return {"trust_remote_code": args.trust_remote_code, **chosen}


def check_attention(bases: dict[str, Any], value: Any, is_mixed: bool) -> None:
    """FlashAttention takes half precision only: bases have it on disk, the value network by mixed precision."""
    chosen = value.config._attn_implementation or ""
    if "flash" not in chosen:
        return
    what = f"--model_init_kwargs: {chosen} takes bfloat16 and float16 only"
    if not is_mixed:
        raise ValueError(f"{what}: add --bf16 true, or leave it out")
    for name, base in bases.items():
        if base.dtype not in (torch.bfloat16, torch.float16):
            kind = str(base.dtype).removeprefix("torch.")
            raise ValueError(f"{what}, and {name} is {kind} on disk: save it in bfloat16, or leave it out")


def limit_length(args: Any, networks: dict[str, Any]) -> None:
    """Lower `--max_length` to the positions that all networks have; learned ones end there for good."""
    configs = {name: network.config.get_text_config() for name, network in networks.items()}
    positions = {name: getattr(config, "max_position_embeddings", None) for name, config in configs.items()}
    known = {name: count for name, count in positions.items() if isinstance(count, int) and count > 0}
    if known and (args.max_length is None or min(known.values()) < args.max_length):
        name, args.max_length = min(known.items(), key=lambda item: item[1])
        if args.process_index == 0:
            print(f"--max_length is {args.max_length}: {name} has no more positions", flush=True)


def check_sharding(trainer: ValueTrainer) -> None:
    """accelerate ignores `--fsdp` where processes have no GPU each."""
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError(
            f"--fsdp was given, but on the device {trainer.args.device} of {trainer.args.world_size} processes nothing "
            "would be sharded: accelerate shards over processes with a GPU each and ignores the flag elsewhere; "
            "leave --fsdp out"
        )


def fp16_note(args: Any, norm: str, norm_weight: float, columns: int) -> list[str]:
    """The norm's gradient is λ over the columns of the vocabulary, and float16 rounds below 6e-7 by more than 5 %."""
    if not args.fp16 or norm == "none" or not 0 < norm_weight / columns < 6e-7:
        return []
    return [
        f"warning: --fp16 true: with --lambda {norm_weight:g} and {columns} columns the norm's gradients are "
        f"{norm_weight / columns:.1e}, which float16 rounds away in part or whole: use --bf16 true or a larger --lambda"
    ]


def check_batches(trainer: ValueTrainer) -> None:
    """`--dataloader_drop_last` may leave nothing to train on."""
    rows, batch = len(trainer.train_dataset), trainer.args.per_device_train_batch_size * trainer.args.world_size
    if trainer.args.dataloader_drop_last and rows < batch:
        raise ValueError(
            f"--dataloader_drop_last true: {rows} rows make no whole batch of {batch} (--batch_size × processes): "
            "lower --batch_size, or leave the flag out"
        )


def check_checkpoint(output: Path, name: str | None) -> str | None:
    """Find the checkpoint to go on from; refuse to mix a new run with an earlier one's checkpoints."""
    found = list_checkpoints(output)
    name = str(name or "")  # YAML reads `true` and `no` as booleans
    if name.lower() in ("", "no", "false", "none"):
        if found:
            raise ValueError(
                f"--output {output}: it holds checkpoints of an earlier run; go on from there with --resume last, "
                "remove them, or choose another folder"
            )
        return None
    if name.lower() in ("last", "true"):
        if not found:
            raise ValueError(f"--resume {name}: there is no checkpoint in {output}")
        path = found[-1]
    else:
        path = Path(os.path.expanduser(name))
        if not (path / "trainer_state.json").is_file():
            raise ValueError(f"--resume {name}: no such checkpoint (a folder with trainer_state.json)")
    if not any((path / file).exists() for file in ("scheduler.pt", "latest")):  # the latter is DeepSpeed's
        raise ValueError(
            f"--resume {name}: {path} has weights only (--save_only_model), so that the learning rate would start "
            f"anew: start a new run with --init {path}"
        )
    return str(path)


def check_output(name: str, inputs: tuple[str, ...]) -> Path:
    """The output folder, which is none that is read, nor one with another model."""
    output = Path(os.path.expanduser(name))
    check_writable(output, "--output")
    if str(output.resolve()) in inputs:
        raise ValueError(
            f"--output {name}: that is the folder of --base, --init or --more_bases, which would be overwritten"
        )
    # A run that was killed while its files were put in place left some of its own.
    if not (output / CONFIG_NAME).exists() and not list_checkpoints(output) and not (output / UNFINISHED).exists():
        for file in ("config.json", "README.md"):
            if (output / file).exists():
                raise ValueError(
                    f"--output {name}: its {file} is not of `ivl train` and would be overwritten; choose another folder"
                )
    return output
