"""Decoding-time steering with two or three Hugging Face models: what one runs without a serving engine.

`base + Σ weight · value` over transformers' own `generate()`: a logits processor runs the value models, each with its
own KV cache. One value model of weight 1 is inverse value learning (arXiv 2410.21027, whose own server keeps no cache);
an expert of weight 1 and an anti-expert of weight -1 are proxy-tuning (arXiv 2401.08565, formula 1). Batches are static
and padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from throughput_worker import Request, Run, clock, process_memory
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList


class AddValues(LogitsProcessor):
    """Adds the weighted logits of value models, which read the tokens that the base reads.

    Args:
        values: Value models and their weights.
        mask: int `[batch, prompt]`, 0 where the prompt is padding; None without padding.

    Attributes:
        times: `clock()` at the end of every step.
    """

    def __init__(self, values: Sequence[tuple[torch.nn.Module, float]], mask: torch.Tensor | None) -> None:
        self._values = [(model, weight, DynamicCache(config=model.config)) for model, weight in values]
        self._mask = mask
        self._seen = 0
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The joint logits of the next token.

        Args:
            input_ids: int `[batch, tokens so far]`.
            scores: fp32 `[batch, vocabulary]` of the base.
        """
        new = input_ids[:, self._seen :]
        arguments = {}
        if self._mask is not None:
            if self._seen:
                self._mask = torch.cat([self._mask, self._mask.new_ones(new.shape)], dim=1)
            positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
            arguments = {"attention_mask": self._mask, "position_ids": positions}
        self._seen = input_ids.shape[1]
        for model, weight, cache in self._values:
            value = model(new, past_key_values=cache, use_cache=True, logits_to_keep=1, **arguments).logits[:, -1]
            columns = min(value.shape[1], scores.shape[1])
            scores[:, :columns].add_(value[:, :columns], alpha=weight)
        if scores.is_cuda:  # `generate()` would wait for the same a moment later
            torch.cuda.synchronize()
        self.times.append(clock())
        return scores


class HFPeers:
    """The base and its value models in this process.

    Args:
        base: Folder of the base model.
        values: Folders of the value models.
        dtype: Of all of them.
        device: Where they run.
    """

    def __init__(self, base: str, values: Sequence[str], dtype: str = "float32", device: str = "cpu") -> None:
        self._device = device
        self._base, *self._values = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(device)
            for folder in (base, *values)
        )
        # Outputs are forced to length: nothing ends a text, and no token is forbidden.
        self._base.generation_config = GenerationConfig(pad_token_id=0)

    def run(self, requests: list[Request], weights: Sequence[float], batch_size: int) -> Run:
        """Greedy decoding in static batches.

        Requests of similar output length share a batch, which a server could not know: a batch runs until its longest
        request is done.

        Args:
            requests: What to generate.
            weights: Of the value models; those beyond its end take no part.
            batch_size: Requests in a batch.
        """
        values = list(zip(self._values, weights, strict=False))
        order = sorted(range(len(requests)), key=lambda number: requests[number].output_len)
        run = Run(0.0, [[] for _ in requests], [[] for _ in requests])
        start = clock()
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            tokens, times = self._generate([requests[number] for number in chosen], values)
            for number, row in zip(chosen, tokens, strict=True):
                length = requests[number].output_len
                run.tokens[number] = row[:length]
                run.times[number] = [moment - start for moment in times[:length]]
        run.seconds = clock() - start
        if self._device == "cuda":  # what it keeps, engines in other processes cannot have
            torch.cuda.empty_cache()
        run.check_lengths(requests)
        return run

    @torch.inference_mode()
    def _generate(self, requests: list[Request], values: list) -> tuple[list[list[int]], list[float]]:
        longest = max(len(request.prompt) for request in requests)
        prompts = [[0] * (longest - len(request.prompt)) + request.prompt for request in requests]
        ids = torch.tensor(prompts, device=self._device)
        mask = None
        if any(len(request.prompt) < longest for request in requests):
            pads = torch.tensor([longest - len(request.prompt) for request in requests], device=self._device)
            mask = (torch.arange(longest, device=self._device) >= pads[:, None]).long()
        processor = AddValues(values, mask)
        found = self._base.generate(
            ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            max_new_tokens=max(request.output_len for request in requests),
            do_sample=False,
            logits_processor=LogitsProcessorList([processor]),
        )
        return found[:, longest:].tolist(), processor.times

    @torch.inference_mode()
    def recomputed(self, requests: list[Request], weights: Sequence[float], cascade: bool = False) -> list[list[int]]:
        """The same tokens from the formula alone: no cache, no batch, no `generate()`.

        Args:
            requests: What to generate.
            weights: Of the value models.
            cascade: The value models read `softmax(base) · embeddings` in place of tokens.
        """
        outputs = []
        for request in requests:
            ids = list(request.prompt)
            for _ in range(request.output_len):
                ids.append(int(self._formula(ids, 1, weights, cascade).argmax()))
            outputs.append(ids[len(request.prompt) :])
        return outputs

    @torch.inference_mode()
    def shortfall(
        self,
        requests: list[Request],
        tokens: list[list[int]],
        weights: Sequence[Sequence[float]],
        cascade: bool = False,
    ) -> tuple[float, float]:
        """How far the logits of given tokens are below the best ones by the formula, and how large those are.

        Args:
            requests: What was asked for.
            tokens: What came, each judged by the tokens before it.
            weights: Of the value models, for each request.
            cascade: As for `recomputed`.

        Returns:
            Means over all tokens.
        """
        short, best = [], []
        for request, given, asked in zip(requests, tokens, weights, strict=True):
            logits = self._formula([*request.prompt, *given[:-1]], len(given), asked, cascade)
            largest = logits.max(-1).values
            short.append(largest - logits[torch.arange(len(given)), torch.tensor(given)])
            best.append(largest.abs())
        return float(torch.cat(short).mean()), float(torch.cat(best).mean())

    def _formula(self, ids: list[int], rows: int, weights: Sequence[float], cascade: bool) -> torch.Tensor:
        """Logits fp32 `[rows, vocabulary]` behind the last `rows` tokens."""
        inputs = torch.tensor([ids], device=self._device)
        base = self._base(inputs, use_cache=False).logits.float()
        logits = base[0, -rows:].clone()
        for model, weight in zip(self._values, weights, strict=False):
            given = {"input_ids": inputs}
            if cascade:
                given = {"inputs_embeds": base.softmax(-1) @ model.get_input_embeddings().weight}
            value = model(**given, use_cache=False).logits[0, -rows:].float()
            columns = min(value.shape[1], logits.shape[1])
            logits[:, :columns] += weight * value[:, :columns]
        return logits.cpu()

    def memory(self) -> dict[str, int]:
        """Bytes that this process has used at most."""
        return process_memory()
