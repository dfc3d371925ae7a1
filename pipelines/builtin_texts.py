"""`builtin:python-docstrings`: what the standard library says of itself, labelled by chapter.

Short real texts that every Python brings, to try methods for labelled texts on: the first
paragraph of the docstring of each public function, class and method of a fixed list of modules.
The label is the chapter of Python's library reference that the module stands in. Texts are kept
as they are, even where one names its module. Which rows there are depends on the build of Python;
their digest enters the key of the table.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache

from .builtin_chats import builtin_docstrings

NAME = "builtin:python-docstrings"
SHORTEST = 30
"""Characters; a shorter paragraph says too little to tell its chapter."""

# Chapters of the library reference in a few words each, which describe the class to a model.
# Modules that a build may lack (those of compression and TLS) are left out.
_CHAPTERS: dict[str, tuple[str, ...]] = {
    # File and Directory Access; Data Persistence; Data Compression and Archiving; File Formats
    "files and folders": (
        "configparser",
        "csv",
        "filecmp",
        "fileinput",
        "fnmatch",
        "glob",
        "io",
        "linecache",
        "netrc",
        "os.path",
        "pathlib",
        "plistlib",
        "shelve",
        "shutil",
        "tarfile",
        "tempfile",
        "tomllib",
        "zipfile",
    ),
    # Internet Protocols and Support; sockets of Networking and Interprocess Communication
    "network protocols": (
        "ftplib",
        "http.client",
        "http.cookiejar",
        "http.cookies",
        "http.server",
        "imaplib",
        "ipaddress",
        "poplib",
        "smtplib",
        "socket",
        "socketserver",
        "urllib.parse",
        "urllib.request",
        "urllib.robotparser",
        "wsgiref.headers",
        "xmlrpc.client",
        "xmlrpc.server",
    ),
    # Numeric and Mathematical Modules; Numeric Types
    "numbers and mathematics": (
        "cmath",
        "complex",
        "decimal",
        "float",
        "fractions",
        "int",
        "math",
        "numbers",
        "random",
        "statistics",
    ),
    # Concurrent Execution; asyncio of Networking and Interprocess Communication
    "threads and processes": (
        "asyncio.locks",
        "asyncio.queues",
        "asyncio.runners",
        "asyncio.taskgroups",
        "asyncio.tasks",
        "asyncio.timeouts",
        "concurrent.futures",
        "contextvars",
        "multiprocessing.connection",
        "multiprocessing.context",
        "multiprocessing.managers",
        "multiprocessing.pool",
        "multiprocessing.process",
        "multiprocessing.shared_memory",
        "queue",
        "sched",
        "subprocess",
        "threading",
    ),
    # Text Processing Services; Text Sequence Type; codecs; Structured Markup
    "text and strings": (
        "codecs",
        "difflib",
        "html",
        "html.parser",
        "locale",
        "pprint",
        "re",
        "str",
        "string",
        "textwrap",
        "unicodedata",
    ),
}
_BUILTINS = ("complex", "float", "int", "str")  # types of no module of their own
_CALL = re.compile(r"[\w.]+\(.*?\)")


@lru_cache(maxsize=1)
def docstrings() -> tuple[tuple[str, str], ...]:
    """(text, chapter) of every row, in a fixed order; no text stands twice.

    Raises
    ------
    PruneryError
        No Python could be started, or it failed.
    """
    modules = [name for names in _CHAPTERS.values() for name in names if name not in _BUILTINS]
    found = builtin_docstrings(NAME, [*modules, "builtins"])
    seen: set[str] = set()
    made = []
    for chapter, names in _CHAPTERS.items():
        for name in names:
            for text in _paragraphs(name, found):
                key = text.casefold()
                if key not in seen:
                    seen.add(key)
                    made.append((text, chapter))
    return tuple(made)


def _paragraphs(name: str, found: dict[str, list[tuple[str, str]]]) -> Iterator[str]:
    """The first paragraphs of a module, or of a built-in type, that say something."""
    for full, docstring in found["builtins" if name in _BUILTINS else name]:
        if name in _BUILTINS and full.partition(".")[0] != name:
            continue
        for paragraph in re.split(r"\n\s*\n", docstring):
            text = " ".join(paragraph.split())
            # The signature that C code writes first is no sentence.
            if not _CALL.match(text):
                if len(text) >= SHORTEST and " at 0x" not in text:
                    yield text
                break


def digest() -> str:
    """SHA-256 of all rows."""
    return hashlib.sha256(json.dumps(docstrings(), ensure_ascii=False).encode()).hexdigest()
