"""A loaded model that leaves small activations out: thresholds, where they act, and their file.

Thresholds lie beside a model as `activation_thresholds.safetensors`: one tensor for each place,
named `layer/module/kind`, a number or one a neuron. While a model decodes (few rows at a time),
`kernels.gated_mlp` reads the weights of live neurons alone; otherwise activations are masked and
nothing is faster, only the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...errors import ModelError
from ...kernels.gated_mlp import MOST_ROWS, sparse_gated_mlp
from .block_layouts import BlockLayout, Matrix, layout_of

FILE = "activation_thresholds.safetensors"
Kind = Literal["input", "alone", "gate"]
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class Site(NamedTuple):
    """A place in a block.

    Attributes
    ----------
    module
        Path in a block, as statistics of inputs are kept (`BlockLayout.input_of`): the query
        stands for key and value too, the gate for up.
    kind
        "input": the numbers that the module (and those it stands for) takes. "alone": the same
        numbers for this module, and not for those it stands for. "gate": of a gated MLP,
        act(gate), whose dead neurons leave up and down unread.
    """

    module: str
    kind: Kind


Thresholds = Mapping[tuple[int, Site], Tensor]
"""(layer, place) -> threshold, () or (n,) float32, at least 0."""
Counter = Callable[[Site, Tensor], None]
"""Called with a place and which of its numbers live, (..., n) bool."""


def sites(block: nn.Module, layout: BlockLayout) -> list[Site]:
    """The places of kind "input" of a block, in the order of the forward pass."""
    return list(dict.fromkeys(Site(layout.input_of(m), "input") for m in layout.matrices(block)))


def readers(block: nn.Module, layout: BlockLayout, module: str) -> list[Matrix]:
    """The matrices that take the numbers of a place."""
    return [one for one in layout.matrices(block) if layout.input_of(one) == module]


def refuse_unfit(layout: BlockLayout, kind: str, gated: bool) -> None:
    """ModelError for a model that has no place to put thresholds at."""
    if layout.experts is not None:
        raise ModelError(
            f"activation thresholds: expected a model whose every token passes the same MLP; found"
            f" {kind!r}, a mixture of experts. Prune its experts instead."
        )
    if gated and layout.gate is None:
        raise ModelError(
            f"activation thresholds: expected a gated MLP; found {kind!r}, which has none. Use"
            " teal or ppl_p, which look at what any matrix takes."
        )


def masked(values: Tensor, threshold: Tensor) -> Tensor:
    """Values (..., n) with those at or under the threshold in size at 0; a NaN stays."""
    return values.masked_fill(values.abs().float() <= threshold, 0.0)


@dataclass
class SparseActivation:
    """Thresholds in force in a model or a block; `remove` or the end of a `with` takes them off."""

    _undo: list[Callable[[], None]] = field(default_factory=list)

    def remove(self) -> None:
        """Make the model dense again."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def apply_thresholds(
    model: nn.Module, thresholds: Thresholds, *, kernel: bool = True
) -> SparseActivation:
    """Put thresholds into a causal language model of transformers.

    Parameters
    ----------
    model
        With its head, loaded (not streamed), of an architecture in LAYOUTS.
    kernel
        Leave dead neurons' weights unread for at most 4 rows of a gated MLP without biases,
        where no gradient is asked for. The down projection's weight is then kept the other way
        round in memory (the same shape and numbers); `remove` turns it back.

    Raises
    ------
    ModelError
        A layer, module or number of neurons that the model does not have, a threshold below 0,
        or an architecture that thresholds cannot be put into.
    """
    config: Any = model.config
    layout = layout_of(config)
    refuse_unfit(layout, config.model_type, any(site.kind == "gate" for _, site in thresholds))
    blocks = list(cast("Iterable[nn.Module]", model.get_submodule(layout.blocks)))
    by_layer: dict[int, dict[Site, Tensor]] = {}
    for (layer, site), value in thresholds.items():
        if not 0 <= layer < len(blocks):
            raise ModelError(
                f"expected thresholds for layers 0 to {len(blocks) - 1}; found layer {layer}."
                " They belong to another model."
            )
        by_layer.setdefault(layer, {})[site] = value
    activation = _ACTIVATIONS.get(str(getattr(config, "hidden_act", ""))) if kernel else None
    whole = SparseActivation()
    try:
        for layer, mine in by_layer.items():
            part = apply_to_block(blocks[layer], layout, mine, layer=layer, activation=activation)
            whole._undo.append(part.remove)
    except ModelError:
        whole.remove()
        raise
    return whole


def apply_to_block(
    block: nn.Module,
    layout: BlockLayout,
    thresholds: Mapping[Site, Tensor],
    *,
    layer: int,
    activation: str | None = None,
    count: Counter | None = None,
) -> SparseActivation:
    """Put thresholds into one block.

    `activation` is the kernel's name of the MLP's activation; None masks and nothing more.
    `count` is told which numbers live; what the kernel decides is not seen by it.
    """
    made = SparseActivation()
    device = next(block.parameters()).device
    placed = {
        site: _checked(block, layout, site, value, layer).to(device, torch.float32)
        for site, value in thresholds.items()
    }
    inside: dict[Site, Tensor] = {}
    if layout.gate is not None:
        mlp = {Site(layout.gate, "input"), Site(layout.gate, "gate"), Site(layout.down, "input")}
        inside = {site: value for site, value in placed.items() if site in mlp}
    if inside:
        _Gated(block, layout, inside, activation, count).install(made)
    for site, value in placed.items():
        if site not in inside:
            names = [matrix.name for matrix in readers(block, layout, site.module)]
            for number, name in enumerate(names if site.kind == "input" else [site.module]):
                told = count if number == 0 else None  # they take the same numbers
                _mask_input(block.get_submodule(name), site, value, told, made)
    return made


