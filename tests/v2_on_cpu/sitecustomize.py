"""Tests only: runs vLLM's model runner V2, its Triton kernels and ours, on a CPU in Triton's interpreter.

Put this folder on PYTHONPATH, with TRITON_INTERPRET=1 and VLLM_USE_V2_MODEL_RUNNER=1. vLLM's CPU build uses Triton only
when there is a backend named "cpu" whose driver is active; this adds one, which the interpreter never asks to compile.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton import backends

    class InterpreterDriver(backends.DriverBase):
        """Says that it is active, and has nothing else to do."""

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty):
            raise NotImplementedError("the interpreter compiles nothing")

        def get_current_target(self):
            raise NotImplementedError("the interpreter compiles nothing")

        def get_active_torch_device(self):
            import torch

            return torch.device("cpu")

        def get_benchmarker(self):
            raise NotImplementedError("nothing is timed in the interpreter")

    backends.backends["cpu"] = backends.Backend(compiler=backends.BaseBackend, driver=InterpreterDriver)
