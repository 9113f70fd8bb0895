"""Asking the held-out questions of vLLM: many value networks and weights in one engine."""

import contextlib
import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transfer_rows import Row
from transfer_world import Item, World, prompt

MAX_NEW_TOKENS = 12

Answers = dict[str, list[tuple[str, str]]]


def make_maps(base: Path, value: Path, seed: int, output: Path) -> dict[str, Path]:
    """Every kind of vocabulary map from the value network's tokenizer to the base's.

    Args:
        base: Folder of the base.
        value: Folder of a model with the value network's tokenizer.
        seed: Of the world, whose raw text `aligned` reads.
        output: Folder for the files.

    Returns:
        `method, input, unmapped` → file.
    """
    from transformers import AutoTokenizer

    from ivl_vllm.vocab import INPUTS, METHODS, UNMAPPED
    from ivl_vllm.vocab.make import make_vocab_map

    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (base, value)]
    texts = list(itertools.islice(World(seed).documents(2000 + seed), 1000))
    output.mkdir(parents=True, exist_ok=True)
    maps = {}
    for method, read, unmapped in itertools.product(METHODS, INPUTS, UNMAPPED):
        made = make_vocab_map(*tokenizers, method=method, input=read, unmapped=unmapped, corpus=texts)
        label = f"{method}, {read}, {unmapped}"
        maps[label] = output / f"{method}-{read}-{unmapped}.safetensors"
        made.save(maps[label])
    return maps


@contextlib.contextmanager
def engine(base: Path, values: dict[str, dict[str, str]], settings: dict[str, Any]) -> Iterator[Any]:
    """A vLLM engine in this process, with value networks if there are any."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    import ivl_vllm

    llm = LLM(
        str(base),
        **(ivl_vllm.engine_args(values=values) if values else {}),
        **settings,
        dtype="float32",
        max_model_len=96,
        max_num_seqs=128,
        block_size=32,
        seed=0,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def ask(base: Path, rows: list[Row], items: list[Item], settings: dict[str, Any]) -> Answers:
    """Greedy answers of every row to every item, one batch for each row and request: networks of others sit out.

    Args:
        base: Folder of the base that vLLM serves.
        rows: At least one.
        items: What is asked.
        settings: Further engine arguments.

    Returns:
        Label → for each item its text and why it ended (`stop` where the model ended it itself).
    """
    from tqdm import tqdm
    from vllm import SamplingParams

    values = {name: entry for row in rows for name, entry in row.values.items()}
    found: Answers = {}
    with engine(base, values, settings) as llm:
        for row in tqdm(rows, desc="rows", unit="row"):
            answers: list[tuple[str, str]] = []
            for _, batch in itertools.groupby(items, key=lambda item, row=row: row.request(item.task)):
                asked = list(batch)
                request = row.request(asked[0].task)
                params = SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS, extra_args=request)
                outputs = llm.generate([prompt(item) for item in asked], params, use_tqdm=False)
                answers += [(out.outputs[0].text.strip(), str(out.outputs[0].finish_reason)) for out in outputs]
            found[row.label] = answers
    return found


def hits(items: list[Item], answers: list[tuple[str, str]]) -> list[bool]:
    """Exact match: the whole answer and nothing else, ended by the model itself."""
    return [text == item.answer and stop == "stop" for item, (text, stop) in zip(items, answers, strict=True)]
