"""Tables and pictures of what `throughput.py` measured: `python benchmarks/throughput_table.py RESULTS.json`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # needs no display
import matplotlib.pyplot as plt

SPEED = ("case", "output tokens/s (spread)", "decode: speed of base alone", "its bound", "share of the bound")
SPEED += ("prompts: speed of base alone", "its bound", "share of the bound")
LIMIT = ("case", "phase", "seconds", "bound by FLOPs", "bound by bytes", "bound step by step", "of which FLOPs")
LIMIT += ("share of the bound",)
LATENCY = ("case", "TTFT ms p50 / p90 / p99", "TPOT ms p50 / p90 / p99", "ITL ms p50 / p90 / p99")
LATENCY += ("peak memory", "KV-cache tokens that fit")
GOALS = ("goal", "measured in", "wanted", "measured (interval)", "", "what limits it")
PEERS = (
    "way",
    "output tokens/s (spread)",
    "ours is faster by (spread)",
    "plain vLLM is faster by",
    "goal",
    "TTFT ms p50 / p90 / p99",
    "TPOT ms p50 / p90 / p99",
)


def rows_of(header: tuple[str, ...], rows: list[tuple]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _throughput(case: dict) -> str:
    low, high = case["spread"]["output_throughput"]
    return f"{case['output_throughput']:,.1f} ({low:,.1f}–{high:,.1f})"


def _percentiles(case: dict, name: str) -> str:
    return " / ".join(f"{case[f'p{p}_{name}_ms']:,.0f}" for p in (50, 90, 99))


def _memory(case: dict) -> str:
    memory = case["memory"]
    return f"{memory.get('peak_gpu_bytes', memory['peak_resident_bytes']) / 2**30:.2f} GiB"


def serving_tables(section: dict) -> str:
    """Speed against plain vLLM and its bound, the limits in seconds, latencies and memory."""
    speed, limits, latencies = [], [], []
    for case in section["cases"]:
        cells = [case["label"], _throughput(case)]
        for phase, found in (("decode", case["phases"]["decode"]), ("prompts", case["phases"]["prefill"])):
            compared = case["name"] != "value"
            cells.append(f"{found['speed_over_plain']:.3f}" if compared else "–")
            highest, lock_step = found["bound_of_speed_over_plain"], found["bound_in_lock_step"]
            tighter = f" ({lock_step:.3f} in lock-step)" if lock_step < highest - 1e-6 else ""
            cells.append(f"{highest:.3f}{tighter}" if compared else "–")
            low, high = found["share_of_bound_interval"]
            cells.append(f"{found['share_of_bound']:.3f} ({low:.3f}–{high:.3f})" if compared else "–")
            limit = found["bound"]
            numbers = (found["median_seconds"], *(limit[f"seconds{by}"] for by in ("_by_flops", "_by_bytes", "")))
            seconds = tuple(f"{number:.2f}" for number in numbers)
            share = f"{found['share_of_absolute_bound']:.2f}"
            limits.append((case["label"], phase, *seconds, f"{limit['share_bound_by_flops']:.0%}", share))
        speed.append(tuple(cells))
        fit = f"{case['memory']['kv_cache_tokens']:,}"
        latencies.append((case["label"], *(_percentiles(case, n) for n in ("ttft", "tpot", "itl")), _memory(case), fit))
    rates, (low, high) = section["rates"], section["cases"][0]["spread"]["output_throughput"]
    one = "start (the median of its rounds)" if section.get("starts", 1) > 1 else "round"
    return "\n".join(
        [
            rows_of(SPEED, speed),
            f"Ratios are of one {one} each: the median, with an interval that holds the median with 95 % (below 6 "
            "of them: the range). A share above 1 is noise: base alone's own rounds differ by "
            f"{high / low - 1:.0%}. Bounds count value networks in the steps and for the tokens "
            "of steered requests alone; in lock-step a value network reads every token of a step with a steered one.\n",
            f"Limits: {rates['flops'] / 1e9:,.0f} GFLOP/s (large matrix product), {rates['bytes'] / 1e9:,.1f} GB/s "
            "(matrix times vector), measured in the same run. Seconds of the whole run:\n",
            rows_of(LIMIT, limits),
            rows_of(LATENCY, latencies),
        ]
    )


def speculative_tables(section: dict) -> str:
    """The same, with what drafts brought."""
    rows = [
        (case["label"], f"{case['phases']['decode']['tokens_per_request_and_step']:.2f}") for case in section["cases"]
    ]
    said = (
        "Triton ran in its interpreter: seconds say nothing here.\n\n" if section["environment"]["interpreted"] else ""
    )
    return said + rows_of(("case", "output tokens per request and decode step"), rows) + "\n" + serving_tables(section)


def peers_table(section: dict) -> str:
    """Ours beside every peer."""
    rows = []
    for case in section["cases"]:
        times, goal = case.get("times_faster"), case.get("goal")
        verdict = "" if goal is None else f"≥ {goal:g}× {'met' if case['met'] else 'MISSED'}"
        latencies = [_percentiles(case, name) for name in ("ttft", "tpot")]
        few = "" if case["requests"] == section["cases"][0]["requests"] else f" ({case['requests']} requests)"
        faster = plain = ""
        if times is not None:
            low, high = case["times_faster_spread"]
            faster, plain = f"{times:.2f}× ({low:.2f}–{high:.2f})", f"{case['plain_times_faster']:.2f}×"
        rows.append((case["label"] + few, _throughput(case), faster, plain, verdict, *latencies))
    sizes = ", ".join(f"{size} for {name}" for name, size in section["batch_sizes"].items())
    return rows_of(PEERS, rows) + (
        f"\nStatic batches have the size that was best in the sweep ({sizes}) and are sorted by output length, which a "
        f"server cannot know. Where requests run one by one, a few stand for all: {section['subset']}. No plugin can "
        "be expected to be faster than plain vLLM.\n"
    )


def sweep_table(section: dict) -> str:
    """What batch sizes give, output tokens per second."""
    ways = section["ways"].values()
    rows = []
    for place, entry in enumerate(max((way["sizes"] for way in ways), key=len)):
        cells = []
        for way in ways:
            rate = f"{way['sizes'][place]['output_throughput']:,.1f}" if place < len(way["sizes"]) else ""
            cells.append(f"**{rate}** (best)" if entry["batch_size"] == way["best"] else rate)
        rows.append((entry["batch_size"], *cells))
    return rows_of(("batch size", *(f"{way['label']}, output tokens/s" for way in ways)), rows)


def curves_table(section: dict) -> str:
    """Cost of an output token over base alone, by what was varied."""
    header = ("varied", "at", "base alone, ms per token", "all steered", "cost over base alone", "its bound")
    header += ("bound by FLOPs",)
    rows = []
    for name, points in section["curves"].items():
        for point in points:
            milliseconds = tuple(f"{point[key]:.2f}" for key in ("plain_ms", "steered_ms"))
            cost = f"{point['cost']:.3f}", f"{point['cost_bound']:.3f}"
            rows.append((name, point["label"], *milliseconds, *cost, f"{point['share_bound_by_flops']:.0%}"))
    done, wanted = section.get("points"), section.get("points_wanted")
    missing = "" if done == wanted else f"\nInterrupted: {done} of {wanted} points.\n"
    return rows_of(header, rows) + missing


def goals_table(entries: list[dict]) -> str:
    """Every goal, met or missed, and what limits it."""
    rows = []
    for entry in entries:
        low, high = entry["interval"]
        times = "×" if entry["wanted"] > 1 else ""
        digits = 2 if times else 3
        verdict = "met" if entry["met"] else "MISSED"
        if not entry["beyond_noise"]:
            verdict += ", not beyond noise"
        measured = f"{entry['measured']:.{digits}f}{times} ({low:.{digits}f}–{high:.{digits}f})"
        starts = f" in {entry['starts']} starts" if entry.get("starts", 1) > 1 else ""
        where = f"{entry['section']}, {entry['rounds']} rounds{starts}"
        rows.append((entry["goal"], where, f"≥ {entry['wanted']:g}{times}", measured, verdict, entry["limited_by"]))
    return rows_of(GOALS, rows)


TITLES = {
    "serving": ("What steering costs, eager", serving_tables),
    "short": ("The same in many short rounds, for small differences", serving_tables),
    "compiled": ("The same, compiled", serving_tables),
    "speculative": ("Speculative decoding", speculative_tables),
    "peers": ("Every other way", peers_table),
    "sweep": ("Batch size of the Hugging Face peers", sweep_table),
    "curves": ("Scaling: cost of one output token", curves_table),
}


def markdown(report: dict) -> str:
    """The whole report."""
    parts = ["# Throughput\n"]
    for name, (title, table) in TITLES.items():
        section = report["sections"].get(name)
        if section is None:
            continue
        found, scale, check = section["environment"], section["scale"], section.get("check", {})
        mixed = ", request by request in mixed batches" if "10 %" in check.get("cases", {}) else ""
        starts = f", in {section['starts']} starts of all engines" if section.get("starts", 1) > 1 else ""
        parts.append(f"## {title}\n")
        machine = found.get("gpu") or f"{found['cpu'].partition(',')[0]}, {found['threads']} threads"
        parts.append(
            f"{machine}; vLLM {found['vllm']}, torch {found['torch']}, transformers {found['transformers']}; "
            f"{found['date']}; `{found['command']}`. Base {scale['base_parameters'] / 1e6:,.0f} M parameters, value "
            f"network {scale['value_parameters'] / 1e6:,.0f} M, {scale['dtype']}; {scale['prompts']} requests at once, "
            f"prompts of {scale['input_len'][0]}–{scale['input_len'][1]} and outputs of {scale['output_len'][0]}–"
            f"{scale['output_len'][1]} tokens; medians of {section.get('rounds', 1)} rounds in turns{starts}."
            + (f" Greedy tokens were compared with the formula's first{mixed}." if check.get("checked") else "")
            + (f" TOKENS WERE NOT CHECKED: {check['why']}." if "why" in check else "")
            + _model_runners(section.get("model_runners", {}))
            + (" Seconds are CPU seconds of one thread." if found["clock"] == "cpu" else "")
            + (" QUICK RUN." if scale["quick"] else "")
            + "\n"
        )
        parts.append(table(section))
    if report.get("goals"):
        parts.append("## Goals\n")
        parts.append(goals_table(report["goals"]))
    parts.append("## Not measured\n")
    parts.extend(f"* {entry['what']}: {entry['why']}" for entry in report["skipped"])
    return "\n".join(parts) + "\n"


def _model_runners(runners: dict[str, str]) -> str:
    kinds = sorted(set(runners.values()))
    if len(kinds) > 1:
        each = ", ".join(f"{name}: {kind}" for name, kind in runners.items())
        return f" MODEL RUNNERS DIFFER, so that ratios compare them too ({each})."
    return f" vLLM's model runner {kinds[0]}." if kinds else ""


def draw_cases(sections: dict, output: Path) -> None:
    """Bars: output tokens per second of every case and every peer."""
    panels = [name for name in ("serving", "compiled", "peers") if sections.get(name, {}).get("cases")]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(7.5 * len(panels), 4.8), layout="constrained", squeeze=False)
    for panel, name in zip(axes[0], panels, strict=True):
        cases = [case for case in sections[name]["cases"] if case["name"] != "value"][::-1]
        rates = [case["output_throughput"] for case in cases]
        edges = [
            [abs(rate - case["spread"]["output_throughput"][end]) for case, rate in zip(cases, rates, strict=True)]
            for end in (0, 1)
        ]
        colors = [
            "tab:gray"
            if case["name"] == "plain"
            else "tab:orange"
            if name == "peers" and "goal" in case
            else "tab:blue"
            for case in cases
        ]
        panel.barh([case["label"] for case in cases], rates, xerr=edges, color=colors)
        for place, rate in enumerate(rates):
            panel.annotate(f" {rate:,.0f}", (rate, place), va="center", xytext=(6, 0), textcoords="offset points")
        panel.set_xlabel("output tokens/s")
        panel.set_title(TITLES[name][0])
        panel.margins(x=0.12)
        panel.grid(axis="x", alpha=0.3)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def draw_curves(section: dict, output: Path) -> None:
    """One panel for each thing that was varied: measured cost over base alone, and its bound."""
    count = len(section["curves"])
    figure, axes = plt.subplots(1, count, figsize=(5 * count, 4), layout="constrained", squeeze=False)
    for panel, (name, points) in zip(axes[0], section["curves"].items(), strict=True):
        places = range(len(points))
        panel.plot(places, [point["cost"] for point in points], "o-", label="measured")
        low, high = ([point["cost_spread"][end] for point in points] for end in (0, 1))
        panel.fill_between(places, low, high, alpha=0.2)
        panel.plot(places, [point["cost_bound"] for point in points], "k:", label="bound")
        panel.set_xticks(places, [point["label"] for point in points])
        panel.set_xlabel(name)
        panel.set_ylabel("cost of an output token, base alone = 1")
        panel.set_ylim(bottom=0.9)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(output, dpi=130)
    plt.close(figure)


def write(report: dict, results: Path) -> None:
    """Writes the Markdown and the pictures beside the JSON."""
    results.with_suffix(".md").write_text(markdown(report))
    draw_cases(report["sections"], results.with_suffix(".png"))
    if "curves" in report["sections"]:
        draw_curves(report["sections"]["curves"], results.with_name(f"{results.stem}-curves.png"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of benchmarks/throughput.py")
    for path in parser.parse_args().results:
        write(json.loads(path.read_text()), path)


if __name__ == "__main__":
    main()
