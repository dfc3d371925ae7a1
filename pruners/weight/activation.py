"""Thresholds under which numbers between a model's matrices count as zero.

CATS (arXiv:2404.08763), CHESS (arXiv:2409.01366), TEAL (arXiv:2408.14690) and the CETT of
"Sparsing Law" (arXiv:2411.02335). These are no methods of the catalogue: a catalogued method says
once for each row of a table whether it stays, and a threshold says it anew for every token. What
is decided here is a number for a layer or a neuron, and everything else follows while the model
runs (`pruners.models.sparse_activation`). A number lives where its size is above the threshold; a
NaN lives, so that it is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...errors import InputError
from ..rules import floor_of

_LOW = 15  # bits of a float32 that the second pass counts; the first counts the 16 above
_FINITE = 0x7F7FFFFF


class SizeQuantiles:
    """Exact quantiles of the sizes of more numbers than can be kept, in two passes over them.

    The bits of a float32 that is not negative, read as an integer, rise with it. The first pass
    counts the upper 16 of the 31, the second the lower 15 within the few bins that hold a
    quantile. 256 KiB and 256 KiB a quantile, whatever the count; nothing is assumed of how the
    numbers lie.

    Parameters
    ----------
    shares
        Shares of the numbers, in [0, 1], that a quantile leaves at or under it.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        for share in shares:
            if not 0.0 <= share <= 1.0:
                raise InputError(f"a share lies in [0, 1]; found {share}.")
        self._shares = list(shares)
        self._upper = torch.zeros(1 << 16, dtype=torch.int64)
        self._lower: dict[int, Tensor] | None = None
        self.count = 0

    def add(self, values: Tensor) -> None:
        """Take values of any shape and floating dtype, in either pass.

        Raises InputError for a NaN or an infinity.
        """
        bits = values.detach().abs().float().flatten().view(torch.int32)
        if not bits.numel():
            return
        if int(bits.max()) > _FINITE:
            raise InputError("expected finite activations; found a NaN or an infinity.")
        upper = bits >> _LOW
        if self._lower is None:
            self._upper += torch.bincount(upper, minlength=1 << 16).cpu()
            self.count += bits.numel()
            return
        for number, counts in self._lower.items():
            inside = bits[upper == number] & ((1 << _LOW) - 1)
            counts += torch.bincount(inside, minlength=1 << _LOW).cpu()

    def refine(self) -> None:
        """End the first pass; the same values have to be added again."""
        places = [self._place(share) for share in self._shares]
        bins = {number for number, _ in places if number >= 0}
        self._lower = {number: torch.zeros(1 << _LOW, dtype=torch.int64) for number in bins}

    def values(self) -> list[float]:
        """The threshold of each share: the k-th smallest size of N, k = floor(share N).

        So just k numbers are at or under it, and more only where sizes are equal; 0 for k = 0.

        Raises InputError where the second pass saw other values than the first.
        """
        if self._lower is None:
            raise InputError("`refine` comes before `values`.")
        return [self._value(share) for share in self._shares]

    def _place(self, share: float) -> tuple[int, int]:
        """Bin of a quantile and its rank inside, from 1; (-1, 0) where it is 0."""
        wanted = floor_of(self.count, share)
        if wanted == 0:
            return -1, 0
        reached = self._upper.cumsum(0)
        number = int(torch.searchsorted(reached, wanted))
        before = int(reached[number - 1]) if number else 0
        return number, wanted - before

    def _value(self, share: float) -> float:
        number, rank = self._place(share)
        if number < 0:
            return 0.0
        assert self._lower is not None
        counts = self._lower[number]
        if int(counts.sum()) != int(self._upper[number]):
            raise InputError("expected the same activations in both passes; found others.")
        low = int(torch.searchsorted(counts.cumsum(0), rank))
        bits = torch.tensor([(number << _LOW) | low], dtype=torch.int32)
        return float(bits.view(torch.float32))


def size_quantile(values: Tensor, share: float) -> float:
    """The k-th smallest size of N values, k = floor(share N), exactly; 0 for k = 0."""
    count = floor_of(values.numel(), share)
    if count == 0:
        return 0.0
    return float(values.detach().abs().float().flatten().kthvalue(count).values)


def chess_level(acted: Tensor, up_mean: Tensor, share: float) -> float:
    """CHESS's quantile of one sample's importances |act(gate)_i| E|up_i|.

    A layer's T is the mean of it over samples, and `neuron_thresholds(T, up_mean)` are the
    thresholds of |act(gate)_i|.

    Parameters
    ----------
    acted
        act(gate), (tokens, n).
    up_mean
        E|up_i| over all tokens, (n,).
    share
        Of the importances that fall at or under it.
    """
    return size_quantile(acted.float() * up_mean.to(torch.float32), share)


