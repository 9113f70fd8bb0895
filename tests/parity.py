"""Greedy parity: what vLLM generates against a Hugging Face fp32 reference that recomputes everything."""

from __future__ import annotations

import contextlib
import gc
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Set before vLLM is imported: the engine runs in this process, where it starts in seconds.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Unless a test process says otherwise: with Triton vLLM would choose its runner V2.
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
# On a GPU: products in vLLM's Triton kernels are as exact as the reference's, where Triton would take TF32, and the
# sampler is vLLM's own.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
# Models this small gain nothing from a second thread, and lose much when it shares a core with something else.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import numpy as np
import torch
from PIL import Image
from tiny import IMAGE_TOKEN
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

ENGINE = {
    "dtype": "float32",
    # PARITY_COMPILED=1 pytest ...: by hand, the same suites with torch.compile and, on a GPU, CUDA graphs.
    "enforce_eager": os.environ.get("PARITY_COMPILED") != "1",
    "max_model_len": 256,
    "kv_cache_memory_bytes": 32 << 20,
    "gpu_memory_utilization": 0.3,  # what has to be free where engines start
    "max_num_seqs": 16,
    "block_size": 32,
    "seed": 0,
}


class Reference:
    """`base + sum of weight * (model - minus)` in fp32, all positions recomputed in one forward without a cache.

    Args:
        base: folder of the base model.
        schemes: name -> scheme of its model, where that is not residual.
        maps: name -> vocabulary map of its models, where they have another vocabulary.
        values: name -> folder, or name -> (model, minus).
    """

    def __init__(
        self,
        base: Path,
        schemes: dict[str, str] | None = None,
        maps: dict[str, Any] | None = None,
        **values: Path | tuple[Path, Path],
    ):
        self.schemes = schemes or {}
        self.maps = maps or {}

        def sees(folder: Path) -> bool:
            return hasattr(AutoConfig.from_pretrained(folder), "vision_config")

        def load(folder: Path) -> torch.nn.Module:
            kind = AutoModelForImageTextToText if sees(folder) else AutoModelForCausalLM
            return kind.from_pretrained(folder, dtype=torch.float32).eval()

        self.base = load(base)
        self.image_processor = AutoProcessor.from_pretrained(base).image_processor if sees(base) else None
        self.values = {}
        for name, folders in values.items():
            pair = folders if isinstance(folders, tuple) else (folders,)
            self.values[name] = [(load(folder), sign) for folder, sign in zip(pair, (1.0, -1.0), strict=False)]

    @torch.no_grad()
    def logits(self, ids: Sequence[int], weights: dict[str, float], images: Sequence[Image.Image] = ()) -> torch.Tensor:
        """`[len(ids), vocab of the base]` logits that predict the token after each position.

        Images are the base's alone: a value network reads the tokens that stand for their pieces.
        """
        inputs = torch.tensor([list(ids)])
        seen = {}
        if images:
            seen = self.image_processor(images=list(images), return_tensors="pt")
            seen["mm_token_type_ids"] = (inputs == self.base.config.image_token_id).int()
        base = self.base(inputs, **seen).logits[0]
        joined = base.clone()
        for name, weight in weights.items():
            for model, sign in self.values[name]:
                if name in self.maps:
                    joined += weight * sign * self._mapped(model, ids, self.maps[name], joined.shape[1])
                    continue
                known = model.config.get_text_config().vocab_size
                columns = min(known, joined.shape[1])
                value = self._value_logits(model, inputs.clamp(max=known - 1), base, self.schemes.get(name, "residual"))
                joined[:, :columns] += weight * sign * value[:, :columns]
        return joined

    @staticmethod
    def _read_through_map(model: torch.nn.Module, ids: Sequence[int], vocab_map: Any) -> torch.Tensor:
        """Value logits on the model's own columns; it reads each token as the mean of its pieces."""
        embedding = model.get_input_embeddings()
        starts = vocab_map.piece_starts.tolist()
        pieces = [torch.from_numpy(vocab_map.pieces[starts[i] : starts[i + 1]]).long() for i in ids]
        return model(inputs_embeds=torch.stack([embedding(p).mean(0) for p in pieces])[None]).logits[0]

    def _mapped(self, model: torch.nn.Module, ids: Sequence[int], vocab_map: Any, columns: int) -> torch.Tensor:
        """Value logits on the base's columns."""
        value = self._read_through_map(model, ids, vocab_map)[:, : vocab_map.value_vocab]
        sources = torch.cat([value, value.mean(1, keepdim=True), torch.zeros(len(ids), 1)], dim=1)
        mapped = torch.zeros(len(ids), columns)
        mapped[:, : vocab_map.base_vocab] = sources[:, torch.from_numpy(vocab_map.columns).long()]
        return mapped

    @staticmethod
    def _value_logits(model: torch.nn.Module, inputs: torch.Tensor, base: torch.Tensor, scheme: str) -> torch.Tensor:
        if scheme == "residual":
            return model(inputs).logits[0]
        embedding = model.get_input_embeddings()
        columns = min(base.shape[1], model.config.get_text_config().vocab_size)
        expected = base.softmax(-1)[:, :columns] @ embedding(torch.arange(columns))
        if scheme == "cascade+text":
            expected = expected + embedding(inputs[0])
        return model(inputs_embeds=expected[None]).logits[0]

    def greedy(
        self,
        prompt: Sequence[int],
        output: Sequence[int],
        weights: dict[str, float],
        images: Sequence[Image.Image] = (),
    ) -> list[int]:
        """The reference's choice at each position of `output`, given the tokens before it.

        All choices equal to `output` means that greedy decoding of the reference gives `output`.
        """
        ids = [*prompt, *output]
        return self.logits(ids, weights, images)[len(prompt) - 1 : -1].argmax(-1).tolist()


