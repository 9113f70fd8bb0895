"""Pipeline parallelism: vLLM splits the base into stages; value networks are whole, all of them on the last stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vllm import envs
from vllm.distributed import parallel_state


class _OnlyStage:
    """What models ask the group of stages for, where there is one."""

    rank_in_group = 0
    world_size = 1
    is_first_rank = True
    is_last_rank = True


_ONLY_STAGE = _OnlyStage()


@contextlib.contextmanager
def one_stage() -> Iterator[None]:
    """In here models are built whole and run whole: they take token ids and return hidden states."""
    stages = parallel_state._PP
    parallel_state._PP = _ONLY_STAGE
    try:
        yield
    finally:
        parallel_state._PP = stages


@contextlib.contextmanager
def built_on_one_stage() -> Iterator[None]:
    """The same while a network is built; how the user spread the base's layers is none of its business."""
    envs.VLLM_PP_LAYER_PARTITION = None  # hides what vLLM reads from the environment, or has read
    try:
        with one_stage():
            yield
    finally:
        del envs.VLLM_PP_LAYER_PARTITION
