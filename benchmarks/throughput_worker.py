"""One contestant of the throughput benchmark in a process of its own: it waits for its turn, runs requests, reports.

Several engines have to be alive at once, since cases alternate. Each has a process: vLLM without this project's plugin
is then really without it, and each process's memory is its own.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from throughput_models import CACHE

PERCENTILES = [50, 90, 99]
# Read in the contestants' processes: CPU time keeps figures of one thread comparable while the machine does other work.
CLOCK = "THROUGHPUT_CLOCK"


def clock() -> float:
    """Seconds: of the wall clock, or of this process's CPU time where `THROUGHPUT_CLOCK=cpu`."""
    return time.process_time() if os.environ.get(CLOCK) == "cpu" else time.perf_counter()


@dataclass
class Request:
    """What one request asks for.

    Args:
        prompt: Token ids.
        output_len: Tokens to generate, neither more nor less.
        ivl: Sent as `extra_args["ivl"]`; None sends nothing.
    """

    prompt: list[int]
    output_len: int
    ivl: Any = None


@dataclass
class Step:
    """One engine step.

    Args:
        seconds: How long it took.
        generated: How many tokens each request got: more than one only with drafts.
        prefill: Whether it had, or may have had, prompt tokens to compute.
    """

    seconds: float
    generated: dict[int, int]
    prefill: bool

    @property
    def rows(self) -> int:
        """Tokens of all requests."""
        return sum(self.generated.values())


@dataclass
class Run:
    """What happened to requests that were all sent at once.

    Args:
        seconds: From sending them to the last token.
        tokens: Token ids of every request.
        times: When each of them came, in seconds since the start.
        steps: Engine steps, where the contestant has them.
    """

    seconds: float
    tokens: list[list[int]]
    times: list[list[float]]
    steps: list[Step] = field(default_factory=list)

    def check_lengths(self, requests: list[Request]) -> None:
        """Every request must have got the length that it asked for.

        Raises:
            RuntimeError: one has not.
        """
        found, asked = [len(tokens) for tokens in self.tokens], [request.output_len for request in requests]
        if found != asked:
            raise RuntimeError(f"outputs of {found} tokens where {asked} were asked for")


def serve_metrics(requests: list[Request], run: Run) -> dict[str, float]:
    """The fields of `vllm bench serve`, by its own function, and those of `vllm bench throughput`."""
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
    from vllm.benchmarks.serve import calculate_metrics

    samples, outputs = [], []
    for request, tokens, times in zip(requests, run.tokens, run.times, strict=True):
        samples.append(SampleRequest(request.prompt, len(request.prompt), request.output_len))
        output = RequestFuncOutput(success=True, prompt_len=len(request.prompt), output_tokens=len(tokens))
        output.ttft, output.latency = times[0], times[-1]
        output.itl = [later - earlier for earlier, later in itertools.pairwise(times)]
        outputs.append(output)
    with contextlib.redirect_stdout(io.StringIO()):  # advertises a plotting library
        metrics, _ = calculate_metrics(samples, outputs, run.seconds, None, PERCENTILES, {})
    total = metrics.total_input + metrics.total_output
    found = {"duration": run.seconds, "elapsed_time": run.seconds, "num_requests": len(requests)}
    found |= {"total_input_tokens": metrics.total_input, "total_output_tokens": metrics.total_output}
    found |= {"total_num_tokens": total, "tokens_per_second": total / run.seconds}
    found |= {"requests_per_second": metrics.request_throughput, "request_throughput": metrics.request_throughput}
    found |= {name: getattr(metrics, name) for name in ("output_throughput", "total_token_throughput")}
    for name in ("ttft", "tpot", "itl"):
        found |= {
            f"{kind}_{name}_ms": float(getattr(metrics, f"{kind}_{name}_ms")) for kind in ("mean", "median", "std")
        }
        found |= {f"p{p}_{name}_ms": float(value) for p, value in getattr(metrics, f"percentiles_{name}_ms")}
    return found


