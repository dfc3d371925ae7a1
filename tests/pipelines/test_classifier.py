"""Reading examples, and training to exactly the same numbers."""

import math

import numpy as np
import pytest
import torch

from prunery.errors import InputError, ModelError, RecipeError, StoreError
from prunery.pipelines import classifier
from prunery.pipelines.classifier import (
    ModelSpec,
    Trainer,
    fit,
    load_examples,
    make_model,
    predict,
)
from prunery.pipelines.dataset_tables import DATASET
from prunery.storage import Store, schemas

from .classifier_rows import (
    examples,
    pictures,
    png,
    points,
    rows_of,
    write,
    write_data,
    write_points,
)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def small(seed=0, classes=3):
    return make_model(ModelSpec("mlp", hidden=16, depth=1), (4,), classes, seed)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.state_dict().values()])


# -- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_decoded_in_the_tables_order(store, channels):
    pixels, label = pictures(7, channels=channels)
    contents = [png(picture) for picture in pixels]
    rows = rows_of("image", 7, train=5, contents=contents, label=label)
    write_data(store, rows, kind="image", shape=[channels, 8, 8], shards=3)
    found = load_examples(store.table("data"))
    wanted = pixels[:, None] if channels == 1 else pixels.transpose(0, 3, 1, 2)
    assert found.x.dtype == torch.uint8
    np.testing.assert_array_equal(found.x.numpy(), wanted)
    assert found.ids.tolist() == [row["id"] for row in rows]
    assert found.label.tolist() == label.tolist()
    assert found.split.tolist() == ["train"] * 5 + ["test"] * 2
    assert (found.classes, found.kind, found.shape, len(found)) == (3, "image", (channels, 8, 8), 7)
    second = load_examples(store.table("data"), shard=1)
    assert second.ids.tolist() == found.ids[3:6].tolist()
    np.testing.assert_array_equal(second.x.numpy(), wanted[3:6])


def test_images_take_the_shape_of_the_notes(store):
    grey, label = pictures(2, size=6)
    colour, _ = pictures(2, size=8, channels=3)
    rows = rows_of("image", 2, train=2, contents=[png(grey[0]), png(colour[1])], label=label)
    write_data(store, rows, kind="image", shape=[3, 8, 8])
    found = load_examples(store.table("data")).x
    assert found.shape == (2, 3, 8, 8)
    assert torch.equal(found[0, 0], found[0, 1])
    np.testing.assert_array_equal(found[1].numpy(), colour[1].transpose(2, 0, 1))


def test_features_are_a_matrix(store):
    key, rows = write_points(store, 10, train=6, shards=2)
    found = load_examples(store.table(key))
    assert found.x.dtype == torch.float32
    np.testing.assert_array_equal(found.x.numpy(), np.float32([row["features"] for row in rows]))
    assert found.take([3, 1]).ids.tolist() == [rows[3]["id"], rows[1]["id"]]
    assert torch.equal(found.take([3, 1]).x, found.x[[3, 1]])
    assert found.of_split("test").ids.tolist() == [row["id"] for row in rows[6:]]
    assert found.take(found.label == 1).label.tolist() == [1, 1, 1]
    assert len(found.take([])) == 0


def test_text_needs_embeddings_of_this_data(store):
    label = [0, 1, 0, 1]
    rows = rows_of("text", 4, train=4, contents=["a", "b", "c", "d"], label=label)
    key = write_data(store, rows, kind="text", shards=2, classes=("x", "y"))
    table = store.table(key)
    with pytest.raises(RecipeError, match="Add an `embed` step"):
        load_examples(table)
    vectors = np.eye(4, dtype=np.float32)
    schema = schemas.pa.schema(
        [schemas.id_field(), schemas.pa.field("embedding", schemas.vector(4), nullable=False)]
    )
    made = [{"id": r["id"], "embedding": v} for r, v in zip(rows, vectors, strict=True)]
    embed = store.table(write(store, schema, [made[::-1]], step="embed", inputs=[key]))
    np.testing.assert_array_equal(load_examples(table, embed).x.numpy(), vectors)
    np.testing.assert_array_equal(load_examples(table, embed, shard=1).x.numpy(), vectors[2:])
    foreign = store.table(write(store, schema, [made], step="embed", name="foreign"))
    with pytest.raises(RecipeError, match="made from others"):
        load_examples(table, foreign)
    short = store.table(write(store, schema, [made[:3]], step="embed", name="s", inputs=[key]))
    with pytest.raises(InputError, match=str(rows[3]["id"])):
        load_examples(table, short)
    made[2]["embedding"] = np.float32([0, math.nan, 0, 0])
    bad = store.table(write(store, schema, [made], step="embed", name="b", inputs=[key]))
    with pytest.raises(InputError, match="1 of them not finite"):
        load_examples(table, bad)


