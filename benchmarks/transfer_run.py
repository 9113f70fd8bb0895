"""Runs the stages of the transfer benchmark, several at a time, and goes on where an earlier run stopped.

Every stage has a folder whose name holds a hash of its settings, of the stages that it needs and of the code that makes
it. A finished stage leaves `stage.json` there and is never run again while the hash stays the same.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm
from transfer_family import Scale
from transfer_stages import ENGINES, RESULT, Stage, read_result
from transfer_work import run_stage


def work(stage: Stage, scale: Scale, folders: dict[str, Path], log: Path) -> None:
    """Run a stage in a worker process; its folder gets its name when all of it is there."""
    final = folders[stage.name]
    if (final / RESULT).is_file():
        return  # another run was quicker
    unfinished = final.with_name(f"unfinished-{final.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    with log.open("a") as stream:
        print(f"\n── {stage.name}", file=stream, flush=True)
        # Libraries print progress to both; file descriptors, because vLLM's C++ writes there too.
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
        began, processor = time.time(), time.process_time()
        result = run_stage(stage, scale, folders, unfinished)
    result.update(began=began, ended=time.time(), cpu_seconds=time.process_time() - processor)
    unfinished.mkdir(parents=True, exist_ok=True)
    for checkpoints in unfinished.glob("checkpoint*"):
        shutil.rmtree(checkpoints)
    (unfinished / RESULT).write_text(json.dumps(result, indent=1) + "\n")
    unfinished.rename(final)


def leave_with_parent() -> None:
    """Let this worker end when the process that started it is gone, however it went."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_all(stages: list[Stage], scale: Scale, folders: dict[str, Path], jobs: int, log: Path) -> None:
    """Run what is not finished yet, at most `jobs` stages at a time, of which one may be an engine.

    SIGTERM lets the running stages finish and starts no other.

    Raises:
        SystemExit: It was stopped.
        RuntimeError: A stage failed; names it and the log. What was finished before stays finished.
    """
    waiting = [stage for stage in stages if not (folders[stage.name] / RESULT).is_file()]
    done = {stage.name for stage in stages} - {stage.name for stage in waiting}
    context = get_context("spawn")
    # vLLM gets a process of its own: it changes threads and process groups of the one that it runs in.
    start = {"mp_context": context, "initializer": leave_with_parent}
    trainers, engines = ProcessPoolExecutor(jobs, **start), ProcessPoolExecutor(1, **start)
    running: dict[Future, Stage] = {}
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    bar = tqdm(total=len(stages), initial=len(done), desc="stages", unit="stage", file=sys.stdout)
    try:
        while running or (waiting and not stopped.is_set()):
            ready = [] if stopped.is_set() else [stage for stage in waiting if done.issuperset(n for n in stage.needs)]
            engine_is_free = not any(stage.kind in ENGINES for stage in running.values())
            # Engines first: left to the end they would run one after another beside an idle core.
            ready.sort(key=lambda stage: stage.kind not in ENGINES)
            for stage in ready:
                is_engine = stage.kind in ENGINES
                if len(running) < jobs and (engine_is_free or not is_engine):
                    pool = engines if is_engine else trainers
                    running[pool.submit(work, stage, scale, folders, log)] = stage
                    waiting.remove(stage)
                    engine_is_free = engine_is_free and not is_engine
            bar.set_postfix_str(", ".join(stage.name for stage in running.values()))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                stage = running.pop(future)
                try:
                    future.result()
                except Exception as error:
                    raise RuntimeError(f"stage {stage.name} failed: {error} (see {log})") from error
                done.add(stage.name)
                bar.update()
        if waiting:
            raise SystemExit("stopped; the same command goes on from here")
    finally:
        bar.close()
        for pool in (trainers, engines):
            pool.shutdown(wait=True, cancel_futures=True)


def elapsed(folders: dict[str, Path]) -> float:
    """Seconds in which at least one stage ran, over all the runs that they took."""
    spans = sorted((result["began"], result["ended"]) for result in map(read_result, folders.values()))
    total, until = 0.0, 0.0
    for began, ended in spans:
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total
