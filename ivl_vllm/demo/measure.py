"""Ask held-out questions of a model inside vLLM. Run as a process of its own, so that engines come one after another.

python -m ivl_vllm.demo.measure --model FOLDER [--value FOLDER] --questions questions.jsonl --answers answers.json
"""

import argparse
import json
import os
from pathlib import Path

MAX_NEW_TOKENS = 12


def ask(model: Path, value: Path | None, questions: list[str]) -> dict[str, list[dict[str, str]]]:
    """Greedy answers of one engine; with a value network, steered and plain requests share every batch.

    Args:
        model: Folder of the model that vLLM serves.
        value: Folder of the value network, or None for the model alone.
        questions: What a user asks, one chat each.

    Returns:
        `alone` and, with a value network, `steered`: for each question `text` and `stop` (`stop` where the model
        ended its answer itself, `length` where it was cut off).
    """
    # In this process: vLLM's engine then starts in a third of the time.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    import ivl_vllm

    engine = LLM(
        str(model),
        **(ivl_vllm.engine_args(value_model=str(value)) if value else {}),
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        kv_cache_memory_bytes=256 << 20,
    )
    chats = [[{"role": "user", "content": question}] for question in questions]
    weights = [None, 1.0] if value else [None]
    params = [
        SamplingParams(
            temperature=0.0, max_tokens=MAX_NEW_TOKENS, extra_args=None if weight is None else {"ivl": weight}
        )
        for _ in chats
        for weight in weights
    ]
    outputs = engine.chat([chat for chat in chats for _ in weights], params, use_tqdm=True)
    answers = [{"text": out.outputs[0].text.strip(), "stop": str(out.outputs[0].finish_reason)} for out in outputs]
    names = ("alone", "steered")[: len(weights)]
    return {name: answers[i :: len(weights)] for i, name in enumerate(names)}


def main() -> None:
    """Read questions, write answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--value", type=Path)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True)
    args = parser.parse_args()
    questions = [json.loads(line)["messages"][0]["content"] for line in args.questions.read_text().splitlines()]
    args.answers.write_text(json.dumps(ask(args.model, args.value, questions)))


if __name__ == "__main__":
    main()
