"""Inputs for the kernels, and what they should give, in float64 and straight from the words."""

import torch

NEVER = -torch.inf


def logits_of(hidden, weight, bias=None, softcap=None, scale=1.0, dtype=torch.float64):
    """All logits in `dtype`, in the order of transformers' heads."""
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits


def stats_of(logits, targets):
    """(nll, entropy, lse, rank) of logits (N, V), in their dtype."""
    p = torch.softmax(logits, 1)
    log_p = torch.log_softmax(logits, 1)
    own = targets[:, None]
    nll = -log_p.gather(1, own)[:, 0]
    entropy = torch.special.entr(p).sum(1)
    rank = (logits > logits.gather(1, own)).sum(1)
    return nll, entropy, torch.logsumexp(logits, 1), rank


def tokens(seed, rows, size, vocabulary, dtype=torch.float32, *, bias=False, ban=0, spread=3.0):
    """hidden, weight, targets and bias (None, or with the first `ban` entries at -inf)."""
    made = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(rows, size, generator=made) * spread / size**0.5).to(dtype)
    weight = torch.randn(vocabulary, size, generator=made).to(dtype)
    targets = torch.randint(ban, vocabulary, (rows,), generator=made)
    shift = None
    if bias or ban:
        shift = torch.randn(vocabulary, generator=made)
        shift[:ban] = NEVER
    return hidden, weight, targets, shift


def attention_of(
    query,
    key,
    *,
    scale,
    causal=True,
    window=None,
    softcap=None,
    query_segment=None,
    key_segment=None,
    dtype=torch.float64,
):
    """The matrix (B, H, Q, K), pair by pair as the words have it; rows that see nothing are 0."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    shared = heads // key.shape[1]
    made = torch.zeros(batch, heads, queries, keys, dtype=dtype)
    for b in range(batch):
        for i in range(queries):
            position = i + keys - queries
            seen = [
                (not causal or j <= position)
                and (window is None or position - j < window)
                and (
                    query_segment is None or int(query_segment[b, i]) == int(key_segment[b, j]) >= 0
                )
                for j in range(keys)
            ]
            chosen = torch.tensor(seen, dtype=torch.bool)
            if not chosen.any():
                continue
            for h in range(heads):
                logits = key[b, h // shared].to(dtype)[chosen] @ query[b, h, i].to(dtype) * scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                made[b, h, i, chosen] = torch.softmax(logits, 0)
    return made


def mass_of(attention, query_rows=None, key_columns=None):
    """(row, column) sums of a matrix."""
    if query_rows is not None:
        attention = attention * query_rows[:, None, :, None]
    wanted = attention if key_columns is None else attention * key_columns[:, None, None, :]
    return wanted.sum(3), attention.sum(2)


def heads(seed, batch, query_heads, key_heads, queries, keys, size, dtype=torch.float32):
    """query and key; logits at scale 1 / sqrt(size) are spread enough to matter."""
    made = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(batch, query_heads, queries, size, generator=made)
    key = torch.randn(batch, key_heads, keys, size, generator=made)
    return query.to(dtype), key.to(dtype)


def distance(found, truth):
    """Largest absolute difference; infinities must stand at the same places."""
    assert found.shape == truth.shape
    same = torch.isinf(found) & (found.double() == truth.double())
    assert torch.equal(same, torch.isinf(truth))
    gap = (found.double() - truth.double()).abs()[~same]
    return float(gap.max()) if gap.numel() else 0.0


def cluster_rows(seed, rows, size):
    """Unit points (rows, size), a unit centre, and distances known before, some of them chosen."""
    made = torch.Generator().manual_seed(seed)
    points = torch.nn.functional.normalize(torch.randn(rows, size, generator=made), dim=1)
    centre = torch.nn.functional.normalize(torch.randn(size, generator=made), dim=0)
    away = 2 * torch.rand(rows, generator=made)
    return points, centre, away.masked_fill(torch.rand(rows, generator=made) < 0.2, -1.0)


def step_of(points, centre, away, dtype):
    """What the distances `away` become, in `dtype`."""
    new = (1 - (points.to(dtype) * centre.to(dtype)).sum(1)).clamp(min=0)
    new[new < 1e-6] = 0.0
    return torch.minimum(away.to(dtype), new)


def sides(seed, rows, count, size, *, exclude=False):
    """queries, points, and for each query a point to leave out or -1 (None without `exclude`)."""
    made = torch.Generator().manual_seed(seed)
    queries = torch.randn(rows, size, generator=made)
    points = torch.randn(count, size, generator=made)
    out = torch.randint(-1, count, (rows,), generator=made) if exclude else None
    return queries, points, out


def pairs_of(queries, points, metric, exclude):
    """All products or squared distances (Q, N) by the words, left out ones infinitely bad."""
    queries, points = queries.double(), points.double()
    if metric == "l2":
        values = torch.stack([(points - one).square().sum(1) for one in queries])
    else:
        values = queries @ points.T
    if exclude is not None:
        for row, place in enumerate(exclude.tolist()):
            if place >= 0:
                values[row, place] = torch.inf if metric == "l2" else -torch.inf
    return values


def top_of(queries, points, k, metric, exclude):
    """The k best of all pairs, in float64; k may pass their number."""
    values = pairs_of(queries, points, metric, exclude)
    best, place = values.sort(dim=1, descending=metric == "ip", stable=True)
    missing = max(0, k - values.shape[1])
    bad = torch.inf if metric == "l2" else -torch.inf
    best = torch.nn.functional.pad(best, (0, missing), value=bad)[:, :k]
    place = torch.nn.functional.pad(place, (0, missing))[:, :k]
    return best, place.masked_fill(torch.isinf(best), -1)


def check_topk(made, queries, points, k, metric, exclude, slack=None):
    """Values no further from the truth than plain float32, and indices that belong to them."""
    values, indices = made
    truth, _ = top_of(queries, points, k, metric, exclude)
    pairs = pairs_of(queries, points, metric, exclude)
    full = pairs_of(queries, points, metric, None)
    if slack is None:
        # Plain: |q|**2 + |p|**2 - 2 q p, whose terms are what float32 rounds.
        q, p = queries.float(), points.float()
        plain = q @ p.T
        if metric == "l2":
            plain = q.square().sum(1)[:, None] + p.square().sum(1) - 2 * plain
        slack = distance(plain, full) + 2e-6 * (1 + float(full.abs().max()))
    assert values.shape == indices.shape == (len(queries), k)
    rounding = 2.0**-24 * float(full.abs().max())
    assert distance(values, truth) <= slack + rounding
    found = indices >= 0
    assert torch.equal(found, truth.isfinite())
    own = pairs.gather(1, indices.clamp(min=0))[found]
    assert distance(values[found], own) <= slack + rounding
    ordered = values if metric == "ip" else -values
    assert (ordered.diff(dim=1)[found[:, 1:]] <= 0).all()
    for row in indices:
        assert len(set(row[row >= 0].tolist())) == (row >= 0).sum()
    tied = (values.diff(dim=1) == 0) & found[:, 1:]
    assert (indices.diff(dim=1)[tied] > 0).all()
