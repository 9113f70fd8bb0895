"""Correctness before speed: the greedy tokens of every contestant against the formula, computed by transformers."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from throughput_serving import Case, Setup, sample
from throughput_worker import Request, Worker


def check(setup: Setup, engines: dict[str, Worker], cases: Iterable[Case], peers: Worker | None) -> dict[str, Any]:
    """Greedy tokens of every case against the formula, on a few prompts, before anything is timed.

    In a mixed batch, steered requests have to follow the formula and the others the base alone. So that the comparison
    could fail, tokens of steered requests have to differ from the base's.

    Raises:
        RuntimeError: a case gives other tokens, or steering changes none.
    """
    if peers is None:
        return {"checked": False, "why": "vLLM's dummy weights exist in no folder that transformers could read"}
    few = [Request(request.prompt[:24], 8) for request in sample(setup.scale, 10, seed=1)]
    weights = {"two": (1.0, 0.5), "proxy": (1.0, -1.0)}

    @functools.cache
    def formula(*asked: float, cascade: bool = False) -> list[list[int]]:
        return peers.call("recomputed", few, asked, cascade)

    changed = {}
    for case in cases:
        if case.name == "value":
            continue
        steered, base = case.steered(len(few)), formula()
        theirs = formula(*weights.get(case.name, (1.0,)), cascade=case.engine == "cascade") if steered else base
        expected = [theirs[number] if number in steered else base[number] for number in range(len(few))]
        found = engines[case.engine].call("run", case.requests(few)).tokens
        if found != expected:
            raise RuntimeError(f"{case.label}: {found} but the formula gives {expected}")
        differ = sum(found[number] != base[number] for number in steered)
        if steered and not differ:
            raise RuntimeError(f"{case.label}: no steered request got other tokens than the base's")
        changed[case.name] = {"steered": len(steered), "other_tokens_than_base": differ}
    return {"checked": True, "prompts": len(few), "tokens": sum(r.output_len for r in few), "cases": changed}


def check_peers(setup: Setup, peers: Worker, ways: Iterable[tuple[float, ...]]) -> dict[str, Any]:
    """Greedy tokens of the Hugging Face peers against the formula, one by one and batched.

    Args:
        setup: Models.
        peers: Where they run.
        ways: Weights of the value models.

    Raises:
        RuntimeError: a peer gives other tokens.
    """
    few = [Request(request.prompt[:24], 8) for request in sample(setup.scale, 4, seed=1)]
    for weights in sorted(set(ways)):
        expected = peers.call("recomputed", few, weights)
        for batch_size in (1, 4):
            found = peers.call("run", few, weights, batch_size).tokens
            if found != expected:
                raise RuntimeError(
                    f"peers, weights {weights}, batch {batch_size}: {found}, the formula gives {expected}"
                )
    return {"checked": True, "prompts": len(few), "tokens": sum(request.output_len for request in few)}
