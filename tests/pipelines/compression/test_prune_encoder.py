"""GAPrune on an embedding model: gradients, alignment, and a folder that loads again."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from prunery.errors import InputError, ModelError, RecipeError
from prunery.pipelines.compression import embedding_gradients as gradients
from prunery.pipelines.compression.encoder_folders import (
    encoder_folder,
    load_encoder,
    write_pruned,
)
from prunery.pipelines.engine import StepContext
from prunery.pipelines.sft_tables import CHATS
from prunery.pipelines.steps import STEPS
from prunery.pruners.weight.gaprune import GaPrune
from prunery.storage import Store

from ...tiny_models import tiny_encoder
from ..sft_rows import write

WORDS = [
    "tomato",
    "kiwi",
    "plum",
    "olive",
    "fig",
    "pear",
    "grows",
    "in",
    "the",
    "sea",
    "red",
    "green",
    "sweet",
    "small",
    "stone",
]


def texts(count, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(4, 9))) for _ in range(count)]


def pairs(count, seed=0):
    return list(zip(texts(count, seed), texts(count, seed + 100), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


def test_matrices_of_the_mlp_and_of_attention(folder):
    _, network = load_encoder(folder, None)
    mlp = gradients.encoder_matrices(network)
    assert list(mlp) == [
        f"encoder.layer.{layer}.{name}"
        for layer in range(2)
        for name in ("intermediate.dense", "output.dense")
    ]
    assert list(mlp.values()) == [0, 0, 1, 1]
    both = gradients.encoder_matrices(network, "both")
    attention = gradients.encoder_matrices(network, "attention")
    assert len(attention) == 8 and set(both) == set(mlp) | set(attention)


def test_gradients_against_finite_differences_and_a_plain_loss(folder):
    model, network = load_encoder(folder, None)
    path, given = "encoder.layer.1.output.dense", pairs(7)
    found = gradients.pair_gradients(model, network, [path], given, batch_pairs=3)

    def loss_of(batch):
        vectors = [
            model.encode([p[side] for p in batch], convert_to_numpy=True).astype(np.float64)
            for side in (0, 1)
        ]
        first, second = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors)
        scores = 20 * first @ second.T
        own = [math.log(np.exp(row).sum()) - row[i] for i, row in enumerate(scores)]
        return float(np.mean(own))

    batches = [given[:3], given[3:6]]  # the seventh pair has nothing to be told apart from
    assert found.loss == pytest.approx(np.mean([loss_of(b) for b in batches]), abs=1e-4)
    weight = network.get_submodule(path).weight.data
    for at in [(0, 0), (5, 17), (31, 60)]:
        slopes = []
        for batch in batches:
            ends = []
            for step in (0.05, -0.05):
                weight[at] += step
                ends.append(loss_of(batch))
                weight[at] -= step
            slopes.append((ends[0] - ends[1]) / 0.1)
        assert float(found.mean[path][at]) == pytest.approx(np.mean(slopes), rel=0.03, abs=2e-5)
        assert float(found.fisher[path][at]) == pytest.approx(
            np.mean(np.square(slopes)), rel=0.06, abs=2e-6
        )
    assert not any(p.requires_grad for p in model.parameters())


def test_too_few_pairs(folder):
    model, network = load_encoder(folder, None)
    paths = list(gradients.encoder_matrices(network))
    with pytest.raises(InputError, match="at least 2 pairs"):
        gradients.pair_gradients(model, network, paths, pairs(1), batch_pairs=4)


@pytest.mark.parametrize("by", ["product", "cosine"])
def test_alignment_against_a_loop(by):
    rng = np.random.default_rng(0)
    domain, general = rng.normal(size=(5, 4)), rng.normal(size=(5, 4))
    first, second = domain / np.linalg.norm(domain), general / np.linalg.norm(general)
    expected = np.zeros((5, 4))
    for i in range(5):
        for j in range(4):
            near = [
                (a, b)
                for a in range(i - 1, i + 2)
                for b in range(j - 1, j + 2)
                if 0 <= a < 5 and 0 <= b < 4
            ]
            together = sum(first[p] * second[p] for p in near)
            if by == "product":
                expected[i, j] = together / 9
            else:
                lengths = [sum(x[p] ** 2 for p in near) for x in (first, second)]
                expected[i, j] = together / math.sqrt(lengths[0] * lengths[1])
    found = gradients.alignment(torch.tensor(domain), torch.tensor(general), by=by)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_alignment_of_a_gradient_with_itself_and_with_nothing():
    some = torch.randn(6, 6)
    assert torch.allclose(gradients.alignment(some, some, by="cosine"), torch.ones(6, 6))
    assert torch.allclose(gradients.alignment(some, -some, by="cosine"), -torch.ones(6, 6))
    for by in ("product", "cosine"):
        assert (gradients.alignment(some, torch.zeros(6, 6), by=by) == 0).all()


def test_balanced_terms_are_as_large_as_each_other():
    weights = {"a": torch.randn(8, 8), "b": torch.randn(4, 8)}
    fisher = {name: torch.rand_like(w) * 1e-9 for name, w in weights.items()}
    made = gradients.balanced(fisher, weights)
    gain = sum((made[n] * w.abs()).sum() for n, w in weights.items())
    assert float(gain) == pytest.approx(
        float(sum(w.abs().sqrt().sum() for w in weights.values())), rel=1e-5
    )
    nothing = gradients.balanced({n: 0 * f for n, f in fisher.items()}, weights)
    assert all((f == 0).all() for f in nothing.values())


def test_the_budget_is_one_over_all_matrices():
    scores = {"a": np.array([[1.0, 5.0], [2.0, 2.0]], np.float32), "b": np.full((1, 3), 2, "f4")}
    masks = gradients.keep_over_all(scores, 3 / 7)
    assert masks["a"].tolist() == [[False, True], [True, True]]  # ties to the earlier place
    assert masks["b"].tolist() == [[False, False, False]]
    for keep, count in ((0.0, 0), (0.5, 4), (1.0, 7)):
        made = gradients.keep_over_all(scores, keep)
        assert sum(int(m.sum()) for m in made.values()) == count
    with pytest.raises(InputError, match="b: expected finite"):
        gradients.keep_over_all({**scores, "b": np.array([[np.nan]], "f4")}, 0.5)


def test_random_scores_do_not_depend_on_the_weights():
    first = gradients.random_scores({"a": torch.zeros(3, 4), "b": torch.zeros(2, 2)}, 1)
    again = gradients.random_scores({"a": torch.ones(3, 4), "b": torch.ones(2, 2)}, 1)
    other = gradients.random_scores({"a": torch.ones(3, 4), "b": torch.ones(2, 2)}, 2)
    assert all(np.array_equal(first[n], again[n]) for n in first)
    assert not np.array_equal(first["a"], other["a"])
    assert len(np.unique(np.concatenate([v.ravel() for v in first.values()]))) == 16


def test_retrieval_by_hand():
    questions = np.eye(3, dtype=np.float32)
    passages = questions[[0, 2, 1]]
    # question 0 finds its own at once; the others find each other's first, and their own
    # (cosine 0) ties with another's (cosine 0): third
    found = gradients.retrieval_quality((questions, passages), (questions, -passages))
    assert found.mrr == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    assert found.recall == 1.0
    assert found.cosine == pytest.approx(0.0)
    same = np.ones((20, 1), np.float32)
    assert gradients.retrieval_quality((same, same), (same, same)).recall == 0.0


def test_scores_are_the_methods_own(folder):
    model, network = load_encoder(folder, None)
    paths = list(gradients.encoder_matrices(network))
    domain, general = (
        gradients.pair_gradients(model, network, paths, pairs(6, seed), batch_pairs=3)
        for seed in (0, 1)
    )
    weights = {path: network.get_submodule(path).weight.detach() for path in paths}
    made = gradients.gaprune_scores(GaPrune(regularisation=0.5), weights, domain, general)
    for path in paths:
        w = weights[path].double().abs().numpy()
        gain = (domain.fisher[path] - general.fisher[path]).double().numpy() * w
        a = gradients.alignment(domain.mean[path], general.mean[path]).double().numpy()
        expected = gain * np.clip(1 + 0.2 * a, 0.8, 1.2) + 0.5 * np.sqrt(w + 1e-8)
        np.testing.assert_allclose(made[path], expected, rtol=1e-5)


def test_a_pruned_folder_keeps_everything_else(folder, tmp_path):
    _, network = load_encoder(folder, None)
    paths = list(gradients.encoder_matrices(network))
    rng = np.random.default_rng(0)
    masks = {p: rng.random(network.get_submodule(p).weight.shape) < 0.5 for p in paths}
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    write_pruned(folder, tmp_path, masks, network.base_model_prefix)
    assert not list(tmp_path.rglob("*.py")) and not list(tmp_path.rglob("*.bin"))
    before = load_file(next(folder.rglob("model.safetensors")))
    after = load_file(next(tmp_path.rglob("model.safetensors")))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        mask = masks.get(name.removesuffix(".weight"))
        expected = tensor if mask is None else tensor * torch.from_numpy(mask)
        assert torch.equal(after[name], expected) and after[name].dtype == tensor.dtype
    loaded = SentenceTransformer(str(tmp_path), device="cpu", local_files_only=True)
    assert loaded.encode(["a kiwi"]).shape == (1, 32)
    (folder / "evil.py").unlink()
    (folder / "pytorch_model.bin").unlink()


def test_a_mask_of_another_model_is_refused(folder, tmp_path):
    with pytest.raises(ModelError, match="elsewhere.weight"):
        write_pruned(folder, tmp_path, {"elsewhere": np.ones((2, 2), np.bool_)}, "bert")


def chat(number, question, answer):
    def said(role, content):
        return {"role": role, "content": content, "tool_calls": "", "train": True}

    return {
        "id": number,
        "source": f"f#{number}",
        "domain": "",
        "format": "messages",
        "messages": [said("user", question), said("assistant", answer)],
        "tools": "",
        "raw": json.dumps({}),
    }


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))
    made = Store(tmp_path / "store")
    for name, seed in (("domain", 0), ("general", 5)):
        rows = [chat(n, *pair) for n, pair in enumerate(pairs(40, seed))]
        write(made, name, "read_chats", CHATS, [rows])
    return made


def run(store, folder, **options):
    spec = STEPS["prune_encoder"]
    inputs = {"domain": "domain", "general": "general"}
    made = spec.options(encoder=str(folder), batch_pairs=8, **options)
    return spec(made, inputs, StepContext(store, "pruned", threads=1))


@pytest.mark.parametrize("fisher", ["published", "balanced"])
def test_the_step_gives_a_model_that_loads_and_says_what_it_lost(store, folder, fisher):
    align = "product" if fisher == "published" else "cosine"
    manifest = run(store, folder, keep=0.3, fisher=fisher, alignment=align)
    table = store.table("pruned")
    rows = table.to_table().to_pylist()
    matrices = [row for row in rows if row["kind"] == "matrix"]
    total = sum(row["total"] for row in matrices)
    assert total == 4 * 32 * 64
    assert sum(row["kept"] for row in matrices) == math.ceil(0.3 * total)
    quality = {(row["method"], row["set"]): row for row in rows if row["kind"] == "quality"}
    assert set(quality) == {
        (method, role)
        for method in ("dense", "gaprune", "magnitude", "random")
        for role in ("domain", "general")
    }
    for (method, _), row in quality.items():
        assert row["kept"] == (total if method == "dense" else math.ceil(0.3 * total))
        assert (row["cosine"] == pytest.approx(1.0)) == (method == "dense")
        assert 0 < row["mrr"] <= 1 and 2 <= row["total"] <= 20
    made = encoder_folder(table)
    assert encoder_folder(table) == made
    loaded = SentenceTransformer(str(made), device="cpu", local_files_only=True)
    dense = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    zeros = 0
    for row in matrices:
        weight = loaded[0].auto_model.get_submodule(row["module"]).weight
        source = dense[0].auto_model.get_submodule(row["module"]).weight
        assert torch.equal(weight[weight != 0], source[weight != 0])
        assert int((weight != 0).sum()) == row["kept"]
        zeros += int((weight == 0).sum())
    assert zeros == total - math.ceil(0.3 * total)
    assert run(store, folder, keep=0.3, fisher=fisher, alignment=align) == manifest


def test_all_kept_is_the_dense_model(store, folder):
    run(store, folder, keep=1.0)
    made = load_file(next(encoder_folder(store.table("pruned")).rglob("model.safetensors")))
    before = load_file(next(folder.rglob("model.safetensors")))
    assert all(torch.equal(made[name], before[name]) for name in before)


def test_too_few_rows_name_the_table(store, folder):
    write(store, "domain", "read_chats", CHATS, [[chat(1, "a", "b")]])
    with pytest.raises(InputError, match="`domain`"):
        run(store, folder)


def test_images_are_refused(store, folder):
    class Source:
        manifest = type("M", (), {"step": "read_dataset", "notes": {"kind": "image"}, "name": "x"})

    spec = STEPS["prune_encoder"]
    with pytest.raises(RecipeError, match="kind image"):
        spec.plan(spec.options(encoder=str(folder)), {"domain": Source, "general": Source}, None)


def test_a_folder_that_is_no_encoder(store, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    save_file({"a": torch.zeros(1)}, bad / "model.safetensors")
    with pytest.raises(ModelError, match="sentence-transformers"):
        run(store, bad)
