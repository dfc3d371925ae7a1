"""Recipes of strangers: refused in bounded time and memory, always as a RecipeError."""

import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunery.errors import RecipeError
from prunery.pipelines.recipe import apply_overrides, load_recipe, parse_recipe

GOOD = """
name: good
steps:
  chunks: {step: chunk, path: docs, max_tokens: 40}
"""


def laughs(levels, width=9):
    """Each line lists the line before `width` times over."""
    lines = ['a0: &a0 ["lol"]']
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines)


def merges(levels, width=9):
    """The same through merge keys."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * width)}], y{i}: 1}}"
        for i in range(1, levels)
    ]
    return "\n".join(lines)


def chain(length):
    """Not large but deep: each list holds the one before."""
    return "\n".join(["- &a0 [x]", *(f"- &a{i} [*a{i - 1}]" for i in range(1, length))])


HOSTILE = {
    "laughs": laughs(40),
    "laughs just past the bound": laughs(8),
    "merges": merges(30),
    "a chain of aliases": chain(5000),
    "a long text many times": "a: &a " + "x" * 100_000 + "\nb: [" + "*a, " * 1000 + "]",
    "itself": "steps: &a {b: *a}",
    "itself in a list": "name: &a [*a]",
    "deep lists": "[" * 100_000,
    "deep and closed": "a: " + "[" * 100_000 + "]" * 100_000,
    "deep mappings": "{a: " * 50_000,
    "deep blocks": "\n".join(" " * i + "a:" for i in range(1000)),
    "an object": "name: !!python/object/apply:os.system ['true']",
    "a name": "name: !!python/name:os.system",
    "a module": "name: !!python/module:os",
    "a new tag": "name: !thing {a: 1}",
    "an unknown alias": "name: *nowhere",
    "a day that is none": "name: 2026-99-99",
    "many digits": "seed: " + "9" * 10_000,
    "not a number": "name: a\nbad_rows: .nan\nsteps: {}",
    "no base 64": "name: !!binary x",
    "a step that is a list": "name: a\nsteps: {b: {step: [1]}}",
    "a step that is a mapping": "name: a\nsteps: {b: {step: {c: d}}}",
    "a list as a key": "? [a, b]\n: 1",
    "an empty number": "seed: !!int ''",
    "no bool": "seed: !!bool x",
    "a long key": "? " + "k" * 500_000 + "\n: 1",
    "a long value": "name: a\nsteps: [" + "1, " * 100_000 + "]",
    "controls": "name: a\x00b",
    "half a surrogate": "name: \ud800",
    "two documents": "name: a\n---\nname: b",
    "nothing": "",
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_recipes_are_refused_quickly_and_shortly(kind):
    began = time.perf_counter()
    with pytest.raises(RecipeError) as caught:
        parse_recipe(HOSTILE[kind])
    assert time.perf_counter() - began < 10
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("value", ["&a [*a]", "[" * 5000, "{a: " * 5000, "2026-99-99", "\x00"])
def test_a_hostile_override_is_refused(value):
    with pytest.raises(RecipeError):
        apply_overrides(parse_recipe(GOOD), [f"chunks.max_tokens={value}"])


def test_a_bomb_takes_no_memory():
    tracemalloc.start()
    try:
        with pytest.raises(RecipeError):
            parse_recipe(laughs(40))
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_a_recipe_of_a_hundred_megabytes_is_not_read(tmp_path):
    path = tmp_path / "large.yaml"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    began = time.perf_counter()
    with pytest.raises(RecipeError, match="100000000 bytes; 4194304 are allowed"):
        load_recipe(path)
    assert time.perf_counter() - began < 1
    with pytest.raises(RecipeError, match="2000000 characters; 1048576 are allowed"):
        parse_recipe("#" * 2_000_000)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\x80name: a")
    with pytest.raises(RecipeError, match="not text in UTF-8"):
        load_recipe(path)


def test_anchors_of_a_sensible_size_work():
    made = parse_recipe(
        """
name: anchored
steps:
  one: &base {step: chunk, path: docs, max_tokens: 40}
  two: {<<: *base, max_tokens: 50}
  three: *base
"""
    )
    assert [step.options.max_tokens for step in made.steps] == [40, 50, 40]


PIECES = st.sampled_from(
    ["name", ": ", "steps", "\n", "  ", "- ", "[", "]", "{", "}", ", ", "&a ", "*a", "<<", "? ",
     "!!int ", "!!set ", "!!omap ", "!!binary ", "| ", "> ", "'", '"', "#", "%YAML 9.9\n", "---",
     "...", "1:2", "0x", "0b", ".inf", "~", "chunk", "step", "path", "\t", "\x85", "2026-02-30"]
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.lists(PIECES, max_size=25).map("".join), st.text(max_size=60)))
def test_any_text_is_a_recipe_or_a_recipe_error(text):
    try:
        parse_recipe(text)
        apply_overrides(parse_recipe(GOOD), [f"chunks.max_tokens={text}"])
    except RecipeError:
        pass
