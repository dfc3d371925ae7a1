"""Endpoints against servers that others wrote, on models whose answers are known.

llama.cpp's own server (xllamacpp) always; `llama_cpp.server` and `transformers serve` where they
are installed. The models run in stock transformers beside them.
"""

from __future__ import annotations

import importlib.util
import math
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import numpy as np
import pytest

from prunery.errors import InputError
from prunery.pipelines.prompts.answer_log import SqliteLog
from prunery.pipelines.prompts.asking import Asker, AskOptions, Limits
from prunery.pipelines.prompts.endpoint import EndpointLabels
from prunery.pipelines.prompts.task import PromptTaskOptions

from .gguf_models import STORIES, Small, random_small, stories, write_gguf

PROMPTS = ["", "very", "not so"]
ROWS = ["the dog was", "a big, red ball. it is", "lily saw her mom and was"]
WORDS = {"random": ["good", "bad"], "stories": ["happy", "sad", "little"]}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module", params=["random", "stories"])
def small(request, tmp_path_factory):
    """(name, model, GGUF file)"""
    if request.param == "stories" and not STORIES.exists():
        pytest.skip(f"no {STORIES}: stories260K is not at hand")
    pytest.importorskip("gguf", reason="gguf writes the model for llama.cpp")
    model = stories() if request.param == "stories" else random_small()
    folder = tmp_path_factory.mktemp("gguf")
    return request.param, model, write_gguf(model, folder / f"{request.param}.gguf")


@pytest.fixture(scope="module")
def llama_cpp(small):
    """URL of llama.cpp's server, in float32 throughout."""
    x = pytest.importorskip("xllamacpp", reason="xllamacpp is llama.cpp's server")
    asked = x.CommonParams()
    asked.model.path = str(small[2])
    asked.n_ctx, asked.n_parallel = 512, 2
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
    asked.warmup, asked.verbosity = False, -1
    asked.cache_type_k = asked.cache_type_v = x.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = x.Server(asked)
    yield server.listening_address + "/v1"
    del server


def box(url: str, words, **more) -> EndpointLabels:
    task = PromptTaskOptions(black_box="endpoint", model="m", base_url=url, **more)
    how = AskOptions(concurrency=4, timeout_seconds=30, retries=1)
    return EndpointLabels(task, words, how, backoff_seconds=0.05)


def whole(piece: bytes) -> bool:
    """Whether it is more than the first byte of a letter."""
    return not (len(piece) == 1 and 0xC0 <= piece[0] <= 0xF7)


def expected(model: Small, words, top: int) -> np.ndarray:
    """Classes' probabilities from the `top` likeliest tokens, worked out in plain Python."""
    made = np.zeros((len(PROMPTS), len(ROWS), len(words)))
    for p, prompt in enumerate(PROMPTS):
        for n, row in enumerate(ROWS):
            after = model.next_logprobs(f"{row} {prompt}".strip())
            after = sorted(after, key=lambda item: -item[1])[:top]
            if not whole(after[0][0]):  # then llama.cpp tells no candidates
                made[p, n] = 1 / len(words)
                continue
            mass = [
                sum(
                    math.exp(value)
                    for piece, value in after
                    if piece.lstrip(b" ") and word.encode().startswith(piece.lstrip(b" ").lower())
                )
                for word in words
            ]
            left = 1 - sum(math.exp(value) for _, value in after)
            bound = min(math.exp(after[-1][1]), max(left, 2.0**-24))
            mass = [m or bound for m in mass] if any(mass) else [1.0] * len(words)
            made[p, n] = np.array(mass) / sum(mass)
    return made


@pytest.mark.parametrize("protocol", ["completions", "chat"])
@pytest.mark.parametrize("top", [5, 20, 600])
def test_llama_cpp_answers_as_transformers_does(small, llama_cpp, protocol, top):
    name, model, _ = small
    made = box(llama_cpp, WORDS[name], protocol=protocol, top_logprobs=top)
    got = made.label_logprobs(PROMPTS, ROWS)
    want = expected(model, WORDS[name], top)
    assert np.exp(got.astype(np.float64)) == pytest.approx(want, abs=2e-4)
    assert (np.ptp(want, axis=1) > 0.01).any()  # rows matter, so equal answers mean something


