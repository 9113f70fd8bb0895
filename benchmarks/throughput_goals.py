"""The goals of the throughput benchmark: what was measured against each, and what keeps it from more."""

from __future__ import annotations

from typing import Any

NONE, ALL = 0.98, 0.97
# Below these rounds or starts their range says little: then only a measurement this far from its goal is sure.
ENOUGH_ROUNDS, FAR = 6, 0.25
PHASES = {"decode": "decode", "prefill": "prompts"}


def goals(sections: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each goal and section of a report: wanted, measured, met, and what limits it.

    Steering costs goals of speed: with none steered over plain vLLM's, with all steered over the bound's. Peers cost
    goals of being so many times faster; what plain vLLM itself reaches against a peer stands beside each, since nothing
    that runs inside vLLM can be expected to be faster than that. Processes differ in speed by a few percent that no
    number of rounds takes away: only what is further from its goal than plain vLLM is from itself in another process is
    beyond noise.

    Args:
        sections: Of the report.
    """
    found = []
    for name, section in sections.items():
        cases = {case["name"]: case for case in section.get("cases", [])}
        for case in cases.values():
            if "phases" in case:
                found += _steering(name, section, case, cases)
            elif case.get("goal") is not None:
                found.append(_peer(name, section, case))
    return found


def _entry(
    section: str,
    report: dict,
    goal: str,
    wanted: float,
    measured: float,
    interval: list[float],
    limited_by: str,
    margin: float = 0.0,
) -> dict[str, Any]:
    met = measured >= wanted
    outside = interval[0] >= wanted if met else interval[1] < wanted
    off = abs(measured / wanted - 1)
    starts = report.get("starts", 1)
    enough = (report["rounds"] if starts == 1 else starts) >= ENOUGH_ROUNDS
    beyond_noise = outside and (off > FAR or (enough and off > margin))
    found = {
        "section": section,
        "rounds": report["rounds"],
        "starts": starts,
        "goal": goal,
        "wanted": wanted,
        "measured": measured,
    }
    return found | {"interval": interval, "met": met, "beyond_noise": beyond_noise, "limited_by": limited_by}


def _steering(section: str, report: dict, case: dict, cases: dict[str, dict]) -> list[dict[str, Any]]:
    kind = case["name"].removeprefix("speculative, ")
    if kind not in ("none", "all"):
        return []
    plain, again, found = cases[case["against"]], cases.get("plain again"), []
    for phase, label in PHASES.items():
        mine, theirs = case["phases"][phase], plain["phases"][phase]
        noise, margin = _noise(plain, report["rounds"]), FAR
        if again is not None:
            ratio = again["phases"][phase]["speed_over_plain"]
            noise, margin = f"{noise}, and in another process it is {ratio:.3f} times as fast", abs(ratio - 1)
        if kind == "none":
            goal, wanted = f"{case['label']}, {label}: speed of plain vLLM", NONE
            limited_by = f"noise: {noise}"
        else:
            goal, wanted = f"{case['label']}, {label}: share of the bound", ALL
            limited_by = _limit(mine, theirs, cases.get("value", {}).get("phases", {}).get(phase), noise)
        measured = (mine["share_of_bound"], mine["share_of_bound_interval"])
        found.append(_entry(section, report, goal, wanted, *measured, limited_by, margin))
    return found


def _noise(plain: dict, rounds: int) -> str:
    if rounds == 1:
        return "one round says nothing about noise"
    low, high = plain["spread"]["output_throughput"]
    return f"rounds of base alone differ by {high / low - 1:.0%}"


def _limit(mine: dict, plain: dict, value: dict | None, noise: str) -> str:
    if value is None:
        return f"base alone reaches {plain['share_of_absolute_bound']:.2f} of its own bound; {noise}"
    # One after the other, each as fast as plain vLLM runs it.
    both = plain["median_seconds"] / (plain["median_seconds"] + value["median_seconds"])
    return (
        f"alone in plain vLLM the value network reaches {value['share_of_absolute_bound']:.2f} of its own bound, the "
        f"base {plain['share_of_absolute_bound']:.2f}: one after the other they would reach "
        f"{both / mine['bound_of_speed_over_plain']:.2f} here; {noise}"
    )


def _peer(section: str, report: dict, case: dict) -> dict[str, Any]:
    goal = f"ours, times as fast as {case['label']}"
    limited_by = f"plain vLLM itself is {case['plain_times_faster']:.2f} times as fast"
    measured = (case["times_faster"], case["times_faster_spread"])
    return _entry(section, report, goal, case["goal"], *measured, limited_by)
