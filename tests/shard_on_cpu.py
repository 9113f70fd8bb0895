"""`ivl` for the test of FSDP without a GPU: `torchrun tests/shard_on_cpu.py train --fsdp ...`.

accelerate honours an FSDP plugin only where the processes are of a kind with a GPU, and wraps those on the CPU in DDP
without a word. torch itself shards on the CPU with gloo; told that these are the other kind, accelerate lets it.
"""

import sys

from accelerate.state import DistributedType, PartialState

_init = PartialState.__init__


def _init_as_gpu_kind(self, *args, **kwargs):
    _init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = _init_as_gpu_kind
    from ivl_vllm import cli

    sys.exit(cli.main(sys.argv[1:]))
