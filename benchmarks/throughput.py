"""What steering costs: vLLM with value networks against plain vLLM, against the limit, and against every peer.

On a CPU:    python benchmarks/throughput.py               125 M base, 21 M value network, fp32
Wiring:      python benchmarks/throughput.py --quick       the same models, a quarter of the requests, one round
Curves:      python benchmarks/throughput.py --only curves concurrency, size of the value network, vocabulary, context
Busy CPU:    python benchmarks/throughput.py --threads 1 --clock cpu     CPU time of one thread, +-5 % a round
On a GPU:    python benchmarks/throughput.py --scale gpu   shapes of Qwen2.5-7B and 0.5B, bf16, random weights (17 GB on
                                                           disk); compiled, with drafts from vLLM 0.32 on
Its peers:   python benchmarks/throughput.py --scale gpu-peers   every other way, beside the shape of Qwen2.5-3B (8 GB)
             Eight and ten minutes by estimate (--only sweep, then --only peers, are shorter): neither has ever run, no
             GPU was at hand.
Small first: python benchmarks/throughput.py --scale gpu-tiny --only compiled sweep peers       whether all that runs

`serving` is eager, `compiled` has torch.compile (CUDA graphs on a GPU), and so has vLLM beside its peers. Requests are
sent all at once; cases take turns, round after round, and figures are medians over rounds. Flags and fields are those
of `vllm bench throughput` and `vllm bench serve`, whose functions compute TTFT, TPOT and ITL. Tokens are compared with
transformers' before anything is timed. Parts may run one by one: each replaces its own section of the JSON file, and
what it has is saved as it goes.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))  # from a checkout, installed or not

from revision import cpu_model, revision  # noqa: E402

PARTS = ("serving", "compiled", "speculative", "sweep", "peers", "curves")
PACKAGES = ("ivl-vllm", "vllm", "torch", "transformers")
GPU_ROUNDS = 2


def environment(threads: int, device: str) -> dict:
    """What a figure depends on: machine, versions, command."""
    found = {"command": shlex.join(["python", *sys.argv]), "threads": threads, **revision()}
    found["python"] = platform.python_version()
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise SystemExit(
                f"{name} is not installed, so vLLM cannot find the plugin: pip install --no-deps --no-build-isolation ."
            ) from None
    found["cpu"], found["cores"] = cpu_model(), os.cpu_count()
    found["interpreted"] = os.environ.get("TRITON_INTERPRET") == "1"
    found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def skipped(device: str, drafts_run: bool) -> list[dict[str, str]]:
    """What is not measured, and why."""
    if device == "cuda":
        older = "vLLM takes n-gram drafts beside a logits processor from 0.32 on"
        return [] if drafts_run else [{"what": "speculative decoding", "why": older}]
    drafts = "vLLM's runner V1 takes no logits processors beside a drafter, and V2 needs Triton, so not on a CPU"
    absent = "this machine has no GPU: --scale gpu measures one"
    return [{"what": "speculative decoding", "why": drafts}, {"what": "every GPU figure", "why": absent}]


def usual_parts(scale: str, drafts_run: bool) -> list[str]:
    """What runs where `--only` says nothing: on a GPU vLLM's default, compiled, and with drafts where vLLM can."""
    if scale == "gpu":
        return ["compiled", *(["speculative"] if drafts_run else [])]
    return ["sweep", "peers"] if scale == "gpu-peers" else ["serving", "compiled", "sweep", "peers"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scale",
        choices=("cpu", "gpu", "gpu-peers", "gpu-tiny", "tiny"),
        help="models and requests (default: gpu where vLLM has one)",
    )
    parser.add_argument(
        "--only",
        choices=PARTS,
        nargs="+",
        help="parts to run (default: serving, compiled, sweep and peers; of gpu compiled and speculative)",
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the requests, one round")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="cases of the part `serving` (default: all)")
    parser.add_argument("--rounds", type=int, metavar="N", help="timed rounds (default: 3, peers and GPU 2)")
    parser.add_argument(
        "--starts",
        type=int,
        default=1,
        metavar="N",
        help="start the engines of `serving` and `compiled` anew N times, with these rounds each (default: 1): "
        "processes of one engine differ by a few percent",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of weights and KV cache (default: the scale's)"
    )
    parser.add_argument("--num-prompts", type=int, metavar="N", help="requests, all sent at once")
    for name in ("input", "output"):
        parser.add_argument(
            f"--{name}-len", type=int, nargs=2, metavar=("MIN", "MAX"), help=f"{name} tokens of a request"
        )
    parser.add_argument("--section", choices=("serving", "short"), help="of the JSON, for the part `serving`")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the requests (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="of every contestant")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU time, for --threads 1 on a busy machine"
    )
    parser.add_argument("--engine-args", type=json.loads, default={}, metavar="JSON", help="more arguments of vllm.LLM")
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="torch's profile of plain, none and all; no timing"
    )
    parser.add_argument(
        "--output-json", type=Path, metavar="FILE", help="default: benchmarks/results/throughput-SCALE.json"
    )
    arguments = parser.parse_args()
    if arguments.starts < 1:
        parser.error(f"--starts is {arguments.starts}: give 1 or more")
    from throughput_cases import CASES, FEW, SPECULATIVE
    from throughput_goals import goals
    from throughput_models import SCALES
    from throughput_peers import measure as measure_peers
    from throughput_peers import sweep
    from throughput_serving import Setup, drafts_run, measure
    from throughput_table import write
    from vllm.platforms import current_platform

    arguments.scale = arguments.scale or ("gpu" if current_platform.is_cuda() else "cpu")
    device = "cuda" if arguments.scale.startswith("gpu") else "cpu"
    if device == "cpu" and current_platform.is_cuda():
        parser.error(
            f"--scale {arguments.scale} measures a CPU, but this vLLM would put its engines on the GPU: use --scale gpu"
        )
    scale = SCALES[arguments.scale]
    prompts = arguments.num_prompts or scale.prompts // (4 if arguments.quick else 1)
    scale = replace(scale, prompts=prompts, dtype=arguments.dtype or scale.dtype)
    if arguments.input_len:
        scale = replace(scale, input_len=tuple(arguments.input_len))
    if arguments.output_len:
        scale = replace(scale, output_len=tuple(arguments.output_len))
    if arguments.clock == "cpu" and arguments.threads != 1:
        parser.error(f"--clock cpu adds up the time of {arguments.threads} threads: give --threads 1 with it")
    name = f"throughput-{arguments.scale}{'-quick' if arguments.quick else ''}.json"
    output = arguments.output_json or HERE / "results" / name
    parts = arguments.only or usual_parts(arguments.scale, drafts_run())
    if "speculative" in parts and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--only speculative needs vLLM's runner V2 and Triton: a GPU")
    if "speculative" in parts and not drafts_run():
        parser.error("--only speculative needs vLLM 0.32 or later, which takes n-gram drafts beside a logits processor")
    # Four engines of 7 B would not fit on a GPU of 80 GB; how noisy it is counts more than `none, no skip`.
    wanted = arguments.cases or (
        ["plain", "plain again", "none", "10 %", "50 %", "all"] if device == "cuda" else [c.name for c in CASES]
    )
    cases = [case for case in CASES if case.name in {*wanted, "plain"}]

    def setup(compiled: bool = False) -> Setup:
        return Setup(scale, arguments.threads, device, compiled, arguments.engine_args, arguments.clock == "cpu")

    import vllm.benchmarks.serve  # noqa: F401  (what it lacks is missed before the first round)

    found_environment = environment(arguments.threads, device) | {"clock": arguments.clock}
    if arguments.profile:
        from throughput_profile import profile

        chosen = [case for case in cases if case.name in FEW and case.name != "plain again"]
        profile(setup(), chosen, arguments.profile)
        return

    def saved() -> dict:
        return json.loads(output.read_text()) if output.exists() else {"sections": {}}

    def save(section: str, found: dict) -> None:
        report = saved() | {"skipped": skipped(device, drafts_run())}
        found["environment"] = found_environment
        found["scale"] = asdict(scale) | {"base_parameters": scale.base.parameters}
        found["scale"] |= {"value_parameters": scale.value.parameters, "quick": arguments.quick}
        report["sections"][section] = found
        report["goals"] = goals(report["sections"])
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n")

        write(report, output)

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def rounds(default: int) -> int:
        return arguments.rounds or (1 if arguments.quick else GPU_ROUNDS if device == "cuda" else default)

    def saver(section: str) -> Callable[[dict], None]:
        return functools.partial(save, section)

    if "serving" in parts:
        keep = saver(arguments.section or "serving")
        measure(setup(), cases, rounds(3), arguments.starts, arguments.seed, say, keep)
    if "compiled" in parts:
        few = cases if device == "cuda" else [case for case in CASES if case.name in (*FEW, "value")]
        measure(setup(compiled=True), few, rounds(3), arguments.starts, arguments.seed, say, saver("compiled"))
    if "speculative" in parts:
        drafting = setup(compiled=device == "cuda")
        measure(drafting, SPECULATIVE, rounds(3), 1, arguments.seed, say, saver("speculative"))
    if "sweep" in parts:
        sweep(setup(), arguments.seed, say, saver("sweep"))
    if "peers" in parts:
        found = saved()["sections"].get("sweep", {})
        now = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(scale).items()}
        if any(found.get("scale", {}).get(key) != value for key, value in now.items()):
            parser.error("--only peers needs the best batch size for these requests: run --only sweep peers")
        best = {name: way["best"] for name, way in found["ways"].items()}
        measure_peers(setup(compiled=True), best, rounds(2), arguments.seed, say, saver("peers"))
    if "curves" in parts:
        from throughput_curves import measure as measure_curves

        measure_curves(setup(compiled=device == "cuda"), rounds(2), arguments.seed, say, saver("curves"))
    print(output.with_suffix(".md").read_text())
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
