"""What the generated code says about the kernels: compiled here for GPUs that need not be there."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels work with torch alone; CI pins Triton")

# From its file: benchmarks/ must not come into sys.path, where its `kernels.py` would pass for Hugging Face's package.
place = Path(__file__).parent.parent / "benchmarks" / "compile_sheet.py"
specification = importlib.util.spec_from_file_location("compile_sheet", place)
compile_sheet = importlib.util.module_from_spec(specification)
specification.loader.exec_module(compile_sheet)
Variant = compile_sheet.Variant


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("variant", compile_sheet.default_variants(), ids=Variant.label)
def test_default_configurations_fit_and_do_not_spill(variant, architecture):
    compiled, config = compile_sheet.compile_variant(variant, architecture)
    used = compile_sheet.resources(compiled.asm["cubin"])
    assert used["spilled"] == 0
    assert compiled.metadata.shared <= compile_sheet.MULTIPROCESSORS[architecture].block_shared
    assert compile_sheet.occupancy(architecture, used["registers"], compiled.metadata.shared, config.num_warps) >= 1


@pytest.mark.parametrize("rows", [16, 32, 64, 512])
def test_tiles_fit_the_small_shared_memory_of_consumer_gpus(rows):
    compiled, _ = compile_sheet.compile_variant(Variant("lm_head_value_add", rows), 89)
    assert compiled.metadata.shared <= compile_sheet.MULTIPROCESSORS[89].block_shared


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("rows", [8, 512])
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_value_add_moves_each_tile_in_16_byte_accesses(architecture, rows, ragged):
    compiled, config = compile_sheet.compile_variant(Variant("value_add", rows, ragged=ragged), architecture)
    found = compile_sheet.accesses(compiled.asm["ptx"])
    threads = config.num_warps * 32
    assert found["load 16"] * 16 * threads == config.block * (4 + 2)  # float32 logits, bfloat16 value
    assert found["store 16"] * 16 * threads == config.block * 4
    # What is left: weight, row index, and the columns behind the last multiple of 16.
    assert found.get("load 2", 0) + found.get("load 4", 0) <= 4
    assert found.get("store 4", 0) <= 1


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_value_add_with_a_map_gathers_value_logits_alone(architecture):
    compiled, config = compile_sheet.compile_variant(Variant("value_add", 512, has_map=True), architecture)
    found = compile_sheet.accesses(compiled.asm["ptx"])
    threads = config.num_warps * 32
    assert found["load 16"] * 16 * threads == config.block * (4 + 4)  # float32 logits, int32 map
    assert found["store 16"] * 16 * threads == config.block * 4
    assert found["load 2"] * threads <= config.block + threads


@pytest.mark.parametrize("has_map", [False, True])
@pytest.mark.parametrize("rows", [16, 32, 64, 512])
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_lm_head_streams_the_matrix_in_pipelined_16_byte_copies(architecture, rows, has_map):
    compiled, config = compile_sheet.compile_variant(Variant("lm_head_value_add", rows, has_map=has_map), architecture)
    found = compile_sheet.accesses(compiled.asm["ptx"])
    threads = config.num_warps * 32
    step = (config.block_m + config.block_n) * config.block_k * 2  # bytes of hidden states and matrix per step
    copies, rest = divmod(found["copy 16"] * 16 * threads, step)
    assert rest == 0
    assert copies >= config.num_stages  # the first stages are filled before the loop, one is copied inside
    assert not any(access in found for access in ("copy 4", "copy 8", "load 2"))
    # The logits, read and written once with and once without a column mask (the last tile may be ragged).
    tile = 2 * config.block_m * config.block_n * 4
    assert found["store 16"] * 16 * threads == tile
    assert "store 4" not in found


@pytest.mark.parametrize("rows", [16, 512])
def test_tiles_without_a_steered_row_read_no_matrix(rows):
    compiled, _ = compile_sheet.compile_variant(Variant("lm_head_value_add", rows), 90)
    code = compiled.asm["ttir"]
    test, product = code.index("scf.if"), code.index("tt.dot")
    assert "tt.reduce" in code[:test]  # over the rows' weights
    assert test < code.index("scf.for") < product


@pytest.mark.parametrize("rows", [64, 512])
def test_lm_head_uses_the_tensor_cores_of_each_generation(rows):
    for architecture, instruction in ((80, "mma.sync"), (90, "wgmma.mma"), (100, "tcgen05.mma")):
        compiled, _ = compile_sheet.compile_variant(Variant("lm_head_value_add", rows), architecture)
        assert instruction in compiled.asm["ptx"]


def test_lm_head_multiplies_float32_exactly():
    compiled, _ = compile_sheet.compile_variant(Variant("lm_head_value_add", 16, torch.float32), 90)
    assert "mma" not in compiled.asm["ptx"]
    assert "fma.rn.f32" in compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("kernel", "strides"),
    [
        ("value_add", ["logits_stride", "value_stride"]),
        ("lm_head_value_add", ["logits_stride", "hidden_stride", "matrix_stride"]),
    ],
)
def test_row_offsets_are_64_bit(kernel, strides):
    compiled, _ = compile_sheet.compile_variant(Variant(kernel, 16), 90)
    header, *body = compiled.asm["ttir"][compiled.asm["ttir"].index("tt.func public") :].splitlines()
    arguments = re.findall(r"(%[\w.]+): ", header)
    names = [name for name in compiled.src.fn.arg_names if name.islower()]  # the others are compile-time constants
    for stride in strides:
        argument = arguments[names.index(stride)]
        uses = [line for line in body if re.search(re.escape(argument) + r"\b", line)]
        assert uses
        assert all("arith.extsi" in line and "i64" in line for line in uses), uses
    assert len(re.findall(r"arith\.muli .*: (?:tensor<[0-9x]+x)?i64", compiled.asm["ttir"])) >= len(strides)