def test_llama_cpp_counts_tokens_below_the_bound(small, llama_cpp):
    name, model, _ = small
    for protocol in ("completions", "chat"):
        made = box(llama_cpp, WORDS[name], protocol=protocol)
        pairs, heard = [(prompt, row) for prompt in PROMPTS for row in ROWS], {}
        made.answer_all(pairs, heard.__setitem__)
        bounds = made.input_tokens(PROMPTS, ROWS).ravel()
        for place, (prompt, row) in enumerate(pairs):
            read = len(model.tokenizer.encode(f"{row} {prompt}".strip()))
            assert heard[place][1:] == (read, 1)
            assert read <= bounds[place]
        assert made.written_tokens == 1


def test_llama_cpp_refuses_a_text_by_name(small, llama_cpp):
    long = "word " * 400
    with pytest.raises(InputError, match="prompt 'p' on row 'word word.*context"):
        box(llama_cpp, WORDS[small[0]]).label_logprobs(["p"], ["short", long])


def test_a_budget_and_a_log_before_llama_cpp(small, llama_cpp, tmp_path):
    words = WORDS[small[0]]

    def ask():
        asker = Asker(
            box(llama_cpp, words), ROWS, Limits(queries=7), SqliteLog(tmp_path / "log"), batch=4
        )
        return asker, *asker.ask(PROMPTS)

    first, found, tokens = ask()
    again, same, same_tokens = ask()
    assert len(found) == 2 and first.exhausted(PROMPTS[2]) == "queries"
    assert np.array_equal(found, same) and np.array_equal(tokens, same_tokens)
    assert (first.spent.sent, again.spent.sent) == (6, 0)
    assert first.spent.tokens == again.spent.tokens == tokens.sum()


@contextmanager
def process(ready: str, *command: str):
    """A server process on a free port; its URL once `ready` answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = subprocess.Popen(
        [sys.executable, "-m", *command, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    try:
        until = time.monotonic() + 60
        while not _answers(f"http://localhost:{port}{ready}"):
            assert started.poll() is None, f"{command} ended with {started.returncode}"
            assert time.monotonic() < until, f"{command} did not start in 60 s"
            time.sleep(0.2)
        yield f"http://localhost:{port}/v1"
    finally:
        started.terminate()
        started.wait(20)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


# Not the random one: llama-cpp-python lists tokens by their text, where its letters stand twice.
@pytest.mark.parametrize("small", ["stories"], indirect=True)
@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama-cpp-python is not installed: it has no wheel, and is built from source",
)
def test_llama_cpp_python_answers_as_transformers_does(small):
    name, model, path = small
    command = ["llama_cpp.server", "--model", str(path), "--n_ctx", "256", "--n_threads", "1"]
    with process("/v1/models", *command, "--logits_all", "true") as url:
        for protocol in ("completions", "chat"):
            made = box(url, WORDS[name], protocol=protocol, top_logprobs=20)
            got = made.label_logprobs(PROMPTS, ROWS)
            want = expected(model, WORDS[name], 20)
            # Its cache of keys and values is float16.
            assert np.exp(got) == pytest.approx(want, abs=5e-3)


@pytest.mark.skipif(
    importlib.util.find_spec("openai") is None,
    reason="`transformers serve` needs transformers[serving]",
)
def test_transformers_serve_is_refused_for_its_silence(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {piece: n for n, piece in enumerate(["<unk>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    wrapped.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    wrapped.save_pretrained(tmp_path)
    random_small().model.save_pretrained(tmp_path)
    command = ["transformers.cli.transformers", "serve", str(tmp_path), "--device", "cpu"]
    with process("/health", *command) as url:
        for protocol in ("completions", "chat"):
            task = PromptTaskOptions(
                black_box="endpoint", model=str(tmp_path), base_url=url, protocol=protocol
            )
            made = EndpointLabels(task, ["good", "bad"], AskOptions(retries=0))
            with pytest.raises(InputError, match="no log probabilities.*`top_logprobs`"):
                made.label_logprobs(PROMPTS, ROWS)
            assert made.ledger.requests == 1
