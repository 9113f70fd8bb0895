"""Writes the figures of `benchmarks/results/` into README.md, so that none is typed.

python benchmarks/readme.py            write them
python benchmarks/readme.py --check    exit with 1 if README.md says something else than the results

A block of the README begins with `<!-- figures: NAME -->` and ends with `<!-- end -->`; NAME is a key of `BLOCKS`.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"<!-- figures: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def measured(environment: dict[str, Any]) -> str:
    """`, 2026-11-22, commit 0123456789` out of a report's environment: what it says of both."""
    commit = environment.get("commit", "unknown")
    parts = [environment.get("date"), None if commit == "unknown" else f"commit {commit}"]
    return "".join(f", {part}" for part in parts if part)


def made_by(environment: dict[str, Any]) -> str:
    """The command that made figures, and when."""
    gpu = f", {environment['gpu']}" if "gpu" in environment else ""
    return f"`{environment['command']}`{gpu}{measured(environment)}."


def verdict(met: bool | None) -> str:
    """How a goal stands."""
    return "not yet measured" if met is None else "met" if met else "**missed**"


def transfer(report: dict[str, Any]) -> str:
    """Average accuracy of the main ways of answering on every target base, and the goals."""
    targets = report["targets"]
    shown = ("base alone", "residual", "cascade+text", "no norm", "proxy-tuning", "fine-tuned")
    rows = []
    for label in shown:
        cells = [target["rows"].get(label, {}).get("average") for target in targets.values()]
        rows.append(
            [label, *(f"{c['mean']:.2f} [{c['low']:.2f}, {c['high']:.2f}]" if c else "–" for c in cells)],
        )
    goals = []
    for goal in report["goals"]:
        unsure = ", not by the lower bound" if goal["met"] and not goal["sure"] else ""
        goals.append([goal["goal"], goal["measured"], verdict(goal["met"]) + unsure])
    environment = report["environment"]
    made = (
        f"`{report['command']}`: {report['seeds']} seeds, {report['wall_seconds'] / 60:.0f} minutes on "
        f"{environment['cores']} cores, vLLM {environment['vllm']}{measured(environment)}."
    )
    heading = ["exact match [95 % interval]", *targets]
    return "\n\n".join([table(heading, rows), table(["goal", "measured", ""], goals), made])


def maps(report: dict[str, Any]) -> str:
    """What a value network of another vocabulary is worth, by how it reads the base's tokens."""
    by_input: dict[str, list[float]] = {}
    for label, cells in report["maps_on_X"].items():
        _, reading, _ = label.split(", ")
        by_input.setdefault(reading, []).append(cells["average"]["mean"])
    rows = [[f"`--input {reading}`", f"{min(f):.2f} to {max(f):.2f}"] for reading, f in by_input.items()]
    return table(["", "exact match on X over the other settings of the map"], rows)


def experts(report: dict[str, Any]) -> str:
    """Several experts of one task each: share of the gap to fine-tuning."""
    targets = report["several_experts"]
    rows = [
        [
            label,
            *(
                f"{c['mean']:.0%} [{c['low']:.0%}, {c['high']:.0%}]"
                for c in (t[label]["share"] for t in targets.values())
            ),
        ]
        for label in next(iter(targets.values()))
        if label not in ("base alone", "fine-tuned")
    ]
    return table(["share of the gap [95 % interval]", *targets], rows)


def throughput(*reports: dict[str, Any]) -> str:
    """Speed against plain vLLM and the limit, compiled and eager."""
    rows, runs = [], []
    for how, section in (
        (f"{where}{how}", next((report["sections"][name] for name in names if name in report["sections"]), None))
        for report, where in zip(reports, ("", "GPU, "), strict=False)
        for how, names in (("compiled", ("compiled",)), ("eager", ("short", "serving")))
    ):
        if section is None:
            continue
        for case in section["cases"]:
            if case["name"] in ("plain", "value"):
                continue
            phases = [case["phases"][name] for name in ("decode", "prefill")]
            keys = ("speed_over_plain", "bound_of_speed_over_plain", "share_of_bound")
            cells = (" / ".join(f"{phase[key]:.2f}" for phase in phases) for key in keys)
            rows.append([f"{how}, {case['label']}", *cells])
        runs.append(f"{how[0].upper()}{how[1:]}: {run(section)}")
    heading = ["decode / prompts", "speed of plain vLLM", "limit", "share of the limit"]
    return "\n\n".join([table(heading, rows), *runs])


def peers(*reports: dict[str, Any]) -> str:
    """How much faster than every peer."""
    rows, runs = [], []
    for report, where in zip(reports, ("", "GPU, "), strict=False):
        section = report["sections"].get("peers")
        if section is None:  # the sweep before it is a run of its own
            continue
        runs.append(run(section))
        plain = next(case for case in section["cases"] if case["name"] == "plain")["output_throughput"]
        for goal in report["goals"]:
            label = goal["goal"].removeprefix("ours, times as fast as ")
            case = next((case for case in section["cases"] if case["label"] == label), None)
            if case is not None:
                rows.append(
                    [
                        f"{where}{label}",
                        f"{case['times_faster']:.1f}×",
                        f"{plain / case['output_throughput']:.1f}×",
                        f"≥ {case['goal']:g}×",
                        verdict(goal["met"]) + ("" if goal["beyond_noise"] else ", not beyond noise"),
                    ]
                )
    heading = ["against", "all steered is faster by", "plain vLLM is faster by", "goal", ""]
    return "\n\n".join([table(heading, rows), *runs])