@dataclass
class Request:
    """A prompt with what it asks for.

    Attributes:
        prompt: token ids.
        weights: name -> weight, as the reference takes them.
        ivl: what is sent as `extra_args["ivl"]`; `...` sends nothing.
        params: further sampling parameters.
        arrives: engine step before which the request is added.
        aborts: engine steps after which it is aborted, if at all.
        images: for each placeholder in the prompt one.
    """

    prompt: list[int]
    weights: dict[str, float]
    ivl: Any = ...
    params: dict[str, Any] = field(default_factory=dict)
    arrives: int = 0
    aborts: int | None = None
    images: Sequence[Image.Image] = ()


def random_requests(
    count: int,
    seed: int,
    names: Sequence[str] = ("default",),
    *,
    vocab: int = 320,
    longest: int = 60,
    last_arrival: int = 40,
) -> list[Request]:
    """Mixed weights, prompt lengths, output lengths and arrivals; a third of the prompts share a prefix."""
    rng = random.Random(seed)
    shared = [[rng.randrange(4, vocab) for _ in range(rng.randrange(33, longest))] for _ in range(2)]
    requests = []
    for _ in range(count):
        prompt = [rng.randrange(4, vocab) for _ in range(rng.randrange(1, longest))]
        if rng.random() < 0.35:
            prompt = rng.choice(shared) + prompt[:5]
        weights = {name: rng.choice([0.0, 0.5, 1.0, 2.0, -1.0]) for name in names if rng.random() < 0.7}
        ivl: Any = dict(weights)
        if list(weights) == [names[0]]:
            ivl = rng.choice([ivl, weights[names[0]], f"{names[0]}={weights[names[0]]}"])
        elif not weights:
            ivl = rng.choice([..., False, 0])
        params = {"max_tokens": rng.randrange(2, 20)}
        requests.append(Request(prompt, weights, ivl, params, rng.randrange(last_arrival)))
    return requests


def add_images(requests: Sequence[Request]) -> list[Image.Image]:
    """Puts one or two of three images into three of four requests, and returns the three."""
    rng = np.random.default_rng(0)
    # As large as the model has positions for: vLLM and transformers find those of other sizes in ways of their own.
    images = [Image.fromarray(rng.integers(0, 256, (56, 56, 3), np.uint8)) for _ in range(3)]
    for number, request in enumerate(requests):
        if number % 4:
            request.images = [images[number % 3], images[number % 2]][: number % 4]
            for _ in request.images:
                place = rng.integers(len(request.prompt))
                request.prompt[place:place] = [1, IMAGE_TOKEN, 1]  # never side by side
    return images


