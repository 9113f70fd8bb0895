"""Asking the held-out questions of vLLM: many value networks and weights in one engine and one batch."""

import contextlib
import gc
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfer_world import Item, World, prompt

MAX_NEW_TOKENS = 12
WEIGHTS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
BASE_ALONE, VALUE_ALONE, TUNED = "base alone", "value alone", "fine-tuned"
RESIDUAL, PROXY = "residual", "proxy-tuning"
FUSION = "proxy-tuning, weight auto"
TRUST = {f"residual, max_kl {nats}": nats for nats in (2, 8)}

Answers = dict[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class Row:
    """One way of answering: a row of the table.

    Attributes:
        label: What the table calls it.
        name: Name of its value in the engine, or None for the base alone. Rows may share a value.
        entry: What the engine is told of that value: `model`, perhaps `minus` and `vocab_map`.
        ivl: What each request sends as `extra_args["ivl"]`, anything that the engine takes; None sends nothing.
    """

    label: str
    name: str | None = None
    entry: dict[str, str] | None = None
    ivl: Any = None


def steered(label: str, entry: dict[str, str], ivl: Any = None) -> Row:
    """A row whose requests are steered by a value of the row's own, with weight 1 unless `ivl` says otherwise."""
    name = "".join(c if c.isalnum() else "_" for c in label)
    return Row(label, name, entry, {name: 1.0} if ivl is None else ivl)


def sweep_label(weight: float) -> str:
    """What the row of one weight of the sweep is called."""
    return f"weight {weight:g}"


def rows_of(values: dict[str, Path], tuned: Path, small: Path, vocab_map: Path | None = None) -> list[Row]:
    """The rows that every target base has.

    Args:
        values: Variant → folder of its value network.
        tuned: The small base, fully fine-tuned: the expert of proxy-tuning.
        small: The small base: its anti-expert.
        vocab_map: Where the target has another vocabulary.
    """
    mapped = {} if vocab_map is None else {"vocab_map": str(vocab_map)}
    rows = [Row(BASE_ALONE)]
    rows += [steered(variant, {"model": str(folder), **mapped}) for variant, folder in values.items()]
    rows.append(steered(PROXY, {"model": str(tuned), "minus": str(small), **mapped}))
    main = next(row for row in rows if row.label == RESIDUAL)
    if vocab_map is None:
        # Weights that the engine finds at every token: Dynamic Logits Fusion, and a trust region around the base.
        proxy = rows[-1]
        rows.append(Row(FUSION, proxy.name, proxy.entry, f"auto:{proxy.name}"))
        rows += [Row(label, main.name, main.entry, f"{main.name}=1.0;max_kl={n}") for label, n in TRUST.items()]
    rows += [Row(sweep_label(w), main.name, main.entry, {main.name: w}) for w in WEIGHTS]
    return rows


def map_rows(maps: dict[str, Path], value: Path) -> list[Row]:
    """One row for each vocabulary map, all with the same value network."""
    return [steered(label, {"model": str(value), "vocab_map": str(path)}) for label, path in maps.items()]


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
    """Greedy answers of every row to every item, all in one batch.

    Args:
        base: Folder of the base that vLLM serves.
        rows: At least one.
        items: What is asked.
        settings: Further engine arguments.

    Returns:
        Label → for each item its text and why it ended (`stop` where the model ended it itself).
    """
    from vllm import SamplingParams

    values = {row.name: row.entry for row in rows if row.name is not None}
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=MAX_NEW_TOKENS,
            extra_args=None if row.ivl is None else {"ivl": row.ivl},
        )
        for row in rows
    ]
    with engine(base, values, settings) as llm:
        outputs = llm.generate(
            [prompt(item) for item in items for _ in rows], [p for _ in items for p in params], use_tqdm=True
        )
    answers = [(out.outputs[0].text.strip(), str(out.outputs[0].finish_reason)) for out in outputs]
    return {row.label: answers[i :: len(rows)] for i, row in enumerate(rows)}


def hits(items: list[Item], answers: list[tuple[str, str]]) -> list[bool]:
    """Exact match: the whole answer and nothing else, ended by the model itself."""
    return [text == item.answer and stop == "stop" for item, (text, stop) in zip(items, answers, strict=True)]
