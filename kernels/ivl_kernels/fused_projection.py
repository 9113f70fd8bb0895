"""`hidden @ matrix.T` with float32 sums, compiled by numba: what projects on a CPU where `is_projected` says so.

A decode step has few rows, so the matrix is what takes time. Its rows are read in four places at a time, a quarter of
the matrix apart, since memory serves four streams faster than one, and each is multiplied with several hidden rows
while it is in registers.
"""

import concurrent.futures
import functools
import itertools
import os

import numpy as np
import torch
from llvmlite import binding, ir

from ivl_kernels.compiler import config, intrinsic, njit, types

# Of this processor, unless numba is told to compile for another.
_asked = config.CPU_NAME is not None or config.CPU_FEATURES is not None or not config.ENABLE_AVX
FEATURES = {} if _asked else dict(binding.get_host_cpu_features())
# Rows of the matrix, hidden rows and float32 numbers of each that registers hold the products of.
STREAMS = 4
GROUP, LANES = (4, 16) if FEATURES.get("avx512f") else (2, 8)
# Numbers of the matrix that are worth a thread.
THREAD_NUMBERS = 1 << 19
VECTOR = ir.VectorType(ir.FloatType(), LANES)
INT64 = ir.IntType(64)


class _BFloat(ir.Type):
    """LLVM's `bfloat`, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


class _Float32:
    """float32 hidden rows and matrix."""

    number, lanes, memory = "float32", LANES, VECTOR

    @staticmethod
    def add_product(builder: ir.IRBuilder, total: ir.Value, hidden: ir.Value, matrix: ir.Value) -> ir.Value:
        """`total + hidden * matrix`, of vectors."""
        fast = ("contract",)
        return builder.fadd(total, builder.fmul(hidden, matrix, flags=fast), flags=fast)

    @staticmethod
    def widened(number: np.float32) -> np.float32:
        """The same."""
        return number


class _BFloat16:
    """bfloat16 hidden rows and matrix, as bits, for processors that multiply them (AVX-512 BF16)."""

    number, lanes, memory = "int16", 32, ir.VectorType(_BFloat(), 32)

    @staticmethod
    def add_product(builder: ir.IRBuilder, total: ir.Value, hidden: ir.Value, matrix: ir.Value) -> ir.Value:
        """`total` plus the sums of each two products, of vectors."""
        kind = ir.FunctionType(VECTOR, [VECTOR, _BFloat16.memory, _BFloat16.memory])
        return builder.call(_function(builder, "llvm.x86.avx512bf16.dpbf16ps.512", kind), [total, hidden, matrix])

    @staticmethod
    def widened(bits: np.int16) -> np.float32:
        """The number of these bits."""
        return np.int32(np.int32(bits) << 16).view(np.float32)


def _function(builder: ir.IRBuilder, name: str, kind: ir.FunctionType) -> ir.Function:
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


def _dots(rows: int, kind: type):
    """A function for compiled code: the products of `rows` hidden rows with `STREAMS` rows of the matrix.

    Its arguments are addresses and counts: the first hidden row, bytes to the next one, the rows of the matrix, vectors
    in a row, and where the `rows` × `STREAMS` float32 sums go.
    """

    def generate(context, builder, _signature, arguments):
        hidden, stride, *matrix, steps, output = arguments
        pointer = kind.memory.as_pointer()
        hidden = [builder.add(hidden, builder.mul(stride, INT64(row))) for row in range(rows)]
        hidden, matrix = ([builder.inttoptr(address, pointer) for address in side] for side in (hidden, matrix))
        before, loop, after = builder.block, *(builder.append_basic_block() for _ in range(2))
        builder.branch(loop)
        builder.position_at_end(loop)
        step, totals = builder.phi(INT64), [[builder.phi(VECTOR) for _ in matrix] for _ in hidden]

        def load(row):
            found = builder.load(builder.gep(row, [step]))
            found.align = 2
            return found

        columns = [load(row) for row in matrix]
        sums = []
        for row, of_row in zip(hidden, totals, strict=True):
            numbers = load(row)
            sums.append([kind.add_product(builder, t, numbers, c) for t, c in zip(of_row, columns, strict=True)])
        following = builder.add(step, INT64(1))
        step.add_incoming(INT64(0), before)
        step.add_incoming(following, loop)
        for of_row, sums_of_row in zip(totals, sums, strict=True):
            for total, found in zip(of_row, sums_of_row, strict=True):
                total.add_incoming(ir.Constant(VECTOR, None), before)
                total.add_incoming(found, loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)
        builder.position_at_end(after)
        reduce = _function(
            builder, f"llvm.vector.reduce.fadd.v{LANES}f32", ir.FunctionType(ir.FloatType(), [ir.FloatType(), VECTOR])
        )
        target = builder.inttoptr(output, ir.FloatType().as_pointer())
        for place, found in enumerate(found for of_row in sums for found in of_row):
            total = builder.call(reduce, [ir.Constant(ir.FloatType(), 0.0), found], fastmath=("reassoc",))
            builder.store(total, builder.gep(target, [INT64(place)]))
        return context.get_dummy_value()

    @intrinsic
    def dots(_typing, hidden, stride, first, second, third, fourth, steps, output):
        return types.void(*[types.int64] * 8), generate

    return dots


def _compiled(kind: type):
    one, group, lanes, widened = _dots(1, kind), _dots(GROUP, kind), kind.lanes, njit(inline="always")(kind.widened)

    @njit(f"void({kind.number}[:, :], {kind.number}[:, :], float32[:, :])", nogil=True)
    def project(hidden, matrix, output):
        (count, width), columns = hidden.shape, matrix.shape[0]
        length = -(-columns // STREAMS)
        steps = width // lanes
        sums = np.zeros(GROUP * STREAMS, np.float32)
        stride, place = hidden.strides[0], sums.ctypes.data
        # The last stream ends with the matrix; the others may overlap and find the same again.
        first, second, third = 0, (columns - length) // 3, 2 * (columns - length) // 3
        starts = (first, second, third, columns - length)
        for i in range(length):
            a, b, c, d = [matrix.ctypes.data + (start + i) * matrix.strides[0] for start in starts]
            row = 0
            while row < count:
                rows = 1
                if count >= GROUP:
                    rows, row = GROUP, min(row, count - GROUP)
                if steps > 0:
                    numbers = hidden.ctypes.data + row * stride
                    if rows == 1:
                        one(numbers, stride, a, b, c, d, steps, place)
                    else:
                        group(numbers, stride, a, b, c, d, steps, place)
                for n in range(rows):
                    for m in range(STREAMS):
                        total = sums[n * STREAMS + m]
                        for k in range(steps * lanes, width):
                            total += widened(hidden[row + n, k]) * widened(matrix[starts[m] + i, k])
                        output[row + n, starts[m] + i] = total
                row += rows

    return project


_project = {torch.float32: _compiled(_Float32)}
if FEATURES.get("avx512bf16") and binding.llvm_version_info[0] >= 16:  # before, the intrinsic took integers
    _project[torch.bfloat16] = _compiled(_BFloat16)


def can_project(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies vectors of such numbers, and has a core for each of torch's threads."""
    # A caller that is bound to one core would have all threads of the pool there.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return dtype in _project and cores >= torch.get_num_threads()


