"""Benchmark of the kernels: correct first, then bandwidth against eager torch, torch.compile, cuBLAS and a plain copy.

On a GPU:          python benchmarks/kernels.py              writes benchmarks/results/kernels-<gpu>.json
Without a GPU:     python benchmarks/kernels.py              torch path against the naive expression, kernels-cpu.json
Generated code:    python benchmarks/kernels.py --sheet      registers, spills, access widths; needs no GPU
Launch shapes:     python benchmarks/kernels.py --tune       tries other configurations (GPU)
"""

import argparse
import importlib
import importlib.metadata
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "kernels"))  # from a checkout, installed or not

import ivl_kernels  # noqa: E402
from kernel_timing import (  # noqa: E402
    CPU_CLOCK,
    Inputs,
    check,
    environment,
    make_inputs,
    progress,
    rotating_sets,
    time_cpu,
    time_cuda,
    time_host,
)

COLUMNS = (32_000, 128_256, 151_936)
HEAD = (151_936, 896)  # vocabulary and hidden size of a 0.5 B model
GOALS = [
    ("value_add, 32–512 rows: share of copy bandwidth", 0.90, "≥"),
    ("value_add: times faster than eager", 3.0, "≥"),
    ("value_add: times faster than torch.compile", 1.2, "≥"),
    ("lm_head_value_add, 1–64 rows: time over streaming the matrix once", 1.1, "≤"),
    ("lm_head_value_add, 64–512 rows: time over cuBLAS + value_add", 1.0, "≤"),
    ("no steered row: µs added", 5.0, "≤"),
]


def ours(inputs: Inputs) -> None:
    """The operation under test."""
    index = {"row_index": inputs.row_index, "vocab_map": inputs.vocab_map}
    if inputs.value is not None:
        ivl_kernels.value_add(inputs.logits, inputs.value, inputs.weights, **index)
    else:
        ivl_kernels.lm_head_value_add(inputs.logits, inputs.hidden, inputs.matrix, inputs.weights, **index)


def eager(inputs: Inputs) -> None:
    """The naive expression of `value_add`."""
    value = inputs.value if inputs.vocab_map is None else inputs.value[:, inputs.vocab_map]
    inputs.logits[inputs.row_index] += inputs.weights[:, None] * value


def project_then_add(inputs: Inputs) -> None:
    """The projection by the vendor's library, then our own `value_add`."""
    value = torch.mm(inputs.hidden, inputs.matrix.t())
    ivl_kernels.value_add(inputs.logits, value, inputs.weights, row_index=inputs.row_index, vocab_map=inputs.vocab_map)


