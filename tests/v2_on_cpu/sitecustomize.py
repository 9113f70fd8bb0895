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

    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    masked_store = InterpreterBuilder.create_masked_store

    def store_with_a_boolean_mask(self, ptrs, value, mask, cache_policy):
        # The interpreter leaves the mask of vLLM's grammar kernel as integers 0 and 1, and then refuses them.
        return masked_store(self, ptrs, value, TensorHandle(mask.data.astype(bool), mask.dtype), cache_policy)

    InterpreterBuilder.create_masked_store = store_with_a_boolean_mask
    backends.backends["cpu"] = backends.Backend(compiler=backends.BaseBackend, driver=InterpreterDriver)
