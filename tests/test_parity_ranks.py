"""Bases split over two processes, by tensor and by pipeline parallelism: runs `two_ranks.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cascade_models import mark_scheme
from own_process import ON_V2
from sibling_models import make_sibling
from tiny import make_model

if torch.cuda.is_available() and torch.cuda.device_count() < 2:
    pytest.skip("two ranks want two GPUs", allow_module_level=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base of three layers, and value networks of other depths: no rank may lay one out as it does the base."""
    root = tmp_path_factory.mktemp("ranks")
    base, value = make_model(root / "base", seed=5, heads=4, kv_heads=2, layers=3, hidden=128), root / "value"
    make_model(value, "qwen2", seed=6, heads=2, kv_heads=2)
    cascade = mark_scheme(make_model(root / "cascade", seed=12, heads=2, kv_heads=2), "cascade+text")
    return [base, value, cascade, make_sibling(value, root / "sibling", seed=15)]


@pytest.mark.parametrize(
    "split, variables",
    [
        ("tensor_parallel_size", {}),
        ("pipeline_parallel_size", {"VLLM_PP_LAYER_PARTITION": "2,1"}),
        ("pipeline_parallel_size", ON_V2),
    ],
    ids=["tensor", "stages", "stages_on_v2"],
)
def test_two_ranks(folders, split, variables):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "two_ranks.py"), split, *map(str, folders)],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"} | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0 and "parity on 2 ranks" in done.stdout, printed[-4000:]
    assert "projected once" in printed  # also where each rank has a part of the matrix
