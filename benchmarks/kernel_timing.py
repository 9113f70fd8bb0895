"""Inputs, checks and clocks for the kernel benchmarks: correct first, then timed past the caches."""

import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import tqdm


class Inputs(NamedTuple):
    """Arguments of one call of either operation; `value` or (`hidden`, `matrix`) is None."""

    logits: torch.Tensor
    weights: torch.Tensor
    row_index: torch.Tensor
    vocab_map: torch.Tensor | None
    value: torch.Tensor | None
    hidden: torch.Tensor | None
    matrix: torch.Tensor | None

    def bytes_moved(self) -> int:
        """The fewest bytes that memory has to move: every input read once, the logits read and written once."""
        others = [self.vocab_map, self.value, self.hidden, self.matrix]
        return 2 * size_of(self.logits) + sum(size_of(tensor) for tensor in others if tensor is not None)


class Timing(NamedTuple):
    """Microseconds for one call."""

    median_us: float
    p20_us: float
    p80_us: float


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of the elements of a tensor, which may be a part of a wider one."""
    return tensor.numel() * tensor.element_size()


def make_inputs(
    device: torch.device,
    rows: int,
    columns: int,
    *,
    hidden: int | None = None,
    value_dtype: torch.dtype = torch.bfloat16,
    has_map: bool = False,
    stride: int | None = None,
) -> Inputs:
    """Random arguments, all rows steered, in random order. With `hidden` those of `lm_head_value_add`."""
    normal = {"device": device, "dtype": torch.float32}
    logits = torch.randn(rows, stride or columns, **normal)[:, :columns]
    weights = torch.rand(rows, **normal) + 0.5
    row_index = torch.randperm(rows, device=device)
    # Without -1, which is the last column to the eager expression.
    vocab_map = torch.randint(0, columns, (columns,), device=device, dtype=torch.int32) if has_map else None
    if hidden is None:
        value = torch.randn(rows, stride or columns, **normal).to(value_dtype)[:, :columns]
        return Inputs(logits, weights, row_index, vocab_map, value, None, None)
    states = torch.randn(rows, hidden, **normal).to(value_dtype)
    matrix = (torch.randn(columns, hidden, **normal) / hidden**0.5).to(value_dtype)
    return Inputs(logits, weights, row_index, vocab_map, None, states, matrix)


def check(step: Callable[[Inputs], None], inputs: Inputs, tolerance: float = 2e-5) -> None:
    """Compare one call with float64 arithmetic, row by row.

    Raises:
        SystemExit: The error ‖out - ref‖ / ‖ref‖ of a row is above the tolerance, or not a number.
    """
    before = inputs.logits.clone()
    step(inputs)
    for i, row in enumerate(inputs.row_index.tolist()):
        if inputs.value is not None:
            value = inputs.value[i].double()
        else:
            value = torch.mv(inputs.matrix.double(), inputs.hidden[i].double())
        gathered = value if inputs.vocab_map is None else value[inputs.vocab_map.long()]
        expected = before[row].double() + inputs.weights[i].double() * gathered
        error = float((inputs.logits[row].double() - expected).norm() / expected.norm())
        if not error <= tolerance:
            raise SystemExit(f"wrong result: row {row} is off by {error:.3g} (allowed: {tolerance}); nothing was timed")
        if i >= 16:  # the first rows of a large batch say enough; the tests cover all
            break


WARM_UP, WINDOW, SHORT_WINDOW = 0.025, 0.1, 0.02  # seconds: before the clock counts, and of what it counts


def time_cuda(
    step: Callable[[Inputs], None], sets: list[Inputs], calls: int = 24, replays: int = 40, window: float = WINDOW
) -> Timing:
    """Time a step on the GPU: calls over rotating inputs in one CUDA graph, so that launches leave no gaps.

    Together the sets have to exceed the L2 cache (`rotating_sets`). The graph is replayed until the clocks are up, then
    `replays` times or for `window` seconds, whichever is longer: a short step says little in less.
    """
    calls = -(-max(calls, len(sets)) // len(sets)) * len(sets)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # which may still write the inputs
    with torch.cuda.stream(side):
        for inputs in sets:
            step(inputs)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            step(sets[call % len(sets)])
    graph.replay()  # the first one also brings the graph to the device
    torch.cuda.synchronize()
    passed, warm_ups, begin = 0.0, 0, time.perf_counter()
    while passed < WARM_UP:
        graph.replay()
        torch.cuda.synchronize()
        passed, warm_ups = time.perf_counter() - begin, warm_ups + 1
    replays = max(replays, math.ceil(window * warm_ups / passed))
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, stop in pairs:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return summary([start.elapsed_time(stop) * 1000 / calls for start, stop in pairs])


def attempt(measure: Callable[[], dict]) -> dict:
    """What a measurement gives, or why it failed, so that the others go on."""
    try:
        return measure()
    except (Exception, SystemExit) as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def rotating_sets(make: Callable[[], Inputs], cache_bytes: int) -> list[Inputs]:
    """As many inputs as take four times the memory of the cache, at least two."""
    sets = [make()]
    held = sets[0].bytes_moved() - size_of(sets[0].logits)  # which move twice
    while held * len(sets) < 4 * cache_bytes or len(sets) < 2:
        sets.append(make())
    return sets


ROUNDS = 5
CPU_CLOCK = (
    f"steps in turns, {ROUNDS} rounds; of each step the round with the least median, against load from elsewhere"
)


def time_cpu(steps: dict[str, Callable[[], None]], seconds: float = 1.0) -> dict[str, Timing]:
    """Time steps on the CPU in turns, so that a change of load meets them all; see `CPU_CLOCK`."""
    for step in steps.values():
        step()
    rounds: dict[str, list[Timing]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        taken: dict[str, list[float]] = {name: [] for name in steps}
        end = time.perf_counter() + seconds / ROUNDS
        while time.perf_counter() < end or len(next(iter(taken.values()))) < 3:
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                taken[name].append((time.perf_counter() - start) * 1e6)
        for name, values in taken.items():
            rounds[name].append(summary(values))
    return {name: min(timings) for name, timings in rounds.items()}


def time_host(step: Callable[[], None], calls: int = 300) -> float:
    """Microseconds of host time for one launch, without waiting for the device."""
    step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / calls * 1e6


def summary(values: list[float]) -> Timing:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(statistics.median(values), cuts[1], cuts[7])


def environment(device: torch.device) -> dict:
    """What a figure depends on: machine, driver, versions, command."""
    from revision import cpu_model, revision  # here, since tests load this file alone

    found = {
        "command": " ".join(["python", *sys.argv]),
        **revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpu_model": cpu_model(),
    }
    if device.type == "cuda":
        import triton

        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        except OSError:
            driver = "unknown"
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "driver": driver, "cuda": torch.version.cuda, "triton": triton.__version__}
        found |= {"multiprocessors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size}
    return found


def progress(cases: list) -> tqdm.tqdm:
    """A progress bar over cases; silent where the output is no terminal."""
    return tqdm.tqdm(cases, unit="case", disable=None)
