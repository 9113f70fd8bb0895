"""`lm_head_value_add` on the CPU with numba: products of a few rows with the projection matrix."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import check, make_case

pytest.importorskip("numba", reason="the kernels work without it; CI has it")
lm_head_module = importlib.import_module("ivl_kernels.lm_head_value_add")
fused_projection = importlib.import_module("ivl_kernels.fused_projection")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="cases go to the GPU where there is one; CI has none")
DTYPES = list(fused_projection._project)


@pytest.fixture
def calls(monkeypatch) -> list:
    """The number of rows of each product that numba takes."""
    taken, original = [], fused_projection.project_fused
    monkeypatch.setattr(fused_projection, "project_fused", lambda *args: taken.append(len(args[0])) or original(*args))
    return taken


def product(rows, columns, width, dtype=torch.float32, padding=0):
    """Random operands, with numbers between the rows if there is padding, and their product in float64."""
    hidden = torch.randn(rows, width + padding).to(dtype)[:, :width]
    matrix = torch.randn(columns, width + padding).to(dtype)[:, :width]
    return hidden, matrix, hidden.double() @ matrix.double().T


def test_bfloat16_is_taken_where_the_processor_multiplies_it():
    assert DTYPES[0] == torch.float32
    assert (torch.bfloat16 in DTYPES) == bool(fused_projection.FEATURES.get("avx512bf16"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [0, 3], ids=["contiguous", "strided"])
@pytest.mark.parametrize("width", [1, 15, 32, 33, 100])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9])
def test_products_of_every_size(calls, rows, width, padding, dtype):
    torch.manual_seed(0)
    for columns in (1, 2, 3, 4, 5, 6, 7, 50):
        hidden, matrix, wanted = product(rows, columns, width, dtype, padding)
        found = lm_head_module.project(hidden, matrix)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=0)
    assert calls == [rows] * 8


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_matrix(monkeypatch, threads):
    parts, original = [], fused_projection._project[torch.float32]
    monkeypatch.setitem(
        fused_projection._project, torch.float32, lambda *args: parts.append(len(args[1])) or original(*args)
    )
    monkeypatch.setattr(fused_projection, "THREAD_NUMBERS", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    hidden, matrix, wanted = product(3, 101, 40)
    output = torch.empty(3, 101)
    fused_projection.project_fused(hidden, matrix, output)
    torch.testing.assert_close(output.double(), wanted, atol=1e-4, rtol=0)
    assert len(parts) == threads and sum(parts) == 101


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_number_reaches_its_own_products_only(dtype):
    hidden, matrix, _ = product(5, 9, 40, dtype)
    hidden[1, 35], matrix[7, 2] = float("inf"), float("nan")
    found = lm_head_module.project(hidden, matrix)
    finite = torch.ones(5, 9, dtype=bool)
    finite[1], finite[:, 7] = False, False
    assert torch.equal(found.isfinite(), finite)


@pytest.mark.parametrize("value_dtype", DTYPES)
@pytest.mark.parametrize("map_dtype", [None, torch.int32])
def test_the_operation_projects_with_numba(calls, value_dtype, map_dtype):
    check(make_case("lm_head", 5, value_dtype=value_dtype, map_dtype=map_dtype), "torch")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("why", "rows", "dtype"),
    [
        ("many rows", 65, torch.float32),
        ("dtype", 2, torch.float16),
        ("processor", 2, torch.bfloat16),
        ("bound to a core", 2, torch.float32),
        ("no rows", 0, torch.float32),
        ("not aligned", 2, torch.float32),
    ],
)
def test_the_rest_is_left_to_torch(monkeypatch, calls, why, rows, dtype):
    if why == "processor":
        monkeypatch.delitem(fused_projection._project, torch.bfloat16, raising=False)
    if why == "bound to a core":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1 + os.cpu_count())
    hidden, matrix, wanted = product(rows, 30, 40, dtype)
    if why == "not aligned":  # as a file that is mapped into memory may be
        bytes_of_it = torch.empty(matrix.nbytes + 1, dtype=torch.uint8)[1:]
        matrix = torch.frombuffer(bytes_of_it.numpy(), dtype=torch.float32).view_as(matrix).copy_(matrix)
    torch.testing.assert_close(lm_head_module.project(hidden, matrix).double(), wanted, atol=1e-4, rtol=0)
    assert not calls


@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_of_a_model_that_is_trained(dtype):
    hidden, matrix, wanted = product(2, 30, 40, dtype)
    found = lm_head_module.project(hidden.requires_grad_(), torch.nn.Parameter(matrix))
    torch.testing.assert_close(found.double(), wanted.detach(), atol=1e-4, rtol=0)


SMALL_VECTORS = """
import torch
from ivl_kernels import fused_projection

assert (fused_projection.GROUP, fused_projection.LANES, list(fused_projection._project)) == (2, 8, [torch.float32])
for rows in (1, 2, 3, 6):
    hidden, matrix, found = torch.randn(rows, 21), torch.randn(13, 21), torch.empty(rows, 13)
    fused_projection.project_fused(hidden, matrix, found)
    torch.testing.assert_close(found.double(), hidden.double() @ matrix.double().T, atol=1e-4, rtol=0)
print("ok")
"""


@pytest.mark.parametrize(("name", "told"), [("NUMBA_CPU_NAME", "generic"), ("NUMBA_ENABLE_AVX", "0")])
def test_processors_with_small_vectors(name, told):
    """What numba is told to compile for counts, not what the machine has."""
    environment = os.environ | {name: told}
    done = subprocess.run([sys.executable, "-c", SMALL_VECTORS], env=environment, capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr
