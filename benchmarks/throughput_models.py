"""Models of the throughput benchmark: their shapes, what a step of them must compute and read, and random weights."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parent / ".cache" / "throughput"


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family (grouped-query attention, gated MLP, RMS norm).

    Args:
        hidden: Width.
        layers: Depth.
        heads: Query heads.
        kv_heads: Key and value heads.
        intermediate: Width of the MLP.
        vocabulary: Columns of the logits.
        architecture: transformers' name of the architecture, without `ForCausalLM`.
        tied: Whether input embeddings and output projection are one matrix.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    architecture: str = "Llama"
    tied: bool = False

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Weights of all layers, which every token is multiplied with."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Weights of the output projection, which every row to be sampled is multiplied with."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """All weights; norms and biases left out."""
        return self.layer_weights + self.head_weights * (1 if self.tied else 2)

    @property
    def kv_numbers(self) -> int:
        """Numbers in the KV cache for one token."""
        return 2 * self.layers * self.kv_heads * self.head_size

    def flops(self, tokens: float, rows: float, attended: float) -> float:
        """Floating point operations of a forward.

        Args:
            tokens: Tokens that go through the layers.
            rows: Rows that go through the output projection.
            attended: Pairs of a token and a token that it attends to.
        """
        attention = 4 * attended * self.heads * self.head_size * self.layers
        return 2 * (tokens * self.layer_weights + rows * self.head_weights) + attention

    def bytes_read(self, steps: float, cached: float, itemsize: int) -> float:
        """Bytes that steps read at least: all layers and the output projection once a step, and the KV cache.

        Args:
            steps: Steps.
            cached: Tokens whose keys and values are read, summed over steps and requests.
            itemsize: Bytes of a number.
        """
        return itemsize * (steps * (self.layer_weights + self.head_weights) + cached * self.kv_numbers)

    def config(self, positions: int) -> dict:
        """`config.json` of this shape.

        Args:
            positions: Context length in tokens.
        """
        # Wide enough that the two best logits differ by more than rounding, and that greedy outputs do not loop. In
        # wide models attention would get so sharp that the rounding of 16 bits grows from layer to layer.
        return {
            "architectures": [f"{self.architecture}ForCausalLM"],
            "model_type": self.architecture.lower(),
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": positions,
            "initializer_range": 0.06 if self.hidden <= 768 else 1.2 / self.hidden**0.5,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }


@dataclass(frozen=True)
class Scale:
    """What is measured on one kind of machine.

    Args:
        base: The base model.
        value: The value network; the second one has its shape.
        dtype: Of weights and KV cache.
        random_weights: Write random weights and load them; else vLLM's `load_format="dummy"`, which nothing can check.
        prompts: Requests, all sent at once.
        input_len: Shortest and longest prompt in tokens.
        output_len: Shortest and longest output in tokens.
        kv_bytes: Memory that each engine's KV cache may take.
        step_tokens: vLLM's `max_num_batched_tokens`.
    """

    base: Shape
    value: Shape
    dtype: str
    random_weights: bool
    prompts: int
    input_len: tuple[int, int]
    output_len: tuple[int, int]
    kv_bytes: int
    step_tokens: int

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return 4 if self.dtype == "float32" else 2

    @property
    def positions(self) -> int:
        """Context length of the models in tokens."""
        return max(512, self.input_len[1] + self.output_len[1])


SCALES = {
    "cpu": Scale(
        Shape(768, 12, 12, 4, 2048, 32_000),
        Shape(256, 6, 4, 2, 768, 32_000),
        "float32",
        True,
        64,
        (16, 192),
        (16, 96),
        512 << 20,
        2048,
    ),
    "tiny": Scale(
        Shape(128, 2, 4, 2, 256, 2_000),
        Shape(64, 1, 2, 1, 128, 2_000),
        "float32",
        True,
        8,
        (4, 24),
        (4, 12),
        32 << 20,
        512,
    ),
    # The shapes of Qwen2.5-7B and Qwen2.5-0.5B; the larger has 128 more columns of padding, which only tokenizers tell.
    # Three such engines fit on a GPU of 80 GB.
    "gpu": Scale(
        Shape(3584, 28, 28, 4, 18_944, 151_936, "Qwen2"),
        Shape(896, 24, 14, 2, 4864, 151_936, "Qwen2", True),
        "bfloat16",
        True,
        96,
        (64, 1024),
        (64, 192),
        5 << 30,
        8192,
    ),
    # Small models of the same kind, to see whether everything runs.
    "gpu-tiny": Scale(
        Shape(256, 4, 4, 2, 768, 32_000, "Qwen2"),
        Shape(128, 2, 2, 1, 384, 32_000, "Qwen2", True),
        "bfloat16",
        True,
        16,
        (16, 64),
        (8, 24),
        256 << 20,
        2048,
    ),
    # Qwen2.5-3B: four engines and three Hugging Face models fit there.
    "gpu-peers": Scale(
        Shape(2048, 36, 16, 2, 11_008, 151_936, "Qwen2", True),
        Shape(896, 24, 14, 2, 4864, 151_936, "Qwen2", True),
        "bfloat16",
        True,
        64,
        (64, 512),
        (32, 192),
        2 << 30,
        8192,
    ),
}


def folder(
    shape: Shape, positions: int, seed: int, scheme: str = "residual", weights: bool = True, dtype: str = "float32"
) -> Path:
    """A model folder of this shape, written unless it is there already.

    Args:
        shape: Of the model.
        positions: Context length in tokens.
        seed: Of its random weights.
        scheme: How it is joined to a base, where that is not `residual`.
        weights: Whether it needs weights (safetensors), or a configuration alone.
        dtype: Of the weights.
    """
    size = f"{shape.architecture.lower()}-{shape.hidden}x{shape.layers}-{shape.heads}-{shape.kv_heads}"
    name = f"{size}-{shape.intermediate}-{shape.vocabulary}-{positions}-{seed}"
    name += "" if scheme == "residual" else f"-{scheme}"
    name += "" if dtype == "float32" else f"-{dtype}"
    target = CACHE / (name if weights else f"{name}-config")
    if target.exists():
        return target
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    config = shape.config(positions)
    if weights:
        _write_weights(config, seed, dtype, partial)
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    if scheme != "residual":
        from ivl_vllm.training.ivl_config import IVLConfig

        IVLConfig("random", scheme, "none", 0.0, shape.vocabulary, "0" * 64).write(partial)
    try:
        partial.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
    return target


def _write_weights(config: dict, seed: int, dtype: str, target: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    kind = config["model_type"]
    settings = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # seconds in place of a minute for 7 B
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=getattr(torch, dtype))
    model.save_pretrained(target)
    del model
    torch.cuda.empty_cache()  # the engines need the room
