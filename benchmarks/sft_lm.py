"""A small Llama for the fine-tuning benchmarks: tokenizer, training, held-out loss.

One training loop for every method: cross-entropy summed over the tokens that are trained,
divided by their number, whatever chose them. Only the hidden states of trained tokens go
through the head.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = "<|endoftext|>"


@dataclass(frozen=True)
class Sample:
    """A tokenised row: ids (L,), and which of them are trained (L,) bool, never the first."""

    ids: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]

    @property
    def tokens(self) -> int:
        """Trained tokens."""
        return int(self.trained.sum())


def make_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`."""
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts, vocabulary, min_frequency=2, special_tokens=[EOS])
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token=EOS, pad_token=EOS)


def make_model(
    vocabulary: int, *, hidden: int, layers: int, length: int, seed: int
) -> LlamaForCausalLM:
    """A Llama with tied embeddings and random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3 // 8 * 8,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            max_position_embeddings=length,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
    )


def batches(samples: Sequence[Sample], rows: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Shuffled batches of `rows` samples, rows of like length together."""
    order = rng.permutation(len(samples))
    block = rows * 16
    made = []
    for start in range(0, len(order), block):
        part = sorted(order[start : start + block], key=lambda i: len(samples[i].ids))
        made.extend(part[i : i + rows] for i in range(0, len(part), rows))
    for number in rng.permutation(len(made)):
        yield [int(i) for i in made[number]]


def loss_sum(model: LlamaForCausalLM, samples: Sequence[Sample]) -> tuple[torch.Tensor, list[int]]:
    """(T,) loss in nats of each trained token, row after row, and their count in each row."""
    width = max(len(s.ids) for s in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    trained = torch.zeros(len(samples), width, dtype=torch.bool)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = torch.from_numpy(sample.ids)
        trained[row, : len(sample.ids)] = torch.from_numpy(sample.trained)
    # Padding stands on the right and attention is causal: no mask is needed.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][trained[:, 1:]])
    losses = cross_entropy(logits.float(), ids[:, 1:][trained[:, 1:]], reduction="none")
    return losses, [s.tokens for s in samples]


def train(
    model: LlamaForCausalLM,
    samples: Sequence[Sample],
    *,
    epochs: int,
    rows: int,
    rate: float,
    seed: int,
    report: Path | None = None,
) -> tuple[int, float]:
    """AdamW, linear warm-up over 5 % of the steps, cosine to a tenth. (steps, seconds)."""
    samples = [sample for sample in samples if sample.tokens]
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    total = epochs * math.ceil(len(samples) / rows)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    began, step = time.perf_counter(), 0
    for _ in range(epochs):
        for batch in batches(samples, rows, rng):
            part = step / max(1, total)
            factor = min(1.0, (step + 1) / max(1, 0.05 * total))
            factor *= 0.1 + 0.45 * (1 + math.cos(math.pi * part))
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            losses, _ = loss_sum(model, [samples[i] for i in batch])
            loss = losses.mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            step += 1
            if report is not None and step % 50 == 0:
                with report.open("a") as out:
                    spent = time.perf_counter() - began
                    out.write(f"{step}/{total} {loss.item():.3f} {spent:.0f} s\n")
    model.eval()
    return step, time.perf_counter() - began


@torch.no_grad()
def held_out(model: LlamaForCausalLM, samples: Sequence[Sample], rows: int = 32) -> np.ndarray:
    """(N, 2) float64: summed loss in nats and trained tokens of each sample."""
    made = np.zeros((len(samples), 2))
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].ids))
    for start in range(0, len(order), rows):
        part = order[start : start + rows]
        losses, counts = loss_sum(model, [samples[i] for i in part])
        for i, value in zip(part, losses.double().split(counts), strict=True):
            made[i] = float(value.sum()), len(value)
    return made
