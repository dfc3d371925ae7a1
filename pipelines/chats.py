"""Rows of five formats become chats: who says what, and whose tokens may be targets.

Formats, told apart by the keys of a row (in this order, so that a row with `messages` and a
`prompt` beside it is read as messages):

messages            `messages`: [{role, content, ...}], the OpenAI style
sharegpt            `conversations` (or `conversation`): [{from, value}], `system`, `tools`
prompt_completion   `prompt` and `completion`: two strings, or two lists of messages
alpaca              `instruction`, `input`, `output`, and maybe `system` and `history`
text                `text`: a plain document, no turns

A message may carry `train` or `weight`, 0 or 1; without one, the assistant's turns are targets
and nothing else. Strings of prompt_completion become one user turn and one turn of the
assistant; of message lists only those of the completion are targets. The user turn of an Alpaca
row is the instruction, then, where there is an input, a blank line and the input; the sentence
that Alpaca's own prompt begins with is left to the chat template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from ..errors import InputError
from ..storage import canonical_json, row_id
from . import builtin_chats, sources
from .sources import RowProblem, shown

ChatFormat = Literal["messages", "sharegpt", "prompt_completion", "alpaca", "text"]

_KEYS: dict[ChatFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_CALL = "function_call"  # ShareGPT's role of an assistant that calls a tool
# Keys of a message that templates read besides role, content and tool_calls.
_MORE = ("name", "tool_call_id", "reasoning_content", "thinking")
_ROWS_LOOKED_AT = 20


@dataclass(frozen=True, slots=True)
class ChatPiece:
    """A piece of a file (or a module of the built-in chats) and how its rows are read.

    `format` is None where no row could be looked at; `given` says that the caller named it.
    """

    piece: sources.Piece
    format: ChatFormat | None
    given: bool = False

    @property
    def size(self) -> int:
        """Bytes, about."""
        return self.piece.size


@dataclass(frozen=True, slots=True)
class ChatScan:
    """What `scan_chats` found: the pieces in order and the digest of names and contents."""

    pieces: tuple[ChatPiece, ...]
    digest: str
    skipped: tuple[str, ...]

    @property
    def formats(self) -> list[str]:
        """The formats met, sorted."""
        return sorted({found.format for found in self.pieces if found.format})


def scan_chats(
    paths: Sequence[str],
    *,
    format: ChatFormat | None = None,
    piece_bytes: int = sources.PIECE_BYTES,
) -> ChatScan:
    """Look at files, folders, patterns and `builtin:python-chats`; tell the format of each file.

    Reads `.jsonl`, `.ndjson`, `.parquet`, and `.json` (one array, or an object a line). Where
    two files have one name, the second is shown as `name (2)`, so that their rows have ids of
    their own.

    Raises
    ------
    InputError
        A path matches nothing, no format fits the first rows of a file, or two formats do.
    """
    pieces: list[ChatPiece] = []
    skipped: list[str] = []
    whole = hashlib.sha256()
    names: dict[str, str] = {}
    for path in paths:
        if path == builtin_chats.NAME:
            digest, made = _builtin_pieces()
        else:
            found = sources.scan([path], piece_bytes=piece_bytes, suffixes=sources.ROW_SUFFIXES)
            digest = found.digest
            made = [
                replace(piece, name=sources.name_apart(piece.name, piece.path, names))
                for piece in found.pieces
            ]
            skipped.extend(found.skipped)
        whole.update(f"{digest};".encode())
        pieces.extend(_with_formats(made, format))
    return ChatScan(tuple(pieces), whole.hexdigest(), tuple(skipped))


def _builtin_pieces() -> tuple[str, list[sources.Piece]]:
    text = json.dumps(builtin_chats.builtin_chats(), ensure_ascii=False)
    pieces: list[sources.Piece] = []
    row = 1
    for module, chats in builtin_chats.builtin_chats().items():
        size = sum(len(turn["content"]) for _, turns in chats for turn in turns)
        pieces.append(
            sources.Piece(builtin_chats.NAME, module, "jsonl", size, stop=len(chats), first_row=row)
        )
        row += len(chats)
    return hashlib.sha256(text.encode()).hexdigest(), pieces


def _with_formats(
    pieces: Sequence[sources.Piece], format: ChatFormat | None
) -> Iterator[ChatPiece]:
    known: dict[str, ChatFormat | None] = {}
    for piece in pieces:
        if piece.path == builtin_chats.NAME:
            yield ChatPiece(piece, "messages", given=True)
            continue
        if format is None and piece.path not in known:
            known[piece.path] = _detect_file(piece)
        yield ChatPiece(piece, format or known[piece.path], given=format is not None)


def _detect_file(piece: sources.Piece) -> ChatFormat | None:
    """The format of a file's first rows; None where none of them is an object."""
    first: tuple[ChatFormat, int] | None = None
    rows = sources.read_rows(piece, lambda row, reason, where: None)
    for row, record, _ in islice(rows, _ROWS_LOOKED_AT):
        found = detect(record)
        if found is None:
            raise InputError(
                f"{piece.name}, row {row}: expected the keys of one of {_known_keys()}; found"
                f" {', '.join(map(str, record)) or 'no keys'}. Rename the keys, or set `format`."
            )
        if first is not None and found != first[0]:
            raise InputError(
                f"{piece.name}, row {row}, key {_KEYS[found][0]}: expected rows of one format;"
                f" found {found} after {first[0]} in row {first[1]}. Split the file, or set"
                " `format`."
            )
        first = first or (found, row)
    return first[0] if first else None


