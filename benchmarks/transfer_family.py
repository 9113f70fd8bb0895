"""Sizes and recipes of the transfer benchmark."""

from dataclasses import dataclass, field
from typing import Any

# S, M and L are one family; L2 is L, trained on with newer text; X is as large as L and has another kind of tokenizer.
BASES = ("S", "M", "L", "L2", "X")
TOKENIZERS = {"S": "bpe", "M": "bpe", "L": "bpe", "L2": "bpe", "X": "wordpiece"}
SMALL = "S"


@dataclass(frozen=True)
class Pretraining:
    """How one base is made: its width and depth, and its steps."""

    hidden: int
    layers: int
    steps: int
    learning_rate: float
    batch: int = 16


@dataclass(frozen=True)
class Scale:
    """All that a run's size decides.

    Attributes:
        bases: Name → recipe; `L2` goes on from `L` and takes its shape.
        head: Size of an attention head.
        value_rate: Peak learning rate of a value network's training.
        value_grid: Settings of `ivl train` that each variant chooses from, for all seeds, on validation splits beside
            M: one setting is varied at a time, from `value_start` on.
        value_start: Where that begins.
        search_seeds: The first so many seeds choose those, and the expert of proxy-tuning.
        expert_rates: Learning rates that the expert of proxy-tuning is chosen from, likewise.
        tuning_steps: Most steps of fine-tuning a base.
        tuning_rates: Learning rates that each fine-tuned base chooses from, on its own seed's validation split: from
            the middle to either side, for as long as it helps.
        patience: Evaluations without progress, 10 steps apart, after which training stops, of either.
        demonstration_batch: Demonstrations in a step, of either.
        test_items: Most test items of a task.
        resamples: Of the bootstrap.
        engine: Arguments of vLLM that depend on the machine.
    """

    bases: dict[str, Pretraining]
    head: int = 32
    value_rate: float = 2e-3
    value_grid: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            "base_temperature": (2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.2, 0.1),
            "norm_weight": (0.06, 0.25, 1.0, 4.0, 16.0, 64.0, 256.0),
            "max_steps": (50, 100, 200, 400, 800),
        }
    )
    value_start: dict[str, float] = field(
        default_factory=lambda: {"base_temperature": 0.35, "norm_weight": 16.0, "max_steps": 200}
    )
    search_seeds: int = 2
    expert_rates: tuple[float, ...] = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3)
    tuning_steps: int = 400
    tuning_rates: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)
    patience: int = 8
    demonstration_batch: int = 32
    test_items: int = 60
    resamples: int = 2000
    engine: dict[str, Any] = field(default_factory=lambda: {"enforce_eager": True, "kv_cache_memory_bytes": 512 << 20})


CPU = Scale(
    {
        "S": Pretraining(64, 2, 500, 8e-3),
        "M": Pretraining(96, 3, 600, 6e-3),
        "L": Pretraining(160, 4, 600, 4e-3),
        "L2": Pretraining(160, 4, 250, 1.5e-3),
        "X": Pretraining(160, 4, 600, 4e-3),
    }
)
SCALES = {
    "cpu": CPU,
    "gpu": Scale(
        {
            "S": Pretraining(128, 4, 3000, 4e-3, batch=64),
            "M": Pretraining(384, 8, 3000, 2e-3, batch=64),
            "L": Pretraining(768, 12, 3000, 1e-3, batch=64),
            "L2": Pretraining(768, 12, 1000, 4e-4, batch=64),
            "X": Pretraining(768, 12, 3000, 1e-3, batch=64),
        },
        head=64,
        value_rate=1e-3,
        engine={"gpu_memory_utilization": 0.4},
    ),
    "quick": Scale(
        {
            "S": Pretraining(32, 1, 8, 8e-3),
            "M": Pretraining(32, 2, 8, 6e-3),
            "L": Pretraining(64, 2, 8, 4e-3),
            "L2": Pretraining(64, 2, 4, 3e-3),
            "X": Pretraining(64, 2, 8, 4e-3),
        },
        value_grid={"base_temperature": (1.0, 0.5), "norm_weight": (1.0, 4.0), "max_steps": (10,)},
        value_start={"base_temperature": 0.5, "norm_weight": 1.0, "max_steps": 10},
        expert_rates=(5e-4, 1e-3),
        tuning_steps=10,
        tuning_rates=(5e-4, 1e-3),
        test_items=5,
        resamples=100,
    ),
}
