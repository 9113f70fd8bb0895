"""How far a value network transfers: other sizes, a newer release, another tokenizer; all measured through vLLM.

python benchmarks/transfer.py            three seeds on two cores, writes benchmarks/results/transfer.{json,md,png}
python benchmarks/transfer.py --quick    seconds of training, to see the wiring; the figures mean nothing
python benchmarks/transfer.py --scale gpu

It makes a family of small bases, trains value networks beside the smallest in every way that `ivl train` offers,
fully fine-tunes every base for comparison, and asks held-out questions of vLLM. Finished stages lie in .cache/transfer
and are used again, so an interrupted run goes on where it stopped.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # from a checkout, installed or not

# Before anything imports torch or vLLM, and for the worker processes too. Nothing comes from the hub, nothing is told
# to it; one thread each, as stages run side by side; vLLM's engine in the process that asks, where it starts quickly.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "0",  # a training process takes one
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "PYTHONWARNINGS": "ignore",
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="worlds, each with models of its own")
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu", help="size of models and training")
    parser.add_argument("--quick", action="store_true", help="tiny models, a few steps, one seed")
    parser.add_argument("--jobs", type=int, metavar="N", help="stages at a time (default: 2; with a GPU 1)")
    parser.add_argument("--train-only", action="store_true", help="stop before the first engine starts")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where transfer.{json,md,png} go")
    parser.add_argument("--cache", type=Path, default=Path(".cache/transfer"), metavar="FOLDER", help="finished stages")
    arguments = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    from transfer_family import SCALES
    from transfer_markdown import render
    from transfer_plot import draw
    from transfer_report import build
    from transfer_run import elapsed, run_all
    from transfer_stages import ENGINES, folder_names, plan

    start = time.perf_counter()
    scale_name = "quick" if arguments.quick else arguments.scale
    scale, seeds = SCALES[scale_name], 1 if arguments.quick else arguments.seeds
    stages = plan(seeds, scale)
    folders = {name: arguments.cache / folder for name, folder in folder_names(stages, scale, scale_name).items()}
    arguments.cache.mkdir(parents=True, exist_ok=True)
    log = arguments.cache / f"{scale_name}.log"
    print(f"stages print to {log}")
    wanted = [stage for stage in stages if not arguments.train_only or stage.kind not in ENGINES]
    run_all(wanted, scale, folders, arguments.jobs or (1 if arguments.scale == "gpu" else 2), log)
    if arguments.train_only:
        return

    report = {
        "command": " ".join(["python", *sys.argv]),
        "wall_seconds": elapsed(folders),
        **build(stages, folders, scale, seeds),
    }
    output = arguments.output or (arguments.cache / "quick" if arguments.quick else HERE / "results")
    output.mkdir(parents=True, exist_ok=True)
    (output / "transfer.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "transfer.md").write_text(render(report))
    draw(report, output / "transfer.png")
    print((output / "transfer.md").read_text())
    print(f"wrote {output}/transfer.json, .md and .png, {time.perf_counter() - start:.0f} s for this call")


if __name__ == "__main__":
    main()