def detect(record: Mapping[str, Any]) -> ChatFormat | None:
    """The format whose keys a row has, first match in the order of the module's table."""
    present = {key for key, value in record.items() if value is not None}
    if "conversation" in present:
        present.add("conversations")
    return next((name for name, keys in _KEYS.items() if present.issuperset(keys)), None)


def _known_keys() -> str:
    return "; ".join(f"{name} ({' + '.join(keys)})" for name, keys in _KEYS.items())


def read_chats(
    found: ChatPiece, reject: sources.Reject, *, domain_field: str | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of the CHATS schema from one piece, in order; bad rows go to `reject`.

    `domain_field` is a key of the row, dotted where it is nested (`meta.source`); a row without
    it has the domain "".
    """
    if found.piece.path == builtin_chats.NAME:
        yield from _builtin_rows(found.piece)
        return
    name = found.piece.name
    for row, record, raw in sources.read_rows(found.piece, reject):
        try:
            _check_format(found, record)
            messages, tools = parse(record, found.format or "messages")
            domain = _domain(record, domain_field)
        except RowProblem as problem:
            reject(record, problem.reason, f"{name}, row {row}, key {problem.key}")
            continue
        yield _row(name, row, domain, found.format or "messages", messages, tools, raw)


def _check_format(found: ChatPiece, record: Mapping[str, Any]) -> None:
    """Refuse a row whose keys are those of another format than the file's."""
    own = detect(record)
    if found.given or own is None or own == found.format:
        return
    raise RowProblem(
        _KEYS[own][0], f"expected {found.format}, as the file's first rows are; found {own}."
    )


def _builtin_rows(piece: sources.Piece) -> Iterator[dict[str, Any]]:
    for place, (thing, turns) in enumerate(builtin_chats.builtin_chats()[piece.name]):
        messages, tools = parse({"messages": turns}, "messages")
        raw = json.dumps({"messages": turns, "about": thing}, ensure_ascii=False)
        yield _row(
            builtin_chats.NAME,
            piece.first_row + place,
            piece.name,
            "messages",
            messages,
            tools,
            raw,
        )


def _row(
    name: str,
    row: int,
    domain: str,
    format: ChatFormat,
    messages: list[dict[str, Any]],
    tools: str,
    raw: str,
) -> dict[str, Any]:
    return {
        "id": row_id(name, row, canonical_json({"messages": messages, "tools": tools})),
        "source": f"{name}#{row}",
        "domain": domain,
        "format": format,
        "messages": messages,
        "tools": tools,
        "raw": raw,
    }


def _domain(record: Mapping[str, Any], field: str | None) -> str:
    if field is None:
        return ""
    value: Any = record
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        return ""
    if not isinstance(value, str | int):
        raise RowProblem(field, f"expected the name of a domain; found {shown(value)}.")
    return _whole(str(value), field)


def parse(record: Mapping[str, Any], format: ChatFormat) -> tuple[list[dict[str, Any]], str]:
    """The messages of a row (of the MESSAGE type) and its tools as JSON, or "".

    Raises
    ------
    RowProblem
        The row is not of that format, or no chat that could be trained on.
    """
    messages = _PARSERS[format](record)
    if format != "text":
        _check_chat(messages, _KEYS[format][-1])
    return messages, _tools(record)


def _of_messages(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return _turns(record.get("messages"), "messages")


def _of_sharegpt(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    key = "conversations" if record.get("conversations") is not None else "conversation"
    return _system(record) + _turns(record.get(key), key)


def _of_prompt_completion(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = record.get(key)
        if isinstance(value, str):
            made.append(_message(role, _filled(value, key)))
            continue
        turns = _turns(value, key, wanted="text or a list of messages")
        if key == "prompt":
            turns = [{**turn, "train": False} for turn in turns]
        made += turns
    return made


def _of_alpaca(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    made = _system(record)
    history = record.get("history") or []
    if not isinstance(history, list):
        raise RowProblem("history", f"expected a list of pairs; found {shown(history)}.")
    for place, pair in enumerate(history):
        key = f"history[{place}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowProblem(key, f"expected a pair of texts; found {shown(pair)}.")
        made += [
            _message("user", _filled(pair[0], key)),
            _message("assistant", _filled(pair[1], key)),
        ]
    asked = _filled(record.get("instruction"), "instruction")
    given = _text(record.get("input") or "", "input")
    made.append(_message("user", f"{asked}\n\n{given}" if given.strip() else asked))
    made.append(_message("assistant", _filled(record.get("output"), "output")))
    return made


def _of_text(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [_message("text", _filled(record.get("text"), "text"), train=True)]


_PARSERS: dict[ChatFormat, Callable[[Mapping[str, Any]], list[dict[str, Any]]]] = {
    "messages": _of_messages,
    "sharegpt": _of_sharegpt,
    "prompt_completion": _of_prompt_completion,
    "alpaca": _of_alpaca,
    "text": _of_text,
}


def _system(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The system turn of formats that have it beside the conversation."""
    text = _text(record.get("system") or "", "system")
    return [_message("system", text)] if text.strip() else []


def _turns(value: Any, key: str, wanted: str = "a list of messages") -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise RowProblem(key, f"expected {wanted}; found {shown(value)}.")
    return [_turn(turn, f"{key}[{place}]") for place, turn in enumerate(value)]


def _turn(turn: Any, key: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowProblem(key, f"expected a message with role and content; found {shown(turn)}.")
    by, says = ("from", "value") if "from" in turn else ("role", "content")
    spoken = turn.get(by)
    if spoken == _CALL:
        calls = _calls(turn.get(says), f"{key}.{says}")
        return _message("assistant", "", calls=calls, train=_train(turn, key, True))
    role = _ROLES.get(spoken) if isinstance(spoken, str) else None
    if role is None:
        known = ", ".join([*_ROLES, _CALL])
        raise RowProblem(f"{key}.{by}", f"expected a role among {known}; found {shown(spoken)}.")
    calls = turn.get("tool_calls") or turn.get("function_call") or []
    if calls and role != "assistant":
        raise RowProblem(
            f"{key}.tool_calls", f"expected calls of the assistant only, not of {role}."
        )
    if calls:
        calls = _calls(calls, f"{key}.tool_calls")
    content = _content(turn.get(says), f"{key}.{says}", empty=bool(calls) or role == "tool")
    more = {name: turn[name] for name in _MORE if turn.get(name) is not None}
    train = _train(turn, key, role == "assistant")
    return _message(role, content, calls=calls, more=more, train=train)


def _message(
    role: str,
    content: str,
    *,
    calls: Sequence[Any] = (),
    more: Mapping[str, Any] | None = None,
    train: bool | None = None,
) -> dict[str, Any]:
    """A value of the MESSAGE type.

    `tool_calls` is the list of calls as JSON; where a message has more that templates read
    (`name`, `tool_call_id`, reasoning), it is an object of all that.
    """
    extra: Any = list(calls)
    if more:
        extra = {**more, "tool_calls": extra} if extra else dict(more)
    return {
        "role": role,
        "content": content,
        "tool_calls": _whole(json.dumps(extra, ensure_ascii=False), "tool_calls") if extra else "",
        "train": role == "assistant" if train is None else train,
    }


def _calls(value: Any, key: str) -> list[Any]:
    """Calls in the OpenAI form; a bare {name, arguments} becomes one of type function."""
    if isinstance(value, str):
        value = _json(value, key, "a call {name, arguments}")
    calls = value if isinstance(value, list) else [value]
    made = []
    for call in calls:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise RowProblem(key, f"expected a call with a function's name; found {shown(call)}.")
        made.append(call if "function" in call else {"type": "function", "function": inner})
    return made


def _tools(record: Mapping[str, Any]) -> str:
    value = record.get("tools") or record.get("functions")
    if isinstance(value, str) and value.strip():
        value = _json(value, "tools", "a list of tools")
    if not value or (isinstance(value, str) and not value.strip()):
        return ""
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowProblem("tools", f"expected a list of objects; found {shown(value)}.")
    return _whole(json.dumps(value, ensure_ascii=False), "tools")


def _train(turn: Mapping[str, Any], key: str, default: bool) -> bool:
    for name in ("train", "weight"):
        value = turn.get(name)
        if value is None:
            continue
        if value not in (0, 1):
            raise RowProblem(f"{key}.{name}", f"expected 0 or 1; found {shown(value)}.")
        return bool(value)
    return default


def _content(value: Any, key: str, *, empty: bool) -> str:
    """Text, or the text of a list of parts."""
    if isinstance(value, list):
        value = "".join(_part(part, f"{key}[{place}]") for place, part in enumerate(value))
    if empty:
        return _text("" if value is None else value, key)
    return _filled(value, key)


def _part(part: Any, key: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise RowProblem(key, f"expected a part of type text; found {shown(kind)}.")
    return str(part["text"])


def _filled(value: Any, key: str) -> str:
    text = _text(value, key)
    if not text.strip():
        raise RowProblem(key, "expected text; found nothing but white space.")
    return text


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise RowProblem(key, f"expected text; found {shown(value)}.")
    return _whole(value, key)


def _whole(text: str, key: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowProblem(
            key, f"the text holds half of a surrogate pair at character {error.start}."
        ) from error
    return text


def _json(text: str, key: str, wanted: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowProblem(key, f"expected {wanted} as JSON; found {shown(text)}.") from error


def _check_chat(messages: Sequence[Mapping[str, Any]], key: str) -> None:
    """Refuse a chat that nobody answers, or where a tool speaks unasked."""
    if not any(message["role"] == "assistant" for message in messages):
        raise RowProblem(key, "no answer: expected at least one turn of the assistant.")
    asked: set[str] = set()
    for place, message in enumerate(messages):
        extra = json.loads(message["tool_calls"] or "[]")
        calls = extra.get("tool_calls", []) if isinstance(extra, dict) else extra
        asked |= {str(call["id"]) for call in calls if call.get("id")}
        if message["role"] != "tool":
            continue
        before = messages[place - 1]["role"] if place else "nothing"
        answers = extra.get("tool_call_id") if isinstance(extra, dict) else None
        if before not in ("assistant", "tool") or (asked and answers and str(answers) not in asked):
            raise RowProblem(
                key,
                f"message {place} is an orphan: a tool answers after {before}"
                f"{f' to the call {answers!r}' if answers else ''}, which nobody made.",
            )
