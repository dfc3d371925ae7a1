"""A model behind an HTTP server as a black box: the log probabilities of its first token.

`POST {base_url}/completions` with the text, or `/chat/completions` with the text as the only
message; one token is asked for, with its `top_logprobs` likeliest candidates, at temperature 0.
"""

from __future__ import annotations

import asyncio
import threading
import warnings
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from ...errors import InputError, ModelError, PruneryWarning, RecipeError
from ...pruners.contract import FloatArray, IntArray
from ..openai_calls import Caller, CallFailure, Endpoint, Ledger
from .asking import Answer, AskOptions
from .first_token import LabelWords, TokenReply, parse_reply
from .task import PromptTaskOptions

if TYPE_CHECKING:
    import httpx

Pair = tuple[str, str]

#: Tokens that a server adds to a text (its first token, the space before the text), and to a chat.
_ADDED = 8
_CHAT_ADDED = 64


class EndpointLabels:
    """An endpoint as a black box; see `asking.RemoteBox` and `BlackBox`.

    The words of the classes are scored by the first token that the model would write (see
    `LabelWords`): a word of several tokens by its first one. A class that is not among the
    candidates gets the most that it can have, never a guess; where no class is, all are equal.
    Both are counted.

    Requests go out one by one until log probabilities have come. A server that gives none is
    refused by its first answer, before anything more is sent.

    Parameters
    ----------
    task
        What is asked, and where.
    words
        Words for the C classes.
    how
        Concurrency, time-out, retries and the variable that holds the key.

    Attributes
    ----------
    written_tokens
        Tokens that one answer writes at most; raised where the server counts more.
    bounded
        Classes that got their bound, over all replies of this object, blind ones aside.
    blind
        Replies whose candidates begin no class.
    unresolved
        Replies whose likeliest label token begins several classes.
    ledger
        Requests, retries and tokens so far. A try that got no reply is not charged to a budget,
        though a server may have worked on it.

    Raises
    ------
    RecipeError
        The URL is odd, or a word is a prefix of another.
    """

    def __init__(
        self,
        task: PromptTaskOptions,
        words: Sequence[str],
        how: AskOptions,
        *,
        backoff_seconds: float = 1.0,
    ) -> None:
        self.classes = len(words)
        self.written_tokens = 1
        self.bounded = self.blind = self.unresolved = 0
        self.ledger = Ledger()
        self._template = task.templates()[0]
        self._words = words
        self._labels = LabelWords(words)
        self._chat = task.protocol == "chat"
        self._top = task.top_logprobs
        self._excess = 0  # of what the server counted over our bound, at most so far
        self._heard = False
        try:
            self._endpoint = Endpoint(
                base_url=task.base_url or "",
                model=task.model,
                max_tokens=1,
                api_key_env=how.api_key_env,
                concurrency=how.concurrency,
                timeout_seconds=how.timeout_seconds,
                retries=how.retries,
                backoff_seconds=backoff_seconds,
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise RecipeError(f"`{first['loc'][0]}` of the endpoint: {first['msg']}.") from error
        self._endpoint.check_key()
        self._caller = Caller(
            self._endpoint,
            "chat/completions" if self._chat else "completions",
            parse_reply,
            self.ledger,
            mendable="`base_url`, `model`, `protocol`",
        )
        self._session: _Session | None = None

    def label_logprobs(self, prompts: Sequence[str], rows: Sequence[str]) -> FloatArray:
        """Log probabilities (P, N, C) float32; see `BlackBox` and `answer_all`."""
        made = np.zeros((len(prompts) * len(rows), self.classes), np.float32)

        def done(place: int, answer: Answer) -> None:
            made[place] = answer[0]

        self.answer_all([(prompt, row) for prompt in prompts for row in rows], done)
        return made.reshape(len(prompts), len(rows), self.classes)

    def input_tokens(self, prompts: Sequence[str], rows: Sequence[str]) -> IntArray:
        """An upper bound on the tokens of each (prompt, row), (P, N) int64.

        No token is less than a byte of UTF-8, so the bytes do, and some for what the server adds.
        Where it ever counted more than that, later bounds are higher by as much.
        """
        render = self._template.render
        frames = np.array([_bytes(render(prompt=prompt)) for prompt in prompts], np.int64)
        texts = np.array([_bytes(row) for row in rows], np.int64)
        added = _ADDED + (_CHAT_ADDED if self._chat else 0) + self._excess
        return frames[:, None] + texts[None, :] + added

    def answer_all(self, pairs: Sequence[Pair], done: Callable[[int, Answer], None]) -> None:
        """Ask all; `done(place, answer)` is called as each arrives, in the event loop's thread.

        After an error nothing more is sent; replies under way are waited for and handed over.

        Raises
        ------
        InputError
            The endpoint refuses the key, the path or the model; it gives no log probabilities;
            or it refuses a text, which is named.
        ModelError
            It stays away, or what it says of a text is not the protocol's JSON in any try.
        """
        if not pairs:
            return
        if self._session is None:
            self._session = _Session(self._endpoint)
        places = list(range(len(pairs)))
        while places and not self._heard:
            self._session.run(self._ask(self._session.http, pairs, places[:1], done))
            places = places[1:]
        if places:
            self._session.run(self._ask(self._session.http, pairs, places, done))

    async def _ask(
        self,
        http: httpx.AsyncClient,
        pairs: Sequence[Pair],
        places: Sequence[int],
        done: Callable[[int, Answer], None],
    ) -> None:
        def came(number: int, reply: TokenReply | CallFailure) -> None:
            pair = pairs[places[number]]
            done(places[number], self._answer(pair, self._usable(pair, reply)))

        await self._caller.call_all(http, self._bodies(pairs[place] for place in places), came)

    def _bodies(self, pairs: Iterator[Pair]) -> Iterator[dict[str, Any]]:
        for prompt, row in pairs:
            text = self._template.render(prompt=prompt, text=row)
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"prompt {prompt!r} on row {row[:80]!r} is not Unicode text ({error}), so it"
                    " cannot be sent. Mend or drop the row."
                ) from error
            body = {"model": self._endpoint.model, **self._endpoint.sampling()}
            if self._chat:
                messages = [{"role": "user", "content": text}]
                yield {**body, "messages": messages, "logprobs": True, "top_logprobs": self._top}
            else:
                yield {**body, "prompt": text, "logprobs": self._top}

    def _usable(self, pair: Pair, reply: TokenReply | CallFailure) -> TokenReply:
        """The reply, or the error that it is."""
        where = f"for prompt {pair[0]!r} on row {pair[1][:80]!r}"
        url = f"{self._endpoint.base_url}/{self._caller.path}"
        if isinstance(reply, CallFailure):
            if reply.reason == "malformed":
                raise ModelError(
                    f"{url} gave no completion in {reply.requests} tries {where}: {reply.detail}."
                    " Check that the server speaks the OpenAI protocol. Answers so far are kept."
                )
            if not self._heard and "logprob" in reply.detail.lower():
                raise InputError(
                    f"{url} refuses to be asked for {self._top} log probabilities: {reply.detail}."
                    " Set `top_logprobs` to what it gives, or ask a server that gives some."
                )
            raise InputError(
                f"{url} refuses the text {where}: {reply.detail}. Shorten or drop the row, or use"
                " a model that reads more. Answers so far are kept."
            )
        if reply.partial:  # which tells nothing of what the server can do
            return reply
        if reply.candidates is None or not (reply.candidates or self._heard):
            raise InputError(
                f"{url} gave no log probabilities {where}, though asked for {self._top}"
                " (`top_logprobs`). Use a server that gives them, such as vLLM or llama.cpp, or"
                " try the other `protocol`; nothing more was sent."
            )
        self._heard = True
        return reply

    def _answer(self, pair: Pair, reply: TokenReply) -> Answer:
        assert reply.candidates is not None  # `_usable` refuses it
        scored = self._labels.score(reply.candidates)
        self.bounded += scored.bounded
        self.blind += scored.blind
        if scored.unresolved:
            self._warn_unresolved(scored.unresolved)
        bound = int(self.input_tokens([pair[0]], [pair[1]])[0, 0])
        read = bound if reply.prompt_tokens is None else reply.prompt_tokens
        self._excess += max(0, read - bound)
        written = 1 if reply.completion_tokens is None else reply.completion_tokens
        self.written_tokens = max(self.written_tokens, written)
        return scored.logprobs, read, written

    def _warn_unresolved(self, token: bytes) -> None:
        self.unresolved += 1
        if self.unresolved == 1:
            words = [self._words[place] for place in self._labels.begun_by(token)]
            warnings.warn(
                f"the model would write {token.decode('utf-8', 'replace')!r}, which begins"
                f" {' and '.join(map(repr, words))}: such replies count for each alike. Give"
                " words that begin differently in `verbalisers`.",
                PruneryWarning,
                stacklevel=2,
            )


class _Session:
    """One event loop and its connections, kept from call to call, closed when dropped."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._runner = asyncio.Runner()
        self.http = self._runner.run(_opened(endpoint))
        weakref.finalize(self, _close, self._runner, self.http)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        self._runner.run(work)


async def _opened(endpoint: Endpoint) -> httpx.AsyncClient:
    return endpoint.open_http()


def _close(runner: asyncio.Runner, http: httpx.AsyncClient) -> None:
    def close() -> None:
        runner.run(http.aclose())
        runner.close()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        close()
    else:  # garbage is collected while some other loop runs here, beside which none may run
        thread = threading.Thread(target=close)
        thread.start()
        thread.join()


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
