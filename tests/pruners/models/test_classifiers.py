"""Networks: the same by seed, logits from the head, the public layout, a user's own."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from prunery.errors import ModelError, RecipeError
from prunery.pruners.models.classifiers import (
    Cnn,
    Mlp,
    ModelSpec,
    ResNet20,
    _Block,
    describe,
    load_classifier,
    make_model,
    save_classifier,
)

OWN = """
from torch import nn

class Two(nn.Module):
    def __init__(self, shape, classes, order):
        super().__init__()
        self.body = nn.Linear(shape[0], 5)
        self.drop = nn.Dropout(0.5)
        if order == "head":
            self.head = nn.Linear(5, classes)
            self.unused = nn.Linear(3, 3)
        else:
            self.out = nn.Linear(5, classes, bias=order != "plain")
    def forward(self, x):
        last = self.head if hasattr(self, "head") else self.out
        return last(self.drop(self.body(x).relu()))

def good(shape, classes): return Two(shape, classes, "last")
def headed(shape, classes): return Two(shape, classes, "head")
def soft(shape, classes): return nn.Sequential(nn.Linear(shape[0], classes), nn.Softmax(dim=1))
def wide(shape, classes): return nn.Linear(shape[0], classes + 1)
def none(shape, classes): return nn.Flatten()
def text(shape, classes): return "a network"
pixels = lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(shape[1] * shape[2], classes))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Name of a module of factories on the path."""
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_networks"
    import sys

    sys.modules.pop("own_networks", None)


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet20"])
def test_the_seed_alone_decides_the_weights(name):
    before = torch.random.get_rng_state()
    a, b, c = (make_model(ModelSpec(name), (3, 16, 16), 4, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    first, same, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in (a, b, c))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((20,), Mlp), ((1, 8, 8), Mlp), ((3, 16, 15), Mlp), ((3, 16, 16), Cnn), ((1, 28, 28), Cnn)],
)
def test_auto_takes_a_cnn_for_images_of_sixteen_pixels(shape, kind):
    assert type(make_model(ModelSpec(), shape, 3, 0)) is kind


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet20"])
def test_logits_come_from_the_head_over_the_features(name):
    model = make_model(ModelSpec(name, hidden=32), (3, 16, 16), 5, 0).eval()
    x = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    features = model.features(x)
    assert features.shape == (6, model.head.in_features)
    assert torch.equal(
        model(x), features @ model.head.weight.T + model.head.bias
    ) or torch.allclose(model(x), features @ model.head.weight.T + model.head.bias, atol=1e-5)
    assert model(x).shape == (6, 5)
    assert model(x[:0]).shape == (0, 5)


def test_sizes_follow_the_spec():
    model = make_model(ModelSpec("mlp", hidden=32, depth=3), (7,), 4, 0)
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 2] == [
        (32, 7),
        (32, 32),
        (32, 32),
        (4, 32),
    ]
    assert make_model(ModelSpec("cnn", hidden=64), (1, 16, 16), 4, 0).head.in_features == 32


def test_pixels_are_normalised_inside():
    x = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    model = make_model(ModelSpec("mlp"), (1, 8, 8), 3, 0).eval()
    assert torch.allclose(model(x), model((x.float() / 255 - 0.5) / 0.25), atol=1e-5)
    deep = make_model(ModelSpec("resnet20"), (3, 8, 8), 3, 0).eval()
    rgb = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    spread = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    assert torch.allclose(deep(rgb), deep((rgb.float() / 255 - mean) / spread), atol=1e-4)


def test_an_mlp_brings_float_columns_to_one_scale():
    x = torch.tensor([[1.0, 1000.0, 7.0], [3.0, 3000.0, 7.0]])
    model = make_model(ModelSpec("mlp"), (3,), 2, 0)
    model.fit_input(x)
    scaled = (x - model.shift) * model.scale
    assert torch.allclose(scaled, torch.tensor([[-1.0, -1.0, 0.0], [1.0, 1.0, 0.0]]), atol=1e-5)
    assert torch.isfinite(model(x)).all()
    model.fit_input(x[:0])
    assert model.shift[1] == 2000
    pixels = make_model(ModelSpec("mlp"), (1, 8, 8), 2, 0)
    pixels.fit_input(torch.full((4, 1, 8, 8), 200, dtype=torch.uint8))
    assert (pixels.shift == 0).all()


def test_a_resnet_20_has_the_published_size_and_shortcuts():
    model = make_model(ModelSpec("resnet20"), (3, 32, 32), 10, 0)
    assert sum(p.numel() for p in model.parameters()) == 269_722
    block = _Block(2, 4, 2).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 4, 4)
    y = block(x)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert (y[:, [0, 3]] == 0).all()


def test_the_public_layout_is_loaded():
    source, other = (make_model(ModelSpec("resnet20"), (3, 32, 32), 10, s).eval() for s in (0, 1))
    state = {
        "module." + name.replace("head.", "linear."): value
        for name, value in source.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    x = torch.rand(2, 3, 32, 32)
    assert not torch.allclose(source(x), other(x))
    other.load_public(state)
    assert torch.equal(source(x), other(x))
    del state["module.layer3.2.bn2.weight"]
    with pytest.raises(ModelError, match="ResNet-20"):
        other.load_public(state)


def test_a_public_checkpoint_reads_cifar_as_measured(root):
    data = root.parent / "shared" / "data"
    weights = data / "ckpt_resnet_cifar10" / "resnet20-12fca82f.th"
    archive = data / "img_cifar10_jpeg" / "cifar10_test_jpeg.tar.gz"
    if not weights.is_file() or not archive.is_file():
        pytest.skip("shared/data has no CIFAR-10 images and checkpoints")
    model = make_model(ModelSpec("resnet20"), (3, 32, 32), 10, 0)
    model.load_public(torch.load(weights, weights_only=True, map_location="cpu")["state_dict"])
    pictures, names = [], []
    with tarfile.open(archive) as files:
        for number, member in enumerate(m for m in files if m.isfile()):
            if number % 10 == 0:
                image = Image.open(io.BytesIO(files.extractfile(member).read())).convert("RGB")
                pictures.append(np.array(image).transpose(2, 0, 1))
                names.append(member.name.split("/")[-2])
    label = np.unique(names, return_inverse=True)[1]
    with torch.no_grad():
        found = model.eval()(torch.from_numpy(np.stack(pictures))).argmax(dim=1).numpy()
    assert 0.76 < (found == label).mean() < 0.86  # 0.81 over all of them


def test_a_network_of_ones_own_gives_what_enters_its_last_layer(own):
    model = make_model(ModelSpec(f"{own}:good"), (4,), 3, 5).eval()
    same = make_model(ModelSpec(f"{own}:good"), (4,), 3, 5).eval()
    x = torch.rand(6, 4)
    assert torch.equal(model(x), same(x))
    assert torch.equal(model.features(x), model.network.body(x).relu())
    assert model.head is model.network.out
    assert torch.allclose(model.head(model.features(x)), model(x))
    assert sorted(model.state_dict()) == [
        "network.body.bias",
        "network.body.weight",
        "network.out.bias",
        "network.out.weight",
    ]
    assert make_model(ModelSpec(f"{own}:good"), (4,), 3, 5).training
    headed = make_model(ModelSpec(f"{own}:headed"), (4,), 3, 0)
    assert headed.head is headed.network.head


def test_a_network_of_ones_own_sees_pixels_from_zero_to_one(own):
    model = make_model(ModelSpec(f"{own}:pixels"), (1, 2, 2), 3, 0)
    x = torch.tensor([[[[0, 255], [51, 102]]]], dtype=torch.uint8)
    assert torch.allclose(model.features(x), torch.tensor([[0.0, 1.0, 0.2, 0.4]]))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("soft", "output of the last nn.Linear"),
        ("wide", r"logits of shape \(N, 3\)"),
        ("none", "ends in an nn.Linear"),
        ("text", "expected an nn.Module, found str"),
    ],
)
def test_a_network_that_cannot_be_read_is_refused(own, factory, message):
    with pytest.raises(ModelError, match=message):
        make_model(ModelSpec(f"{own}:{factory}"), (4,), 3, 0)


def test_what_is_no_network_is_refused(own):
    with pytest.raises(RecipeError, match="expected a model among"):
        ModelSpec("vgg")
    with pytest.raises(RecipeError, match="hidden=4"):
        ModelSpec("mlp", hidden=4)
    for name in (f"{own}:absent", "no_such_module:make"):
        with pytest.raises(RecipeError, match="PYTHONPATH"):
            make_model(ModelSpec(name), (4,), 3, 0)
    for name in ("cnn", "resnet20"):
        with pytest.raises(RecipeError, match="Use `mlp`"):
            make_model(ModelSpec(name), (20,), 3, 0)
    with pytest.raises(ModelError, match="at least one class"):
        make_model(ModelSpec("mlp"), (4,), 0, 0)


@pytest.mark.parametrize("name", ["mlp", "cnn", "OWN"])
def test_weights_come_back_from_a_file(name, own, tmp_path):
    spec = ModelSpec(f"{own}:pixels" if name == "OWN" else name, hidden=16, depth=1)
    model = make_model(spec, (1, 16, 16), 3, 7).eval()
    model.fit_input(torch.rand(5, 1, 16, 16))
    save_classifier(model, tmp_path / "w.safetensors")
    description = describe(spec, (1, 16, 16), 3)
    loaded = load_classifier(description, tmp_path / "w.safetensors")
    x = torch.rand(3, 1, 16, 16)
    assert not loaded.training
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(ModelError, match="expected the weights of"):
        load_classifier(describe(spec, (1, 16, 16), 4), tmp_path / "w.safetensors")


def test_a_resnet_is_a_classifier_of_grey_images_too():
    model = make_model(ModelSpec("resnet20"), (1, 28, 28), 3, 0)
    assert isinstance(model, ResNet20)
    assert model(torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)).shape == (2, 3)
