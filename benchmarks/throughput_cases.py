"""The cases of the throughput benchmark: which engine serves, and which requests are steered by what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from throughput_worker import Request


@dataclass(frozen=True)
class Case:
    """One way of serving the requests.

    Args:
        name: Key in the report.
        label: For tables.
        engine: Key of the engine that runs it.
        ivl: What a steered request asks for.
        share: Of the requests that are steered.
        networks: Value networks that a steered request uses.
        against: Key of the case that it is compared with.
    """

    name: str
    label: str
    engine: str
    ivl: Any = None
    share: float = 0.0
    networks: int = 1
    against: str = "plain"

    def steered(self, count: int) -> set[int]:
        """Which of `count` requests are steered: the share of them, evenly spread."""
        return {int((number + 0.5) / self.share) for number in range(round(count * self.share))}

    def requests(self, requests: list[Request]) -> list[Request]:
        """The same requests, the steered ones marked."""
        steered = self.steered(len(requests))
        return [Request(r.prompt, r.output_len, self.ivl if n in steered else None) for n, r in enumerate(requests)]


CASES = [
    Case("plain", "base alone (plain vLLM)", "plain"),
    Case("plain again", "base alone in another process", "plain again"),
    Case("none", "none steered", "ours"),
    Case("none, no skip", "none steered, skip_unsteered=false", "ours, no skip"),
    Case("10 %", "10 % steered", "ours", 1.0, 0.1),
    Case("50 %", "50 % steered", "ours", 1.0, 0.5),
    Case("all", "all steered", "ours", 1.0, 1.0),
    Case("two", "all steered by two value networks", "two", "default=1.0,second=0.5", 1.0, 2),
    Case("cascade", "all steered by a cascade", "cascade", 1.0, 1.0),
    Case("value", "value network alone (plain vLLM)", "value"),
]
FEW = ("plain", "plain again", "none", "all")
# With drafts: only vLLM's runner V2 takes logits processors beside a drafter.
SPECULATIVE = [
    Case("speculative, plain", "base alone, n-gram drafts", "plain, drafts", against="speculative, plain"),
    Case("speculative, none", "none steered, n-gram drafts", "ours, drafts", against="speculative, plain"),
    Case("speculative, all", "all steered, n-gram drafts", "ours, drafts", 1.0, 1.0, against="speculative, plain"),
]
