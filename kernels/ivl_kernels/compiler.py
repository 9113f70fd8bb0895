"""numba, ready to live beside vLLM. Importing this fails where numba is missing or compiles nothing."""

import contextlib

from llvmlite.binding import ffi
from numba import config, njit, types
from numba.extending import intrinsic

if config.DISABLE_JIT:
    raise ImportError("numba compiles nothing here (NUMBA_DISABLE_JIT)")

# vLLM's CPU worker asks whatever a module holds for its `__dict__`, and llvmlite's library takes that for the name of a
# function: the next engine in this process would not start.
with contextlib.suppress(AttributeError):
    ffi.lib._fntab.setdefault("__dict__", {})

__all__ = ["config", "intrinsic", "njit", "types"]