def run(section: dict[str, Any]) -> str:
    """What a section was measured with."""
    environment, scale = section["environment"], section["scale"]
    machine = environment.get("gpu") or environment["cpu"].partition(",")[0]
    clock = "CPU time of one thread" if environment["clock"] == "cpu" else f"{environment['threads']} threads"
    starts = f" in {section['starts']} starts" if section.get("starts", 1) > 1 else ""
    return (
        f"`{environment['command']}`: {scale['base_parameters'] / 1e6:.0f} M base, "
        f"{scale['value_parameters'] / 1e6:.0f} M value network, {scale['prompts']} requests, "
        f"medians of {section['rounds']} rounds{starts}, {machine}, {clock}"
        f"{measured(environment)}."
    )


def kernels(cpu: dict[str, Any], *gpu: dict[str, Any]) -> str:
    """The kernels' goals; a CPU's report says of a GPU's that they are not measured."""
    goals = [goal for report in gpu for goal in report["goals"]]
    goals += [goal for goal in cpu["goals"] if goal["measured"] is not None or not gpu]
    rows = []
    for goal in goals:
        measured = "–" if goal["measured"] is None else f"{goal['measured']:.2f}"
        missing = f", {goal['missing']}" if "missing" in goal else ""
        rows.append([goal["goal"], goal["target"], measured, verdict(goal.get("met")) + missing])
    made = [made_by(report["environment"]) for report in (*gpu, cpu)]
    return "\n\n".join([table(["", "goal", "measured", ""], rows), *made])


def solver(*reports: dict[str, Any]) -> str:
    """Solved weights against the grid search."""
    rows = []
    for report, where in zip(reports, ("", ", on a GPU"), strict=False):
        for experts in sorted({case["experts"] for case in report["cases"]}):
            cases = [case for case in report["cases"] if case["experts"] == experts]
            found = [case["times_faster"] for case in cases if "times_faster" in case]  # a GPU's case may have failed
            met = sum(times >= 10 for times in found)
            faster = f"{min(found):.1f}× to {max(found):.1f}×" if found else "–"
            rows.append([f"{experts}{where}", faster, f"{met} of {len(cases)}"])
    heading = ["experts", "faster than a grid search", "cases at the goal of 10×"]
    return "\n\n".join([table(heading, rows), *(made_by(report["environment"]) for report in reports)])


def siblings(report: dict[str, Any]) -> str:
    """What a pair of LoRA siblings saves in vLLM."""
    engine = report["engine"]
    share = {
        (one["rows"], one["ivl"]): f"{one['of_nothing_shared']:.2f} ({one['range'][0]:.2f} to {one['range'][1]:.2f})"
        for one in engine["decode"]
    }
    rows = [[str(count), share[count, 1.0], share[count, "auto"]] for count in sorted({count for count, _ in share})]
    held = engine["resident_bytes"]
    saved = (held["nothing shared"] - held["tables shared"]) / 2**20
    heading = ["requests", "decode step with weight 1, of that with nothing shared (rounds)", "with `auto`"]
    return table(heading, rows) + f"\n\n{saved:.0f} MiB less memory; {made_by(engine['environment'])}"


# Name in the README → files of results and what to make of them. The second one is a GPU's, once there is one.
BLOCKS: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "transfer": (("transfer.json",), transfer),
    "experts": (("transfer.json",), experts),
    "maps": (("transfer.json",), maps),
    "throughput": (("throughput-cpu.json", "throughput-gpu.json"), throughput),
    "peers": (("throughput-cpu.json", "throughput-gpu-peers.json"), peers),
    "kernels": (("kernels-cpu.json", "kernels-nvidia-*.json"), kernels),
    "siblings": (("siblings-cpu.json",), siblings),
    "solver": (("fusion-cpu.json", "fusion-nvidia-*.json"), solver),
}


def fill(text: str, results: Path = RESULTS) -> str:
    """Fill in every block.

    Args:
        text: The README.
        results: Folder of the JSON files.

    Raises:
        KeyError: A block has a name that is not in `BLOCKS`.
    """

    def written(match: re.Match[str]) -> str:
        files, write = BLOCKS[match[1]]
        found = [results / files[0], *(path for name in files[1:] for path in sorted(results.glob(name))[:1])]
        reports = [json.loads(path.read_text()) for path in found]
        return f"<!-- figures: {match[1]} -->\n{write(*reports)}\n<!-- end -->"

    return BLOCK.sub(written, text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if figures are stale")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    arguments = parser.parse_args()
    text = arguments.readme.read_text()
    filled = fill(text)
    if arguments.check and filled != text:
        raise SystemExit(f"{arguments.readme}: figures differ from {RESULTS}; run python benchmarks/readme.py")
    if filled != text:
        arguments.readme.write_text(filled)
        print(f"wrote {arguments.readme}")


if __name__ == "__main__":
    main()
