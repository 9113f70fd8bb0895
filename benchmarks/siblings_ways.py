"""A pair of LoRA siblings in torch modules of its own, and the ways to get their difference of logits."""

from __future__ import annotations

import copy

import torch
from throughput_models import SCALES, Shape
from torch.nn import functional

BASE, PAIR = SCALES["cpu"].base, SCALES["cpu"].value
SHAPES = {"21 M": PAIR, "0.5 M": Shape(96, 3, 3, 1, 256, 1000)}
RANKS = (8, 32)
ROWS = (1, 4, 16, 64)
CONTEXT = 128  # tokens that a decode step attends to
PROMPT = 512
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def siblings(shape: Shape, rank: int, seed: int) -> tuple:
    """A small base, its expert (adapter merged) and the adapter: random weights.

    Returns:
        Two `LlamaForCausalLM`, and `{name of a linear layer: (down [rank, in], up [out, rank])}`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = shape.config(PROMPT + 64)
    settings = {name: value for name, value in settings.items() if name not in ("model_type", "architectures")}
    base = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    expert, adapter = copy.deepcopy(base), {}
    with torch.no_grad():
        for name, module in expert.named_modules():
            if name.rpartition(".")[2] in LINEARS:
                out, width = module.weight.shape
                down, up = torch.randn(rank, width) / width**0.5, torch.randn(out, rank) * 0.05
                module.weight += up @ down
                adapter[name] = down, up
    return base, expert, adapter


class Stack:
    """The layers of a Llama on a KV cache of its own, with or without an adapter for the second half of its rows.

    Args:
        model: `LlamaForCausalLM`; its tensors are used, fused as vLLM fuses them (q, k, v; gate, up).
        rows: Rows of the KV cache.
        adapter: As `siblings` gives it.
    """

    def __init__(self, model, rows: int, adapter: dict | None = None) -> None:
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size, self.epsilon = config.hidden_size // self.heads, config.rms_norm_eps
        self.embed, self.head = model.model.embed_tokens.weight, model.lm_head.weight
        self.norm = model.model.norm.weight
        self.layers = []
        for number, layer in enumerate(model.model.layers):
            groups = {}
            for key, owner, names in (
                ("qkv", "self_attn", ("q_proj", "k_proj", "v_proj")),
                ("out", "self_attn", ("o_proj",)),
                ("gate_up", "mlp", ("gate_proj", "up_proj")),
                ("down", "mlp", ("down_proj",)),
            ):
                weights = [getattr(getattr(layer, owner), name).weight for name in names]
                low = [adapter[f"model.layers.{number}.{owner}.{name}"] for name in names] if adapter else None
                groups[key] = torch.cat(weights), low and (torch.cat([d for d, _ in low]), [u for _, u in low])
            norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
            self.layers.append((groups, norms))
        keep = PROMPT + 64
        shape = (len(self.layers), 2, rows, self.kv_heads, keep, self.size)
        self.cache = torch.randn(shape)
        angles = torch.outer(torch.arange(keep), 10_000.0 ** (-torch.arange(0, self.size, 2) / self.size))
        self.cos, self.sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))

    @staticmethod
    def _linear(x, weights):
        """`[tokens, in] @ weight.T`, plus the adapter's product for the second half of the tokens."""
        weight, low = weights
        out = x @ weight.t()
        if low is not None:
            down, ups = low
            half, rank, start = x.shape[0] // 2, down.shape[0] // len(ups), 0
            narrow = x[half:] @ down.t()
            for number, up in enumerate(ups):
                columns = slice(start, start + up.shape[0])
                out[half:, columns].addmm_(narrow[:, number * rank : (number + 1) * rank], up.t())
                start += up.shape[0]
        return out

    def _rotate(self, x, start: int):
        end, half = start + x.shape[2], self.size // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * self.cos[start:end] + turned * self.sin[start:end]

    def hidden(self, ids, start: int):
        """`[rows, hidden]` of the last of `[rows, tokens]` ids that begin at position `start`."""
        rows, tokens = ids.shape
        x, end = functional.embedding(ids.flatten(), self.embed), start + tokens
        widths = [self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size]
        for (groups, norms), (keys, values) in zip(self.layers, self.cache, strict=True):
            normed = functional.rms_norm(x, x.shape[-1:], norms[0], self.epsilon)
            q, k, v = (
                part.view(rows, tokens, -1, self.size).transpose(1, 2)
                for part in self._linear(normed, groups["qkv"]).split(widths, -1)
            )
            keys[:rows, :, start:end], values[:rows, :, start:end] = self._rotate(k, start), v
            mixed = functional.scaled_dot_product_attention(
                self._rotate(q, start),
                keys[:rows, :, :end],
                values[:rows, :, :end],
                is_causal=tokens > 1,
                enable_gqa=True,
            )
            x = x + self._linear(mixed.transpose(1, 2).reshape(rows * tokens, -1), groups["out"])
            normed = functional.rms_norm(x, x.shape[-1:], norms[1], self.epsilon)
            gate, up = self._linear(normed, groups["gate_up"]).chunk(2, -1)
            x = x + self._linear(functional.silu(gate) * up, groups["down"])
        return functional.rms_norm(x.view(rows, tokens, -1)[:, -1], x.shape[-1:], self.norm, self.epsilon)


