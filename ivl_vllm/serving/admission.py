"""What requests may ask of the engines of this process: vLLM validates parameters without the engine's settings.

A process that serves one engine (every server) checks a request against exactly that engine's settings. Where several
engines live in one process, a request is admitted if any of them would take it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ivl_vllm.settings import Settings

_engines: list[Settings] = []


def admit_for(settings: Settings) -> None:
    """Requests that fit these settings are admitted from now on in this process."""
    if settings in _engines:
        _engines.remove(settings)
    _engines.append(settings)


def check_request(extra_args: Mapping[str, Any] | None) -> None:
    """Refuses a request that no engine of this process takes.

    Raises:
        ValueError: the newest engine's reason.
    """
    refusal = None
    for settings in reversed(_engines):
        try:
            settings.request_weights(extra_args)
        except ValueError as error:
            refusal = refusal or error
        else:
            return
    if refusal:
        raise refusal
