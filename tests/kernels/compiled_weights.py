"""The Triton kernels over weights compiled ahead of time: run by test_triton.py on its own.

Compiling does not mean that a device can launch the kernel, so shared memory is held to the
device's limit.
"""

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prunery.kernels import gated_mlp_triton, hadamard_triton, int4_triton, wanda_triton

LIMIT = {80: 163 * 1024, 90: 227 * 1024}
DTYPES = ("fp16", "bf16")
POINTERS = {"norm": "*fp32", "highest": "*i32", "out": "*u8"}
# Strides and sizes that are multiples of 16 in any real model, as a launch would find them.
DIVISIBLE = {"weight_row", "size", "width", "x_row", "gate_row", "up_row", "down_row", "columns"}


def build(kernel, types, arch, constants, warps=4, stages=3):
    """The compiled kernel, launchable on `arch`; arguments that `types` leaves out are i32."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if signature[name].startswith("*") or name in DIVISIBLE:
            attributes[(place,)] = [["tt.divisibility", 16]]
    made = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False},
    )
    assert made.metadata.shared <= LIMIT[arch]
    assert made.asm["cubin"]
    assert "fma.rn.f32" not in made.asm["ptx"]
    return made


@pytest.mark.parametrize("arch", LIMIT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "packed"), [(4096, True), (wanda_triton.LONGEST, False)])
def test_wanda_rows(size, packed, dtype, arch):
    constants = {"weight_inner": 1, "norm_inner": 1, "BLOCK": size, "PACKED": packed}
    types = POINTERS | {"weight": f"*{dtype}"}
    build(wanda_triton.row_kernel, types, arch, constants, wanda_triton.row_warps(size))


@pytest.mark.parametrize("arch", LIMIT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [4, 8])
def test_wanda_patterns(m, dtype, arch):
    groups, lanes = wanda_triton.group_tile(m)
    constants = {"weight_inner": 1, "norm_inner": 1, "GROUPS": groups, "LANES": lanes}
    build(wanda_triton.group_kernel, POINTERS | {"weight": f"*{dtype}"}, arch, constants)


@pytest.mark.parametrize("arch", LIMIT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [128, 4096, hadamard_triton.LARGEST])
def test_hadamard(block, dtype, arch):
    rows, warps = hadamard_triton.tile(block)
    constants = {
        "ROWS": rows,
        "BLOCK": block,
        "STEPS": block.bit_length() - 1,
        "HAS_SIGNS": True,
        "INVERSE": True,
    }
    types = {"x": f"*{dtype}", "out": f"*{dtype}", "signs": "*fp32", "scale": "fp32"}
    build(hadamard_triton.butterfly_kernel, types, arch, constants, warps)


@pytest.mark.parametrize("arch", LIMIT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4])
def test_gated_mlp(rows, dtype, arch):
    types = dict.fromkeys(("x", "gate", "up", "down"), f"*{dtype}")
    types |= dict.fromkeys(("limit", "out", "inner", "parts"), "*fp32")
    constants = {"ROWS": rows, "NEURONS": gated_mlp_triton.NEURONS}
    own = {"ACTIVATION": 0, "PRODUCT": False, "INNER": gated_mlp_triton.INNER}
    warps = gated_mlp_triton.WARPS
    build(gated_mlp_triton.gate_kernel, types, arch, constants | own, warps)
    if rows == 1:
        other = own | {"ACTIVATION": 1, "PRODUCT": True}
        build(gated_mlp_triton.gate_kernel, types, arch, constants | other, warps)
    own = {"COLUMNS": gated_mlp_triton.COLUMNS}
    build(gated_mlp_triton.down_kernel, types, arch, constants | own, warps)


@pytest.mark.parametrize("arch", LIMIT)
@pytest.mark.parametrize("dtype", [*DTYPES, "fp32"])
@pytest.mark.parametrize("rows", int4_triton.ROWS)
def test_int4(rows, dtype, arch):
    constants = {
        "HAS_ZERO": True,
        "ROWS": rows,
        "OUTPUTS": int4_triton.OUTPUTS,
        "INNER": int4_triton.INNER,
    }
    types = {"x": f"*{dtype}", "scale": f"*{dtype}", "packed": "*i32", "zero": "*i8"}
    types["parts"] = "*fp32"
    made = build(
        int4_triton.int4_kernel, types, arch, constants, int4_triton.WARPS, int4_triton.STAGES
    )
    assert "mma" in made.asm["ptx"]
