"""A family of two causal language models, small and large, pre-trained on the same raw text."""

import itertools
import math
from collections.abc import Iterable

import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ivl_vllm.demo.world import World, documents

# Head size 32 is the smallest that vLLM's CPU attention takes.
SIZES = {
    "small": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3},
    "large": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6},
}
ROW_TOKENS = 64


def new_model(shape: dict[str, int], tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A randomly initialised Llama (fp32) of a shape such as those in `SIZES`."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            **shape,
            vocab_size=len(tokenizer),
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalised before each step (Jordan et al., 2024).

    `torch.optim.Muon` computes in bfloat16, which processors without bfloat16 arithmetic only emulate; here it is fp32.

    Args:
        params: Matrices, fp32.
        lr: Learning rate, on the scale of AdamW's.
    """

    def __init__(self, params: list[torch.Tensor], lr: float):
        super().__init__(params, {"lr": lr, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients that are there."""
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(buffer, group["momentum"]))
                # A matrix with singular values of 1 has entries of RMS 1/sqrt(longer side); AdamW's have about 0.2.
                p.add_(update, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])


def orthogonalise(matrix: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """The nearest matrix with all singular values near 1, by a quintic Newton-Schulz iteration.

    The coefficients are those of Jordan et al. (2024), which trade exactness for speed: values end in 0.7 to 1.2.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def pretrain(
    size: str,
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
) -> LlamaForCausalLM:
    """Train a fresh model of the named size on the world's raw text.

    Returns:
        The trained model, fp32, in eval mode.
    """
    return train_on_text(
        new_model(SIZES[size], tokenizer, seed),
        tokenizer,
        documents(world, seed),
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        title=f"pre-train the {size} base",
    )


def train_on_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    title: str,
    row_tokens: int = ROW_TOKENS,
) -> PreTrainedModel:
    """Train a model, fresh or not, on raw texts, one a row, with a warm-up and a cosine.

    Args:
        model: On any device; trained in place.
        tokenizer: Its tokenizer, which pads on the right.
        texts: At least `steps · batch` of them.
        steps: Optimizer steps.
        batch: Texts a step.
        learning_rate: Peak, of Muon and AdamW alike.
        title: What the progress bar says.
        row_tokens: Longer texts are cut.

    Returns:
        The same model, in eval mode.
    """
    model.train()
    # Muon for the matrices inside the layers learns these little worlds in half of AdamW's steps.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        Muon(matrices, lr=learning_rate),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    warmup = max(1, steps // 20)

    def course(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, course) for optimizer in optimizers]
    stream = iter(texts)
    with tqdm(range(steps), desc=title, unit="step", mininterval=1.0) as bar:
        for step in bar:
            rows = list(itertools.islice(stream, batch))
            inputs = tokenizer(rows, return_tensors="pt", padding=True, truncation=True, max_length=row_tokens)
            inputs = inputs.to(model.device)
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            # Right padding under a causal mask needs no attention mask, and without one attention is faster.
            logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()
