"""What requests may ask of this process's engines: vLLM validates parameters without the engine's settings.

A process that serves one engine (every server) checks a request against exactly that engine's settings. Where several
engines live in one process, a request is admitted if any of them would take it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from ivl_vllm.settings import Settings

# Marks a request that may come back with other weights (a session with streamed input): it always needs all networks.
ALL_NETWORKS = "ivl_all_networks"
# What a traced request is called in the trace, however often the batch takes it in again after a preemption.
TRACE_ID = "ivl_trace_id"
MARKS = (ALL_NETWORKS, TRACE_ID)
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
        ValueError: the newest engine's reason; or a key that is meant to be `ivl` and is not.
    """
    for key in extra_args or () if _engines else ():
        if key != "ivl" and key not in MARKS and str(key).lower().startswith("ivl"):
            raise ValueError(f"ivl: {key!r} is not read: what a request asks for stands under 'ivl', in small letters")
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
