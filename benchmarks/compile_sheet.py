"""Compile the kernels for GPUs that are not there, and read the generated code: registers, spills, access widths.

Triton compiles ahead of time, so that this needs no GPU: it says what a launch with the default configurations runs.
"""

import itertools
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from ivl_kernels import triton_fusion, triton_lm_head_value_add, triton_value_add
from ivl_kernels.fusion import ITERATIONS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 89, 90, 100)
TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# What the solvers hand to their one kernel. With several experts it runs as "fusion", as "trust_region" along the ray,
# and with a pair and targets, as it does for the trust region of a pair.
SOLVERS = {
    "fusion": {"HAS_MINUS": True, "HAS_TARGETS": False},
    "trust_region": {"HAS_MINUS": False, "HAS_TARGETS": True},
    "joint_fusion": {"HAS_MINUS": True, "HAS_TARGETS": True},
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Multiprocessor(NamedTuple):
    """What one multiprocessor has, from NVIDIA's table of compute capabilities."""

    warps: int
    blocks: int
    shared: int  # bytes, all blocks together
    block_shared: int  # bytes, largest block
    registers: int = 65536


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 << 10, 163 << 10),
    89: Multiprocessor(48, 24, 100 << 10, 99 << 10),
    90: Multiprocessor(64, 32, 228 << 10, 227 << 10),
    100: Multiprocessor(64, 32, 228 << 10, 227 << 10),
}


class Variant(NamedTuple):
    """One compiled kernel: which, for which rows, types and argument properties."""

    kernel: str  # "value_add", "lm_head_value_add", "fusion", "trust_region" or "joint_fusion"
    rows: int
    value_dtype: torch.dtype = torch.bfloat16
    logits_dtype: torch.dtype = torch.float32
    has_map: bool = False
    ragged: bool = False  # the number of columns is not a multiple of 16; row strides are

    def label(self) -> str:
        """One line for tables and test names."""
        extras = ("-map" if self.has_map else "") + ("-ragged" if self.ragged else "")
        types = f"{TYPE_NAMES[self.value_dtype]}-to-{TYPE_NAMES[self.logits_dtype]}"
        return f"{self.kernel}-{self.rows}-{types}{extras}"


def default_variants() -> list[Variant]:
    """Every tile that the launchers choose for real models: hidden sizes that are multiples of 64, rows by an index."""
    bf16, fp32 = torch.bfloat16, torch.float32
    value_add = [Variant("value_add", rows, has_map=has_map) for rows in (8, 512) for has_map in (False, True)]
    value_add += [Variant("value_add", 512, ragged=True), Variant("value_add", 512, fp32, fp32)]
    value_add += [Variant("value_add", 512, bf16, bf16)]
    head = [
        Variant("lm_head_value_add", rows, dtype, has_map=has_map)
        for rows, dtype, has_map in itertools.product((16, 32, 64, 512), (bf16, fp32), (False, True))
    ]
    solvers = [
        Variant(kernel, 64, dtype, has_map=has_map)
        for kernel, dtype, has_map in itertools.product(SOLVERS, (bf16, fp32), (False, True))
    ]
    return value_add + head + [Variant("lm_head_value_add", 64, ragged=True)] + solvers


