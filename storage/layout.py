"""Where things are in a store, and the small files that say what is going on.

    tables/<key>/part-00000-<hash>.parquet   rows; the hash is the start of the file's SHA-256
    tables/<key>/rejects-00000-<hash>.parquet
    tables/<key>/files/<hash>-<name>         attachments
    tables/<key>/manifest.json               written last; what it does not list is not there
    names/<name>.json                        name -> key, with the keys before
    work/<key>/intent.json                   who is making this table, from which inputs
    work/<key>/plan.json                     into how many shards it is cut
    work/<key>/journal/00000.json            a finished shard
    work/<key>/tmp/                          unfinished files (on this machine only)
    work/<key>.lock, work/gc.lock            locks (on this machine only)

Part names carry their content, so two writers of one shard never overwrite each other.
"""

import re

from ..errors import InputError

KEY = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

TABLES = "tables"
NAMES = "names"
WORK = "work"
GC_LOCK = f"{WORK}/gc.lock"
NAMES_LOCK = f"{WORK}/names.lock"


def table(key: str) -> str:
    """Folder of a table."""
    return f"{TABLES}/{key}"


def manifest(key: str) -> str:
    """The manifest of a table."""
    return f"{TABLES}/{key}/manifest.json"


def name(label: str) -> str:
    """The file of a name."""
    return f"{NAMES}/{label}.json"


def work(key: str) -> str:
    """Folder of unfinished work on a table."""
    return f"{WORK}/{key}"


def lock(key: str) -> str:
    """The lock that writers of a table, and writers that read it, hold shared."""
    return f"{WORK}/{key}.lock"


def journal(key: str, shard: int) -> str:
    """The journal entry of a shard."""
    return f"{WORK}/{key}/journal/{shard:05d}.json"


def part(kind: str, shard: int, sha256: str) -> str:
    """File name of a part inside the table's folder."""
    return f"{kind}-{shard:05d}-{sha256[:12]}.parquet"


def attachment(label: str, sha256: str) -> str:
    """Path of an attachment inside the table's folder."""
    return f"files/{sha256[:12]}-{label}"


def check_name(label: str, what: str = "a name") -> str:
    """Return the name if it may stand in a path.

    Raises:
        InputError: anything but letters, digits, `.`, `_` and `-`, starting with a letter or digit.
    """
    if not isinstance(label, str) or not _NAME.fullmatch(label):
        raise InputError(
            f"expected {what} of up to 128 letters, digits, '.', '_' or '-' that starts with "
            f"a letter or digit, found {label!r}"
        )
    return label
