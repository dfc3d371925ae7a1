"""Which options of a deployed recipe a request may set: numbers and names, never places.

A request must not make a worker open a path, a URL or a model of its choice. So a value is a
number, true, false, null, a list of such, or a text from a fixed list: a method of the catalogue,
or one of the choices that an option allows by its type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import InputError

_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}(\.[A-Za-z0-9_]{1,100})?")
_TOP = ("seed", "bad_rows")
_MOST = 100


def overrides_of(settings: Mapping[str, Any]) -> list[str]:
    """`step.option=value` for each setting, as `prunery run --set` takes it.

    Raises
    ------
    InputError
        A name is none, or a value could be a path, a URL or a model.
    """
    if len(settings) > _MOST:
        raise InputError(f"at most {_MOST} parameters; found {len(settings)}.")
    return [_override(name, value) for name, value in settings.items()]


def _override(name: str, value: Any) -> str:
    step, _, option = name.partition(".")
    if not _NAME.fullmatch(name) or (not option and step not in _TOP):
        raise InputError(
            f"`{name:.100}` is no parameter; write `step.option` with the step's name in the"
            f" recipe, or one of {', '.join(_TOP)}."
        )
    _check(name, option, value)
    return f"{name}={json.dumps(value)}"


def _check(name: str, option: str, value: Any) -> None:
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, str):
            allowed = _choices().get(option, frozenset())
            if item not in allowed:
                known = ", ".join(sorted(allowed)) or "numbers, true and false alone"
                raise InputError(
                    f"`{name}` cannot be set to a text of your own from here, as it could name a"
                    f" file or a model; allowed: {known}. Set it where the recipe is deployed."
                )
        elif item is not None and not isinstance(item, bool | int | float):
            raise InputError(
                f"`{name}` must be a number, true, false, null, a name, or a list of such; found"
                f" {type(item).__name__}."
            )


@cache
def _choices() -> dict[str, frozenset[str]]:
    """Option name to the texts it may have; none where some step takes any text there."""
    from ..pipelines.steps import STEPS
    from ..pruners.catalogue import METHODS

    found: dict[str, set[str]] = {"method": set(METHODS)}
    free: set[str] = set()
    for spec in STEPS.values():
        for name, field in spec.options.model_fields.items():
            _gather(name, field.annotation, found, free)
    for method in METHODS.values():
        for name, hint in get_type_hints(method).items():
            _gather(name, hint, found, free)
    free.discard("method")  # checked against the catalogue, wherever a step takes one
    return {name: frozenset(texts) for name, texts in found.items() if name not in free}


def _gather(name: str, hint: Any, found: dict[str, set[str]], free: set[str]) -> None:
    if hint is str:
        free.add(name)
    elif get_origin(hint) is Literal:
        found.setdefault(name, set()).update(x for x in get_args(hint) if isinstance(x, str))
    else:
        for inner in get_args(hint):
            _gather(name, inner, found, free)
