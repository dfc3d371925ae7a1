"""`attention_mass` by the definition, in float64, and who may see whom."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sight:
    """Which keys a query may see; the options are `attention_mass`'s."""

    queries: int
    keys: int
    causal: bool
    window: int | None
    query_segment: torch.Tensor | None  # (B, Q)
    key_segment: torch.Tensor | None  # (B, K)

    @property
    def ahead(self) -> int:
        """Position of the first query."""
        return self.keys - self.queries

    def mask(self, item: int, rows: torch.Tensor, span: slice) -> torch.Tensor:
        """(len(rows), keys in span) bool: may query `rows` of batch `item` see the key?"""
        position = (rows + self.ahead)[:, None]
        key = torch.arange(span.start, span.stop, device=rows.device)
        seen = torch.ones(len(rows), len(key), dtype=torch.bool, device=rows.device)
        if self.causal:
            seen &= key <= position
        if self.window is not None:
            seen &= position - key < self.window
        if self.query_segment is not None and self.key_segment is not None:
            own = self.query_segment[item, rows][:, None]
            seen &= (own == self.key_segment[item, span]) & (own >= 0)
        return seen


@torch.no_grad()
def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    query_rows: torch.Tensor | None,
    key_columns: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sight: Sight,
    columns: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(row, column), from the whole matrix."""
    batch, heads = query.shape[:2]
    keys = key.double().repeat_interleave(heads // key.shape[1], 1)
    logits = scale * (query.double() @ keys.transpose(2, 3))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    every = torch.arange(sight.queries, device=query.device)
    whole = slice(0, sight.keys)
    seen = [sight.mask(item, every, whole) for item in range(batch)]
    if batch:
        logits = logits.masked_fill(~torch.stack(seen)[:, None], -torch.inf)
    attention = torch.softmax(logits, 3)
    # A query that sees no key has 0 / 0 everywhere.
    attention = attention.masked_fill((logits == -torch.inf).all(3, keepdim=True), 0.0)
    if query_rows is not None:
        attention = attention.masked_fill(~query_rows[:, None, :, None], 0.0)
    chosen = attention
    if key_columns is not None:
        chosen = attention.masked_fill(~key_columns[:, None, None, :], 0.0)
    return chosen.sum(3).float(), attention.sum(2).float() if columns else None
