"""Recipes are strict: whatever is not understood is refused, with the place and the known names."""

from pathlib import Path

import pytest

from prunery.errors import RecipeError
from prunery.pipelines.recipe import (
    apply_overrides,
    bundled_recipes,
    load_recipe,
    parse_recipe,
    recipe_of,
)

GOOD = """
name: small
seed: 3
bad_rows: 0.1
steps:
  vectors:
    step: embed
    inputs: {chunks: chunks}
  chunks:
    step: chunk
    path: docs
    max_tokens: 64
  keep:
    step: prune_passages
    inputs: {vectors: vectors}
    method: near_duplicate
    distance: 0.1
"""


def test_good_recipe_is_ordered_by_its_inputs(tmp_path):
    recipe = parse_recipe(GOOD, folder=tmp_path)
    assert [step.name for step in recipe.steps] == ["chunks", "vectors", "keep"]
    assert (recipe.seed, recipe.bad_rows) == (3, 0.1)
    assert recipe.step("chunks").options.path == str(tmp_path / "docs")
    assert recipe.step("keep").options.options == {"distance": 0.1}
    assert recipe_of(recipe.raw, tmp_path) == recipe


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seed: 3", "sead: 3", r"line 3, `sead`: unknown key `sead`; known: name.*mean `seed`"),
        ("seed: 3", "seed: yes", "`seed` must be int; found True"),
        ("seed: 3", "seed: -1", "`seed` must lie in"),
        ("bad_rows: 0.1", "bad_rows: 1.0", r"line 4.*must lie in \[0, 1\); found 1.0"),
        ("name: small", "about: x", "`name` must be str; found None"),
        ("step: embed", "step: embde", r"line 7.*unknown step `embde`.*Did you mean `embed`"),
        ("max_tokens: 64", "max_token: 64", r"line 12.*unknown option of `chunk` `max_token`"),
        ("max_tokens: 64", "max_tokens: many", r"line 12.*valid integer.*'many'"),
        ("max_tokens: 64", "max_tokens: 64.0", r"line 12.*valid integer"),
        ("max_tokens: 64", "max_tokens: 2", r"line 12.*greater than or equal to 8"),
        ("    path: docs\n", "", r"line 9.*`steps.chunks.path`: Field required"),
        ("chunks: chunks", "chunk: chunks", "unknown input `chunk`; known: chunks"),
        (
            "    inputs: {chunks: chunks}\n",
            "",
            r"needs the input `chunks` \(a chunk or read_chats or read_dataset step\)",
        ),
        ("chunks: chunks", "chunks: chunk", "unknown step `chunk`; known: vectors, chunks, keep"),
        (
            "chunks: chunks",
            "chunks: keep",
            "expected the name of a chunk or read_chats or read_dataset step; `keep` is a",
        ),
        ("vectors: vectors", "vectors: keep", "expected the name of a embed step"),
        ("method: near_duplicate", "method: cosine", "unknown method `cosine`; known here: random"),
        ("method: near_duplicate", "method: nope", "unknown method `nope`; known here"),
        ("distance: 0.1", "distanse: 0.1", "unknown option of `prune_passages` `distanse`"),
        ("distance: 0.1", "distance: 1.5", r"must lie in \[0, 1\]; found 1.5"),
        ("distance: 0.1", "distance: far", "option `distance` of method `near_duplicate`"),
        ("seed: 3", "seed: 3\nseed: 4", r"line 4: key `seed` was given already on line 3"),
        ("seed: 3", "seed: [", "is not valid YAML"),
        ("  keep:", "  ke/ep:", "may hold letters, digits, _ and - only"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(old, new, words, tmp_path):
    assert old in GOOD
    with pytest.raises(RecipeError, match=words):
        parse_recipe(GOOD.replace(old, new), origin="r.yaml", folder=tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "name: x\nsteps: {}", "name: x\nsteps:\n  a: 3"])
