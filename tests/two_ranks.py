"""Two processes, each with a part of every layer or with some of the layers. Run by `test_parity_ranks.py`."""

import os
import sys
from pathlib import Path

from parity import Reference, assert_parity, engine, random_requests, run

import ivl_vllm


def main() -> None:
    split, (base, value, cascade, sibling) = sys.argv[1], map(Path, sys.argv[2:6])
    arguments = {split: 2}
    if split == "pipeline_parallel_size" and os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0":
        # On a CPU vLLM's runner V1 makes the second stage's inputs when it compiles, and only then.
        arguments["enforce_eager"] = False
    requests = random_requests(24, seed=43, names=("a", "b", "c"), last_arrival=10)
    values = {"a": {"model": str(value)}, "b": {"model": str(cascade)}}
    values["c"] = {"model": str(sibling), "minus": str(value)}
    with engine(base, **ivl_vllm.engine_args(values=values), **arguments) as llm:
        outputs = run(llm, requests)
    folders = {"a": value, "b": cascade, "c": (sibling, value)}
    assert_parity(Reference(base, {"b": "cascade+text"}, **folders), requests, outputs)
    print(f"parity on 2 ranks: {len(requests)} requests")


if __name__ == "__main__":
    main()
