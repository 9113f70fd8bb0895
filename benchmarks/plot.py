"""Draw kernel benchmarks: rows × bandwidth from a GPU's results, rows × speed-up from a CPU's.

python benchmarks/plot.py benchmarks/results/kernels-nvidia-h200.json     writes the PNG beside the JSON
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # needs no display
import matplotlib.pyplot as plt

OPERATIONS = ("value_add", "lm_head_value_add")


def label_of(case: dict) -> str:
    """What tells one line from another: columns, and what is not the ordinary case."""
    extras = [case["value_dtype"]] if "value_dtype" in case else []
    extras += ["map"] if case.get("has_map") else []
    return ", ".join([f"{case['columns']:,} columns", *extras])


def lines_of(cases: list[dict]) -> dict[str, list[dict]]:
    """Group cases into lines over the number of rows."""
    lines: dict[str, list[dict]] = {}
    for case in sorted(cases, key=lambda case: case["rows"]):
        lines.setdefault(label_of(case), []).append(case)
    return lines


def draw(report: dict, output: Path) -> None:
    """Draw one panel for each operation.

    Args:
        report: What `benchmarks/kernels.py` wrote.
        output: The PNG to write.
    """
    has_bandwidth = "copy_gb_per_s" in report
    figure, panels = plt.subplots(1, 2, figsize=(14, 4.5), layout="constrained")
    for panel, operation in zip(panels, OPERATIONS, strict=True):
        cases = [case for case in report["cases"] if case["operation"] == operation]
        for label, line in lines_of(cases).items():
            if has_bandwidth:
                draw_bandwidth(panel, label, line)
            else:
                draw_speed_up(panel, label, line, [case["rows"] for case in line])
        panel.axhline(
            report["copy_gb_per_s"] if has_bandwidth else 1.0,
            color="black",
            linestyle=":",
            label="copy on this device" if has_bandwidth else "naive expression",
        )
        panel.set_xscale("log", base=2)
        ticks = sorted({case["rows"] for case in cases})
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.set_xlabel("rows")
        panel.set_ylabel("GB/s" if has_bandwidth else "times faster than the naive expression")
        if has_bandwidth:
            panel.set_ylim(bottom=0)
        else:
            panel.set_yscale("log", base=2)
            panel.yaxis.set_major_formatter("{x:g}")
        panel.set_title(operation)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    environment = report["environment"]
    threads = environment["threads"]
    machine = environment.get("gpu", f"CPU ({environment['cpu']}, {threads} thread{'s' if threads > 1 else ''})")
    figure.suptitle(f"{machine}, torch {environment['torch']}, {environment['date']}")
    figure.savefig(output, dpi=150)
    plt.close(figure)


def draw_speed_up(panel: plt.Axes, label: str, line: list[dict], rows: list[int]) -> None:
    """Draw one line: colour for the columns, squares for bfloat16, dashes for a map.

    Where the naive expression gives other numbers, a dotted line shows the speed against the one that gives the same.
    """
    widths = [1000, 4096, 8192, 32_000, 151_936]
    columns, is_bfloat16 = line[0]["columns"], line[0]["value_dtype"] == "bfloat16"
    color = f"C{widths.index(columns) if columns in widths else len(widths)}"
    style = {"color": color, "marker": "s" if is_bfloat16 else "o", "markersize": 4}
    dashes = "--" if line[0].get("has_map") else "-"
    panel.plot(rows, [case["times_faster"] for case in line], linestyle=dashes, label=label, **style)
    if any(case["times_faster_same_numbers"] != case["times_faster"] for case in line):
        same = [case["times_faster_same_numbers"] for case in line]
        panel.plot(rows, same, linestyle=":", label=f"{label}, naive with fp32 sums", **style)


def draw_bandwidth(panel: plt.Axes, label: str, line: list[dict]) -> None:
    """Draw our line with its 20th to 80th percentile, and a thin one for each alternative; not what was not timed."""
    color = None
    for name in dict.fromkeys(["ours", *(name for case in line for name in case["timings"])]):
        timed = [(c["rows"], c["timings"][name]) for c in line if "gb_per_s" in c["timings"].get(name, {})]
        if not timed:
            continue
        rows, timings = zip(*timed, strict=True)
        rates = [timing["gb_per_s"] for timing in timings]
        if name == "ours":
            (drawn,) = panel.plot(rows, rates, "o-", label=label)
            # Bandwidth is inverse to time: the slower percentile gives the lower edge.
            edges = [[t["gb_per_s"] * t["median_us"] / t[key] for t in timings] for key in ("p80_us", "p20_us")]
            panel.fill_between(rows, *edges, color=drawn.get_color(), alpha=0.2)
            color = drawn.get_color()
        else:
            panel.plot(rows, rates, "--", linewidth=0.8, color=color, label=f"{name}, {label}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of benchmarks/kernels.py")
    arguments = parser.parse_args()
    for path in arguments.results:
        report = json.loads(path.read_text())
        if "cases" not in report:
            parser.error(f"{path} holds no timings (is it a compile sheet?)")
        draw(report, path.with_suffix(".png"))
        print(f"written to {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
