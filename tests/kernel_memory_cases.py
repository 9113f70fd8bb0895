"""Memory of the torch backend without numba, by torch's profiler.

`test_kernels_torch.py` runs this file in a process of its own.
"""

import importlib

import pytest
import torch
from kernel_cases import device, make_case


@pytest.fixture(autouse=True)
def no_numba(monkeypatch):
    monkeypatch.setattr(importlib.import_module("ivl_kernels.value_add"), "load_compiled", lambda name: None)


def peak_of(case) -> int:
    """The most bytes that a call has allocated at a time, those included that torch creates inside of an operation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        case.run("torch")
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = [0]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held.append(held[-1] + event.nbytes())
    return max(held)


@pytest.mark.parametrize("index", ["none", "scattered"])
@pytest.mark.parametrize("map_dtype", [None, torch.int64])
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [4096, 8000, 32_000])
@pytest.mark.parametrize(
    ("operation", "value_dtype", "most"),
    [
        ("value_add", torch.float32, 1.1),
        ("value_add", torch.bfloat16, 1.1),
        ("lm_head", torch.float32, 1.6),
        ("lm_head", torch.bfloat16, 1.6),
    ],
)
def test_memory_at_a_time(operation, value_dtype, most, columns, logits_dtype, map_dtype, index):
    rows = 32
    case = make_case(
        operation,
        rows,
        columns,
        value_dtype=value_dtype,
        logits_dtype=logits_dtype,
        map_dtype=map_dtype,
        index_dtype=None,
    )
    case.weights.fill_(0.5)
    if index == "scattered":
        case.row_index = torch.randperm(rows + 3, device=device())[:rows]
    fixed = columns * 8 * 3 + (2 << 20)  # the map, moved by one; rows by one; and a block of the matrix, widened
    assert peak_of(case) <= most * rows * columns * 4 + fixed
