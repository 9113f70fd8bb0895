"""From answers to figures: accuracies with intervals, shares of the gap, training costs, goals."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from transfer_bootstrap import Target, cell, interval, paired
from transfer_measure import Answers, hits
from transfer_rows import (
    BASE_ALONE,
    EXPERT_ALONE,
    FUSION,
    LIMITS,
    PROXY,
    PROXY_BEST,
    RESIDUAL,
    TUNED,
    VALUE_ALONE,
    WEIGHTS,
    limit_label,
    sweep_label,
)
from transfer_stages import EVERYTHING
from transfer_training import VARIANTS
from transfer_world import NEWS, TASKS, World, group

AVERAGE, SHARE = "average", "share"
GAIN_NEEDED = 0.05


def by_task(world: World, per_item: list[Any]) -> dict[str, np.ndarray]:
    """What there is for each item, task → [items]."""
    items = world.test + world.news
    return {
        task: np.array([one for item, one in zip(items, per_item, strict=True) if item.task == task])
        for task in (*TASKS, NEWS)
    }


def collect(worlds: list[World], answers: list[Mapping[str, Answers]], base: str) -> Target:
    """Gather the rows of one target base.

    Args:
        worlds: One for each seed.
        answers: For each seed, the answers of every engine by name of the stage, `answers/…` or `joint/…`.
        base: The target.

    Returns:
        Its rows, those of engines of their own (fine-tuned, value alone, experts of one task) among them.
    """
    found: dict[str, list[dict[str, np.ndarray]]] = {}
    groups = []
    for world, engines in zip(worlds, answers, strict=True):
        items = world.test + world.news
        groups.append(by_task(world, [group(item) for item in items]))
        alone = {VALUE_ALONE: engines[f"answers/{VALUE_ALONE}"][VALUE_ALONE]}
        alone[EXPERT_ALONE] = engines[f"answers/{VALUE_ALONE} (proxy)"][VALUE_ALONE]
        of_base = {
            **engines[f"answers/{base}"],
            **engines[f"answers/{base} {TUNED}"],
            **engines.get(f"joint/{base}", {}),
        }
        for label, given in {**of_base, **alone}.items():
            found.setdefault(label, []).append(by_task(world, hits(items, given)))
    return Target(found, groups)


def figures(target: Target, draws: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Row → task, `average` and `share` (of the gap between base alone and fine-tuned) → `cell`.

    The average is over `TASKS`; the news are not in it. `share` is missing where fine-tuning gained next to nothing.

    Args:
        target: What was answered.
        draws: Its `resample`.
    """
    columns = [target.tasks().index(task) for task in TASKS]
    means = {label: d[:, columns].mean(1) for label, d in draws.items()}
    seeds = {label: [float(np.mean([s[t].mean() for t in TASKS])) for s in rows] for label, rows in target.hits.items()}
    found: dict[str, dict[str, Any]] = {}
    for label, rows in target.hits.items():
        found[label] = {
            task: cell([float(seed[task].mean()) for seed in rows], draws[label][:, column])
            for column, task in enumerate(target.tasks())
        }
        found[label][AVERAGE] = cell(seeds[label], means[label])
        base, tuned = np.array(seeds[BASE_ALONE]), np.array(seeds[TUNED])
        if (tuned - base).min() > GAIN_NEEDED:
            gap = np.maximum(means[TUNED] - means[BASE_ALONE], 1e-9)
            share = (np.array(seeds[label]) - base) / (tuned - base)
            found[label][SHARE] = cell(share.tolist(), (means[label] - means[BASE_ALONE]) / gap)
            # Of the means, as the interval is.
            found[label][SHARE]["mean"] = float((np.mean(seeds[label]) - base.mean()) / (tuned.mean() - base.mean()))
    return found


def costs(training: list[Mapping[str, Any]], base: str) -> dict[str, dict[str, float]]:
    """Row → what its training took, and relative to fine-tuning the target; means over the seeds.

    Args:
        training: For each seed, results of the stages `value/…`, `expert/…` and `tuned/…`.
        base: The target.
    """
    stage_of = {**{variant: f"value/{variant}" for variant in VARIANTS}, TUNED: f"tuned/{base}"}
    for label, main in ((PROXY, f"expert/{EVERYTHING}"), (RESIDUAL, f"value/{RESIDUAL}")):
        stage_of |= {label: main, **{limit_label(label, nats): main for nats in LIMITS}}
    stage_of |= dict.fromkeys((PROXY_BEST, FUSION), stage_of[PROXY])
    found = {}
    for label, stage in stage_of.items():
        own = {key: float(np.mean([seed[stage][key] for seed in training])) for key in ("flops", "seconds")}
        tuned = {key: float(np.mean([seed[f"tuned/{base}"][key] for seed in training])) for key in own}
        found[label] = {**own, **{f"{key}_share": own[key] / tuned[key] for key in own}}
    return found


