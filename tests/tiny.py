"""Real, tiny models with random weights and a real tokenizer, saved as ordinary Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

VOCAB = 320
IMAGE_TOKEN = 3
TEXT = [
    "the quick brown fox jumps over the lazy dog and says hello to the world",
    '{"name": "Ada", "age": 36, "tags": ["a", "b", "c"], "ok": true, "none": null}',
    "0 1 2 3 4 5 6 7 8 9 10 20 30 plus minus equals true false user assistant system",
]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(
    folder: Path, vocab_size: int = VOCAB, text: list[str] = TEXT, sees: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with an end token and a chat template, trained on the spot.

    With `sees` the last special token stands for a piece of an image.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|IMAGE_PLACEHOLDER|>" if sees else "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text * 8,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    more = {"extra_special_tokens": {"image_token": "<|IMAGE_PLACEHOLDER|>"}} if sees else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", **more)
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return fast


def _save(model: torch.nn.Module, folder: Path, dtype: torch.dtype) -> Path:
    model.to(dtype).save_pretrained(folder)
    return folder


def make_model(
    folder: Path,
    kind: str = "llama",
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 2,
    kv_heads: int = 1,
    vocab_size: int = VOCAB,
    positions: int = 512,
    window: int | None = None,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    scale: float = 0.15,
) -> Path:
    """A causal LM with random weights, wide enough that no two logits are close.

    Args:
        folder: where it is written.
        kind: "llama", "mistral" (takes a sliding `window`), "gemma2" (takes it in every other layer, caps its logits),
            "qwen2" (has biases), "granite" (scales its logits), "gemma" (scales its embeddings),
            "hybrid" (every other layer is Mamba 2) or "multimodal" (sees images; its positions have three axes).
        seed: of its weights.
        hidden: width; the head size is `hidden // heads`.
        layers: depth.
        heads: query heads.
        kv_heads: key and value heads.
        vocab_size: columns of its logits; more than the tokenizer's tokens is padding.
        positions: context length.
        window: sliding window in tokens.
        tied: whether a "qwen2" ties its embeddings.
        dtype: of the checkpoint.
        tokenizer: save the tokenizer beside it.
        scale: standard deviation of the weights.
    """
    torch.manual_seed(seed)
    common = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "initializer_range": scale,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**common, sliding_window=window))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**common, tie_word_embeddings=tied))
    elif kind == "gemma":
        model = GemmaForCausalLM(GemmaConfig(**common, head_dim=hidden // heads))
    elif kind == "gemma2":
        head = hidden // heads
        config = Gemma2Config(**common, head_dim=head, query_pre_attn_scalar=head, sliding_window=window)
        model = Gemma2ForCausalLM(config)
    elif kind == "granite":
        model = GraniteForCausalLM(GraniteConfig(**common, logits_scaling=2.0, attention_multiplier=0.2))
    elif kind == "hybrid":
        mamba = {"mamba_n_heads": 4, "mamba_d_head": hidden // 2, "mamba_d_state": 16, "mamba_chunk_size": hidden // 4}
        dense = {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 2 * hidden}
        model = GraniteMoeHybridForCausalLM(
            GraniteMoeHybridConfig(
                **common | mamba | dense,
                layer_types=(["mamba", "attention"] * layers)[:layers],
                position_embedding_type="rope",
                attention_multiplier=0.2,
                logits_scaling=2.0,
            )
        )
    elif kind == "multimodal":
        # The axes' shares of a head size of 32.
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}}
        seen = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
        model = PaddleOCRVLForConditionalGeneration(
            PaddleOCRVLConfig(
                text_config=common | rope | {"head_dim": hidden // heads, "tie_word_embeddings": True},
                vision_config=seen | {"image_size": 56, "patch_size": 14},
                image_token_id=IMAGE_TOKEN,
                video_token_id=vocab_size - 2,
                vision_start_token_id=vocab_size - 3,
                vision_end_token_id=vocab_size - 4,
                tie_word_embeddings=True,
            )
        )
    else:
        raise ValueError(kind)
    if tokenizer and kind == "multimodal":
        see = PaddleOCRVLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28})
        PaddleOCRVLProcessor(see, make_tokenizer(folder, sees=True)).save_pretrained(folder)
    elif tokenizer:
        make_tokenizer(folder)
    return _save(model, folder, dtype)


def _draft_layer(config: LlamaConfig | Qwen2Config, layer: str, width: int) -> dict[str, tuple[int, ...]]:
    """Weights of a transformer layer whose attention reads `width` numbers a token: name -> shape."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = hidden // config.num_attention_heads
    attention, feed = f"{layer}.self_attn", f"{layer}.mlp"
    return {
        f"{attention}.q_proj.weight": (hidden, width),
        f"{attention}.k_proj.weight": (head * config.num_key_value_heads, width),
        f"{attention}.v_proj.weight": (head * config.num_key_value_heads, width),
        f"{attention}.o_proj.weight": (hidden, hidden),
        f"{feed}.gate_proj.weight": (inner, hidden),
        f"{feed}.up_proj.weight": (inner, hidden),
        f"{feed}.down_proj.weight": (hidden, inner),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
    }


def _random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Matrices at random; ones for norms."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * 0.15
        for name, shape in shapes.items()
    }


def make_eagle(folder: Path, base: Path, method: str, seed: int = 0) -> Path:
    """A drafter with random weights of the kind "eagle" or "eagle3", of one layer, for a Llama."""
    config = LlamaConfig.from_pretrained(base)
    config.num_hidden_layers, config.architectures = 1, ["LlamaForCausalLM"]
    hidden = config.hidden_size
    # EAGLE joins the embedding to the base's last hidden states, EAGLE 3 three of its layers', and the result to it.
    layer, reads, width = ("layers.0", 2, hidden) if method == "eagle" else ("midlayer", 3, 2 * hidden)
    shapes = {"fc.weight": (hidden, reads * hidden)} | _draft_layer(config, layer, width)
    if method == "eagle3":
        norms = ("norm", f"{layer}.input_layernorm", f"{layer}.hidden_norm")
        shapes |= {"lm_head.weight": (config.vocab_size, hidden)} | {f"{name}.weight": (hidden,) for name in norms}
    config.save_pretrained(folder)
    save_file(_random_weights(shapes, seed), folder / "model.safetensors")
    return folder


def make_mtp(folder: Path, seed: int = 0) -> Path:
    """A base with a head that predicts one token more: a MiMo, which transformers reads as the Qwen 2 that it is."""
    make_model(folder, "qwen2", seed=seed, hidden=128, layers=3, heads=4, tied=False)
    config = Qwen2Config.from_pretrained(folder)
    layer, hidden = "model.mtp_layers.0", config.hidden_size
    shapes = {f"{layer}.input_proj.weight": (hidden, 2 * hidden)} | _draft_layer(config, layer, hidden)
    shapes |= {
        f"{layer}.self_attn.{name}_proj.bias": shapes[f"{layer}.self_attn.{name}_proj.weight"][:1] for name in "qkv"
    }
    norms = ("token_layernorm", "hidden_layernorm", "input_layernorm", "final_layernorm")
    shapes |= {f"{layer}.{name}.weight": (hidden,) for name in norms}
    weights = load_file(folder / "model.safetensors") | _random_weights(shapes, seed)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder
