"""What requests may ask of this process's engines: vLLM validates parameters without the engine's settings.

A process that serves one engine (every server) checks a request against exactly that engine's settings. Where several
engines live in one process, a request is admitted if any of them would take it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from ivl_vllm.settings import Settings

# Newest last, each with the configuration whose life it shares.
_engines: list[tuple[Settings, weakref.ref]] = []


def admit_for(settings: Settings, vllm_config: Any) -> None:
    """Requests that fit these settings are admitted in this process while the configuration lives.

    The newest settings stay even without it, since vLLM may go on with a copy.
    """
    _engines[:] = [entry for entry in _engines if entry[1]() is not None]
    _engines.append((settings, weakref.ref(vllm_config)))


def check_request(extra_args: Mapping[str, Any] | None) -> None:
    """Refuses a request that no engine of this process takes.

    Raises:
        ValueError: the newest engine's reason.
    """
    refusal = None
    for settings, vllm_config in reversed(_engines):
        if refusal and vllm_config() is None:
            continue
        try:
            settings.steering(extra_args)
        except ValueError as error:
            refusal = refusal or error
        else:
            return
    if refusal:
        raise refusal
