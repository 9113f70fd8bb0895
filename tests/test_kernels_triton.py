"""The Triton backend: its cases in a process of their own, and what its launchers choose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own_process import count_results

triton_value_add = pytest.importorskip("ivl_kernels.triton_value_add")
triton_lm_head_value_add = pytest.importorskip("ivl_kernels.triton_lm_head_value_add")

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    ("cases", "count", "needing_a_gpu", "needing_the_interpreter"),
    [("kernel_triton_cases.py", 216, 2, 0), ("kernel_fusion_triton_cases.py", 85, 0, 1)],
)
def test_all_cases_on_the_gpu_or_in_the_interpreter(cases, count, needing_a_gpu, needing_the_interpreter):
    environment = dict(os.environ)
    if torch.cuda.is_available():
        environment.pop("TRITON_INTERPRET", None)
    else:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", cases]
    run = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    skipped = needing_the_interpreter if torch.cuda.is_available() else needing_a_gpu
    expected = {"passed": count - skipped, "skipped": skipped}
    assert {"skipped": 0, **count_results(run.stdout)} == expected


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        pytest.param(8, 32_000, (2048, 4), id="small-tiles-when-there-is-little-work"),
        pytest.param(512, 151_936, (4096, 8), id="large-tiles-when-there-is-much"),
    ],
)
def test_value_add_tile(rows, columns, expected):
    config = triton_value_add.choose_config(rows, columns, processors=132)
    assert (config.block, config.num_warps) == expected


def test_value_add_programs_walk_along_the_row_only_when_rows_are_many():
    assert triton_value_add.choose_config(8, 151_936, 132).splits == 75  # one program per tile
    assert triton_value_add.choose_config(512, 151_936, 132).splits == 9  # 38 tiles
    assert triton_value_add.choose_config(100_000, 151_936, 132).splits == 1


@pytest.mark.parametrize(
    ("rows", "dtype", "block_m"),
    [
        (1, torch.bfloat16, 16),
        (16, torch.float16, 16),
        (17, torch.bfloat16, 32),
        (33, torch.bfloat16, 64),
        (64, torch.bfloat16, 64),
        (65, torch.bfloat16, 128),
        (512, torch.bfloat16, 128),
        (16, torch.float32, 16),
        (512, torch.float32, 32),
    ],
)
def test_lm_head_tile_holds_all_rows_of_a_decode_batch(rows, dtype, block_m):
    assert triton_lm_head_value_add.choose_config(rows, dtype).block_m == block_m


def test_processor_count_without_a_gpu():
    assert triton_value_add.processor_count(torch.device("cpu")) == 1
