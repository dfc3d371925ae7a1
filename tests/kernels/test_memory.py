"""No buffer of tokens x vocabulary or queries x keys, held by the peak memory of a process.

Each case runs in a fresh process, since a peak never falls; the plain path in another shows that
the measure sees such a buffer.
"""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, sys
import faiss, torch
from prunery.kernels import attention_mass, token_stats

torch.set_num_threads(1)

UNIT = 1 if sys.platform == "darwin" else 1024

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT

def tokens(rows, vocabulary, call):
    call(torch.randn(rows, 8), torch.randn(vocabulary, 8), torch.arange(rows) % vocabulary)

def heads(length, call):
    call(torch.randn(1, 2, length, 8), torch.randn(1, 1, length, 8))

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
}
case = CASES[sys.argv[1]]
case(64)
before = peak()
case(1)
print(json.dumps(peak() - before))
"""
LOGITS = 4096 * 16384 * 4
MATRIX = 2 * 4096 * 4096 * 4


@pytest.mark.parametrize(
    ("case", "low", "high"),
    [
        ("tokens", 0, LOGITS / 8),
        ("half", 0, LOGITS / 8),
        ("rank", 0, LOGITS / 2),  # 64 MiB of logits are held, whatever the number of tokens
        ("plain tokens", LOGITS, None),
        ("attention", 0, MATRIX / 3),  # a block of 16 MiB and its mask
        ("plain attention", MATRIX, None),
    ],
)
def test_peak_memory(case, low, high):
    pytest.importorskip("resource", reason="peak memory is read by getrusage, which is not here")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, case], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    assert grown >= low
    assert high is None or grown < high
