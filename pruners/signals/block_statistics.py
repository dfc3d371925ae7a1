"""What passes through a block, summed over tokens: the statistics that compression decides by.

A statistic has the key (module, name). Sums are over tokens that are no padding, in float64
unless said otherwise, and mergeable: see `merge_statistics`.

Of what enters a matrix, under the module `BlockLayout.input_of` (matrices that read the same
numbers share them):

- "count" () int64, tokens. Given wherever one of the others is.
- "sum_squares" (in,), sum of x², a batch's in float32: Wanda's norm (arXiv:2306.11695) is its
  root.
- "mean" (in,), "m2" (in,): mean of x, and the sum of (x - mean)² (FLAP, arXiv:2312.11983).
- "gram" (in, in) float32, sum of x xᵀ, not divided (SparseGPT, arXiv:2301.00774; GPTQ).
- "weighted_gram" (in, in) float32, sum of r x xᵀ with a weight r a token, from the attention that
  it receives in this block (RSQ, arXiv:2503.01820); see `TokenWeights`.

The grams are float32 as the reference's are: float64 products take many times as long, and the
damping that solvers add is larger than what they would change.

Of the block, module "": "count"; "cosine" (), sum of cos(h_in, h_out); "angle" (), sum of
arccos of it divided by pi (CFSP, arXiv:2409.13199).

Of the attention, module `BlockLayout.attention`: "attention" (T,), by position the attention
that a token receives from all queries and heads, summed over rows; "attention_rows" (T,) int64,
rows that reach the position.

Of routed experts, module `BlockLayout.experts`, each (E,), over tokens routed to the expert:
"expert_tokens" int64; "expert_gate", sum of the router's weight g; "expert_norm", sum of
||E(x)||; "expert_reap", sum of g ||E(x)|| (REAP, arXiv:2510.13999, divides by the tokens);
"expert_easy", sum of g ||E(x)|| max(0, 1 - cos(h, h + y)), where h is the residual stream before
the experts and y what the routed experts add (EASY-EP, arXiv:2504.06792; a shared expert's
output is left out).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...kernels.attention import attention_mass
from ..models.block_layouts import BlockLayout, SplitExperts
from .attention_tap import AttentionTap, tap_module
from .block_sums import EXPERT_STATISTICS, ExpertSums, InputSums, cosine_rows, position_sums
from .moments import joined

Statistics = Mapping[tuple[str, str], Tensor]

INPUT_STATISTICS = frozenset({"sum_squares", "mean", "m2", "gram", "weighted_gram"})
BLOCK_STATISTICS = frozenset({"angle", "cosine"})
FORWARD_STATISTICS = INPUT_STATISTICS | BLOCK_STATISTICS | EXPERT_STATISTICS | {"attention"}
# Of the loss, by the matrix's own path; see pipelines/compression/gradients.py.
GRADIENT_STATISTICS = frozenset({"gradient", "gradient_square", "gradient_abs"})
# Given along with the others.
COUNTS = frozenset({"count", "attention_rows", "gradient_rows"})


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """How much a token counts, by the attention that it receives (RSQ, arXiv:2503.01820).

    Within each row the attention received is brought to [r_min, 1] by its smallest and largest
    value and divided by its mean; the weight is this to the power of `power`. RSQ's code scales
    inputs by the root, which is power 1; the paper's figure scales them by r, which is power 2.
    Where all tokens receive the same, as in a row of one token, each weighs 1.
    """

    r_min: float = 0.005
    power: int = 1

    def __call__(self, received: Tensor, valid: Tensor) -> Tensor:
        """Weights (B, T) float64 of attention received (B, T); 0 where not `valid` (B, T)."""
        found = received.double()
        low = found.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
        high = found.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
        span = high - low
        flat = ~(span > 0)
        scaled = (found - low) / span.masked_fill(flat, 1.0)
        weight = self.r_min + (1.0 - self.r_min) * scaled
        weight = torch.where(flat, 1.0, weight) * valid
        mean = weight.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
        return (weight / mean.clamp(min=torch.finfo(torch.float64).tiny)).pow(self.power) * valid


def check_wanted(wanted: frozenset[str]) -> frozenset[str]:
    """The statistics among `wanted` that a forward pass gives; InputError for a name unknown.

    Counts are given along, and those of gradients are made elsewhere: both are passed over.
    """
    unknown = wanted - FORWARD_STATISTICS - GRADIENT_STATISTICS - COUNTS
    if unknown:
        known = sorted(FORWARD_STATISTICS | GRADIENT_STATISTICS)
        raise InputError(
            f"expected statistics among {', '.join(known)}; found {', '.join(sorted(unknown))}."
        )
    return wanted & FORWARD_STATISTICS


class AllSeenError(Exception):
    """All inputs of a block's matrices have been seen: what it gives is not asked for.

    Attributes
    ----------
    last
        What entered the last matrix.
    """

    def __init__(self, last: Tensor) -> None:
        super().__init__("all inputs of the block have been seen")
        self.last = last


class BlockStatistics:
    """Collects statistics while a block runs over batches; a context manager, which sets hooks.

    Parameters
    ----------
    block, layout
        The block with its weights; experts are `SplitExperts`.
    wanted
        Names of statistics; see the module.
    valid
        Gives (B, T) bool of the batch under way: False where padded.
    weights
        Of "weighted_gram".
    stop
        End a run of the block by `AllSeenError` where nothing more is to be seen: the last
        matrix of a block, a fifth of its operations, need not run. Blocks with experts, and
        statistics of outputs, run to the end all the same.
    """

    def __init__(
        self,
        block: nn.Module,
        layout: BlockLayout,
        wanted: frozenset[str],
        valid: Callable[[], Tensor],
        weights: TokenWeights | None = None,
        *,
        stop: bool = False,
    ) -> None:
        self.block, self.layout, self.wanted = block, layout, check_wanted(wanted)
        self.weights = weights or TokenWeights()
        self._valid = valid
        self._inputs: dict[str, InputSums] = {}
        self._experts: ExpertSums | None = None
        self._tap: AttentionTap | None = None
        self._received: Tensor | None = None
        self._waiting: list[tuple[InputSums, Tensor, Tensor]] = []
        self._attention: list[Tensor] = []
        self._block_sums = torch.zeros(2, dtype=torch.float64)
        self._tokens = 0
        self._stops = stop and not self.wanted & (BLOCK_STATISTICS | EXPERT_STATISTICS)
        self._seen = 0
        self._hooks = ExitStack()

    def __enter__(self) -> BlockStatistics:
        with ExitStack() as stack:
            if self.wanted & {"weighted_gram", "attention"}:
                place = self.layout.attention
                module = self.block.get_submodule(place)
                self._tap = stack.enter_context(tap_module(place, module))
            if self.layout.experts is not None and self.wanted & EXPERT_STATISTICS:
                self._hook_experts(stack, self.layout.experts)
            if self.wanted & INPUT_STATISTICS:
                self._hook_matrices(stack)
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def after(self, hidden: Tensor, out: Tensor) -> None:
        """Tell that a batch has passed: what the block took and gave, (B, T, d).

        `out` is not looked at where the run was stopped.
        """
        valid = self._valid().to(hidden.device)
        if self.wanted & BLOCK_STATISTICS:
            cosine = cosine_rows(hidden[valid], out[valid])
            angle = cosine.clamp(-1, 1).acos() / torch.pi
            self._block_sums += torch.stack([angle.sum(), cosine.sum()]).cpu()
            self._tokens += len(cosine)
        ran = self._tap is not None and self._tap.query is not None
        if ran and "attention" in self.wanted:
            self._attention.append((self._received_by(valid) * valid).sum(0).cpu())
            self._attention.append(valid.sum(0).cpu())
        if ran:
            self._flush(valid)
        if self._tap is not None:
            self._tap.query = self._tap.key = self._tap.mask = None
        self._received = None
        self._seen = 0

    def result(self) -> dict[tuple[str, str], Tensor]:
        """All that was collected, on the CPU; the block may be thrown away."""
        made: dict[tuple[str, str], Tensor] = {}
        for module, inputs in self._inputs.items():
            made |= {(module, name): array for name, array in inputs.result().items()}
        if self._experts is not None:
            assert self.layout.experts is not None
            found = self._experts.sums
            made |= {(self.layout.experts, name): found[name].cpu() for name in found}
        if "attention" in self.wanted:
            sums = position_sums(self._attention[::2], torch.float64)
            rows = position_sums(self._attention[1::2], torch.int64)
            made[self.layout.attention, "attention"] = sums
            made[self.layout.attention, "attention_rows"] = rows
        if self.wanted & BLOCK_STATISTICS:
            made["", "count"] = torch.tensor(self._tokens)
            for place, name in enumerate(("angle", "cosine")):
                if name in self.wanted:
                    made["", name] = self._block_sums[place].clone()
        return made

    # -- inputs of matrices --------------------------------------------------------------------

    def _hook_matrices(self, stack: ExitStack) -> None:
        tokens = _routed_tokens(stack, self.block, self.layout)
        for matrix in self.layout.matrices(self.block):
            name = self.layout.input_of(matrix)
            # An expert that no token reaches would be waited for in vain.
            self._stops = self._stops and matrix.expert is None
            if name in self._inputs:
                continue
            module: Any = self.block.get_submodule(name)
            device = module.weight.device
            size = module.weight.shape[0 if self.layout.transposed else 1]
            self._inputs[name] = InputSums(size, self.wanted, device)
            hook = self._input_hook(self._inputs[name], name == self.layout.query, tokens, matrix)
            stack.callback(module.register_forward_pre_hook(hook).remove)

    def _input_hook(
        self, into: InputSums, first: bool, tokens: Callable[[int], Tensor], matrix: Any
    ) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            with torch.autocast(given[0].device.type, enabled=False):
                see(given)

        def see(given: tuple[Any, ...]) -> None:
            rows = given[0].detach().reshape(-1, given[0].shape[-1])
            valid = self._valid().to(rows.device)
            place = torch.arange(valid.numel(), device=rows.device)
            if matrix.expert is not None:
                place = tokens(matrix.expert)
            real = valid.flatten()[place]
            rows, place = rows[real], place[real]
            into.update(rows)
            if "weighted_gram" in self.wanted:
                self._waiting.append((into, rows, place))
                # What enters query, key and value is there before the attention that weighs it.
                if not first:
                    self._flush(valid)
            self._seen += 1
            if self._stops and self._seen == len(self._inputs):
                raise AllSeenError(given[0])

        return hook

    def _flush(self, valid: Tensor) -> None:
        if not self._waiting:
            return
        weight = self.weights(self._received_by(valid), valid).flatten()
        for into, rows, place in self._waiting:
            into.update_weighted(rows, weight[place])
        self._waiting.clear()

    def _received_by(self, valid: Tensor) -> Tensor:
        """(B, T) float64: attention that each token receives, over heads and real queries."""
        if self._received is None:
            assert self._tap is not None
            query, key = self._tap.taken()
            segment = torch.where(valid, 0, -1)
            causal = self.layout.head == "causal"
            if causal:
                self._tap.check_mask(segment)
            mass = attention_mass(
                query,
                key,
                scale=self._tap.scale,
                causal=causal,
                window=self._tap.window,
                softcap=self._tap.softcap,
                query_segment=segment,
                key_segment=segment,
            )
            assert mass.column is not None
            self._received = mass.column.double().sum(1)
        return self._received

    # -- experts -------------------------------------------------------------------------------

    def _hook_experts(self, stack: ExitStack, path: str) -> None:
        try:
            experts = self.block.get_submodule(path)
        except AttributeError:  # a dense block among blocks of experts
            return
        assert isinstance(experts, SplitExperts)
        norm = self.block.get_submodule(self.layout.mlp_norm)
        self._experts = made = ExpertSums(experts, self.wanted)
        hooks: list[Any] = [
            norm.register_forward_pre_hook(made.before),
            experts.register_forward_pre_hook(made.routed),
            experts.register_forward_hook(
                lambda module, given, out: made.done(out, self._valid().to(out.device))
            ),
        ]
        for number in range(experts.count):
            down = experts.get_submodule(f"{number}.down_proj")
            hooks.append(down.register_forward_hook(made.output(number)))
        for hook in hooks:
            stack.callback(hook.remove)


def merge_statistics(one: Statistics, other: Statistics) -> dict[tuple[str, str], Tensor]:
    """Statistics of two parts of the rows together.

    Sums are added; "mean" and "m2" are joined by Chan's formula with the "count" of their
    module; arrays by position are as long as the longer. Both parts are left as they are. The
    order of merging changes rounding alone.

    Raises InputError where the parts do not hold the same statistics, or of other sizes.
    """
    if set(one) != set(other):
        module, name = min(set(one) ^ set(other))
        raise InputError(
            f"expected the same statistics in every part; found {name!r} of module {module!r} in"
            " one alone. Make all parts with the same options."
        )
    return {key: _merged(key, one, other) for key in one}


def _merged(key: tuple[str, str], one: Statistics, other: Statistics) -> Tensor:
    module, name = key
    mine, theirs = one[key], other[key]
    if name in ("attention", "attention_rows"):
        made = mine.new_zeros(max(len(mine), len(theirs)))
        made[: len(mine)] += mine
        made[: len(theirs)] += theirs
        return made
    if mine.shape != theirs.shape:
        raise InputError(
            f"expected {name!r} of module {module!r} of one shape in every part; found"
            f" {tuple(mine.shape)} and {tuple(theirs.shape)}. Were they made of the same model?"
        )
    if name not in ("mean", "m2"):
        return mine + theirs
    lacking = {"count", "mean"} - {name for of, name in one if of == module}
    if lacking:
        raise InputError(
            f"expected {' and '.join(sorted(lacking))} beside {name!r} of module {module!r}, which"
            " cannot be merged without; found none."
        )
    counts = [int(part[module, "count"]) for part in (one, other)]
    means = [part[module, "mean"] for part in (one, other)]
    spread = [part[module, "m2"] if name == "m2" else part[key] for part in (one, other)]
    _, mean, m2 = joined(counts[0], means[0], spread[0], counts[1], means[1], spread[1])
    return mean if name == "mean" else m2


def _routed_tokens(
    stack: ExitStack, block: nn.Module, layout: BlockLayout
) -> Callable[[int], Tensor]:
    """What gives the positions (n,) of the tokens that an expert is run over."""
    held: list[Tensor] = []
    modules = dict(block.named_modules())
    if layout.experts is not None and layout.experts in modules:

        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            held[:] = [given[1]]

        stack.callback(modules[layout.experts].register_forward_pre_hook(hook).remove)

    def tokens(expert: int) -> Tensor:
        return torch.where(held[0] == expert)[0]

    return tokens