def gpu_cases(quick: bool) -> list[dict]:
    """What is measured on a GPU: arguments of `make_inputs`."""
    rows = (32, 512) if quick else (1, 8, 32, 64, 128, 256, 512)
    cases = [{"rows": r, "columns": c} for c in (COLUMNS[-1:] if quick else COLUMNS) for r in rows]
    cases += [{"rows": r, "columns": 151_936, "has_map": True} for r in (32, 512)]
    cases += [{"rows": 128, "columns": 50_257, "stride": 50_304}]
    head = (16, 64, 512) if quick else (1, 8, 16, 32, 64, 128, 256, 512)
    cases += [{"rows": r, "columns": HEAD[0], "hidden": HEAD[1]} for r in head]
    cases += [{"rows": r, "columns": HEAD[0], "hidden": HEAD[1], "has_map": True} for r in (16, 64)]
    return cases


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy on the device, bytes read and bytes written."""
    source, target = torch.randn(2, 1 << 28, device=device)
    copy = time_cuda(lambda _: target.copy_(source), [None, None])
    return 2 * source.numel() * source.element_size() / copy.median_us / 1e3


def measure_gpu(quick: bool) -> dict:
    """Check and time everything on the current GPU."""
    device = torch.device("cuda")
    found = environment(device)
    cache = found["l2_bytes"]
    copy_rate = copy_bandwidth(device)
    results = []
    for case in progress(gpu_cases(quick)):
        is_head = "hidden" in case
        torch._dynamo.reset()
        compiled = torch.compile(eager, dynamic=False)
        steps: dict[str, Callable] = {"ours": ours}
        steps |= {"project + value_add": project_then_add} if is_head else {"eager": eager, "compiled": compiled}
        sets = rotating_sets(lambda case=case: make_inputs(device, **case), cache)
        moved = sets[0].bytes_moved()
        matrix_us = 0.0 if not is_head else sets[0].matrix.numel() * 2 / copy_rate / 1e3
        result = {"operation": "lm_head_value_add" if is_head else "value_add", **case, "bytes": moved}
        result |= {"matrix_at_copy_bandwidth_us": matrix_us, "timings": {}}
        for name, step in steps.items():
            check(step, make_inputs(device, **case), tolerance=2e-5 if name == "ours" else 1e-2)
            timing = time_cuda(step, sets)
            rate = moved / timing.median_us / 1e3
            result["timings"][name] = {**timing._asdict(), "gb_per_s": rate, "share_of_copy": rate / copy_rate}
        results.append(result)
        del sets
    report = {"environment": found, "copy_gb_per_s": copy_rate, "cases": results, "no_steered_row": {}}
    for name, hidden in (("value_add", None), ("lm_head_value_add", HEAD[1])):
        idle = make_inputs(device, 256, HEAD[0], hidden=hidden)
        idle.weights.zero_()
        idle_us = time_cuda(ours, [idle])._asdict()
        report["no_steered_row"][name] = idle_us | {"host_us": time_host(lambda: ours(idle))}  # noqa: B023
    report["goals"] = judge(report)
    return report


def judge(report: dict) -> list[dict]:
    """Compare the worst case of each goal with its target."""
    add = [case for case in report["cases"] if case["operation"] == "value_add"]
    head = [case for case in report["cases"] if case["operation"] == "lm_head_value_add"]
    batches = [case for case in add if case["rows"] >= 32]
    # A gather reads 32 bytes for 2, mostly from the L2 cache: memory's bandwidth says nothing about it.
    streams = [case for case in batches if not case.get("has_map")]

    def over(case: dict, other: str) -> float:
        return case["timings"][other]["median_us"] / case["timings"]["ours"]["median_us"]

    decode = [case for case in head if case["rows"] <= 64]
    measured = [
        min(case["timings"]["ours"]["share_of_copy"] for case in streams),
        min(over(case, "eager") for case in batches),
        min(over(case, "compiled") for case in batches),
        max(case["timings"]["ours"]["median_us"] / case["matrix_at_copy_bandwidth_us"] for case in decode),
        max(1 / over(case, "project + value_add") for case in head if case["rows"] >= 64),
        max(idle["median_us"] for idle in report["no_steered_row"].values()),
    ]
    return [
        {"goal": text, "target": f"{sign} {target}", "measured": value, "met": (value >= target) == (sign == "≥")}
        for (text, target, sign), value in zip(GOALS, measured, strict=True)
    ]


def measure_cpu(quick: bool) -> dict:
    """Check and time the torch backend against the naive expression."""
    device = torch.device("cpu")
    small = [(rows, columns) for columns in (1_000, 4_096, 8_192) for rows in (1, 8)]
    wide = [(1, 32_000), (8, 32_000), (16, 32_000), (1, 151_936), (16, 151_936), (64, 151_936)]
    cases = [
        {"rows": rows, "columns": columns, "value_dtype": dtype, "has_map": has_map}
        for rows, columns in (small[:2] if quick else small + wide)
        for dtype in (torch.float32, torch.bfloat16)
        for has_map in (False, True)
    ]
    head = [(r, torch.float32) for r in (1, 2, 4, 8, 16)] + [(r, torch.bfloat16) for r in (1, 4, 16)]
    cases += [{"rows": r, "columns": 32_000, "hidden": 896, "value_dtype": t} for r, t in (head[:2] if quick else head)]
    results = []
    for case in progress(cases):
        naive = project_naively if "hidden" in case else eager
        inputs = make_inputs(device, **case)
        check(ours, inputs)
        steps = {"ours": ours, "naive": naive}
        if "hidden" in case and case["value_dtype"] != torch.float32:
            # The naive product rounds value logits to 8 bits; this one gives the numbers that ours gives.
            check(project_in_float32, inputs)
            steps["naive, float32 sums"] = project_in_float32
        steps = {key: lambda step=step: step(inputs) for key, step in steps.items()}  # noqa: B023
        timings = time_cpu(steps, 0.2 if quick else 2.0)
        name = "lm_head_value_add" if "hidden" in case else "value_add"
        result = {"operation": name, **case, "value_dtype": str(case["value_dtype"]).removeprefix("torch.")}
        result["timings"] = {key: timing._asdict() for key, timing in timings.items()}
        result["times_faster"] = timings["naive"].median_us / timings["ours"].median_us
        same = list(timings.values())[-1]  # the naive expression that gives the same numbers
        result["times_faster_same_numbers"] = same.median_us / timings["ours"].median_us
        results.append(result)
    goals = [{"goal": text, "target": f"{sign} {target}", "measured": None} for text, target, sign in GOALS]
    for name, key in (
        ("value_add", "times_faster"),
        ("lm_head_value_add", "times_faster_same_numbers"),
        ("lm_head_value_add", "times_faster"),
    ):
        slowest = min((case for case in results if case["operation"] == name), key=lambda case: case[key])
        shape = f"{slowest['rows']} × {slowest['columns']} {slowest['value_dtype']}"
        other = "naive with float32 sums" if "same" in key else "naive"
        text, least = f"{name} on the CPU, times faster than {other}; least at {shape}", slowest[key]
        goals.append({"goal": text, "target": "≥ 1.0", "measured": least, "met": least >= 1})
    goals[-1]["note"] = "bfloat16 heads: naive rounds value logits to bfloat16, another result; for comparison, no goal"
    return {"environment": environment(device), "clock": CPU_CLOCK, "cases": results, "goals": goals}


def project_naively(inputs: Inputs) -> None:
    """The naive expression of `lm_head_value_add`."""
    inputs.logits[inputs.row_index] += inputs.weights[:, None] * (inputs.hidden @ inputs.matrix.t())


def project_in_float32(inputs: Inputs) -> None:
    """The naive expression of `lm_head_value_add` with float32 sums, as ours promises."""
    value = inputs.hidden.float() @ inputs.matrix.float().t()
    inputs.logits[inputs.row_index] += inputs.weights[:, None] * value


def tune(save: Callable[[dict], None]) -> None:
    """Time other launch shapes than the default ones, to see whether the defaults are still the best; check winners.

    `save` is given the report after every case: all of them take long.
    """
    device, found = torch.device("cuda"), []
    where = environment(device)
    add = importlib.import_module("ivl_kernels.triton_value_add")
    head = importlib.import_module("ivl_kernels.triton_lm_head_value_add")
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    shapes = [add.Config(b, s, w) for b in (1024, 2048, 4096, 8192) for s in (1, 4, 16, 1000) for w in (4, 8)]
    plan = [(add, shapes, {"rows": r, "columns": HEAD[0]}) for r in (32, 512)]
    for rows, blocks in ((16, (16,)), (64, (32, 64)), (512, (64, 128))):
        tiles = itertools.product(blocks, (64, 128, 256), (64, 128), (1, 4, 8), (3, 4), (4, 8))
        configs = [head.Config(*tile) for tile in tiles]
        plan.append((head, configs, {"rows": rows, "columns": HEAD[0], "hidden": HEAD[1]}))
    for module, configs, case in plan:
        sets = rotating_sets(lambda case=case: make_inputs(device, **case), cache)
        default = module.choose_config
        for config in progress(configs):
            module.choose_config = lambda *args, config=config: config
            try:
                timing = time_cuda(ours, sets, replays=10)
            except Exception as error:  # too large for this GPU: an answer too
                timing, reason = None, str(error)[:80]
            entry = {"case": case, "config": config._asdict()}
            found.append(entry | (timing._asdict() if timing else {"failed": reason}))
        module.choose_config = default
        best = sorted((e for e in found if e["case"] == case and "median_us" in e), key=lambda e: e["median_us"])
        print(case, *(f"\n  {e['median_us']:8.1f} µs  {e['config']}" for e in best[:5]))
        save({"environment": where, "tuning": found})
        for entry in best[:1]:
            module.choose_config = lambda *args, entry=entry: module.Config(**entry["config"])  # noqa: B023
            check(ours, make_inputs(device, **case))
            module.choose_config = default


def print_sheet() -> dict:
    """Print the compile sheet, one line for each kernel and architecture."""
    import compile_sheet

    rows = compile_sheet.sheet()
    print(f"{'architecture':13}{'variant':44}{'registers':>10}{'spilled':>8}{'shared':>8}{'programs':>9}  accesses")
    for row in rows:
        widths = ", ".join(f"{count}× {name}" for name, count in row["global_accesses"].items())
        print(
            f"{row['architecture']:13}{row['variant']:44}{row['registers']:>10}{row['spilled']:>8}"
            f"{row['shared_bytes']:>8}{row['programs_per_multiprocessor']:>9}  {widths}"
        )
    found = environment(torch.device("cpu")) | {"triton": importlib.metadata.version("triton")}
    return {"environment": found, "sheet": rows}


def print_report(report: dict) -> None:
    """Print the cases and the goals as tables."""
    for case in report["cases"]:
        what = f"{case['operation']:18} {case['rows']:>4} × {case['columns']:<7}"
        what += f"{case.get('value_dtype', 'bfloat16'):9}{'map' if case.get('has_map') else '':4}"
        times = "  ".join(
            f"{name} {t['median_us']:.0f} µs" + (f" ({t['share_of_copy']:.0%} of copy)" if "share_of_copy" in t else "")
            for name, t in case["timings"].items()
        )
        faster = [f" {case[key]:.2f}×" for key in ("times_faster", "times_faster_same_numbers") if key in case]
        print(what, times, *dict.fromkeys(faster))
    print()
    for goal in report["goals"]:
        state = "not yet measured" if goal["measured"] is None else f"{goal['measured']:.2f}"
        verdict = "" if goal["measured"] is None else (" met" if goal["met"] else " MISSED")
        print(f"{goal['goal']:68} {goal['target']:>7}   {state}{verdict}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", action="store_true", help="print what the generated code says; needs no GPU")
    parser.add_argument("--tune", action="store_true", help="time other launch configurations on this GPU")
    parser.add_argument("--cpu", action="store_true", help="measure the CPU path even where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="a few cases only")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's CPU threads (default: torch's choice)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file (default: in benchmarks/results/)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available() and not arguments.cpu
    if arguments.tune and not on_gpu:
        parser.error("--tune needs a GPU; --sheet shows what the generated code says without one")
    device = torch.cuda.get_device_name().lower().replace(" ", "-") if on_gpu else "cpu"
    name = "kernels-sheet" if arguments.sheet else f"kernels-tuning-{device}" if arguments.tune else f"kernels-{device}"
    output = arguments.output or HERE / "results" / f"{name}.json"

    def save(report: dict) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1, default=str, ensure_ascii=False) + "\n")

    if arguments.sheet:
        save(print_sheet())
    elif arguments.tune:
        tune(save)
    else:
        report = (measure_gpu if on_gpu else measure_cpu)(arguments.quick)
        save(report)
        print_report(report)
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
