"""A small language model trained on the chats at hand, for runs without a model of one's own.

A byte-level BPE tokenizer with a ChatML-like template and a small Llama, trained on all tokens
of the chats for a fixed number of steps. It knows little and is no model to use, but its losses
and attentions differ from token to token as a large model's do, and its checkpoints are the
history of a real run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import InputError, ModelError
from .causal_files import WEIGHTS, checkpoint_name

START, TURN, END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = (START, TURN, END, PAD)
LONGEST = 2048  # tokens, what the model's positions reach

# {% generation %} marks what an assistant says, its end-of-turn token included.
TEMPLATE = (
    "{{- bos_token -}}"
    "{%- if tools -%}"
    "{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- set calls = message.get('tool_calls') -%}"
    "{%- if calls and calls is not string -%}{%- set calls = calls | tojson -%}{%- endif -%}"
    "{%- set said = (message['content'] or '') + (calls or '') + '<|im_end|>' -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- said -}}{%- endgeneration -%}"
    "{%- else -%}{{- said -}}{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model and of its training, as the options of the step name them."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    max_length: int
    steps: int
    batch_tokens: int
    learning_rate: float
    checkpoints: int


@dataclass(frozen=True, slots=True)
class LogPoint:
    """Mean loss (nats a token) since the last point, after so many steps and tokens."""

    step: int
    tokens: int
    loss: float


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of those texts with the template above; the same every time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    wrap: Any = PreTrainedTokenizerFast
    tokenizer = wrap(
        tokenizer_object=made,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        model_max_length=LONGEST,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def rendered(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> str:
    """One row of chats as the text that is trained on; plain text gets a start and an end."""
    if messages[0]["role"] == "text":
        return START + END.join(message["content"] for message in messages) + END
    made: str = tokenizer.apply_chat_template(list(messages), tokenize=False)
    return made


def train_causal(
    chats: Sequence[Sequence[dict[str, Any]]], shape: Shape, folder: Path, *, seed: int
) -> list[LogPoint]:
    """Train tokenizer and model on chats and write them to `folder`, checkpoints beside.

    `folder` then loads with `load_causal`; checkpoint i has its weights in
    `checkpoint_name(i)`, taken after i + 1 of checkpoints + 1 equal parts of the steps. The same
    chats, shape, seed and number of threads give the same files on one machine.

    Raises
    ------
    InputError
        There are no chats, or too few for one window.
    ModelError
        The loss is no longer a number.
    """
    if not chats:
        raise InputError("expected chats to train a model on, found none. Check `read_chats`.")
    texts = [message["content"] for messages in chats for message in messages]
    tokenizer = train_tokenizer(texts, shape.vocab_size)
    encode = tokenizer.backend_tokenizer.encode
    rows = [
        np.array(encode(rendered(tokenizer, row), add_special_tokens=False).ids, np.int64)
        for row in chats
    ]
    if sum(map(len, rows)) <= shape.max_length:
        raise InputError(
            f"expected chats of more than {shape.max_length} tokens, one window; found"
            f" {sum(map(len, rows))}. Read more chats, or lower `max_length`."
        )
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(shape, tokenizer)
        return _train(model, rows, shape, folder, seed)


def _new_model(shape: Shape, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=math.ceil(shape.hidden_size / 6) * 16,  # 8/3, a multiple of 16
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _train(
    model: Any, rows: list[npt.NDArray[np.int64]], shape: Shape, folder: Path, seed: int
) -> list[LogPoint]:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=shape.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    marks = {
        round(shape.steps * (number + 1) / (shape.checkpoints + 1)): number
        for number in range(shape.checkpoints)
    }
    log: list[LogPoint] = []
    since: list[float] = []
    every = max(1, shape.steps // 20)
    batches = _batches(rows, shape, seed)
    model.train()
    for step in range(1, shape.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = shape.learning_rate * _rate(step, shape.steps)
        ids = torch.from_numpy(next(batches))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        since.append(float(loss.detach()))
        if not math.isfinite(since[-1]):
            raise ModelError(
                f"train_lm: expected a finite loss, found {since[-1]} at step {step}. Lower"
                " `learning_rate`."
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % every == 0 or step == shape.steps:
            log.append(LogPoint(step, step * ids.numel(), sum(since) / len(since)))
            since.clear()
        if step in marks:
            _save(model, folder / checkpoint_name(marks[step]))
    _save(model, folder / WEIGHTS)
    model.config.save_pretrained(folder)
    return log


def _save(model: Any, path: Path) -> None:
    from safetensors.torch import save_file

    # The output layer is the embedding again, and a second line of metadata would change places
    # from run to run.
    state = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, path, metadata={"format": "pt"})


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: linear up over a twentieth, then a cosine down to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return step / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _batches(
    rows: list[npt.NDArray[np.int64]], shape: Shape, seed: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Endless (B, max_length) windows of the rows, joined in a new order in every epoch."""
    size = max(1, shape.batch_tokens // shape.max_length) * shape.max_length
    left = np.zeros(0, np.int64)
    epoch = 0
    while True:
        order = np.random.Generator(np.random.Philox([seed, epoch])).permutation(len(rows))
        left = np.concatenate([left, *(rows[row] for row in order)])
        while len(left) >= size:
            yield left[:size].reshape(-1, shape.max_length)
            left = left[size:]
        epoch += 1


def files_of(folder: Path) -> dict[str, Path]:
    """Name to path of what a loader needs and of the checkpoints."""
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    if WEIGHTS not in found:
        raise ModelError(f"{folder}: expected {WEIGHTS} after training, found {sorted(found)}.")
    return found
