"""Regular expressions of strangers, in linear time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from .errors import ServiceError

LONGEST = 1000
"""Characters of one pattern."""
MEMORY = 8 * 2**20
"""Bytes that the automaton of one request's patterns may take."""


class NotInstalled(ServiceError):
    """An option needs a package that this service lacks: 501."""

    status = 501
    kind = "not_installed"


class AnyOf:
    """Whether one of several patterns is found in a text, in one pass over it."""

    def __init__(self, found: Any) -> None:
        self._set = found

    def search(self, text: str, /) -> bool:
        """Whether any pattern is found."""
        return bool(self._set.Match(text))


def linear_patterns(patterns: Sequence[str]) -> tuple[AnyOf, ...]:
    """RE2's automaton over all patterns: time linear in the text, whatever they are.

    Raises
    ------
    InputError
        A pattern is none in RE2's syntax (no look-around, no back-references), or too long.
    NotInstalled
        google-re2 is missing; Python's own expressions can take forever on purpose.
    """
    if not patterns:
        return ()
    try:
        import re2
    except ImportError as error:
        raise NotInstalled(
            "`protect` needs google-re2 on this service: pip install 'prunery[serve]'."
        ) from error
    options = re2.Options()
    options.log_errors = False
    options.max_mem = MEMORY
    made = re2.Set.SearchSet(options)
    for place, pattern in enumerate(patterns):
        if len(pattern) > LONGEST:
            raise InputError(
                f"`protect[{place}]` has {len(pattern)} characters; {LONGEST} are allowed."
            )
        try:
            re2.compile(pattern, options)
            made.Add(pattern)
        except (re2.error, UnicodeEncodeError) as error:
            reason = error.args[0] if error.args else error
            said = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
            raise InputError(
                f"`protect[{place}]` is no regular expression in RE2's syntax: {said:.200}"
            ) from error
    made.Compile()
    return (AnyOf(made),)
