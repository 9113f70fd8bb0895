import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import parity  # noqa: F401  (sets vLLM's environment before any test imports vLLM)
import torch
from benchmark_tools import transfer_modules
from tiny import VOCAB, make_model


def pytest_xdist_auto_num_workers(config):
    """Two processes, which is what two cores feed and memory holds; engines on a GPU want it for themselves."""
    return 0 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders of tiny models that differ in architecture, depth, heads, head size, window and padding."""
    root = tmp_path_factory.mktemp("models")
    return {
        "base": make_model(root / "base", seed=1, hidden=128, layers=3, heads=4, kv_heads=2),
        "value": make_model(root / "value", "qwen2", seed=2, hidden=64, heads=2, kv_heads=1),
        # 64 wide heads, a sliding window, one layer, fewer padded columns than the base.
        "sliding": make_model(
            root / "sliding",
            "mistral",
            seed=3,
            hidden=128,
            layers=1,
            heads=2,
            kv_heads=2,
            window=24,
            vocab_size=VOCAB - 8,
        ),
        # More padded columns than the base.
        "anti": make_model(root / "anti", seed=4, hidden=64, layers=1, vocab_size=VOCAB + 24),
    }


@pytest.fixture(scope="session")
def kinds(tmp_path_factory):
    """Tokenizers of every kind, by name."""
    from vocab_kinds import all_kinds

    return all_kinds(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def transfer():
    """The transfer benchmark's modules by name."""
    with transfer_modules() as found:
        yield found