def project_fused(hidden: torch.Tensor, matrix: torch.Tensor, output: torch.Tensor) -> None:
    """Multiply `hidden` `[n, H]` by `matrix.T` (`[V, H]`) into float32 `output` `[n, V]`; columns adjacent, none empty.

    As many threads as torch has share the matrix.
    """
    project, numbers = _project[hidden.dtype], (hidden, matrix)
    if hidden.dtype == torch.bfloat16:  # which NumPy has not
        numbers = tuple(side.view(torch.int16) for side in numbers)
    (rows, columns), output = (side.numpy() for side in numbers), output.numpy()
    count = max(1, min(torch.get_num_threads(), matrix.numel() // THREAD_NUMBERS))
    if count == 1:
        project(rows, columns, output)
        return
    bounds = np.linspace(0, len(columns), count + 1).astype(int)
    parts = [slice(start, end) for start, end in itertools.pairwise(bounds)]
    pool = _pool(torch.get_num_threads(), os.getpid())
    list(pool.map(lambda part: project(rows, columns[part], output[:, part]), parts))


@functools.cache
def _pool(threads: int, process: int) -> concurrent.futures.ThreadPoolExecutor:  # a fork has no threads
    return concurrent.futures.ThreadPoolExecutor(threads, "ivl_kernels")