def test_shapes_that_are_no_recipe(text):
    with pytest.raises(RecipeError):
        parse_recipe(text)


def test_inputs_that_form_a_circle_are_refused():
    text = """
name: circle
steps:
  a: {step: index, inputs: {vectors: b, decision: c}}
  b: {step: embed, inputs: {chunks: d}}
  c: {step: prune_passages, inputs: {vectors: b}}
  d: {step: chunk, path: x}
"""
    assert [s.name for s in parse_recipe(text).steps] == ["d", "b", "c", "a"]
    circle = """
name: circle
steps:
  q: {step: questions, path: x}
  s: {step: context_signals, inputs: {retrieved: r, questions: q, chunks: c}}
  r: {step: retrieve, inputs: {questions: q, index: i}}
  i: {step: index, inputs: {vectors: v}}
  v: {step: embed, inputs: {chunks: c}}
  c: {step: chunk, path: x}
"""
    assert [s.name for s in parse_recipe(circle).steps] == ["q", "c", "v", "i", "r", "s"]


def test_overrides_change_options_and_top_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe(GOOD, folder=Path("/elsewhere"))
    changed = apply_overrides(
        recipe, ["keep.distance=0.3", "seed=9", "chunks.path=mine", "chunks.max_tokens=99"]
    )
    assert changed.seed == 9
    assert changed.step("keep").options.options == {"distance": 0.3}
    assert changed.step("chunks").options.path == str(tmp_path / "mine")
    assert changed.step("chunks").options.max_tokens == 99
    assert recipe.step("chunks").options.max_tokens == 64
    assert recipe.step("chunks").options.path == "/elsewhere/docs"


def test_an_override_may_choose_another_method():
    recipe = parse_recipe(GOOD.replace("    distance: 0.1\n", ""))
    changed = apply_overrides(recipe, ["keep.method=random", "keep.keep=0.25"])
    assert changed.step("keep").options.pruner().keep == 0.25


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("keep", "must look like key=value"),
        ("=3", "must look like key=value"),
        ("sede=3", r"unknown key `sede`; known: name, about, seed, bad_rows, chunks.OPTION"),
        ("keeep.distance=1", "unknown step `keeep`.*Did you mean `keep`"),
        ("keep.distanc=1", "unknown option of `keep` `distanc`; known: method, distance"),
        ("keep.step=chunk", "expected STEP.OPTION"),
        ("chunks.max_tokens=many", "valid integer"),
        ("chunks.max_tokens=[", "not valid YAML"),
        ("vectors.inputs.chunks=keep", "the name of a chunk or read_chats or read_dataset step"),
    ],
)
def test_overrides_that_do_not_fit(setting, words):
    with pytest.raises(RecipeError, match=words):
        apply_overrides(parse_recipe(GOOD), [setting])


def test_bundled_recipes_load_and_unknown_names_are_refused(tmp_path):
    assert "rag" in bundled_recipes()
    recipe = load_recipe("rag")
    assert recipe.steps[-1].step == "report"
    assert Path(recipe.step("questions").options.path).is_file()
    with pytest.raises(RecipeError, match="no recipe `rga`.*rag"):
        load_recipe("rga")
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD)
    assert load_recipe(file).name == "small"


def test_another_method_leaves_the_options_of_the_first_behind():
    sft = load_recipe("sft")
    other = apply_overrides(sft, ["prune.method=random_tokens", "prune.by_domain=true"])
    assert other.step("prune").options.options == {}
    assert other.step("prune").options.by_domain
    assert other.step("prune").inputs == sft.step("prune").inputs
    settings = ["prune.method=random_tokens", "prune.tokens=0.25"]
    assert apply_overrides(sft, settings).step("prune").options.options == {"tokens": 0.25}
    same = apply_overrides(sft, ["prune.method=qtuning", "prune.samples=0.25"])
    assert same.step("prune").options.options["normalise"] == "rank"
