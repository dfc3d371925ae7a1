"""Small classifiers, and a user's own network in the same dress.

A `Classifier` gives logits and the features that enter its last layer, `head`. The ones here
train in seconds to minutes on two processor cores; `resnet20` has the layout of the public
CIFAR-10 checkpoints, and "package.module:factory" names any torch network.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ModelError, RecipeError

NAMES = ("auto", "mlp", "cnn", "resnet20")
_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_SMALLEST_CNN = 16  # pixels of the shorter side
# Of the public checkpoints (ImageNet's, by channel); any other image gets one pair for all.
_RGB = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_GREY = (0.5, 0.25)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which network, and how large.

    Attributes
    ----------
    name
        "mlp", "cnn", "resnet20", "auto" (images of at least 16 x 16: cnn, else mlp), or
        "package.module:factory", called with (shape, classes) and returning an `nn.Module`.
    hidden
        mlp: units of each hidden layer. cnn: half of it are the channels of the last stage.
    depth
        mlp: hidden layers. Both mean nothing to the other networks.
    """

    name: str = "auto"
    hidden: int = 256
    depth: int = 2

    def __post_init__(self) -> None:
        if self.name not in NAMES and not _OWN.fullmatch(self.name):
            raise RecipeError(
                f"expected a model among {', '.join(NAMES)} or package.module:factory; found"
                f" {self.name!r}."
            )
        if self.hidden < 16 or self.depth < 1:
            raise RecipeError(
                "expected a model of at least 16 hidden units and 1 layer; found"
                f" hidden={self.hidden}, depth={self.depth}."
            )

    @property
    def own(self) -> bool:
        """Whether the name is that of a user's own factory."""
        return self.name not in NAMES


class Classifier(nn.Module):
    """A network whose logits are `head(features(x))`.

    x is (N, ...) float32, or (N, C, H, W) uint8 pixels, which are normalised inside.
    """

    head: nn.Linear

    def features(self, x: Tensor) -> Tensor:
        """What enters the last layer, (N, d)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (N, classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits

    def fit_input(self, x: Tensor) -> None:
        """Take the scale of the inputs from the rows that training starts with."""


class Mlp(Classifier):
    """Hidden layers with ReLU over the flattened input.

    Columns of float inputs are brought to mean 0 and deviation 1 of the training rows; the
    two are buffers, so they travel with the weights.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, inputs: int, classes: int, hidden: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(depth):
            layers += [nn.Linear(hidden if number else inputs, hidden), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(hidden, classes)
        self.register_buffer("shift", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))

    def features(self, x: Tensor) -> Tensor:
        """Output of the last hidden layer, (N, hidden)."""
        flat = _pixels(x, *_GREY).flatten(1)
        made: Tensor = self.body((flat - self.shift) * self.scale)
        return made

    def fit_input(self, x: Tensor) -> None:
        """Mean and deviation of each column; a constant column keeps its scale."""
        if not x.is_floating_point() or not len(x):
            return
        rows = x.flatten(1).double()
        spread = rows.std(dim=0, correction=0)
        self.shift.copy_(rows.mean(dim=0))
        self.scale.copy_(torch.where(spread > 1e-12, 1.0 / spread.clamp_min(1e-12), 1.0))


