"""No buffer of tokens x vocabulary, of queries x keys or points, held by a process's peak memory.

Each case runs in a fresh process; the plain path in another shows that the measure sees such a
buffer. `ru_maxrss` will not do: a process takes over its parent's peak when it is started.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from pathlib import Path
import faiss, torch
from prunery.kernels import attention_mass, int4_matmul, k_center_step, pairwise_topk, token_stats
from prunery.kernels import wanda_mask

torch.set_num_threads(1)

def resident(line):
    found = Path("/proc/self/status").read_text().split(f"{line}:")[1]
    return int(found.split()[0]) * 1024

def tokens(rows, vocabulary, call):
    call(torch.randn(rows, 8), torch.randn(vocabulary, 8), torch.arange(rows) % vocabulary)

def heads(length, call):
    call(torch.randn(1, 2, length, 8), torch.randn(1, 1, length, 8))

def pairs(length, dtype, call):
    call(torch.randn(length // 2, 8, dtype=dtype), torch.randn(8 * length, 8, dtype=dtype))

def centre(rows, call):
    call(torch.randn(rows, 64), torch.randn(64), torch.full((rows,), 3.0))

def layer(rows, call):
    call(torch.randn(rows, 2048), torch.ones(2048))

def packed(rows, call):
    scale = torch.ones(rows, 16)
    call(torch.randn(2, 2048), torch.ones(rows, 256, dtype=torch.int32), scale, None, 128)

def plain_mask(weight, norm):
    (weight.abs() * norm).sort(1)

def plain_int4(x, words, scale, zero, size):
    weight = (words[:, :, None] >> torch.arange(0, 32, 4)) & 15
    x @ weight.view(len(words), -1).float().T

def plain_pairs(queries, points):
    (queries @ points.T).topk(5)

def plain_centre(points, centre, distance):
    torch.minimum(distance, 1 - (points * centre).sum(1))

def plain_tokens(hidden, weight, targets):
    torch.log_softmax(hidden @ weight.T, 1).gather(1, targets[:, None])

def plain_attention(query, key):
    torch.softmax(query @ key.mT, 3).sum(2)

CASES = {
    "tokens": lambda scale: tokens(4096 // scale, 16384 // scale, token_stats),
    "half": lambda scale: tokens(
        4096 // scale, 16384 // scale, lambda h, w, t: token_stats(h.bfloat16(), w.bfloat16(), t)
    ),
    "rank": lambda scale: tokens(
        4096 // scale, 16384 // scale, lambda h, w, t: token_stats(h, w, t, rank=True)
    ),
    "plain tokens": lambda scale: tokens(4096 // scale, 16384 // scale, plain_tokens),
    "attention": lambda scale: heads(
        4096 // scale, lambda q, k: attention_mass(q, k, scale=1.0, causal=False)
    ),
    "plain attention": lambda scale: heads(4096 // scale, plain_attention),
    "nearest": lambda scale: pairs(
        4096 // scale,
        torch.bfloat16,
        lambda q, p: pairwise_topk(q, p, 5, metric="l2", exclude=torch.arange(len(q))),
    ),
    "plain nearest": lambda scale: pairs(4096 // scale, torch.float32, plain_pairs),
    "wanda": lambda scale: layer(8192 // scale, lambda w, n: wanda_mask(w, n, keep=0.5)),
    "plain wanda": lambda scale: layer(8192 // scale, plain_mask),
    "int4": lambda scale: packed(8192 // scale, int4_matmul),
    "plain int4": lambda scale: packed(8192 // scale, plain_int4),
    "centers": lambda scale: centre(2**19 // scale, k_center_step),
    "plain centers": lambda scale: centre(2**19 // scale, plain_centre),
}
case = CASES[sys.argv[1]]
case(64)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
case(1)
print(json.dumps(resident("VmHWM") - before))
"""
LOGITS = 4096 * 16384 * 4
MATRIX = 2 * 4096 * 4096 * 4
PAIRS = 2048 * 32768 * 4
POINTS = 2**19 * 64 * 4
WEIGHT = 8192 * 2048 * 4


@pytest.mark.parametrize(
    ("case", "low", "high"),
    [
        ("tokens", 1, LOGITS / 8),
        ("half", 1, LOGITS / 8),
        ("rank", 1, LOGITS / 1.5),  # 64 MiB of logits are held, whatever the number of tokens
        ("plain tokens", LOGITS, None),
        ("attention", 1, MATRIX / 3),  # a block of 16 MiB and its mask
        ("plain attention", MATRIX, None),
        ("nearest", 1, PAIRS / 4),  # a block of 16 MiB, the best of it, and the points
        ("plain nearest", PAIRS, None),
        ("wanda", WEIGHT, WEIGHT * 1.8),  # the weight, its mask, and blocks of 4 MiB
        ("plain wanda", WEIGHT * 3, None),
        ("int4", 1, WEIGHT / 3),  # the packed weight is an eighth
        ("plain int4", WEIGHT, None),
        ("centers", 1, POINTS * 1.2),  # the points themselves are made after the first measure
        ("plain centers", POINTS * 1.9, None),
    ],
)
def test_peak_memory(case, low, high):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("a process's peak memory is read from /proc, which is not here")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, case], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    assert grown >= low
    assert high is None or grown < high
