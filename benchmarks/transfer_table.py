"""From answers to figures: accuracies with intervals, shares of the gap, training costs, goals."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from transfer_measure import (
    BASE_ALONE,
    FUSION,
    PROXY,
    RESIDUAL,
    TRUST,
    TUNED,
    VALUE_ALONE,
    WEIGHTS,
    Answers,
    hits,
    sweep_label,
)
from transfer_training import VARIANTS
from transfer_world import NEWS, TASKS, World

INTERVAL = "95 % percentile bootstrap over seeds and, within each, over the items of each task"
EXPERT_ALONE = f"{PROXY}'s expert alone"
AVERAGE, SHARE = "average", "share"
GAIN_NEEDED = 0.05


@dataclass
class Target:
    """What was answered beside one base.

    Attributes:
        hits: Row → one mapping for each seed: task → [items] bool.
    """

    hits: dict[str, list[dict[str, np.ndarray]]]

    def tasks(self) -> list[str]:
        """The tasks that all rows have."""
        return list(next(iter(self.hits.values()))[0])


def by_task(world: World, answers: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    """Exact matches of one row, task → [items] bool."""
    items = world.test + world.news
    right = hits(items, answers)
    return {
        task: np.array([hit for item, hit in zip(items, right, strict=True) if item.task == task])
        for task in (*TASKS, NEWS)
    }


def collect(worlds: list[World], answers: list[Mapping[str, Answers]], base: str) -> Target:
    """Gather the rows of one target base.

    Args:
        worlds: One for each seed.
        answers: For each seed, the answers of every engine by name of the stage.
        base: The target.

    Returns:
        Its rows, those of engines of their own (fine-tuned, value alone) among them.
    """
    found: dict[str, list[dict[str, np.ndarray]]] = {}
    for world, engines in zip(worlds, answers, strict=True):
        alone = {VALUE_ALONE: engines[VALUE_ALONE][VALUE_ALONE]}
        alone[EXPERT_ALONE] = engines[f"{VALUE_ALONE} (proxy)"][VALUE_ALONE]
        tuned = engines[f"{base} {TUNED}"]
        for label, given in {**engines[base], **alone, **tuned}.items():
            found.setdefault(label, []).append(by_task(world, given))
    return Target(found)


def resample(target: Target, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Bootstrap of all rows of a target on the same draws, so that differences and ratios between rows are paired.

    Returns:
        Row → [count, tasks] accuracies.
    """
    rng = np.random.default_rng(seed)
    labels, tasks = list(target.hits), target.tasks()
    seeds = len(target.hits[labels[0]])
    stacked = [[np.stack([target.hits[label][s][task] for label in labels]) for task in tasks] for s in range(seeds)]
    found = np.empty((count, len(labels), len(tasks)))
    for draw in range(count):
        total = np.zeros((len(labels), len(tasks)))
        for s in rng.integers(seeds, size=seeds):
            for column, rows in enumerate(stacked[s]):
                chosen = rng.integers(rows.shape[1], size=rows.shape[1])
                total[:, column] += rows[:, chosen].mean(1)
        found[draw] = total / seeds
    return {label: found[:, i] for i, label in enumerate(labels)}


def cell(per_seed: list[float], draws: np.ndarray) -> dict[str, Any]:
    """A figure with its interval and what each seed gave."""
    low, high = np.percentile(draws, (2.5, 97.5))
    return {"mean": float(np.mean(per_seed)), "low": float(low), "high": float(high), "per_seed": per_seed}


def figures(target: Target, count: int) -> dict[str, dict[str, Any]]:
    """Row → task, `average` and `share` (of the gap between base alone and fine-tuned) → `cell`.

    The average is over `TASKS`; the news are not in it. `share` is missing where fine-tuning gained next to nothing.
    """
    draws = resample(target, count)
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
        training: For each seed, results of the stages `value/…` and `tuned/…`.
        base: The target.
    """
    stage_of = {**{variant: f"value/{variant}" for variant in VARIANTS}, PROXY: "tuned/S", TUNED: f"tuned/{base}"}
    stage_of |= {**dict.fromkeys(TRUST, stage_of[RESIDUAL]), FUSION: stage_of[PROXY]}
    found = {}
    for label, stage in stage_of.items():
        own = {key: float(np.mean([seed[stage][key] for seed in training])) for key in ("flops", "seconds")}
        tuned = {key: float(np.mean([seed[f"tuned/{base}"][key] for seed in training])) for key in own}
        found[label] = {**own, **{f"{key}_share": own[key] / tuned[key] for key in own}}
    return found


def goals(targets: Mapping[str, dict[str, dict[str, Any]]], extra: Mapping[str, float]) -> list[dict[str, Any]]:
    """The goals of the project against what came out.

    Args:
        targets: Base → `figures`.
        extra: Row → parameters that each token is multiplied with when it is served, beside the base's.
    """
    found = []

    def add(goal: str, measured: str, met: bool) -> None:
        found.append({"goal": goal, "measured": measured, "met": met})

    for base, kind in (("M", "larger size"), ("L", "larger size"), ("L2", "continued base")):
        ours, tuned = targets[base][RESIDUAL], targets[base][TUNED]
        good = [task for task in TASKS if ours[task]["mean"] >= 0.98 * tuned[task]["mean"]]
        told = f"{len(good)} ({', '.join(good) or 'none'})"
        add(f"{base} ({kind}): ≥ 98 % of fine-tuning on at least two tasks", told, len(good) >= 2)
    wanted = (("M", "larger size", 0.9), ("L", "larger size", 0.9), ("L2", "continued base", 0.9))
    for base, kind, least in (*wanted, ("X", "other vocabulary", 0.8)):
        part = targets[base][RESIDUAL][AVERAGE]["mean"] / max(targets[base][TUNED][AVERAGE]["mean"], 1e-9)
        add(f"{base} ({kind}): ≥ {least:.0%} of fine-tuning on average", f"{part:.1%}", part >= least)
    for base in targets:
        ours, proxy = (targets[base][row][AVERAGE]["mean"] for row in (RESIDUAL, PROXY))
        cost = extra[RESIDUAL] / extra[PROXY]
        add(
            f"{base}: residual with norm ahead of proxy-tuning at half its serving cost",
            f"{ours:.3f} against {proxy:.3f}, {cost:.2f} of its multiplications",
            ours > proxy and cost <= 0.5,
        )
    return found


def sweep(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Weight → `figures` of the main value network at that weight, 0 being the base alone."""
    return {"0": found[BASE_ALONE], **{f"{w:g}": found[sweep_label(w)] for w in WEIGHTS}}