def sampling_params(request: Request) -> Any:
    """vLLM's SamplingParams of a request: greedy and of fixed length unless it says otherwise."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    extra = {} if request.ivl is ... else {"extra_args": {"ivl": request.ivl}}
    return SamplingParams(
        **{"temperature": 0.0, "ignore_eos": True, "detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
        | extra
        | request.params
    )


def run(llm: Any, requests: Sequence[Request]) -> list[Any]:
    """Runs requests through the engine, each added before its own step. Returns vLLM's outputs, None where aborted."""
    engine = llm.llm_engine
    waiting = sorted(range(len(requests)), key=lambda i: requests[i].arrives)
    started: dict[int, int] = {}
    outputs: dict[str, Any] = {}
    step = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and (requests[waiting[0]].arrives <= step or not engine.has_unfinished_requests()):
            number = waiting.pop(0)
            prompt: dict[str, Any] = {"prompt_token_ids": requests[number].prompt}
            if requests[number].images:
                prompt["multi_modal_data"] = {"image": list(requests[number].images)}
            engine.add_request(str(number), prompt, sampling_params(requests[number]))
            started[number] = step
        for output in engine.step():
            if output.finished:
                outputs[output.request_id] = output
        step += 1
        if step > 3000:
            raise TimeoutError(f"after {step} steps only {sorted(outputs)} of {len(requests)} requests have finished")
        for number, start in started.items():
            aborts = requests[number].aborts
            if aborts is not None and step == start + aborts and str(number) not in outputs:
                engine.abort_request([str(number)])
    return [outputs.get(str(i)) for i in range(len(requests))]


def mismatches(reference: Reference, requests: Sequence[Request], outputs: Sequence[Any]) -> list[str]:
    """One line per finished request whose tokens are not the reference's."""
    wrong = []
    for number, (request, output) in enumerate(zip(requests, outputs, strict=True)):
        if output is None:
            continue
        for completion in output.outputs:
            tokens = list(completion.token_ids)
            expected = reference.greedy(output.prompt_token_ids, tokens, request.weights, request.images)
            if tokens != expected:
                wrong.append(f"request {number} {request.weights}: {tokens} but the reference has {expected}")
    return wrong


def steering_shows(reference: Reference, requests: Sequence[Request], outputs: Sequence[Any]) -> bool:
    """Negative control: most steered outputs are not the base's own, so a server that ignored weights would fail."""
    steered = [(r, o) for r, o in zip(requests, outputs, strict=True) if o is not None and any(r.weights.values())]
    changed = []
    for request, output in steered:
        tokens = list(output.outputs[0].token_ids)
        changed.append(tokens != reference.greedy(output.prompt_token_ids, tokens, {}, request.images))
    return len(changed) > 0 and sum(changed) > 0.7 * len(changed)


def assert_parity(reference: Reference, requests: Sequence[Request], outputs: Sequence[Any]) -> None:
    """Every output equals the reference, token for token, and steering made a difference."""
    wrong = mismatches(reference, requests, outputs)
    assert not wrong, f"{len(wrong)} of {len(requests)} differ:\n" + "\n".join(wrong[:5])
    assert steering_shows(reference, requests, outputs)


def create(model: Path | str, **kwargs):
    """An engine's configuration; no engine starts."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256} | kwargs
    return EngineArgs(model=str(model), **arguments).create_engine_config()


@contextlib.contextmanager
def engine(model: Path, **kwargs: Any) -> Iterator[Any]:
    """A vLLM engine for the length of a `with` block."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        llm = LLM(str(model), **ENGINE | kwargs)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
    finally:
        cleanup_dist_env_and_memory()


def metric(llm: Any, name: str) -> float:
    """The sum of one of vLLM's Prometheus counters; the engine needs `disable_log_stats=False`."""
    return sum(m.value for m in llm.get_metrics() if m.name == name)