class Pair:
    """All ways to get `expert - base` logits `[rows, vocabulary]` from `[rows, tokens]` ids."""

    def __init__(self, models: tuple, rows: int) -> None:
        base, expert, adapter = models
        self.base, self.expert = Stack(base, rows), Stack(expert, rows)
        self.both = Stack(base, 2 * rows, adapter)

    def separate(self, ids, start: int):
        """Two passes, two projections."""
        return (self.expert.hidden(ids, start) @ self.expert.head.t()).sub_(
            self.base.hidden(ids, start) @ self.base.head.t()
        )

    def one_head(self, ids, start: int):
        """Two passes, one projection."""
        return (self.expert.hidden(ids, start) - self.base.hidden(ids, start)) @ self.base.head.t()

    def stacked(self, ids, start: int):
        """One pass over both halves, logits of both."""
        base, expert = (self.both.hidden(ids.repeat(2, 1), start) @ self.both.head.t()).chunk(2)
        return expert.sub_(base)

    def stacked_one_head(self, ids, start: int):
        """One pass over both halves, one projection."""
        base, expert = self.both.hidden(ids.repeat(2, 1), start).chunk(2)
        return (expert - base) @ self.both.head.t()


WAYS = {
    "separate": Pair.separate,
    "one head": Pair.one_head,
    "stacked": Pair.stacked,
    "stacked, one head": Pair.stacked_one_head,
}


def check(models: tuple) -> float:
    """Compares every way with transformers, on a prompt and on 12 greedy tokens.

    Returns:
        The largest difference, relative to the largest entry.

    Raises:
        SystemExit: a difference beyond 1e-4, or another token.
    """
    base, expert, _ = models
    torch.manual_seed(1)
    prompt = torch.randint(base.config.vocab_size, (2, 9))
    worst = 0.0
    for name, way in WAYS.items():
        pair, ids, new, start = Pair(models, 2), prompt, prompt, 0
        for _ in range(12):
            wanted = expert(ids).logits[:, -1] - base(ids).logits[:, -1]
            found = way(pair, new, start)
            off = ((found - wanted).abs().max() / wanted.abs().max()).item()
            new, start = wanted.argmax(-1, keepdim=True), ids.shape[1]
            ids, worst = torch.cat([ids, new], 1), max(worst, off)
            if not off <= 1e-4 or not torch.equal(found.argmax(-1, keepdim=True), new):
                raise SystemExit(f"wrong result: {name} is off by {off}; nothing was measured")
    return worst
