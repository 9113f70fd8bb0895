"""Benchmark of the kernels: correct first, then bandwidth against eager torch, torch.compile, cuBLAS and a plain copy.

On a GPU:          python benchmarks/kernels.py              writes benchmarks/results/kernels-<gpu>.json
Without a GPU:     python benchmarks/kernels.py              torch path against the naive expression, kernels-cpu.json
Generated code:    python benchmarks/kernels.py --sheet      registers, spills, access widths; needs no GPU
Launch shapes:     python benchmarks/kernels.py --tune       tries other configurations (GPU)
"""

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "kernels"))  # from a checkout, installed or not

import ivl_kernels  # noqa: E402
from kernel_goals import GOALS, failures, judge, quotient  # noqa: E402
from kernel_timing import (  # noqa: E402
    CPU_CLOCK,
    Inputs,
    attempt,
    check,
    environment,
    make_inputs,
    progress,
    rotating_sets,
    time_cpu,
    time_cuda,
    time_host,
)
from kernel_tuning import tune  # noqa: E402

COLUMNS = (32_000, 128_256, 151_936)
HEAD = (151_936, 896)  # vocabulary and hidden size of a 0.5 B model


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


def measure_gpu(quick: bool, save: Callable[[dict], None]) -> dict:
    """Check and time everything on the current GPU; `save` is given the report after every case."""
    device = torch.device("cuda")
    found, copy_rate = environment(device), copy_bandwidth(device)
    cases, idle = gpu_cases(quick), {"rows": 256, "columns": HEAD[0]}
    # What an ended run did not come to has no timings.
    report = {"environment": found, "copy_gb_per_s": copy_rate}
    report["cases"] = [{"operation": operation_of(case), **case, "timings": {}} for case in cases]
    report["no_steered_row"] = {name: idle | {"failed": "not run"} for name in ("value_add", "lm_head_value_add")}
    report["goals"] = judge(report)
    for number, case in enumerate(progress(cases)):
        report["cases"][number] |= measure_case(device, case, copy_rate, found["l2_bytes"])
        report["goals"] = judge(report)
        save(report)
    for name, hidden in (("value_add", None), ("lm_head_value_add", HEAD[1])):
        timing = attempt(lambda: measure_idle(make_inputs(device, **idle, hidden=hidden)))  # noqa: B023
        report["no_steered_row"][name] = idle | timing
        report["goals"] = judge(report)
        save(report)
    return report


def operation_of(case: dict) -> str:
    """The operation that arguments of `make_inputs` are for."""
    return "lm_head_value_add" if "hidden" in case else "value_add"


def measure_case(device: torch.device, case: dict, copy_rate: float, cache: int) -> dict:
    """Check and time every step of one case on the GPU; a step that fails gives the reason in place of its timing."""
    is_head = "hidden" in case
    torch._dynamo.reset()
    compiled = torch.compile(eager, dynamic=False)
    steps: dict[str, Callable] = {"ours": ours}
    steps |= {"project + value_add": project_then_add} if is_head else {"eager": eager, "compiled": compiled}
    made: dict = attempt(lambda: {"sets": rotating_sets(lambda: make_inputs(device, **case), cache)})
    if "failed" in made:
        return {"timings": dict.fromkeys(steps, made)}
    sets = made["sets"]
    moved = sets[0].bytes_moved()
    matrix_us = 0.0 if not is_head else sets[0].matrix.numel() * 2 / copy_rate / 1e3
    result = {"bytes": moved, "matrix_at_copy_bandwidth_us": matrix_us, "timings": {}}

    def timed(step: Callable, inputs: list) -> dict:
        timing = time_cuda(step, inputs)
        rate = moved / timing.median_us / 1e3
        return {**timing._asdict(), "gb_per_s": rate, "share_of_copy": rate / copy_rate}

    def checked(name: str) -> dict:
        check(steps[name], make_inputs(device, **case), tolerance=2e-5 if name == "ours" else 1e-2)
        return timed(steps[name], sets)

    for name in steps:
        result["timings"][name] = attempt(lambda: checked(name))  # noqa: B023
    if not is_head:
        # Small cases reach less than a large copy does, and so does a copy of their size.
        copied = attempt(lambda: timed(copy, equal_copies(device, moved, len(sets))))
        result["timings"]["equal copy"] = copied
        result["share_of_equal_copy"] = quotient(result, "equal copy", "ours")
    return result


def equal_copies(device: torch.device, moved: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sources and targets of `count` copies that move as many bytes each, half of them read and half written."""
    half = {"high": 256, "size": (moved // 2,), "dtype": torch.uint8, "device": device}
    return [(torch.randint(**half), torch.randint(**half)) for _ in range(count)]


def copy(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A plain copy."""
    pair[1].copy_(pair[0])


def measure_idle(inputs: Inputs) -> dict:
    """Time a call without a steered row on the GPU, and its launch on the host."""
    inputs.weights.zero_()
    return time_cuda(ours, [inputs])._asdict() | {"host_us": time_host(lambda: ours(inputs))}


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
    head = [(r, torch.float32) for r in (1, 2, 4, 8, 16, 64)] + [(r, torch.bfloat16) for r in (1, 4, 16, 64)]
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
        name = operation_of(case)
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
            if "median_us" in t
            else f"{name} FAILED"
            for name, t in case["timings"].items()
        )
        faster = [f" {case[key]:.2f}×" for key in ("times_faster", "times_faster_same_numbers") if key in case]
        print(what, times, *dict.fromkeys(faster))
    print()
    for goal in report["goals"]:
        state = "not yet measured" if goal["measured"] is None else f"{goal['measured']:.2f}"
        stands = "" if "met" not in goal else (" met" if goal["met"] else " MISSED")
        stands += f" ({goal['missing']})" if "missing" in goal else ""
        print(f"{goal['goal']:68} {goal['target']:>7}   {state}{stands}")


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

    failed = []
    if arguments.sheet:
        save(print_sheet())
    elif arguments.tune:
        failed = tune(ours, HEAD, arguments.quick, save)
    else:
        report = measure_gpu(arguments.quick, save) if on_gpu else measure_cpu(arguments.quick)
        save(report)
        print_report(report)
        failed = failures(report)
    print(f"\nwritten to {output}")
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} measurements failed:", *failed]))


if __name__ == "__main__":
    main()