def test_rows_that_cannot_be_used_are_named(store):
    x, label = points(4)
    rows = rows_of("features", 4, train=4, contents=x.tolist(), label=label)
    rows[2]["features"] = rows[2]["features"][:3]
    with pytest.raises(InputError, match=r"rows#3: expected 4 features .* found 3"):
        load_examples(store.table(write_data(store, rows, kind="features")))
    rows = rows_of("features", 4, train=4, contents=x.tolist(), label=label)
    rows[3]["features"][1] = math.inf
    for shards in (1, 2):
        with pytest.raises(InputError, match="rows#4: expected finite features, found inf in col"):
            load_examples(store.table(write_data(store, rows, kind="features", shards=shards)))
    rows = rows_of("features", 4, train=4, contents=[[]] * 4, label=label)
    with pytest.raises(InputError, match="rows#1: expected some features"):
        load_examples(store.table(write_data(store, rows, kind="features")))
    pixels, label = pictures(2)
    rows = rows_of("image", 2, train=2, contents=[png(pixels[0]), b"\x89PNG torn"], label=label)
    with pytest.raises(InputError, match="rows#2: expected a PNG or JPEG"):
        load_examples(store.table(write_data(store, rows, kind="image", shape=[1, 8, 8])))
    whole = png(pixels[1])
    rows[1]["image"] = whole[: len(whole) // 2]
    with pytest.raises(InputError, match="rows#2: expected a PNG or JPEG"):
        load_examples(store.table(write_data(store, rows, kind="image", shape=[1, 8, 8])))
    rows = rows_of("features", 4, train=4, contents=x.tolist(), label=[0, 1, 3, 0])
    with pytest.raises(InputError, match=f"row {rows[2]['id']}: expected a label from 0 to 2"):
        load_examples(store.table(write_data(store, rows, kind="features")))


def test_a_table_that_does_not_say_what_it_holds_is_refused(store):
    for notes in ({}, {"kind": "sound", "classes": []}, {"kind": "image", "classes": ["a"]}):
        key = write(store, DATASET, [[]], name=f"n{len(notes)}", notes=notes)
        with pytest.raises(StoreError, match="read_dataset"):
            load_examples(store.table(key))


def test_no_rows_at_all(store):
    key = write_data(store, [], kind="features", classes=("a",))
    assert len(load_examples(store.table(key))) == 0


# -- training ----------------------------------------------------------------------------------


def test_training_learns_and_is_the_same_again():
    data, held = examples(90), examples(60, seed=9)
    models = [small(), small()]
    state = torch.random.get_rng_state()
    losses = []
    for model in models:
        fit(
            model,
            data,
            steps=60,
            batch_size=16,
            learning_rate=0.05,
            seed=3,
            on_step=lambda step, loss: losses.append((step, loss)),
        )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert losses[:60] == losses[60:]
    assert [step for step, _ in losses[:60]] == list(range(1, 61))
    assert losses[0][1] > 0.9 and losses[59][1] < 0.1
    logits, features = predict(models[0], held.x)
    assert (logits.argmax(axis=1) == held.label).mean() > 0.95
    assert logits.dtype == features.dtype == np.float32
    assert logits.shape == (60, 3) and features.shape == (60, 16)
    other = small()
    fit(other, data, steps=60, batch_size=16, learning_rate=0.05, seed=4)
    assert not torch.equal(weights(models[0]), weights(other))


@pytest.mark.parametrize(
    ("n", "batch", "sizes"), [(5, 64, [5]), (130, 64, [44, 43, 43]), (1, 1, [1])]
)
def test_every_pass_takes_every_row_once_in_even_batches(n, batch, sizes):
    data = examples(n)
    trainer = Trainer(small(), data, steps=9, batch_size=batch, learning_rate=0.01, seed=0)
    assert trainer.steps_a_pass == len(sizes)
    passes = [
        [trainer._batch(number * len(sizes) + step) for step in range(len(sizes))]
        for number in range(3)
    ]
    for batches in passes:
        assert [len(rows) for rows in batches] == sizes
        assert sorted(np.concatenate(batches)) == list(range(n))
    if n > 1:
        assert np.concatenate(passes[0]).tolist() != np.concatenate(passes[1]).tolist()
    taken = []
    fit(
        small(),
        data,
        steps=7,
        batch_size=batch,
        learning_rate=0.01,
        seed=0,
        on_step=lambda step, _: taken.append(step),
    )
    assert taken == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("stop", [1, 7, 16])
def test_a_run_that_was_taken_up_ends_as_one_that_was_not_stopped(stop):
    data = examples(30)
    options = {"steps": 17, "batch_size": 8, "learning_rate": 0.1, "seed": 2}
    whole = small()
    fit(whole, data, **options)
    first = Trainer(small(), data, **options)
    first.run(stop)
    state = {name: value.clone() for name, value in first.state().items()}
    first.run(17)
    second = Trainer(small(seed=8), data, **options)
    second.load(state)
    assert second.done == stop
    second.run(99)
    assert second.done == 17
    assert torch.equal(weights(first.model), weights(whole))
    assert torch.equal(weights(second.model), weights(whole))
    with pytest.raises(ModelError, match="state of this network"):
        Trainer(small(classes=5), examples(30, classes=5), **options).load(state)


def test_a_network_with_dropout_is_the_same_again(tmp_path, monkeypatch):
    (tmp_path / "own_dropout.py").write_text(
        "from torch import nn\n"
        "def make(shape, classes):\n"
        "    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = examples(12)
    options = {"steps": 6, "batch_size": 4, "learning_rate": 0.1, "seed": 2}

    def new():
        return Trainer(make_model(ModelSpec("own_dropout:make"), (4,), 3, 0), data, **options)

    whole, first, second = new(), new(), new()
    whole.run(6)
    first.run(3)
    torch.rand(5)
    second.load(first.state())
    second.run(6)
    assert torch.equal(weights(second.model), weights(whole.model))


def test_weights_multiply_a_rows_loss():
    data = examples(40)
    some = np.zeros(40, np.float32)
    some[:20] = 2.0
    taught, alone = small(), small()
    options = {"learning_rate": 0.05, "seed": 0}
    wrong = data.label.copy()
    wrong[20:] = (wrong[20:] + 1) % 3
    noisy = classifier.Examples(
        data.ids, data.x, wrong, data.clean_label, data.split, 3, "features"
    )
    fit(taught, noisy, steps=40, batch_size=40, weight=some, **options)
    right = predict(taught, data.x)[0].argmax(axis=1) == data.label
    assert right.mean() > 0.95
    fit(alone, noisy, steps=40, batch_size=40, **options)
    losses = []
    fit(
        small(),
        noisy,
        steps=1,
        batch_size=40,
        weight=np.zeros(40),
        on_step=lambda _, loss: losses.append(loss),
        **options,
    )
    assert losses == [0.0]


def test_a_teacher_at_alpha_1_replaces_the_labels():
    data = examples(60)
    logits = np.full((60, 3), -5.0)
    logits[np.arange(60), (data.label + 1) % 3] = 0.0  # teaches the next class
    teacher = torch.tensor(logits).log_softmax(dim=1).numpy()
    model = small()
    options = {"steps": 80, "batch_size": 16, "learning_rate": 0.05, "seed": 0}
    fit(model, data, teacher=teacher, alpha=1.0, temperature=2.0, **options)
    found = predict(model, data.x)[0].argmax(axis=1)
    assert (found == (data.label + 1) % 3).mean() > 0.95
    plain, unheeded = small(), small()
    fit(plain, data, **options)
    fit(unheeded, data, teacher=teacher, alpha=0.0, **options)
    assert torch.equal(weights(plain), weights(unheeded))


@pytest.mark.parametrize("name", ["cnn", "resnet20"])
def test_images_are_learned_by_a_convolutional_network(name):
    pixels, label = pictures(60, size=16)
    data = classifier.Examples(
        np.arange(60),
        torch.from_numpy(pixels[:, None]),
        label,
        np.full(60, -1),
        np.full(60, "train"),
        3,
        "image",
    )
    model = make_model(ModelSpec(name, hidden=32), (1, 16, 16), 3, 0)
    fit(model, data, steps=20, batch_size=20, learning_rate=0.05, seed=0)
    assert (predict(model, data.x)[0].argmax(axis=1) == label).mean() > 0.9


def test_predict_leaves_the_model_as_it_was_and_takes_any_batch():
    model = small()
    x = examples(23).x
    model.train()
    whole = predict(model, x)
    assert model.training
    model.eval()
    predict(model, x)
    assert not model.training
    for found, wanted in zip(predict(model, x, batch_size=5), whole, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert [array.shape for array in predict(model, x[:0])] == [(0, 3), (0, 16)]
    with torch.no_grad():
        model.head.bias[1] = math.nan
    with pytest.raises(ModelError, match="row 0"):
        predict(model, x)


def test_predict_reads_a_row_alone_as_among_others():
    model = make_model(ModelSpec("cnn", hidden=16), (1, 16, 16), 3, 0)
    x = torch.from_numpy(pictures(6, size=16)[0][:, None])
    model.train()
    model(x)  # moves the running numbers of batch normalisation
    before = weights(model)
    whole, alone = predict(model, x)[0], predict(model, x[2:3])[0]
    np.testing.assert_allclose(whole[2:3], alone, atol=1e-5)
    assert torch.equal(weights(model), before)


def test_columns_of_any_scale_are_learned():
    data = examples(90)
    data.x.mul_(torch.tensor([1e-4, 1e5, 1.0, 1.0])).add_(torch.tensor([0.0, 1e6, 0.0, -50.0]))
    model = small()
    fit(model, data, steps=60, batch_size=16, learning_rate=0.05, seed=3)
    assert (predict(model, data.x)[0].argmax(axis=1) == data.label).mean() > 0.95


def test_one_class_alone_trains_to_no_loss():
    data = classifier.Examples(
        np.arange(5), torch.rand(5, 4), np.zeros(5, np.int64), np.full(5, -1),
        np.full(5, "train"), 1, "features",
    )  # fmt: skip
    losses = []
    fit(
        small(classes=1),
        data,
        steps=3,
        batch_size=2,
        learning_rate=0.1,
        seed=0,
        on_step=lambda _, loss: losses.append(loss),
    )
    assert losses == [0.0, 0.0, 0.0]


def test_a_class_without_rows_is_never_predicted():
    data = examples(60, classes=5)
    model = small(classes=5)
    fit(model, data, steps=60, batch_size=16, learning_rate=0.05, seed=0)
    assert set(predict(model, data.x)[0].argmax(axis=1)) == {0, 1, 2}


def test_the_learning_rate_rises_and_falls():
    rates = [classifier._rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert classifier._rate(0, 1) > 0


def test_what_cannot_be_trained_is_refused():
    data = examples(6)
    options = {"steps": 2, "batch_size": 4, "learning_rate": 0.1, "seed": 0}
    with pytest.raises(InputError, match="found none"):
        fit(small(), data.take([]), **options)
    for name in ("steps", "batch_size", "learning_rate"):
        with pytest.raises(InputError, match=f"{name}=0"):
            fit(small(), data, **{**options, name: 0})
    with pytest.raises(InputError, match="row 1002: expected a label from 0 to 1, found 2"):
        fit(small(classes=2), examples(6, classes=2), **options)
    with pytest.raises(InputError, match=r"`teacher` must be finite and of shape \(6, 3\)"):
        fit(small(), data, teacher=np.zeros((5, 3)), alpha=0.5, **options)
    with pytest.raises(InputError, match="values not finite"):
        fit(small(), data, teacher=np.full((6, 3), -math.inf), alpha=0.5, **options)
    with pytest.raises(InputError, match="`weight`"):
        fit(small(), data, weight=np.ones((6, 1)), **options)
    with pytest.raises(InputError, match="needs a teacher"):
        fit(small(), data, alpha=0.5, **options)
    with pytest.raises(InputError, match="`alpha`"):
        fit(small(), data, alpha=2.0, **options)


def test_a_loss_that_is_no_number_stops_with_its_epoch():
    data = examples(12)
    with pytest.raises(
        ModelError, match=r"at step \d+ \(epoch \d+, from 0\). Lower `learning_rate`"
    ):
        fit(small(), data, steps=400, batch_size=4, learning_rate=1e12, seed=0)
    data.x[5, 1] = math.nan
    with pytest.raises(ModelError, match="expected a finite loss, found nan"):
        fit(small(), data, steps=4, batch_size=4, learning_rate=0.1, seed=0)


def test_one_step_is_never_long():
    """Inputs of a large scale give long gradients; the weights move a little all the same."""
    rows = examples(64)
    rows.x.mul_(1e4)
    model = small()
    model.fit_input = lambda x: None  # leave the scale as it is
    before = weights(model)
    fit(model, rows, steps=1, batch_size=64, learning_rate=0.05, seed=0)
    # Nesterov's first step is 1.9 times the gradient, of length 1; weight decay adds a trifle.
    moved = float((weights(model) - before).norm())
    assert 0.05 < moved < 0.05 * 1.9 + 0.05 * 2e-3 * float(before.norm())
