"""Tensor parallelism over two processes, checked against the reference. Run by `test_parity_pairs.py`."""

import sys
from pathlib import Path

from parity import Reference, assert_parity, engine, random_requests, run

import ivl_vllm


def main() -> None:
    base, value, cascade, sibling = map(Path, sys.argv[1:5])
    requests = random_requests(24, seed=43, names=("a", "b", "c"), last_arrival=10)
    values = {"a": {"model": str(value)}, "b": {"model": str(cascade)}}
    values["c"] = {"model": str(sibling), "minus": str(value)}
    with engine(base, **ivl_vllm.engine_args(values=values), tensor_parallel_size=2) as llm:
        outputs = run(llm, requests)
    folders = {"a": value, "b": cascade, "c": (sibling, value)}
    assert_parity(Reference(base, {"b": "cascade+text"}, **folders), requests, outputs)
    print(f"parity on 2 ranks: {len(requests)} requests")


if __name__ == "__main__":
    main()
