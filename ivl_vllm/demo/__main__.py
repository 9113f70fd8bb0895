"""`make demo`: make a small family, train a value network on its small base, steer its large base in vLLM.

Every figure that is printed comes from this run. The pre-trained bases and all else lie under `.cache/demo`; a second
run uses the bases again where their recipe is the same (`--fresh` makes them anew).
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ivl_vllm.demo import world as world_module
from ivl_vllm.demo.world import TASKS, Item, World, build_tokenizer, write_messages

PRETRAINING = {
    "small": {"steps": 700, "batch": 16, "learning_rate": 6e-3},
    "large": {"steps": 600, "batch": 16, "learning_rate": 4e-3},
}
VALUE_FLAGS = ("--learning_rate=5e-4", "--max_steps=150", "--batch_size=32", "--norm_weight=1.0", "--warmup_steps=0.05")
# The best checkpoint by validation, as for the fine-tuned comparison.
SELECTION_FLAGS = (
    "--eval_strategy=steps",
    "--eval_steps=10",
    "--save_strategy=steps",
    "--save_steps=10",
    "--save_only_model=true",
    "--load_best_model_at_end=true",
    "--metric_for_best_model=eval_ce",
    "--greater_is_better=false",
    "--per_device_eval_batch_size=128",
)
FINE_TUNING = {"learning_rates": (5e-5, 1e-4, 2e-4, 5e-4), "max_steps": 150}
QUESTIONS_PER_TASK = 60
COLUMNS = {"alone": "large base", "steered": "large base + value", "tuned": "large base fine-tuned"}


@contextmanager
def stage(title: str, seconds: dict[str, float]) -> Iterator[None]:
    """Print a heading and keep the time that the block takes."""
    print(f"\n── {title}", flush=True)
    start = time.perf_counter()
    yield
    seconds[title] = round(time.perf_counter() - start, 1)


def make_bases(folder: Path, world: World, seed: int, fresh: bool) -> dict[str, Path]:
    """Pre-train both bases, or find them in the cache under a key of their recipe.

    Returns:
        Size → folder with the model and its tokenizer.
    """
    from ivl_vllm.demo import family

    bases = {}
    for size, recipe in PRETRAINING.items():
        source = Path(world_module.__file__).read_text() + Path(family.__file__).read_text()
        key = hashlib.sha256(json.dumps([source, size, recipe, seed]).encode()).hexdigest()[:12]
        bases[size] = folder / f"{size}-{key}"
        if bases[size].is_dir() and not fresh:
            print(f"the {size} base is in the cache: {bases[size]}")
            continue
        tokenizer = build_tokenizer(world)
        model = family.pretrain(size, world, tokenizer, seed=seed, **recipe)
        # Renamed when whole, so that an interrupted run leaves no half of a model in the cache.
        unfinished = folder / f"{size}-unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        shutil.rmtree(bases[size], ignore_errors=True)
        unfinished.rename(bases[size])
    return bases


def run(module: str, *flags: str) -> None:
    """Run one of this package's modules as a process of its own.

    Raises:
        SystemExit: It failed; its own message stands above.
    """
    done = subprocess.run([sys.executable, "-m", module, *flags], check=False)
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(flags)} failed with exit status {done.returncode}")


def right(item: Item, answer: dict[str, str]) -> bool:
    """Exact match: the whole answer and nothing else, ended by the model itself."""
    return answer["text"] == item.answer and answer["stop"] == "stop"


def accuracies(items: list[Item], answers: list[dict[str, str]]) -> dict[str, float]:
    """Share of exact matches per task, and their mean over tasks as `average`."""
    shares = {}
    for task in TASKS:
        hits = [right(item, answer) for item, answer in zip(items, answers, strict=True) if item.task == task]
        shares[task] = sum(hits) / len(hits)
    shares["average"] = sum(shares.values()) / len(TASKS)
    return shares


def table(rows: list[list[str]]) -> str:
    """An aligned Markdown table; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def report(items: list[Item], answers: dict[str, list[dict[str, str]]]) -> dict[str, Any]:
    """Print accuracies, the share of the gap and some answers; return the figures."""
    scores = {name: accuracies(items, answers[name]) for name in COLUMNS}
    counts = {task: sum(item.task == task for item in items) for task in TASKS}
    rows = [["held-out questions, exact match", *COLUMNS.values()]]
    for task in (*TASKS, "average"):
        label = f"{task} ({counts[task]})" if task in counts else task
        rows.append([label, *(f"{scores[name][task]:.2f}" for name in COLUMNS)])
    print(f"\n{table(rows)}\n")
    alone, steered, tuned = (scores[name]["average"] for name in ("alone", "steered", "tuned"))
    share = (steered - alone) / (tuned - alone) if tuned > alone else None
    told = "is not defined: fine-tuning gained nothing" if share is None else f"is {share:.0%}"
    print(f"The share of the gap between base and fine-tuned base that the value network recovers {told}.\n")
    rows = [["question", "expected", *COLUMNS.values()]]
    for task in TASKS:
        for index in [i for i, item in enumerate(items) if item.task == task][:2]:
            shown = (
                answers[name][index]["text"] + ("" if answers[name][index]["stop"] == "stop" else " …")
                for name in COLUMNS
            )
            rows.append([items[index].question, items[index].answer, *shown])
    print(table(rows))
    return {"accuracy": scores, "recovered_share_of_gap": share, "questions": counts}


