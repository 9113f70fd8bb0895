"""Where the time of a run goes: torch's profiler in plain vLLM and in ours, one after the other."""

from __future__ import annotations

from pathlib import Path

from throughput_cases import Case
from throughput_serving import Setup, sample
from throughput_worker import workers


def profile(setup: Setup, cases: list[Case], output: Path, operators: int = 25) -> None:
    """Writes the costliest operators of every case.

    Args:
        setup: Models and engines.
        cases: What to profile.
        output: Text file.
        operators: How many.
    """
    requests = sample(setup.scale, setup.scale.prompts, seed=0)
    names = list(dict.fromkeys(case.engine for case in cases))
    found = []
    with workers({name: setup.engine(name) for name in names}) as engines:
        for name in names:
            engines[name].answer()
        for case in cases:
            engines[case.engine].call("run", case.requests(requests[:8]))
            table = engines[case.engine].call("profile", case.requests(requests), operators)
            found.append(f"{case.label}\n{table}")
    output.write_text("\n\n".join(found))
