"""Which CUDA graphs a step replays. One of the whole forward holds every network; those in pieces let some sit out."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ivl_vllm.serving.steps import Steps

# Arguments that keep vLLM's dispatchers from a graph of the whole forward, by name; each has some of them.
_IN_PIECES = {"uniform_token_count": None, "max_query_len": None}


def choose_graphs(runner: Any, steps: Steps) -> None:
    """Has a model runner replay graphs in pieces in steps that not all networks are needed in.

    Between the pieces of one model and the next runs Python, which leaves the other networks out. Where the runner has
    no graphs in pieces for such a step, it replays the whole forward, all networks included; so it does where the
    pieces are those of vLLM's breakable graphs, which replay the whole forward too.

    Args:
        runner: vLLM's model runner, V1 or V2; may be asked before every step, as runners replace their dispatchers.
        steps: says what the step in progress needs.
    """
    from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
    from vllm.config import CUDAGraphMode

    if is_breakable_cudagraph_enabled():
        return
    owner = getattr(runner, "cudagraph_manager", None) or getattr(runner, "cudagraph_dispatcher", None)
    if owner is None or getattr(owner.dispatch, "ivl", False):
        return
    dispatch = owner.dispatch
    signature = inspect.signature(dispatch)
    changes = {name: value for name, value in _IN_PIECES.items() if name in signature.parameters}
    if "invalid_modes" in signature.parameters:
        changes["invalid_modes"] = {CUDAGraphMode.FULL}

    def mode(found: Any) -> CUDAGraphMode:
        return found[0] if isinstance(found, tuple) else found.cg_mode

    @functools.wraps(dispatch)
    def in_pieces(*args: Any, **kwargs: Any) -> Any:
        found = dispatch(*args, **kwargs)
        if not steps.is_partial or mode(found) != CUDAGraphMode.FULL:
            return found
        other = dispatch(**signature.bind(*args, **kwargs).arguments | changes)
        return other if mode(other) == CUDAGraphMode.PIECEWISE else found

    in_pieces.ivl = True
    owner.dispatch = in_pieces