class Engine:
    """A vLLM engine in this process.

    Args:
        model: Folder of the base model.
        options: Keyword arguments of `vllm.LLM`.
        values: `additional_config["ivl"]`; None leaves the plugin out.
        peer_value: Folder of a value model for the Hugging Face plugin of `peers_plugin.py`.
    """

    def __init__(
        self, model: str, options: dict[str, Any], values: dict | None = None, peer_value: str | None = None
    ) -> None:
        from vllm import LLM

        if values is not None:
            options = options | {"logits_processors": ["ivl"], "additional_config": {"ivl": values}}
        if peer_value is not None:
            from peers_plugin import HFValueProcessor

            os.environ["PEER_VALUE_MODEL"] = peer_value
            options = options | {"logits_processors": [HFValueProcessor]}
        self.llm = LLM(model, **options)

    def run(self, requests: list[Request]) -> Run:
        """Sends all requests and steps the engine until they are done."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        run = Run(0.0, [[] for _ in requests], [[] for _ in requests])
        start = clock()
        for number, request in enumerate(requests):
            params = SamplingParams(
                temperature=0.0,
                ignore_eos=True,
                max_tokens=request.output_len,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
                extra_args=None if request.ivl is None else {"ivl": request.ivl},
            )
            engine.add_request(str(number), {"prompt_token_ids": request.prompt}, params)
        waiting, last = len(requests), clock()
        while engine.has_unfinished_requests():
            outputs, before, generated = engine.step(), waiting, {}
            now = clock()
            for output in outputs:
                number = int(output.request_id)
                tokens = output.outputs[0].token_ids
                waiting -= not run.tokens[number]
                run.tokens[number].extend(tokens)
                run.times[number].extend([now - start] * len(tokens))
                generated[number] = len(tokens)
            run.steps.append(Step(now - last, generated, before > 0))
            last = now
        run.seconds = clock() - start
        run.check_lengths(requests)
        return run

    def profile(self, requests: list[Request], rows: int) -> str:
        """torch's profile of a run: the costliest operators by time of their own."""
        from torch.profiler import profile

        with profile() as found:
            self.run(requests)
        return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=50)

    def memory(self) -> dict[str, int]:
        """Bytes and tokens that this engine holds."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        return {"kv_cache_tokens": cache.num_gpu_blocks * cache.block_size, **process_memory()}


def process_memory() -> dict[str, int]:
    """Most memory that this process has used, in bytes."""
    import torch

    found = {"peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _serve(pipe: Any, make: Callable[..., Any], arguments: dict, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        contestant = make(**arguments)
        pipe.send((None, contestant.memory()))
        for method, given in iter(pipe.recv, None):
            pipe.send((None, getattr(contestant, method)(*given)))
    except BaseException as error:
        pipe.send((f"{type(error).__name__}: {error} (more in {log})", None))
        raise


class Worker:
    """A contestant in a process of its own.

    Args:
        make: Makes the contestant there.
        arguments: Given to `make`.
        environment: Environment variables.
        name: Of the process and of the file that it prints to.
    """

    def __init__(self, make: Callable[..., Any], arguments: dict, environment: dict[str, str], name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        given = (theirs, make, arguments, CACHE / f"{name.replace(', ', '-').replace(' ', '-')}.log")
        self._process = context.Process(target=_serve, args=given, name=name, daemon=True)
        # Inherited, since the new process imports torch, which reads them, before it runs anything of ours.
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()

    def answer(self) -> Any:
        """What the last call gave, or, at first, the contestant's memory.

        Raises:
            RuntimeError: it failed.
        """
        try:
            error, result = self._pipe.recv()
        except EOFError:
            error, result = f"process ended with {self._process.exitcode}", None
        if error:
            raise RuntimeError(f"{self._process.name}: {error}")
        return result

    def call(self, method: str, *given: Any) -> Any:
        """Calls a method of the contestant and waits for what it gives."""
        self._pipe.send((method, given))
        return self.answer()

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError, OSError):
            self._pipe.send(None)
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()


@contextlib.contextmanager
def workers(specifications: dict[str, tuple[Callable[..., Any], dict, dict]]) -> Iterable[dict[str, Worker]]:
    """Contestants by name for the length of a `with` block; all start at the same time."""
    started: dict[str, Worker] = {}
    try:
        for name, specification in specifications.items():
            started[name] = Worker(*specification, name)
        yield started
    finally:
        for worker in started.values():
            worker.close()
