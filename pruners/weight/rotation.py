"""The residual stream of a model turned by an orthonormal matrix: same function, fewer outliers.

RSQ (arXiv:2503.01820) and QuaRot (arXiv:2404.00456) turn the stream h into h Q before weights are
quantised. RMSNorm without weights commutes with Q, so its weights go into the matrices after it;
what reads the stream becomes W Q, what writes to it Q' W. Norms that subtract the mean
(LayerNorm) do not commute with Q, and models with them are refused.

Departures: the published code also rotates inside attention and before the last matrix of the
feed-forward part while the model runs; here everything is in the weights, so any loader runs the
model. Sizes that are no power of two take a Hadamard matrix over the power of two times a random
orthonormal one over the odd part, where QuaRot takes known Hadamard matrices of 12, 20 and 28.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import InputError, ModelError
from ...kernels.hadamard import block_of, hadamard
from ..models.block_layouts import BlockLayout, weight_of


@dataclass(frozen=True, slots=True)
class Rotation:
    """Q = diag(signs) (R ⊗ H), orthonormal (d, d), never made as a matrix.

    Attributes
    ----------
    signs
        (d,) float64 of +1 and -1.
    odd
        R (m, m) float64, orthonormal; m is the odd part of d. (1, 1) of 1 where d is a power of
        two.
    """

    signs: Tensor
    odd: Tensor

    @property
    def size(self) -> int:
        """d."""
        return len(self.signs)

    def apply(self, x: Tensor) -> Tensor:
        """x Q for x (..., d), in float64 inside and the dtype of x outside."""
        block = block_of(self.size)
        signs, odd = self.signs.to(x.device), self.odd.to(x.device)
        turned = hadamard(x.double(), block=block, signs=signs)
        if len(odd) > 1:
            apart = turned.reshape(*x.shape[:-1], -1, block)
            turned = torch.einsum("...mb,mn->...nb", apart, odd).reshape(x.shape)
        return turned.to(x.dtype)

    def matrix(self) -> Tensor:
        """Q itself, (d, d) float64; for tests and small models."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))


def rotation(size: int, *, seed: int) -> Rotation:
    """A random rotation of `size` coordinates; the same seed gives the same."""
    if size < 1:
        raise InputError(f"a rotation has at least one coordinate; found {size}.")
    drawn = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=drawn).double() * 2 - 1
    count = size // block_of(size)
    normal = torch.randn((count, count), dtype=torch.float64, generator=drawn)
    orthonormal, upper = torch.linalg.qr(normal)
    # With R's diagonal above 0 the factor is unique, and uniform over the orthogonal group.
    odd = orthonormal * upper.diagonal().sign()
    return Rotation(signs, odd if count > 1 else torch.ones((1, 1), dtype=torch.float64))


@torch.no_grad()
def rotate_block(block: nn.Module, layout: BlockLayout, turn: Rotation) -> None:
    """Rotate a block in place: it then takes h Q and gives f(h) Q.

    Norm weights before the attention and the feed-forward part go into the matrices after them.

    Raises
    ------
    ModelError
        A norm that is no RMSNorm (it is named), or a stream of another size.
    """
    matrices = layout.matrices(block)
    attention = [m.name for m in matrices if m.role in ("query", "key", "value", "qkv")]
    feed = [m.name for m in matrices if m.role in ("gate", "up")]
    present = dict(block.named_modules())
    small = (layout.router, f"{layout.shared}_gate" if layout.shared else None)
    feed += [name for name in small if name is not None and name in present]
    for norm_name, readers in ((layout.attention_norm, attention), (layout.mlp_norm, feed)):
        norm = _norm_weight(present, norm_name, turn.size)
        for name in readers:
            weight = weight_of(present[name], layout)
            weight.copy_(read_rotated(weight, norm, turn))
        norm.fill_(1.0)
    for name in (m.name for m in matrices if m.role in ("output", "down")):
        weight = weight_of(present[name], layout)
        weight.copy_(turn.apply(weight.T).T)
        bias = present[name].bias
        if isinstance(bias, Tensor):
            bias.copy_(turn.apply(bias.data))


def read_rotated(weight: Tensor, norm: Tensor, turn: Rotation) -> Tensor:
    """diag(norm) and Q put into a matrix (out, d) that reads the normed stream, in its dtype."""
    return turn.apply(weight.double() * norm.double()).to(weight.dtype)


def rotate_outside(
    embedding: Tensor, final_norm: Tensor, head: Tensor, turn: Rotation
) -> tuple[Tensor, Tensor, Tensor]:
    """Embedding (V, d), final norm's weight (d,) and output matrix (V, d) of a rotated model.

    The head holds the norm's weight afterwards, so it is no longer the embedding: a model that
    ties them must be saved with `tie_word_embeddings` false and a matrix of its own for the head.
    """
    return (
        turn.apply(embedding),
        torch.ones_like(final_norm),
        read_rotated(head, final_norm, turn),
    )


def _norm_weight(present: dict[str, nn.Module], name: str, size: int) -> Tensor:
    norm = present[name]
    kind = type(norm).__name__
    weight = getattr(norm, "weight", None)
    if "RMSNorm" not in kind or getattr(norm, "bias", None) is not None or weight is None:
        raise ModelError(
            f"{name}: expected an RMSNorm, which a rotation of the stream passes through; found"
            f" {kind}, which subtracts the mean or adds a bias. Use gptq in place of rsq, or rsq"
            " with no rotation."
        )
    if len(weight) != size:
        raise ModelError(
            f"{name}: expected a stream of {size} numbers, as the rotation; found {len(weight)}."
        )
    data: Tensor = weight.data
    return data
