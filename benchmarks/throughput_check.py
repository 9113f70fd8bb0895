"""Correctness before speed: the greedy tokens of every contestant against the formula, computed by transformers.

In float32 they have to be the formula's own. In 16 bits rounding decides between columns that are close, so every token
is judged by how far its logit falls short of the best one, by the formula in float32, given the tokens before it: on
average by no more than `ROUNDING` of the best logit's size. By the base alone, steered tokens have to fall short by
several times that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from throughput_cases import Case
from throughput_serving import Setup, sample
from throughput_worker import Request, Worker

# One step of bfloat16, relative to the number.
ROUNDING = 2**-8
# How many times that steered tokens have to fall short by the base alone.
CONTROL = 4


def check(setup: Setup, engines: dict[str, Worker], cases: Iterable[Case], reference: Worker) -> dict[str, Any]:
    """Greedy tokens of every case against the formula, on a few prompts, before anything is timed.

    In a mixed batch, steered requests have to follow the formula and the others the base alone. So that the comparison
    could fail, steered requests have to get other tokens than the base's.

    Raises:
        RuntimeError: a case gives other tokens, or steering changes none.
    """
    few = [Request(request.prompt[:24], 8) for request in sample(setup.scale, 10, seed=1)]
    weights = {"two": (1.0, 0.5), "proxy": (1.0, -1.0)}
    judge = _Judge(setup, reference, few)
    found = {}
    for case in cases:
        if case.name == "value":
            continue
        steered = case.steered(len(few))
        asked = [weights.get(case.name, (1.0,)) if number in steered else () for number in range(len(few))]
        tokens = engines[case.engine].call("run", case.requests(few)).tokens
        found[case.name] = {"steered": len(steered)}
        found[case.name] |= judge(case.label, tokens, asked, case.engine == "cascade")
    return {"checked": True, "prompts": len(few), "tokens": sum(r.output_len for r in few), "cases": found}


def check_peers(setup: Setup, peers: Worker, reference: Worker, ways: Iterable[tuple[float, ...]]) -> dict[str, Any]:
    """Greedy tokens of the Hugging Face peers against the formula, one by one and batched.

    Args:
        setup: Models.
        peers: Where they run.
        reference: Where the formula does.
        ways: Weights of the value models.

    Raises:
        RuntimeError: a peer gives other tokens.
    """
    few = [Request(request.prompt[:24], 8) for request in sample(setup.scale, 10, seed=1)]
    judge = _Judge(setup, reference, few)
    for weights in sorted(set(ways)):
        for batch_size in (1, 4):
            tokens = peers.call("run", few, weights, batch_size).tokens
            judge(f"peers, weights {weights}, batch {batch_size}", tokens, [weights] * len(few), False)
    return {"checked": True, "prompts": len(few), "tokens": sum(request.output_len for request in few)}


class _Judge:
    """Compares tokens of the same requests with the formula, again and again.

    Args:
        setup: Says in what dtype they were computed.
        reference: Where the formula runs.
        requests: What was asked for.
    """

    def __init__(self, setup: Setup, reference: Worker, requests: list[Request]) -> None:
        self._exact, self._reference, self._requests = setup.scale.dtype == "float32", reference, requests
        self._known: dict[tuple, list[list[int]]] = {}

    def __call__(
        self, label: str, tokens: list[list[int]], asked: Sequence[tuple[float, ...]], cascade: bool
    ) -> dict[str, Any]:
        """What was compared; `asked` has each request's weights, none of them where it is not steered.

        Raises:
            RuntimeError: other tokens, or the base alone would have given these too.
        """
        compare = self._same if self._exact else self._close
        return compare(label, tokens, asked, cascade)

    def _formula(self, weights: tuple[float, ...], cascade: bool = False) -> list[list[int]]:
        key = (weights, cascade)
        if key not in self._known:
            self._known[key] = self._reference.call("recomputed", self._requests, weights, cascade)
        return self._known[key]

    def _same(self, label: str, tokens: list, asked: Sequence[tuple[float, ...]], cascade: bool) -> dict[str, Any]:
        base = self._formula(())
        expected = [self._formula(w, cascade)[n] if w else base[n] for n, w in enumerate(asked)]
        if tokens != expected:
            raise RuntimeError(f"{label}: {tokens} but the formula gives {expected}")
        differ = sum(tokens[number] != base[number] for number, weights in enumerate(asked) if weights)
        if any(asked) and not differ:
            raise RuntimeError(f"{label}: no steered request got other tokens than the base's")
        return {"other_tokens_than_base": differ}

    def _close(self, label: str, tokens: list, asked: Sequence[tuple[float, ...]], cascade: bool) -> dict[str, Any]:
        short, best = self._reference.call("shortfall", self._requests, tokens, asked, cascade)
        allowed = ROUNDING * best
        if not short <= allowed:
            raise RuntimeError(
                f"{label}: tokens fall short of the formula's best by {short:.4f}, allowed {allowed:.4f}"
            )
        found = {"short_of_the_best_logit": short, "allowed": allowed}
        steered = [number for number, weights in enumerate(asked) if weights]
        if steered:
            some, theirs = [self._requests[n] for n in steered], [tokens[n] for n in steered]
            control, best = self._reference.call("shortfall", some, theirs, [()] * len(some))
            if not control > CONTROL * ROUNDING * best:
                raise RuntimeError(
                    f"{label}: by the base alone steered tokens fall short by no more than {control:.4f}"
                )
            found["short_by_the_base_alone"] = control
        return found
