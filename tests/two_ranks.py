"""Tensor parallelism on two CPU processes, checked against the reference. Run by `test_parity_pairs.py`."""

import sys
from pathlib import Path

from parity import Reference, assert_parity, engine, random_requests, run

import ivl_vllm


def main() -> None:
    base, value = map(Path, sys.argv[1:3])
    requests = random_requests(24, seed=43, last_arrival=10)
    with engine(base, **ivl_vllm.engine_args(value_model=str(value)), tensor_parallel_size=2) as llm:
        outputs = run(llm, requests)
    assert_parity(Reference(base, default=value), requests, outputs)
    print(f"parity on 2 ranks: {len(requests)} requests")


if __name__ == "__main__":
    main()