class Cnn(Classifier):
    """Three stages of convolution, halving, batch normalisation and ReLU; then the mean."""

    def __init__(self, channels: int, classes: int, hidden: int) -> None:
        super().__init__()
        widths = [channels, max(hidden // 8, 1), max(hidden // 4, 1), hidden // 2]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
            layers += [convolution, nn.MaxPool2d(2), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def features(self, x: Tensor) -> Tensor:
        """Mean over the places of the last stage, (N, hidden / 2)."""
        made: Tensor = self.body(_pixels(x, *_GREY)).mean(dim=(2, 3))
        return made


class _Block(nn.Module):
    """Two convolutions around which the input goes by; no parameters on the way by."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.pad = stride, (after - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        made = F.relu(self.bn1(self.conv1(x)))
        by = x[:, :, :: self.stride, :: self.stride]
        return F.relu(self.bn2(self.conv2(made)) + F.pad(by, (0, 0, 0, 0, self.pad, self.pad)))


class ResNet20(Classifier):
    """The 20-layer ResNet for CIFAR (He et al. 2015, arXiv:1512.03385, section 4.2).

    Option A of the paper where the size changes: every other pixel, channels filled up with
    zeros. Pixels are normalised as the public checkpoints expect.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(_Block(16, 16, 1), _Block(16, 16, 1), _Block(16, 16, 1))
        self.layer2 = nn.Sequential(_Block(16, 32, 2), _Block(32, 32, 1), _Block(32, 32, 1))
        self.layer3 = nn.Sequential(_Block(32, 64, 2), _Block(64, 64, 1), _Block(64, 64, 1))
        self.head = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def features(self, x: Tensor) -> Tensor:
        """Mean over the places of the last stage, (N, 64)."""
        rgb = self.conv1.in_channels == 3
        made = F.relu(self.bn1(self.conv1(_pixels(x, *(_RGB if rgb else _GREY)))))
        stages: Tensor = self.layer3(self.layer2(self.layer1(made)))
        return stages.mean(dim=(2, 3))

    def load_public(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a public checkpoint (`module.conv1.weight` … `linear.bias`).

        Raises ModelError where a name or a shape is another one.
        """
        named = {re.sub(r"^linear\.", "head.", re.sub(r"^module\.", "", k)): v for k, v in
                 state.items()}  # fmt: skip
        for name, tensor in self.state_dict().items():
            if name.endswith("num_batches_tracked"):  # older checkpoints lack it
                named.setdefault(name, tensor)
        try:
            self.load_state_dict(named)
        except RuntimeError as error:
            raise ModelError(
                f"expected the weights of a ResNet-20, found others: {error}"
            ) from error


class OwnNetwork(Classifier):
    """A user's network: features are what enters its last `nn.Linear`.

    Images reach it as float32 in [0, 1]. `head` is its attribute of that name, else the last
    `nn.Linear` of `modules()`; the network's output must be that layer's output.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network = network
        own = getattr(network, "head", None)
        linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
        if isinstance(own, nn.Linear):
            linear.append(own)
        if not linear:
            raise ModelError(
                f"model {name}: expected a network that ends in an nn.Linear, found none in"
                f" {type(network).__name__}. Features and gradients are taken there."
            )
        # Not registered a second time: its parameters belong to the network.
        self.__dict__["head"] = linear[-1]

    def features(self, x: Tensor) -> Tensor:
        """What enters the last nn.Linear, (N, d)."""
        caught: list[Tensor] = []

        def catch(module: nn.Module, given: tuple[Any, ...]) -> None:
            caught.append(given[0])

        hook = self.head.register_forward_pre_hook(catch)
        try:
            self.network(_pixels(x, 0.0, 1.0))
        finally:
            hook.remove()
        if not caught:
            raise ModelError(
                f"{type(self.network).__name__}: expected the last nn.Linear to be used in the"
                " forward pass, found that it was not. Name that layer `head`."
            )
        return caught[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (N, classes)."""
        logits: Tensor = self.network(_pixels(x, 0.0, 1.0))
        return logits


def make_model(spec: ModelSpec, shape: Sequence[int], classes: int, seed: int) -> Classifier:
    """A network for rows of `shape` (without N) and that many classes.

    The weights are a function of the seed; torch's own generator is left as it was.

    Raises
    ------
    RecipeError
        A cnn or resnet20 for what are no images, or a factory that cannot be imported.
    ModelError
        The factory's network has no last nn.Linear, or does not give (N, classes) logits there.
    """
    shape = tuple(int(size) for size in shape)
    if classes < 1 or not shape or min(shape) < 1:
        raise ModelError(
            f"expected at least one class and one input; found {classes} classes, shape {shape}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if spec.own:
            return _own(spec.name, shape, classes)
        return _named(spec, shape, classes)


def _named(spec: ModelSpec, shape: tuple[int, ...], classes: int) -> Classifier:
    image = len(shape) == 3
    name = spec.name
    if name == "auto":
        name = "cnn" if image and min(shape[1:]) >= _SMALLEST_CNN else "mlp"
    if name == "mlp":
        return Mlp(int(torch.Size(shape).numel()), classes, spec.hidden, spec.depth)
    if not image or min(shape[1:]) < 8:
        raise RecipeError(
            f"model {name}: expected images of at least 8 x 8, found rows of shape"
            f" {list(shape)}. Use `mlp`."
        )
    return Cnn(shape[0], classes, spec.hidden) if name == "cnn" else ResNet20(shape[0], classes)


def _own(name: str, shape: tuple[int, ...], classes: int) -> OwnNetwork:
    network = _factory(name)(shape, classes)
    if not isinstance(network, nn.Module):
        raise ModelError(f"model {name}: expected an nn.Module, found {type(network).__name__}.")
    model = OwnNetwork(network, name)
    model.eval()
    with torch.no_grad():
        probe = torch.rand(2, *shape)
        logits, features = model(probe), model.features(probe)
        fits = (
            isinstance(logits, Tensor)
            and logits.shape == (2, classes)
            and features.ndim == 2
            and torch.allclose(model.head(features), logits, atol=1e-5)
        )
    if not fits:
        raise ModelError(
            f"model {name}: expected logits of shape (N, {classes}) that are the output of the"
            f" last nn.Linear, found {_shape(logits)} that are not. Leave out what stands after"
            " that layer (a softmax is not needed), or name the layer `head`."
        )
    return model.train()


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def factory_file(name: str) -> Path | None:
    """Source file of a factory's module, to be digested; None where it has none.

    Raises RecipeError where the factory cannot be imported.
    """
    _factory(name)
    found = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return Path(found) if found else None


def _factory(name: str) -> Callable[[tuple[int, ...], int], nn.Module]:
    module, _, attribute = name.partition(":")
    try:
        made: Callable[[tuple[int, ...], int], nn.Module] = getattr(
            importlib.import_module(module), attribute
        )
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"model {name}: expected a factory of that name, found: {error}. Put its module on"
            " the PYTHONPATH."
        ) from error
    return made


def _pixels(x: Tensor, mean: float | Sequence[float], spread: float | Sequence[float]) -> Tensor:
    """uint8 pixels as float32, normalised by channel; anything else as it is."""
    if x.dtype != torch.uint8:
        return x
    shape = (1, -1, 1, 1)
    shift = torch.as_tensor(mean, dtype=torch.float32, device=x.device).reshape(shape)
    scale = torch.as_tensor(spread, dtype=torch.float32, device=x.device).reshape(shape)
    return (x.float() / 255.0 - shift) / scale


def describe(spec: ModelSpec, shape: Sequence[int], classes: int) -> str:
    """JSON that `load_classifier` makes the network from."""
    return json.dumps({**asdict(spec), "shape": list(shape), "classes": classes}, sort_keys=True)


def save_classifier(model: Classifier, path: Path) -> None:
    """Write the weights as safetensors."""
    save_model(model, str(path))


def load_classifier(description: str, weights: Path) -> Classifier:
    """The network of a description with the weights of a file, in evaluation mode.

    Raises ModelError where the weights are not those of that network.
    """
    given = json.loads(description)
    shape, classes = given.pop("shape"), given.pop("classes")
    model = make_model(ModelSpec(**given), shape, classes, seed=0)
    try:
        load_model(model, str(weights))
    except (RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{weights}: expected the weights of {given['name']}, found others: {error}"
        ) from error
    return model.eval()
