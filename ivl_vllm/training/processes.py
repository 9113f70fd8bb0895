"""Several processes of one run: `torchrun` says in the environment how many there are, and they must find each other.

Processes that do not would each train alone and write into one folder.
"""

import os
from importlib.util import find_spec
from typing import Any

_LAUNCH = "torchrun --nproc_per_node {} -m ivl_vllm.cli train ..."


def world_size() -> int:
    """Processes of the run, as the environment says (`WORLD_SIZE`); 1 where it says nothing.

    Raises:
        ValueError: It is no whole number.
    """
    given = os.environ.get("WORLD_SIZE") or "1"
    try:
        return int(given)
    except ValueError as error:
        raise ValueError(f"WORLD_SIZE is {given!r} in the environment; expected a whole number, or unset it") from error


def needs_cpu() -> bool:
    """Whether several processes were started where no accelerator is: they meet over gloo if told to use the CPU."""
    import torch

    return world_size() > 1 and "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()


def check_launch(fsdp: str | None) -> None:
    """Refuse what can be seen before the processes look for each other, for which they would wait for minutes.

    Args:
        fsdp: What was given to `--fsdp`.

    Raises:
        ValueError: Several processes were announced and not started by a launcher, or `--fsdp` has one process.
    """
    size = world_size()
    if size > 1 and "LOCAL_RANK" not in os.environ:
        raise ValueError(
            f"WORLD_SIZE is {size} in the environment, but not LOCAL_RANK, so this process would train alone: start "
            f"all {size} with {_LAUNCH.format(size)}, or unset WORLD_SIZE for one process"
        )
    if fsdp and size == 1:
        raise ValueError(
            f"--fsdp {fsdp}: there is one process (WORLD_SIZE is {os.environ.get('WORLD_SIZE') or 'not set'}) and so "
            f"nothing to shard over; start one for each GPU with {_LAUNCH.format('N')}, or leave --fsdp out"
        )


def check_deepspeed(given: Any) -> None:
    """Refuse `--deepspeed` where its package is missing, which transformers tells in a traceback.

    Args:
        given: What was given to `--deepspeed`.

    Raises:
        ValueError: The package is missing.
    """
    if given and find_spec("deepspeed") is None:
        raise ValueError(f"--deepspeed {given}: its package is missing; pip install deepspeed, or leave the flag out")


def check_stage() -> None:
    """Refuse weights that DeepSpeed shards: base and output layers are used outside the calls that gather them.

    Raises:
        ValueError: Its configuration, from `--deepspeed` or from accelerate, asks for stage 3.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed's zero_optimization.stage is 3: sharded weights are offered with --fsdp full_shard; use that, "
            "or stage 1 or 2"
        )


def check_group(found: int, gpus: int) -> None:
    """Refuse processes that formed no group, and one process that would share its batches among GPUs.

    Args:
        found: How many processes the trainer sees.
        gpus: How many GPUs it would use in this process.

    Raises:
        ValueError: The environment says more processes, or one process sees several GPUs.
    """
    if gpus > 1:
        raise ValueError(
            f"one process sees {gpus} GPUs and would split its batches among them, which is not offered: set "
            f"CUDA_VISIBLE_DEVICES=0 to train on one of them, or start {_LAUNCH.format(gpus)}"
        )
    size = world_size()
    if found == 1 and size > 1:
        raise ValueError(
            f"WORLD_SIZE is {size} in the environment, but the processes formed no group and each would train alone "
            "into one folder; give --use_cpu true to train on the CPU, or start one process without torchrun "
            "(and with WORLD_SIZE unset)"
        )
