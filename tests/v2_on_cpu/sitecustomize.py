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

    def with_boolean_masks(operation):
        # The interpreter leaves the masks of some of vLLM's kernels as integers 0 and 1, and then refuses them.
        def checked(self, *operands):
            mask = 2 if operation is masked_store else 1
            operands = list(operands)
            operands[mask] = TensorHandle(operands[mask].data.astype(bool), operands[mask].dtype)
            return operation(self, *operands)

        return checked

    masked_store, masked_load = InterpreterBuilder.create_masked_store, InterpreterBuilder.create_masked_load
    InterpreterBuilder.create_masked_store = with_boolean_masks(masked_store)
    InterpreterBuilder.create_masked_load = with_boolean_masks(masked_load)
    backends.backends["cpu"] = backends.Backend(compiler=backends.BaseBackend, driver=InterpreterDriver)