def _checked(
    block: nn.Module, layout: BlockLayout, site: Site, value: Tensor, layer: int
) -> Tensor:
    found = readers(block, layout, site.module)
    if not found or site.kind not in get_args(Kind):
        raise ModelError(
            f"layer {layer}: expected a matrix {site.module!r} to put a threshold at"
            f" ({site.kind}), found none. The thresholds belong to another model."
        )
    weight: Any = block.get_submodule(found[0].name).weight
    wide = weight.shape[0] if layout.transposed or site.kind == "gate" else weight.shape[1]
    if value.shape not in ((), (wide,)):
        raise ModelError(
            f"layer {layer}, {site.module} ({site.kind}): expected one threshold or {wide}; found"
            f" {tuple(value.shape)}. The thresholds belong to another model."
        )
    if bool((~(value >= 0)).any()):
        raise ModelError(
            f"layer {layer}, {site.module} ({site.kind}): expected thresholds of at least 0;"
            " found a negative one or a NaN. Make them again."
        )
    return value


def _mask_input(
    module: nn.Module, site: Site, threshold: Tensor, count: Counter | None, made: SparseActivation
) -> None:
    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if count is not None:
            count(site, ~(args[0].abs().float() <= threshold))
        return (masked(args[0], threshold), *args[1:])

    made._undo.append(module.register_forward_pre_hook(before).remove)


class _Gated:
    """The forward pass of a gated MLP with thresholds."""

    def __init__(
        self,
        block: nn.Module,
        layout: BlockLayout,
        thresholds: Mapping[Site, Tensor],
        activation: str | None,
        count: Counter | None,
    ) -> None:
        assert layout.gate is not None
        self.mlp: Any = block.get_submodule(layout.mlp)
        self.gate: Any = block.get_submodule(layout.gate)
        self.up: Any = block.get_submodule(layout.up)
        self.down: Any = block.get_submodule(layout.down)
        self.at_input = Site(layout.gate, "input")
        self.at_gate = Site(layout.gate, "gate")
        self.at_down = Site(layout.down, "input")
        self.thresholds = thresholds
        self.activation = activation
        self.count = count
        self.down_t: Tensor | None = None

    def install(self, made: SparseActivation) -> None:
        sparse = {self.at_gate, self.at_down} & set(self.thresholds)
        plain = all(one.bias is None for one in (self.gate, self.up, self.down))
        if self.activation is not None and plain and len(sparse) == 1 and self.count is None:
            # A neuron's weights of the down projection have to lie together; as a view of that,
            # the weight keeps its shape and costs no second copy.
            self.down_t = self.down.weight.data.T.contiguous()
            self.down.weight.data = self.down_t.T
            made._undo.append(self._turn_back)
        self.mlp.forward = self.forward
        made._undo.append(lambda: self.mlp.__dict__.pop("forward", None))

    def _turn_back(self) -> None:
        self.down.weight.data = self.down.weight.data.contiguous()
        self.down_t = None

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self._masked(self.at_input, hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.down_t is not None and len(flat) <= MOST_ROWS and not torch.is_grad_enabled():
            return self._by_kernel(flat, self.down_t).reshape(*hidden.shape[:-1], -1)
        acted = self._masked(self.at_gate, self.mlp.act_fn(self.gate(hidden)))
        inner = self._masked(self.at_down, acted * self.up(hidden))
        made: Tensor = self.down(inner)
        return made

    def _by_kernel(self, flat: Tensor, down_t: Tensor) -> Tensor:
        by_gate = self.at_gate in self.thresholds
        value = self.thresholds[self.at_gate if by_gate else self.at_down]
        return sparse_gated_mlp(
            flat,
            self.gate.weight,
            self.up.weight,
            down_t,
            value if value.dim() else value.expand(len(down_t)),
            activation=str(self.activation),
            rule="gate" if by_gate else "product",
        )

    def _masked(self, site: Site, values: Tensor) -> Tensor:
        if site not in self.thresholds:
            return values
        threshold = self.thresholds[site]
        if self.count is not None:
            self.count(site, ~(values.abs().float() <= threshold))
        return masked(values, threshold)


def save_thresholds(folder: str | Path, thresholds: Thresholds) -> Path:
    """Write thresholds beside a model; returns the file."""
    path = Path(folder, FILE)
    named = {
        f"{layer}/{site.module}/{site.kind}": value.to(torch.float32).contiguous().cpu()
        for (layer, site), value in thresholds.items()
    }
    save_file(named, path, metadata={"format": "pt"})
    return path


def load_thresholds(place: str | Path) -> dict[tuple[int, Site], Tensor]:
    """The thresholds of a file, or of the one in a model's folder.

    Raises ModelError where there is no such file, or it holds something else.
    """
    path = Path(place)
    path = path / FILE if path.is_dir() else path
    try:
        read = load_file(path)
        found = {}
        for name, value in read.items():
            layer, module, kind = name.split("/")
            if kind not in get_args(Kind):
                raise ValueError(f"{name}: no kind of place is called {kind}")
            found[int(layer), Site(module, cast("Kind", kind))] = value
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(
            f"{path}: expected activation thresholds (tensors layer/module/kind); found"
            f" {type(error).__name__}: {error}. Make them with the step activation_thresholds."
        ) from error
    return found