def compile_variant(variant: Variant, architecture: int, columns: int = 151936, hidden: int = 896):
    """Compile one variant with the hints that a real launch derives from its arguments.

    Returns:
        Triton's compiled kernel (`asm["ttir" | "ptx" | "cubin"]`, `metadata`) and the launch configuration.
    """
    logits, value = f"*{TYPE_NAMES[variant.logits_dtype]}", f"*{TYPE_NAMES[variant.value_dtype]}"
    aligned = ["logits", "vocab_map", "logits_stride"]
    aligned += [] if variant.ragged else ["num_columns", "num_value_columns"]
    constants = {"HAS_ROW_INDEX": True, "HAS_MAP": variant.has_map}
    if variant.kernel == "value_add":
        kernel = triton_value_add.value_add_kernel
        config = triton_value_add.choose_config(variant.rows, columns, processors=132)
        options = {"num_warps": config.num_warps}
        constants |= {"BLOCK": config.block}
        pointers = {"logits": logits, "value": value}
        aligned += ["value", "value_stride"]
    elif variant.kernel in SOLVERS:
        kernel, config = triton_fusion.fusion_kernel, triton_fusion.CONFIG
        options = {"num_warps": config.num_warps}
        constants |= SOLVERS[variant.kernel] | {"ITERATIONS": ITERATIONS, "BLOCK": config.block}
        pointers = {"base": logits, "plus": value, "minus": value}
        pointers |= dict.fromkeys(("results", "limits", "targets"), "*fp32")
        aligned = ["base", "plus", "minus", "vocab_map", "base_stride", "plus_stride", "minus_stride", *aligned[3:]]
    else:
        kernel = triton_lm_head_value_add.lm_head_value_add_kernel
        config = triton_lm_head_value_add.choose_config(variant.rows, variant.value_dtype)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        constants |= {"EVEN_K": hidden % config.block_k == 0, "UPCAST": False}
        constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        constants |= {"PIECES": config.pieces}
        pointers = {"logits": logits, "hidden": value, "matrix": value}
        aligned += ["hidden", "matrix", "hidden_stride", "matrix_stride", "width"]
    pointers |= {"weights": "*fp32", "row_index": "*i32", "vocab_map": "*i32"}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notices about the compiler's future defaults
        source = ASTSource(kernel, signature, constants, hints)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return compiled, config


def accesses(ptx: str) -> dict[str, int]:
    """Count global memory instructions by kind and width: `{"load 16": 6, "store 16": 4, "copy 16": 0, …}`.

    `copy` is an asynchronous copy from global to shared memory. Widths are bytes per thread.
    """
    counts: Counter[str] = Counter()
    for kind, options in re.findall(r"\b(ld|st)\.global((?:\.\w+)+)", ptx):
        lanes = re.search(r"\.v(\d)", options)
        bits = re.search(r"\.[busf](\d+)$", options)
        width = int(bits.group(1)) // 8 * (int(lanes.group(1)) if lanes else 1)
        counts[f"{'load' if kind == 'ld' else 'store'} {width}"] += 1
    for width in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*\], (0x[0-9a-f]+|\d+)", ptx):
        counts[f"copy {int(width, 0)}"] += 1
    return dict(sorted(counts.items()))


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and bytes of local memory per thread (spills), from the machine code's own record."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


def occupancy(architecture: int, registers: int, shared: int, num_warps: int) -> int:
    """Programs that fit on one multiprocessor: the scarcest of warps, registers, shared memory."""
    limits = MULTIPROCESSORS[architecture]
    registers_of_a_warp = -(-registers * 32 // 256) * 256  # handed out in pieces of 256
    return min(
        limits.blocks,
        limits.warps // num_warps,
        limits.registers // registers_of_a_warp // num_warps,
        limits.shared // (shared + 1024),  # 1 KiB of each program is the system's
    )


def sheet(architectures: tuple[int, ...] = ARCHITECTURES) -> list[dict]:
    """Compile every default variant for every architecture.

    Returns:
        One row each: kernel, configuration, registers, spilled bytes, shared memory, programs and warps per
        multiprocessor, global memory instructions by width.
    """
    rows = []
    for architecture, variant in itertools.product(architectures, default_variants()):
        compiled, config = compile_variant(variant, architecture)
        used = resources(compiled.asm["cubin"])
        programs = occupancy(architecture, used["registers"], compiled.metadata.shared, config.num_warps)
        rows.append(
            {
                "architecture": f"sm_{architecture}",
                "variant": variant.label(),
                "config": config._asdict(),
                **used,
                "shared_bytes": compiled.metadata.shared,
                "programs_per_multiprocessor": programs,
                "occupancy": programs * config.num_warps / MULTIPROCESSORS[architecture].warps,
                "global_accesses": accesses(compiled.asm["ptx"]),
            }
        )
    return rows