def main() -> None:
    """Run all stages and print the table."""
    parser = argparse.ArgumentParser(prog="python -m ivl_vllm.demo", description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="pre-train the bases anew, whatever the cache holds")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world, the models and the batches (default 0)")
    args = parser.parse_args()
    # Here, before torch and vLLM are imported. Nothing comes from the hub and nothing is told to it; more threads than
    # two only slow such small models down; and the demo's own lines are not to drown in start-up messages.
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "VLLM_NO_USAGE_STATS"), "1")
    # Training takes one GPU of a process; vLLM refuses to see others than ROCm's variable says.
    one_gpu = {"CUDA_VISIBLE_DEVICES": os.environ.get("HIP_VISIBLE_DEVICES", "0")}
    for name, value in {**quiet, **offline, "OMP_NUM_THREADS": "2", **one_gpu}.items():
        os.environ.setdefault(name, value)
    start = time.perf_counter()
    seconds: dict[str, float] = {}
    cache = Path(".cache/demo")
    work = cache / "run"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)

    world = World(args.seed)
    asked = [item for task in TASKS for item in [i for i in world.test if i.task == task][:QUESTIONS_PER_TASK]]
    data = write_messages(world.train, work / "demonstrations.jsonl")
    validation = write_messages(world.validation, work / "validation.jsonl")
    questions = write_messages(asked, work / "questions.jsonl")
    with stage("pre-train a small and a large base on the same raw text", seconds):
        bases = make_bases(cache, world, args.seed, args.fresh)
    with stage("train a value network on the small base (ivl train)", seconds):
        flags = (f"--base={bases['small']}", f"--data={data}", f"--eval_data={validation}", f"--seed={args.seed}")
        run("ivl_vllm.cli", "train", *flags, f"--output={work / 'value'}", *VALUE_FLAGS, *SELECTION_FLAGS)
    with stage("fine-tune the large base on the same demonstrations, for comparison", seconds):
        from ivl_vllm.demo.finetune import fine_tune

        tries = fine_tune(
            bases["large"],
            build_tokenizer(world),
            data,
            validation,
            work / "tuned",
            seed=args.seed,
            **FINE_TUNING,
        )
    answers = {}
    with stage("serve the large base with the value network in vLLM", seconds):
        path = work / "answers.json"
        common = (f"--questions={questions}", f"--answers={path}")
        run("ivl_vllm.demo.measure", f"--model={bases['large']}", f"--value={work / 'value'}", *common)
        answers.update(json.loads(path.read_text()))
    with stage("serve the fine-tuned large base in vLLM", seconds):
        run("ivl_vllm.demo.measure", f"--model={work / 'tuned'}", *common)
        answers["tuned"] = json.loads(path.read_text())["alone"]

    results = report(asked, answers)
    results.update(seed=args.seed, fine_tuning=tries, seconds=seconds)
    results["total_seconds"] = round(time.perf_counter() - start, 1)
    (cache / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    times = ", ".join(f"{title} {taken:.0f} s" for title, taken in seconds.items())
    print(f"\n{results['total_seconds']:.0f} s in all: {times}. Figures: {cache / 'results.json'}")
    if results["accuracy"]["steered"]["average"] <= results["accuracy"]["alone"]["average"]:
        raise SystemExit("the value network did not improve on the base alone")


if __name__ == "__main__":
    main()