def neuron_thresholds(layer: float, scale: Tensor) -> Tensor:
    """t_i = T / scale_i, (n,) float32: |a_i| scale_i > T just where |a_i| > t_i.

    A neuron whose scale is 0 gives nothing and never lives: infinity; with T = 0 no neuron is
    held back.
    """
    if layer <= 0.0:
        return torch.zeros_like(scale, dtype=torch.float32)
    return torch.where(scale > 0, layer / scale.double(), math.inf).to(torch.float32)


def cett_sums(hidden: Tensor, down: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Sum over tokens of what is lost of the MLP's output under each threshold, (m,) float64.

    A neuron j is inactive where |a_j| ||W_down,:j|| < t. The loss is the length of the inactive
    neurons' share of the output over the length of the output (0 for an output of 0); its mean
    over tokens is the CETT ("cumulative errors of tail truncation").

    Parameters
    ----------
    hidden
        a, what the down projection takes, (tokens, n); for a gated MLP act(gate) times up.
    down
        Its weight (out, n), without the bias.
    """
    wide, matrix = hidden.float(), down.float()
    contribution = wide.abs() * matrix.norm(dim=0)
    length = (wide @ matrix.T).norm(dim=1).double()
    made = []
    for threshold in thresholds:
        # At or under it, as the rule of the masks is: the k-th smallest itself goes too.
        lost = (wide * (contribution <= threshold)) @ matrix.T
        share = lost.norm(dim=1).double() / length
        made.append(torch.where(length > 0, share, 0.0).sum())
    return torch.stack(made).cpu()


def threshold_under(thresholds: Sequence[float], cett: Sequence[float], limit: float) -> int:
    """Place of the last threshold before the CETT first exceeds the limit; -1 for none.

    Thresholds rise. The CETT need not rise with them (what is left out can cancel), so the first
    crossing counts, and not any later threshold that happens to be under the limit.
    """
    for place, value in enumerate(cett):
        if value > limit:
            return place - 1
    return len(thresholds) - 1


def largest_cett(
    ratio: Callable[[float], float], allowed: float, rounds: int
) -> tuple[float, float]:
    """The largest CETT found at which the perplexity rises by no more than `allowed`.

    Bisection of [0, 1] whose lower end is always one that was measured and allowed. The rise is
    not monotone in the CETT, so a larger one may exist; what is returned holds.

    Parameters
    ----------
    ratio
        exp(sparse loss - dense loss) at a CETT.
    allowed
        1 + p/100.

    Returns CETT and ratio.

    Raises InputError where not even 0 is allowed.
    """
    low, high = 0.0, 1.0
    at_low = ratio(low)
    if at_low > allowed:
        raise InputError(
            f"expected the perplexity to stay within a factor {allowed:g} with no neuron left out;"
            f" found {at_low:g}. Give a larger p, or a wider dtype."
        )
    at_high = ratio(high)
    if at_high <= allowed:
        return high, at_high
    for _ in range(rounds):
        middle = (low + high) / 2
        found = ratio(middle)
        if found <= allowed:
            low, at_low = middle, found
        else:
            high = middle
    return low, at_low


def greedy_shares(
    error: Callable[[Mapping[str, float]], float],
    parameters: Mapping[str, int],
    target: float,
    step: float,
) -> dict[str, float]:
    """TEAL's greedy choice: how large a share to zero at each place of a block.

    From 0 on, the place is raised by `step` whose rise in the block's error is least for the
    weights that it leaves unread, until a share `target` of the block's weights is unread.

    Parameters
    ----------
    error
        Of the block's output, for a share at each place.
    parameters
        Weights that read the numbers of each place.
    target
        Share of all of them, in [0, 1]; reached or passed by less than a step of one place.

    Departure: TEAL's steps are cut so that each leaves as many weights unread, and the least
    error alone decides; here steps are equal and the error is held against the weights.
    """
    shares = dict.fromkeys(parameters, 0.0)
    total = sum(parameters.values())
    now = error(shares)
    # Rounded, or the last bit of a sum of steps asks for one step more.
    while round(sum(shares[name] * parameters[name] for name in shares), 6) < target * total:
        best: tuple[float, str, float] | None = None
        for name in parameters:
            if shares[name] >= 1.0:
                continue
            raised = {**shares, name: min(1.0, round(shares[name] + step, 9))}
            found = error(raised)
            cost = (found - now) / parameters[name]
            if best is None or cost < best[0]:
                best = (cost, name, found)
        if best is None:
            break
        _, name, now = best
        shares[name] = min(1.0, round(shares[name] + step, 9))
    return shares
