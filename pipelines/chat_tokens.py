"""Chats to tokens: the template's own rendering, with the tokens that are targets marked.

The ids are those that `tokenizer.apply_chat_template` gives. Where the template marks what the
assistant wrote ({% generation %}), the mask comes from the marks. Elsewhere it comes from
rendering turn by turn: an answer starts where the messages before it end with a generation
prompt, and ends where the messages up to it end. Both renderings must be prefixes of the whole;
a template that writes a turn otherwise once later turns follow (many drop earlier thinking) is
refused, by row.

The end-of-turn token of an answer is trained and protected, also where the template's marks
leave it out: a model that never sees it does not learn to stop.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import InputError, ModelError
from ..pruners.models.tokenizers import check_fast, template_sha256, tokenizer_sha256

TrainOn = Literal["assistant", "last", "all"]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

DEFAULT_TEMPLATE = """{{ bos_token or '' }}\
{% if tools %}{{ '### Tools:\\n' + (tools | tojson) + '\\n\\n' }}{% endif %}\
{% for message in messages %}\
{{ '### ' + (message.role | capitalize) + ':\\n' }}\
{% if message.role == 'assistant' %}\
{% generation %}{{ message.content }}\
{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}\
{{ eos_token }}{% endgeneration %}{{ '\\n\\n' }}\
{% else %}{{ message.content + '\\n\\n' }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"""
"""For tokenizers without a template: a heading for each turn, the end-of-sequence token after
each answer."""

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class ChatTokens:
    """The L tokens of one chat; see the TOKENS schema for the meaning of each array."""

    input_ids: Ints
    trainable: Bools
    turn: Ints
    protected: Bools
    truncated: bool


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A rendered chat of n messages.

    borders
        (n + 1) characters where message i starts; None where the rendering of the messages
        before it is no prefix of the whole. The first is 0, the last the length of the text.
    spans
        (start, end) characters that the template marks as generated; None without marks.
    starts, ends
        (L,) characters of each token.
    """

    text: str
    borders: list[int | None]
    spans: list[tuple[int, int]] | None
    ids: Ints
    starts: Ints
    ends: Ints

    def shown(self, place: int) -> str:
        """The text of a token, without white space around it."""
        return self.text[self.starts[place] : self.ends[place]].strip()


class ChatTokenizer:
    """A tokenizer with a chat template and the choice of what is trained.

    Parameters
    ----------
    tokenizer
        A fast tokenizer of transformers.
    chat_template
        Text of a Jinja template; the tokenizer's own where None, else `DEFAULT_TEMPLATE`.
    max_length
        Longest chat in tokens; the rest is cut off at its end.
    train_on
        "assistant": messages that may be trained (the assistant's, unless a row says otherwise);
        "last": the last of those; "all": every token.
    add_eos
        End plain text with the end-of-sequence token.
    template_options
        Variables that the template reads, such as `enable_thinking` or `date_string`.

    Raises
    ------
    ModelError
        The tokenizer is slow, or lacks an end-of-sequence token that is asked for.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        max_length: int = 2048,
        train_on: TrainOn = "assistant",
        add_eos: bool = True,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        check_fast(tokenizer)
        self._tokenizer = tokenizer
        self._template = chat_template or tokenizer.chat_template or DEFAULT_TEMPLATE
        self._max_length = max_length
        self._train_on = train_on
        self._add_eos = add_eos
        self._options = dict(template_options or {})
        self._eos: int | None = tokenizer.eos_token_id
        added = tokenizer.added_tokens_decoder.items()
        self._special = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
        if self._eos is None and (add_eos or self._template == DEFAULT_TEMPLATE):
            raise ModelError(
                f"tokenizer {tokenizer.name_or_path!r}: expected an end-of-sequence token, found"
                " none. Set `eos_token` in its tokenizer_config.json, or give a chat template and"
                " `add_eos: false`."
            )

    @property
    def template(self) -> Any:
        """The template in use: a text, or a mapping of names to texts."""
        return self._template

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the tokenizer and of the chat template in use."""
        return {
            "tokenizer": tokenizer_sha256(self._tokenizer),
            "chat_template": template_sha256(self._template),
        }

    def __call__(self, messages: Sequence[Mapping[str, Any]], tools: str = "") -> ChatTokens:
        """The tokens of a chat: `messages` of the MESSAGE type, `tools` JSON or "".

        Raises
        ------
        InputError
            The template refuses the chat or rewrites a turn that is trained, or nothing is left
            to train; the message is the reason alone, without the row.
        """
        if messages[0]["role"] == "text":
            whole = self._of_text(messages[0]["content"])
        else:
            whole = self._of_chat(messages, json.loads(tools) if tools else None)
        return self._cut(whole)

    def _cut(self, whole: ChatTokens) -> ChatTokens:
        whole.trainable[:1] = False
        trained = np.flatnonzero(whole.trainable)
        if not len(trained):
            raise InputError("no trainable token: no turn in it may be trained.")
        limit = self._max_length
        if trained[0] >= limit:
            raise InputError(
                f"truncated before its first trainable token: that is token {trained[0]}, and"
                f" `max_length` is {limit}."
            )
        return ChatTokens(
            whole.input_ids[:limit],
            whole.trainable[:limit],
            whole.turn[:limit],
            whole.protected[:limit],
            len(whole.input_ids) > limit,
        )

    def _of_text(self, text: str) -> ChatTokens:
        """All tokens of a plain document; each end-of-sequence token in it ends a document."""
        ids = np.array(self._tokenizer(text, verbose=False)["input_ids"], np.int64)
        if self._add_eos and (not len(ids) or ids[-1] != self._eos):
            ids = np.append(ids, np.int64(self._eos or 0))
        ends = ids == (-1 if self._eos is None else self._eos)
        ends[:1] = False  # one token may serve as start and end
        turn = np.cumsum(ends) - ends
        return ChatTokens(ids, np.ones(len(ids), np.bool_), turn, ends, False)

    def _of_chat(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> ChatTokens:
        turns = [_for_template(message) for message in messages]
        made = self._rendered(turns, tools)
        n = len(made.ids)
        trainable, protected = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
        turn = _turn_of_tokens(made)
        for place in self._trained(messages):
            try:
                targets = self._targets(made, turns, tools, place)
            except InputError:
                if self._train_on != "all":
                    raise
                continue  # every token is trained anyway; this turn's end stays unprotected
            if self._train_on != "all":
                _check_said(made, targets, turns[place], place)
            for start, stop, endings in targets:
                trainable[start:stop] = True
                turn[start:stop] = place
                protected[endings] = True
        protected &= trainable
        if self._train_on == "all":
            trainable[:] = True
            protected |= made.ids == (-1 if self._eos is None else self._eos)
        return ChatTokens(made.ids, trainable, np.maximum.accumulate(turn), protected, False)

    def _trained(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Numbers of the messages whose tokens are targets."""
        found = [place for place, message in enumerate(messages) if message["train"]]
        return found[-1:] if self._train_on == "last" else found

    def _rendered(self, turns: Sequence[dict[str, Any]], tools: Any) -> _Rendered:
        template = self._template_for(tools)
        text, spans = self._render(template, turns, tools, marks=True)
        firsts = (turns[:place] for place in range(1, len(turns)))
        borders = [0, *(self._prefix(template, some, tools, text) for some in firsts), len(text)]
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        return _Rendered(
            text,
            borders,
            spans if _MARKED.search(template) else None,
            np.array(encoded["input_ids"], np.int64),
            offsets[:, 0],
            offsets[:, 1],
        )

    def _template_for(self, tools: Any) -> str:
        """The text of the template; among named ones, transformers chooses."""
        if isinstance(self._template, str):
            return self._template
        chosen: str = self._tokenizer.get_chat_template(None, tools)
        return chosen

    def _render(
        self,
        template: str,
        turns: Sequence[dict[str, Any]],
        tools: Any,
        *,
        marks: bool = False,
        generation_prompt: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a chat, and the characters that the template marks as generated."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        marks = marks and bool(_MARKED.search(template))
        variables = {**self._tokenizer.special_tokens_map, **self._options}
        try:
            made: Any = render_jinja_template(
                conversations=[list(turns)],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=generation_prompt,
                **variables,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise InputError(f"the chat template refuses this chat: {error}.") from error
        texts, spans = made
        return texts[0], spans[0] if marks else []

    def _prefix(
        self,
        template: str,
        turns: Sequence[dict[str, Any]],
        tools: Any,
        text: str,
        *,
        generation_prompt: bool = False,
    ) -> int | None:
        """Length of the rendering of some first turns, or None where it is no prefix of `text`.

        Some templates close every rendering with the end-of-sequence token: it may be missing.
        """
        try:
            found, _ = self._render(template, turns, tools, generation_prompt=generation_prompt)
        except InputError:  # a template may refuse a chat that stops there
            return None
        if not text.startswith(found):
            found = found.removesuffix(self._tokenizer.eos_token or "")
        return len(found) if text.startswith(found) else None

    def _targets(
        self, made: _Rendered, turns: Sequence[dict[str, Any]], tools: Any, place: int
    ) -> list[tuple[int, int, list[int]]]:
        """(first token, last + 1, end-of-turn tokens) of what is trained of a message."""
        start, end = made.borders[place], made.borders[place + 1]
        if turns[place]["role"] == "assistant" and made.spans is not None:
            return self._marked(made, _spans_of(made, turns, place), end)
        if turns[place]["role"] == "assistant":
            template = self._template_for(tools)
            start = self._prefix(template, turns[:place], tools, made.text, generation_prompt=True)
        if start is None or end is None or start >= end:
            raise InputError(_rewritten(place))
        first, stop = _tokens_in(made, start, end)
        if turns[place]["role"] != "assistant":
            # Trained because the row asks for it: all that the template writes for it.
            return [(first, stop, [])]
        endings = self._endings(made, first, stop)
        return [(first, endings[0] + 1 if endings else stop, endings)]

    def _marked(
        self, made: _Rendered, spans: Sequence[tuple[int, int]], end: int | None
    ) -> list[tuple[int, int, list[int]]]:
        """Token ranges of the spans of one turn; the last is stretched to its end of turn."""
        found = [_tokens_in(made, *span) for span in spans]
        first, stop = found[-1]
        endings = self._endings(made, found[0][0], stop)
        if not endings:
            endings = self._ending_behind(made, stop, end)
            stop = endings[0] + 1 if endings else stop
        return [*((a, b, []) for a, b in found[:-1]), (first, stop, endings)]

    def _endings(self, made: _Rendered, first: int, stop: int) -> list[int]:
        """The special tokens that a range ends with, last first, white space aside."""
        found: list[int] = []
        for place in range(stop - 1, first - 1, -1):
            if int(made.ids[place]) in self._special:
                found.append(place)
            elif made.shown(place):
                break
        return found

    def _ending_behind(self, made: _Rendered, stop: int, border: int | None) -> list[int]:
        """The special token right behind an answer, still in its turn.

        Without the border of the turn only the end-of-sequence token counts: another one may be
        the start of the next turn.
        """
        place = stop
        while place < len(made.ids) and not made.shown(place):
            place += 1
        if place >= len(made.ids) or int(made.ids[place]) not in self._special:
            return []
        inside = made.ids[place] == self._eos if border is None else made.starts[place] < border
        return [place] if inside else []


def _check_said(
    made: _Rendered,
    targets: Sequence[tuple[int, int, list[int]]],
    turn: Mapping[str, Any],
    place: int,
) -> None:
    """Refuse a template that leaves out what a trained turn says.

    Some show no calls; those of vision models show nothing of a text that is not in parts. The
    last line is looked for alone, since templates cut thinking off and trim.
    """
    shown = "".join(
        made.text[made.starts[start] : made.ends[stop - 1]] for start, stop, _ in targets
    )
    wanted = [line for line in turn["content"].strip().splitlines()[-1:] if line]
    wanted += [call["function"]["name"] for call in turn.get("tool_calls", ())]
    for text in wanted:
        if text.strip() not in shown:
            raise InputError(
                f"the chat template leaves out what message {place} says ({text[:60]!r}). Use a"
                " template for text and tool calls."
            )


def _rewritten(place: int) -> str:
    return (
        f"the chat template rewrites history: message {place} is not rendered the same once later"
        " ones follow (it may drop earlier thinking), or does not begin with the generation prompt,"
        " so its tokens cannot be told apart. Use a template with {% generation %} marks, or"
        " `train_on: last`."
    )


def _spans_of(
    made: _Rendered, turns: Sequence[dict[str, Any]], place: int
) -> list[tuple[int, int]]:
    """What the template marks as generated in one turn of the assistant."""
    speakers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    spans = made.spans or []
    start, end = made.borders[place], made.borders[place + 1]
    if start is not None and end is not None:
        found = [span for span in spans if start <= span[0] and span[1] <= end]
    elif len(spans) == len(speakers):
        found = [spans[speakers.index(place)]]
    else:
        found = []
    found = [span for span in found if span[0] < span[1]]
    if not found:
        raise InputError(
            f"the chat template marks no generation in message {place} ({len(spans)} marks for"
            f" {len(speakers)} turns of the assistant). Mend its {{% generation %}} marks; they do"
            " not work inside macros."
        )
    return found


def _tokens_in(made: _Rendered, start: int, end: int) -> tuple[int, int]:
    """(first, last + 1) of the tokens that cover any of the characters [start, end).

    Byte-level tokenizers that trim their offsets show a token of white space alone as empty, at
    its end.
    """
    covering = (made.ends > start) & (made.starts < end)
    trimmed = (made.starts > start) & (made.starts <= end)
    found = np.flatnonzero(np.where(made.starts < made.ends, covering, trimmed))
    if not len(found):
        raise InputError("the tokenizer makes no token of a turn that is trained.")
    return int(found[0]), int(found[-1]) + 1


def _turn_of_tokens(made: _Rendered) -> Ints:
    """(L,) number of the message that each token starts in, as far as borders are known."""
    known = [(place, at) for place, at in enumerate(made.borders[:-1]) if at is not None]
    places = np.array([place for place, _ in known], np.int64)
    at = np.array([at for _, at in known], np.int64)
    return places[np.searchsorted(at, made.starts, side="right") - 1]


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as chat templates want it: arguments of calls as objects, not as JSON text."""
    made = {"role": message["role"], "content": message["content"]}
    extra = json.loads(message["tool_calls"]) if message["tool_calls"] else []
    if isinstance(extra, dict):
        made |= extra
    elif extra:
        made["tool_calls"] = extra
    if "tool_calls" in made:
        made["tool_calls"] = [_with_object(call) for call in made["tool_calls"]]
    return made


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # Where it is not JSON, the template shows the text as it is.
        with contextlib.suppress(json.JSONDecodeError):
            function["arguments"] = json.loads(arguments)
    return {**call, "function": function}
