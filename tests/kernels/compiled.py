"""The Triton kernels compiled ahead of time, no GPU needed: run by test_triton.py on its own.

Compiling does not mean that a device can launch the kernel, so shared memory is held to the
device's limit.
"""

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prunery.kernels import attention_triton, centers_triton, nearest_triton, tokens_triton

LIMIT = {80: 163 * 1024, 90: 227 * 1024}
NUMBERS = {"fp16": 2, "bf16": 2, "fp32": 4}
POINTERS = {
    "bias": "*fp32",
    "rows": "*i64",
    "targets": "*i64",
    "at_target": "*fp32",
    "parts": "*fp32",
    "above": "*i32",
    "out": "*fp32",
    "row": "*fp32",
    "lse": "*fp32",
    "query_rows": "*i8",
    "key_columns": "*i8",
    "query_segment": "*i64",
    "key_segment": "*i64",
    "scale": "fp32",
    "softcap": "fp32",
    "distance": "*fp32",
    "nearest": "*i64",
    "best": "*fp32",
    "place": "*i64",
    "out_best": "*fp32",
    "out_place": "*i64",
    "exclude": "*i64",
    "keys": "*i64",
}
# Strides and sizes that are multiples of 16 in any real model, as a launch would find them.
DIVISIBLE = {"hidden_row", "weight_row", "size", "query_row", "key_row", "point_row"}


def build(kernel, dtype, arch, constants, warps=4, stages=3):
    """The compiled kernel; inputs in `dtype`."""
    inputs = ("hidden", "weight", "query", "key", "points", "centre", "queries")
    types = dict.fromkeys(inputs, f"*{dtype}") | POINTERS
    if "points" not in kernel.arg_names:
        del types["queries"], types["keys"]  # how many there are, in the kernels of attention
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if signature[name].startswith("*") or name in DIVISIBLE:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False},
    )


def tiles(dtype, arch, monkeypatch):
    """What a launch on such a device would pick."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (arch // 10, 0))
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    states = type("States", (), {"dtype": names[dtype], "is_cuda": True, "device": "cuda"})
    return tokens_triton.pick_tiles(states)


STATS, RANK = tokens_triton.stats_kernel, tokens_triton.rank_kernel
ROW, COLUMN = attention_triton.row_kernel, attention_triton.column_kernel


@pytest.mark.parametrize("arch", LIMIT)
@pytest.mark.parametrize(
    ("kernel", "dtype"), [(STATS, "fp16"), (STATS, "bf16"), (STATS, "fp32"), (RANK, "bf16")]
)
def test_tokens(kernel, dtype, arch, monkeypatch):
    picked = tiles(dtype, arch, monkeypatch)
    constants = {
        "hidden_inner": 1,
        "weight_inner": 1,
        "ROWS": picked.rows,
        "ENTRIES": picked.entries,
        "INNER": picked.inner,
        "HAS_BIAS": True,
        "HAS_SOFTCAP": True,
    }
    made = build(kernel, dtype, arch, constants, picked.warps, picked.stages)
    assert 0 < made.metadata.shared <= LIMIT[arch]
    assert made.asm["cubin"]
    assert ("wgmma" in made.asm["ptx"]) == (arch == 90)
    # No float32 fusion, so that a newer Triton's default changes nothing.
    assert "fma.rn.f32" not in made.asm["ptx"]


@pytest.mark.parametrize("arch", LIMIT)
@pytest.mark.parametrize(("dtype", "size"), [("fp16", 64), ("bf16", 128), ("fp32", 256)])
@pytest.mark.parametrize("kernel", [ROW, COLUMN])
def test_attention(kernel, dtype, size, arch):
    rows, keys = attention_triton.tile_sizes(size, NUMBERS[dtype])
    constants = {
        "query_inner": 1,
        "key_inner": 1,
        "ROWS": rows,
        "KEYS": keys,
        "INNER": size,
        "CAUSAL": True,
        "WINDOW": True,
        "SOFTCAP": True,
        "SEGMENTS": True,
    }
    made = build(kernel, dtype, arch, constants, attention_triton.WARPS, attention_triton.STAGES)
    assert 0 < made.metadata.shared <= LIMIT[arch]
    assert made.asm["cubin"]


@pytest.mark.parametrize("arch", LIMIT)
@pytest.mark.parametrize("module", [tokens_triton, attention_triton])
def test_combining(module, arch):
    made = build(module.combine_kernel, "fp32", arch, {"ROWS": module.COMBINE_ROWS})
    assert made.metadata.shared <= LIMIT[arch] and made.asm["cubin"]


@pytest.mark.parametrize("arch", LIMIT)
@pytest.mark.parametrize("dtype", NUMBERS)
def test_centers(dtype, arch):
    constants = {
        "point_inner": 1,
        "centre_inner": 1,
        "SAME": centers_triton.SAME,
        "HAS_NEAREST": True,
        "ROWS": centers_triton.ROWS,
        "INNER": centers_triton.INNER,
    }
    made = build(centers_triton.step_kernel, dtype, arch, constants, centers_triton.WARPS)
    assert made.metadata.shared <= LIMIT[arch] and made.asm["cubin"]
    assert "fma.rn.f32" not in made.asm["ptx"]
    constants = {"BLOCKS": centers_triton.BLOCKS}
    made = build(centers_triton.combine_kernel, dtype, arch, constants)
    assert made.metadata.shared <= LIMIT[arch] and made.asm["cubin"]


@pytest.mark.parametrize("arch", LIMIT)
@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("near", [False, True])
def test_nearest(near, dtype, arch):
    rows, points, inner = nearest_triton.tile_sizes(NUMBERS[dtype])
    constants = {
        "query_inner": 1,
        "point_inner": 1,
        "NEAR": near,
        "HAS_EXCLUDE": True,
        "ROWS": rows,
        "POINTS": points,
        "INNER": inner,
    }
    made = build(
        nearest_triton.key_kernel,
        dtype,
        arch,
        constants,
        nearest_triton.WARPS,
        nearest_triton.STAGES,
    )
    assert 0 < made.metadata.shared <= LIMIT[arch]
    assert made.asm["cubin"]
    assert ("wgmma" in made.asm["ptx"]) == (arch == 90)
