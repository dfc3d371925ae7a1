"""`builtin:python-chats`: questions about the standard library, answered by its docstrings.

A small real corpus that every Python brings: functions, classes and methods of a fixed list of
modules, each asked about in one of a few fixed ways that a hash of its name chooses. The rows
are the same for one build of Python; their digest enters the key of the table.

They are collected by a bare Python of their own, for which this file is a script: libraries add
methods to the standard library's classes and replace its functions (torch does with
`inspect.getfile`), and the rows must not hang on what is imported. So this file imports the
standard library alone.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

NAME = "builtin:python-chats"
SHORTEST = 60
"""Characters; a shorter docstring says too little to be an answer."""

_MODULES = (
    "argparse",
    "array",
    "ast",
    "asyncio",
    "base64",
    "bisect",
    "builtins",
    "calendar",
    "collections",
    "concurrent.futures",
    "configparser",
    "contextlib",
    "csv",
    "datetime",
    "decimal",
    "difflib",
    "email.message",
    "enum",
    "fractions",
    "functools",
    "heapq",
    "http.client",
    "inspect",
    "io",
    "ipaddress",
    "itertools",
    "json",
    "logging",
    "math",
    "multiprocessing.pool",
    "operator",
    "os",
    "pathlib",
    "pickle",
    "random",
    "re",
    "shutil",
    "socket",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "time",
    "traceback",
    "typing",
    "unittest",
    "urllib.parse",
    "uuid",
    "xml.etree.ElementTree",
    "zipfile",
)
_QUESTIONS = (
    "What does `{name}` do?",
    "Explain `{name}` from Python's standard library.",
    "How is `{name}` documented?",
    "I came across `{name}` in some Python code. What is it for?",
    "Describe the {kind} `{name}`.",
    "When would I use the {kind} `{name}`?",
)
_SIGNATURES = (
    "How do I call `{name}`?",
    "What is the signature of `{name}`?",
)
_FOLLOW_UPS = ("And what does it do?", "Thanks. What is it for?", "What happens when I call it?")

Messages = list[dict[str, str]]


@lru_cache(maxsize=1)
def builtin_chats() -> dict[str, list[tuple[str, Messages]]]:
    """(qualified name, messages) of every chat, by top module, in a fixed order.

    Raises
    ------
    PruneryError
        No Python could be started, or it failed.
    """
    found: dict[str, list[tuple[str, Messages]]] = _in_bare_python(NAME)
    return found


def builtin_docstrings(name: str, modules: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """(qualified name, docstring) of the public functions, classes and methods of each module.

    In a fixed order, collected as the chats are. `name` is what is being read, for messages.

    Raises
    ------
    PruneryError
        No Python could be started, or it failed.
    """
    found: dict[str, list[tuple[str, str]]] = _in_bare_python(name, *modules)
    return found


def _in_bare_python(name: str, *modules: str) -> Any:
    """What this file as a script writes in a Python that has imported nothing else."""
    from ..errors import PruneryError

    # -I and -S: no environment, no site-packages.
    command = [sys.executable, "-I", "-S", __file__, *modules]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode("utf-8", "replace")[-500:]
        raise PruneryError(
            f"{name}: could not collect docstrings with {sys.executable!r} ({error}). {said} Read"
            " files of your own instead."
        ) from error
    return json.loads(done.stdout)


def collected() -> dict[str, list[tuple[str, Messages]]]:
    """What `builtin_chats` gives, from the standard library as it is in this process."""
    seen: set[str] = set()
    found: dict[str, list[tuple[str, Messages]]] = {}
    for module_name in _MODULES:
        chats = found.setdefault(module_name.partition(".")[0], [])
        for name, kind, thing in _documented(importlib.import_module(module_name)):
            answer = inspect.cleandoc(str(thing.__doc__))
            if len(answer) >= SHORTEST and " at 0x" not in answer and answer not in seen:
                seen.add(answer)
                chats.append((name, _chat(name, kind, thing, answer)))
    return found


def docstrings(modules: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """What `builtin_docstrings` gives, from the standard library as it is in this process."""
    return {
        name: [
            (full, inspect.cleandoc(str(thing.__doc__)))
            for full, _, thing in _documented(importlib.import_module(name))
        ]
        for name in modules
    }


def _documented(module: ModuleType) -> Iterator[tuple[str, str, Any]]:
    """(qualified name, kind, object) of the public functions, classes and methods of a module."""
    for name in sorted(getattr(module, "__all__", None) or vars(module)):
        thing = getattr(module, name, None)
        if name.startswith("_") or not _at_home(thing, module):
            continue
        full = name if module.__name__ == "builtins" else f"{module.__name__}.{name}"
        if inspect.isclass(thing):
            if _own_docstring(thing):
                yield full, "class", thing
            for inner, method in sorted(vars(thing).items()):
                if not inner.startswith("_") and _is_method(method) and _own_docstring(method):
                    yield f"{full}.{inner}", "method", method
        elif inspect.isroutine(thing) and _own_docstring(thing):
            yield full, "function", thing


def _at_home(thing: Any, module: ModuleType) -> bool:
    """Whether a name is of this module or the C code behind it, and not imported from afar."""
    home = getattr(thing, "__module__", None)
    if not isinstance(home, str) or hasattr(module, "__all__"):
        return True
    top = module.__name__.partition(".")[0]
    return home.partition(".")[0].lstrip("_") in (top, "builtins")


def _is_method(thing: Any) -> bool:
    return inspect.isroutine(thing) or isinstance(thing, classmethod | staticmethod)


def _own_docstring(thing: Any) -> bool:
    return isinstance(getattr(thing, "__doc__", None), str)


def _chat(name: str, kind: str, thing: Any, answer: str) -> Messages:
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    signature = _signature(name, thing)
    if place % 4 or signature is None:
        question = _pick(_QUESTIONS, place // 4).format(name=name, kind=kind)
        return [_turn("user", question), _turn("assistant", answer)]
    return [
        _turn("user", _pick(_SIGNATURES, place // 4).format(name=name)),
        _turn("assistant", f"`{signature}`"),
        _turn("user", _pick(_FOLLOW_UPS, place // 8)),
        _turn("assistant", answer),
    ]


def _signature(name: str, thing: Any) -> str | None:
    """The call as text; None where there is none, or it shows an address or an unordered set."""
    target: Callable[..., Any] = getattr(thing, "__func__", thing)
    try:
        text = str(inspect.signature(target))
    except (TypeError, ValueError):
        return None
    return None if "0x" in text or "{" in text else f"{name}{text}"


def _pick(choices: tuple[str, ...], place: int) -> str:
    return choices[place % len(choices)]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


if __name__ == "__main__":
    asked = sys.argv[1:]
    sys.stdout.write(json.dumps(docstrings(asked) if asked else collected()))
