"""Inverse Value Learning inside vLLM: a small value network steers any request to a big frozen model."""

from typing import Any

from ivl_vllm.settings import engine_args

__all__ = ["IVLLogitsProcessor", "engine_args"]


def __getattr__(name: str) -> Any:
    # Lazy: the command line and the plugin hook import this package without needing vLLM's samplers.
    if name == "IVLLogitsProcessor":
        from ivl_vllm.serving.processor import IVLLogitsProcessor

        return IVLLogitsProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
