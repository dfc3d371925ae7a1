"""Recipes: a pipeline as a YAML file, read by strict models.

A recipe names its steps; every key beside `step` and `inputs` is an option of that step:

    name: rag
    seed: 0
    bad_rows: 0.01          # share of rows that a step may reject before the run stops
    steps:
      chunks:
        step: chunk
        path: docs/
      vectors:
        step: embed
        inputs: {chunks: chunks}

Nothing is guessed: an unknown key is refused with the known ones named, a repeated key and a
value of another type too. Relative paths in a recipe are relative to the recipe's own folder;
relative paths in an override are relative to the working directory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import RecipeError
from .engine import StepOptions, StepSpec
from .yaml_text import MOST_CHARACTERS, load_yaml

_TOP = ("name", "about", "seed", "bad_rows", "steps")
_RESERVED = ("step", "inputs")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a recipe: which step it is, what it reads, and its checked options."""

    name: str
    step: str
    inputs: Mapping[str, str]
    options: StepOptions


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe. `steps` is in an order in which each step follows its inputs.

    Attributes
    ----------
    seed
        Enters the key of every step.
    bad_rows
        Share (0..1) of a step's rows that may be rejected before the run stops.
    folder
        What relative paths in the recipe are relative to.
    raw
        The recipe as plain values, as read and overridden; what `apply_overrides` works on.
    """

    name: str
    about: str
    seed: int
    bad_rows: float
    steps: tuple[Step, ...]
    folder: Path
    raw: Mapping[str, Any] = field(repr=False)

    def step(self, name: str) -> Step:
        """The step of that name; RecipeError naming the known ones otherwise."""
        for step in self.steps:
            if step.name == name:
                return step
        raise RecipeError(_unknown("step", name, [s.name for s in self.steps]))


class _Lines:
    """Where each key of a YAML text stands, so that a message can point at it."""

    def __init__(self, origin: str, lines: Mapping[tuple[str, ...], int] | None = None) -> None:
        self.origin = origin
        self._lines = lines or {}

    def at(self, *path: str) -> str:
        """`file, line N` of the deepest key on this path that the text holds."""
        shown = f"`{'.'.join(path):.200}`"
        for depth in range(len(path), 0, -1):
            line = self._lines.get(path[:depth])
            if line is not None:
                return f"{self.origin}, line {line}, {shown}"
        return f"{self.origin}, {shown}" if path else self.origin


def bundled_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("prunery.pipelines.recipes")
    return sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_recipe(path_or_name: str | Path) -> Recipe:
    """Read and check a recipe file, or one that ships with the package, by its name.

    Raises
    ------
    RecipeError
        There is no such recipe, or it does not say what a recipe must; the message names
        file, line and key.
    """
    text = str(path_or_name)
    if text in bundled_recipes():
        path = Path(str(resources.files("prunery.pipelines.recipes").joinpath(f"{text}.yaml")))
    else:
        path = Path(text)
    if not path.is_file():
        raise RecipeError(
            f"no recipe `{text}`: it is neither a file nor one of the recipes that ship with"
            f" prunery ({', '.join(bundled_recipes())}). Give the path of a YAML file."
        )
    return parse_recipe(_read(path), origin=str(path), folder=path.parent)


def _read(path: Path) -> str:
    size = path.stat().st_size
    if size > 4 * MOST_CHARACTERS:  # bytes of a character in UTF-8
        raise RecipeError(
            f"{path} has {size} bytes; {4 * MOST_CHARACTERS} are allowed in a recipe. Is it one?"
        )
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise RecipeError(f"{path} is not text in UTF-8: {error}. Save it as such.") from error


def parse_recipe(text: str, *, origin: str = "<recipe>", folder: Path | None = None) -> Recipe:
    """Read and check a recipe from YAML text; see `load_recipe`."""
    lines: dict[tuple[str, ...], int] = {}
    raw = load_yaml(text, origin, look=lambda node: _walk(node, (), lines, origin))
    if not isinstance(raw, dict):
        raise RecipeError(f"{origin} must be a mapping with the keys {', '.join(_TOP)}.")
    return _check(raw, (folder or Path.cwd()).resolve(), _Lines(origin, lines))


def recipe_of(raw: Mapping[str, Any], folder: Path) -> Recipe:
    """Check a recipe given as plain values, such as `Recipe.raw`; see `load_recipe`."""
    return _check(_plain_copy(raw), folder.resolve(), _Lines("<recipe>"))


def apply_overrides(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """The recipe with `key=value` settings applied, such as `prune.threshold=0.2`.

    A key is `STEP.OPTION`, `STEP.inputs.ROLE`, or one of `seed`, `bad_rows`, `name`, `about`.
    Settings apply in the order given; another `method` of a step leaves the options of the one
    before it behind. Values are read as YAML. A relative path given here is relative to the
    working directory.

    Raises
    ------
    RecipeError
        A setting is not `key=value`, its key is unknown (the known ones are named), or its
        value is refused by the step.
    """
    raw = _plain_copy(recipe.raw)
    origin = "--set"
    for setting in overrides:
        key, sign, text = setting.partition("=")
        key = key.strip()
        if not sign or not key:
            raise RecipeError(
                f"`{setting}` must look like key=value, for example prune.threshold=0.2."
            )
        origin = f"--set {setting}"
        value = load_yaml(text, f"{origin}: the value")
        _set(raw, recipe, key.split("."), value, origin)
    return _check(raw, recipe.folder, _Lines(origin))


def _set(raw: dict[str, Any], recipe: Recipe, path: list[str], value: Any, origin: str) -> None:
    from .steps import STEPS

    head, rest = path[0], path[1:]
    if not rest:
        known = [name for name in _TOP if name != "steps"]
        if head not in known:
            steps = [f"{step.name}.OPTION" for step in recipe.steps]
            raise RecipeError(f"{origin}: " + _unknown("key", head, known + steps))
        raw[head] = value
        return
    names = [step.name for step in recipe.steps]
    if head not in names:
        raise RecipeError(f"{origin}: " + _unknown("step", head, names))
    target = raw["steps"][head]
    if rest[0] == "inputs" and len(rest) == 2:
        target.setdefault("inputs", {})[rest[1]] = value
        return
    if len(rest) != 1 or rest[0] in _RESERVED:
        raise RecipeError(
            f"{origin}: expected STEP.OPTION or STEP.inputs.ROLE; found `{'.'.join(path)}`."
        )
    spec = STEPS[recipe.step(head).step]
    known = spec.options.known_keys({**target, rest[0]: value})
    if rest[0] not in known:
        raise RecipeError(f"{origin}: " + _unknown(f"option of `{head}`", rest[0], known))
    based = spec.options.rebase({rest[0]: value}, Path.cwd())[rest[0]]
    raw["steps"][head] = spec.options.override(target, rest[0], based)


def _check(raw: dict[str, Any], folder: Path, lines: _Lines) -> Recipe:
    from .steps import STEPS

    for key in raw:
        if key not in _TOP:
            raise RecipeError(f"{lines.at(str(key))}: " + _unknown("key", str(key), _TOP))
    name = _typed(raw, "name", str, lines)
    about = _typed(raw, "about", str, lines, default="")
    seed = _typed(raw, "seed", int, lines, default=0)
    bad_rows = _typed(raw, "bad_rows", (int, float), lines, default=0.0)
    if not 0.0 <= bad_rows < 1.0:
        raise RecipeError(f"{lines.at('bad_rows')} must lie in [0, 1); found {bad_rows}.")
    if not 0 <= seed < 2**63:
        raise RecipeError(f"{lines.at('seed')} must lie in [0, 2**63); found {seed}.")
    steps = raw.get("steps")
    if not isinstance(steps, dict) or not steps:
        raise RecipeError(
            f"{lines.at('steps')} must map step names to steps; found {steps!r:.200}."
        )
    made = [_check_step(str(key), value, folder, lines, STEPS) for key, value in steps.items()]
    order = _in_order(made, lines, STEPS)
    return Recipe(name, about, seed, float(bad_rows), order, folder, raw)


def _check_step(
    name: str, value: Any, folder: Path, lines: _Lines, steps: Mapping[str, StepSpec]
) -> Step:
    if not name.replace("_", "").replace("-", "").isalnum():
        raise RecipeError(
            f"{lines.at('steps', name)}: a step's name may hold letters, digits, _ and - only."
        )
    if not isinstance(value, dict) or "step" not in value:
        raise RecipeError(
            f"{lines.at('steps', name)} must be a mapping with a `step` key (one of"
            f" {', '.join(sorted(steps))}); found {value!r:.200}."
        )
    kind = value["step"]
    if not isinstance(kind, str) or kind not in steps:
        where = lines.at("steps", name, "step")
        raise RecipeError(f"{where}: " + _unknown("step", str(kind), sorted(steps)))
    spec = steps[kind]
    inputs = value.get("inputs", {})
    if not isinstance(inputs, dict) or not all(isinstance(v, str) for v in inputs.values()):
        raise RecipeError(
            f"{lines.at('steps', name, 'inputs')} must map roles to step names;"
            f" found {inputs!r:.200}."
        )
    for role in inputs:
        if role not in spec.inputs:
            where = lines.at("steps", name, "inputs", str(role))
            raise RecipeError(f"{where}: " + _unknown("input", str(role), list(spec.inputs)))
    for role, slot in spec.inputs.items():
        if role not in inputs and not slot.optional:
            raise RecipeError(
                f"{lines.at('steps', name)}: step `{kind}` needs the input `{role}`"
                f" (a {' or '.join(slot.steps)} step). Add `inputs: {{{role}: STEP_NAME}}`."
            )
    given = {key: item for key, item in value.items() if key not in _RESERVED}
    return Step(name, kind, dict(inputs), _options(name, spec, given, folder, lines))


def _options(
    name: str, spec: StepSpec, given: dict[str, Any], folder: Path, lines: _Lines
) -> StepOptions:
    known = spec.options.known_keys(given)
    for key in given:
        if key not in known:
            where = lines.at("steps", name, str(key))
            raise RecipeError(f"{where}: " + _unknown(f"option of `{spec.name}`", str(key), known))
    try:
        return spec.options.model_validate(spec.options.rebase(given, folder))
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        found = "" if first["type"] == "missing" else f" Found {first['input']!r:.200}."
        raise RecipeError(
            f"{lines.at('steps', name, *path)}: {first['msg'].removeprefix('Value error, ')}."
            f"{found} Options of `{spec.name}`: {', '.join(known) or 'none'}."
        ) from error


def _in_order(made: list[Step], lines: _Lines, specs: Mapping[str, StepSpec]) -> tuple[Step, ...]:
    by_name = {step.name: step for step in made}
    for step in made:
        for role, source in step.inputs.items():
            where = lines.at("steps", step.name, "inputs", role)
            if source not in by_name:
                raise RecipeError(f"{where}: " + _unknown("step", source, list(by_name)))
            accepted = specs[step.step].inputs[role].steps
            if by_name[source].step not in accepted:
                raise RecipeError(
                    f"{where}: expected the name of a {' or '.join(accepted)} step; `{source}`"
                    f" is a {by_name[source].step} step."
                )
    done: list[Step] = []
    left = list(made)
    while left:
        ready = next((s for s in left if all(by_name[i] in done for i in s.inputs.values())), None)
        if ready is None:
            names = ", ".join(step.name for step in left)
            raise RecipeError(f"{lines.at('steps')}: the inputs of {names} form a circle.")
        left.remove(ready)
        done.append(ready)
    return tuple(done)


def _typed(
    raw: Mapping[str, Any],
    key: str,
    kind: type | tuple[type, ...],
    lines: _Lines,
    default: Any = None,
) -> Any:
    value = raw.get(key, default)
    if value is None or isinstance(value, bool) or not isinstance(value, kind):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise RecipeError(f"{lines.at(key)} must be {wanted}; found {value!r:.200}.")
    return value


def _walk(
    node: yaml.Node, path: tuple[str, ...], lines: dict[tuple[str, ...], int], origin: str
) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = str(key_node.value)
        line = key_node.start_mark.line + 1
        if (*path, key) in lines:
            first = lines[(*path, key)]
            raise RecipeError(
                f"{origin}, line {line}: key `{'.'.join((*path, key))}` was given already on"
                f" line {first}. Remove one of them."
            )
        lines[(*path, key)] = line
        _walk(value_node, (*path, key), lines, origin)


def _unknown(what: str, found: str, known: Iterable[str]) -> str:
    names, found = list(known), f"{found:.100}"
    near = get_close_matches(found, names, n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    return f"unknown {what} `{found}`; known: {', '.join(names) or 'none'}.{hint}"


def _plain_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain_copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_copy(item) for item in value]
    return value
