"""`token_stats` by the definition, in float64: the truth that the other paths are held to."""

from __future__ import annotations

import torch


@torch.no_grad()
def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    rank: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(nll, entropy, lse, rank) of `hidden`'s `rows`; holds all logits."""
    logits = hidden[rows].double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits, 1)
    at_target = targets[:, None]
    entropy = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(1)
    lse = torch.logsumexp(logits, 1)
    lse = torch.where(lse == torch.inf, torch.nan, lse)  # as nll and entropy of such a row
    above = (logits > logits.gather(1, at_target)).sum(1)
    return -log_p.gather(1, at_target).squeeze(1).float(), entropy.float(), lse.float(), above