def goals(
    targets: Mapping[str, dict[str, dict[str, Any]]],
    draws: Mapping[str, dict[str, np.ndarray]],
    extra: Mapping[str, float],
) -> list[dict[str, Any]]:
    """The goals of the project against what came out.

    Args:
        targets: Base → `figures`.
        draws: Base → `resample`, whose columns are in the order of `TASKS`, further ones behind.
        extra: Row → parameters that each token is multiplied with when it is served, beside the base's.

    Returns:
        For each: `goal`, `measured`, `low` (lower bounds of the differences by which it is met, or missed, paired
        over the same draws), `met`, and `sure`: also by the lower bounds. Nothing is met that fine-tuning gained
        nothing at.
    """
    found = []

    def add(goal: str, measured: str, low: list[float], met: bool, sure: bool) -> None:
        found.append({"goal": goal, "measured": measured, "low": low, "met": bool(met), "sure": bool(met and sure)})

    def compared(base: str, other: str, cell_name: str, factor: float) -> tuple[float, float, bool]:
        rows, columns = targets[base], [TASKS.index(cell_name)] if cell_name in TASKS else list(range(len(TASKS)))
        ours, theirs = (rows[label][cell_name]["mean"] for label in (RESIDUAL, other))
        low, _ = interval(paired(draws[base], RESIDUAL, other, columns, factor))
        gained = rows[TUNED][cell_name]["mean"] > rows[BASE_ALONE][cell_name]["mean"]
        # Means of seeds are sums of fractions: what is equal may differ in the last bit.
        return ours - factor * theirs, low, gained and ours >= factor * theirs - 1e-9

    larger = (("M", "larger size"), ("L", "larger size"), ("L2", "continued base"))
    for base, kind in larger:
        by = {task: compared(base, TUNED, task, 0.98) for task in TASKS}
        good = [task for task, (_, _, met) in by.items() if met]
        sure = [task for task in good if by[task][1] >= 0]
        told = f"{len(good)} ({', '.join(good) or 'none'}), {len(sure)} of them by the lower bound"
        lows = [low for _, low, _ in by.values()]
        add(f"{base} ({kind}): ≥ 98 % of fine-tuning on at least two tasks", told, lows, len(good) >= 2, len(sure) >= 2)
    for base, kind, least in (*((base, kind, 0.9) for base, kind in larger), ("X", "other vocabulary", 0.8)):
        _, low, met = compared(base, TUNED, AVERAGE, least)
        part = targets[base][RESIDUAL][AVERAGE]["mean"] / max(targets[base][TUNED][AVERAGE]["mean"], 1e-9)
        add(f"{base} ({kind}): ≥ {least:.0%} of fine-tuning on average", f"{part:.1%}", [low], met, low >= 0)
    for base in targets:
        ours, proxy = (targets[base][row][AVERAGE]["mean"] for row in (RESIDUAL, PROXY_BEST))
        _, low, _ = compared(base, PROXY_BEST, AVERAGE, 1.0)
        add(
            f"{base}: residual with norm ahead of proxy-tuning (best weight) at half its serving cost",
            f"{ours:.3f} against {proxy:.3f}, {extra[RESIDUAL]:,} against {extra[PROXY]:,} multiplications a token",
            [low],
            ours > proxy and 2 * extra[RESIDUAL] <= extra[PROXY],
            low > 0,
        )
    return found


def sweep(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Weight → `figures` of the main value network at that weight, 0 being the base alone."""
    return {"0": found[BASE_ALONE], **{f"{w:g}": found[sweep_label(w)] for w in WEIGHTS}}


def limits(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Row → nats → `figures` within that trust region, and without one (`inf`)."""
    return {
        label: {**{f"{n:g}": found[limit_label(label, n)] for n in LIMITS}, "inf": found[label]}
        for label in (RESIDUAL, PROXY)
        if limit_label(label, LIMITS[0]) in found
    }
