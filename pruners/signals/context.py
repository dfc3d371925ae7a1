"""Signals of context pruning: one run of a Provence network over pairs of question and passage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from ...errors import InputError
from ..context.packing import Frame, Packed, Pair, Span, TokenSource, pack
from ..contract import Array, FloatArray, IntArray, Signals
from ..ragged import segment_mean
from .context_blocks import BlockScores, batch_arrays, not_finite

LOGIT_WITHOUT_TEXT = np.float32(-100.0)
"""Ranking score of a passage without a single token: no model ran, and it ranks last."""


class Batching(NamedTuple):
    """How blocks are put into forward passes, longest first.

    tokens
        Cells of one pass, padding included; a block longer than it goes alone.
    slack
        A block joins a pass only if its padding stays within this share of the row.
    """

    tokens: int
    slack: float


CPU_BATCHING = Batching(2048, 0.08)
"""A processor is as quick a token with one row as with thirty: padding is what costs."""
ACCELERATOR_BATCHING = Batching(65536, 0.5)
"""A GPU wants many rows at once, and pads more gladly than it waits."""


class Forward(Protocol):
    """A network behind arrays: (B, T) int64 ids, mask and token types in, float32 logits out."""

    def __call__(self, ids: Array, mask: Array, types: Array) -> tuple[FloatArray, FloatArray]:
        """Ranking logits (B,) and keep logits (B, T), both float32; padding may hold anything."""


class TorchForward:
    """A loaded Provence network as a `Forward`; runs on the device its weights are on."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()
        self._device = next(model.parameters()).device

    @property
    def on_cpu(self) -> bool:
        """Whether the weights are on the CPU."""
        return bool(self._device.type == "cpu")

    def __call__(self, ids: Array, mask: Array, types: Array) -> tuple[FloatArray, FloatArray]:
        """Run one batch; bf16 and float16 networks give float32 logits as well."""
        import torch

        device = self._device
        with torch.inference_mode():
            out = self._model(
                torch.from_numpy(ids).to(device),
                torch.from_numpy(mask).to(device),
                torch.from_numpy(types).to(device),
            )
            rank = out.rank_logit.float().cpu().numpy()
            keep = out.keep_logit.float().cpu().numpy()
        return rank, keep


@dataclass(frozen=True, slots=True)
class ContextSignals:
    """What the network said about P pairs with S sentences and T tokens in all.

    Rows are sentences, in the order of the pairs and of the text. `keep_probability` of a
    sentence is the mean over its tokens, over all its pieces where it was cut, each token
    counting once; 0 for a sentence without a token. The tokens' own probabilities are kept
    beside it (`token_*`, ragged): the vote's score depends on the threshold, so that another
    threshold needs them, and no model.

    Attributes
    ----------
    question
        (P,) int64, number of the question of each pair.
    relevance_logit
        (P,) float32, maximum over the pair's blocks; `LOGIT_WITHOUT_TEXT` where it has none.
    blocks
        (P,) int64, forward rows spent on the pair.
    title_keep_probability
        (P,) float32, mean over the title's tokens in the first block; 0 without a title.
    packed
        Borders, lengths and ids.
    keep_probability
        (S,) float32 in [0, 1], higher is kept.
    token_keep_probability
        (T,) float32 in [0, 1]; the borders are `packed.token_offset`.
    """

    question: IntArray
    relevance_logit: FloatArray
    blocks: IntArray
    title_keep_probability: FloatArray
    packed: Packed
    keep_probability: FloatArray
    token_keep_probability: FloatArray

    @property
    def passage(self) -> IntArray:
        """(S,) int64, number of the pair that each sentence stands in."""
        counts = np.diff(self.packed.sentence_offset)
        return np.repeat(np.arange(len(counts), dtype=np.int64), counts)

    @property
    def position(self) -> IntArray:
        """(S,) int64, place of each sentence in its passage, from 0."""
        starts = self.packed.sentence_offset
        return np.arange(starts[-1], dtype=np.int64) - starts[self.passage]

    @property
    def tokens(self) -> IntArray:
        """(S,) int64, tokens of each sentence."""
        return np.diff(self.packed.token_offset)

    def signals(
        self,
        ids: Array | None = None,
        *,
        passage_ids: Array | None = None,
        question_ids: Array | None = None,
        token_probabilities: bool = True,
    ) -> Signals:
        """The sentence rows under the contract's names.

        `ids` (S,), `passage_ids` (P,) and `question_ids` (P,) default to running numbers.
        """
        passage = self.passage
        of_pair = np.arange(len(self.question)) if passage_ids is None else passage_ids
        asked = self.question if question_ids is None else question_ids
        arrays = {
            "id": np.arange(len(passage)) if ids is None else ids,
            "passage": np.asarray(of_pair, np.int64)[passage],
            "question": np.asarray(asked, np.int64)[passage],
            "position": self.position,
            "tokens": self.tokens,
            "keep_probability": self.keep_probability,
            "relevance_logit": self.relevance_logit[passage],
        }
        if token_probabilities:
            arrays["token_offset"] = self.packed.token_offset
            arrays["token_keep_probability"] = self.token_keep_probability
        return Signals(arrays)


def context_signals(
    loaded: Any,
    questions: Sequence[str],
    passages: Sequence[Sequence[str]],
    titles: Sequence[Sequence[str | None] | None] | None = None,
    *,
    sentences: Sequence[Sequence[Sequence[Span]]] | None = None,
    batching: Batching | None = None,
) -> ContextSignals:
    """Run the network over each question's passages, all questions together.

    Parameters
    ----------
    loaded
        A `LoadedProvence` (model, tokenizer, config), or a `Scorer`, which keeps the
        tokenizer's copy between calls.
    questions, passages, titles
        Q questions; for each, its passages; for each passage, its title or None.
    sentences
        For each passage, borders that cover it; found by `split_sentences` where absent.
    batching
        How blocks go into forward passes; fitted to the device where absent.

    Returns
    -------
    ContextSignals
        Pairs in the order given, question by question. Equal (question, title, passage) are
        scored once.

    Raises
    ------
    InputError
        Something is no string, a question is blank, or lengths differ.
    ModelError
        The network gave a number that is not finite.
    """
    pairs, question = make_pairs(questions, passages, titles, sentences)
    scorer = loaded if isinstance(loaded, Scorer) else Scorer.of(loaded)
    return scorer(pairs, question, batching=batching)


def pair_signals(
    loaded: Any,
    questions: Sequence[str],
    passages: Sequence[str],
    titles: Sequence[str | None] | None = None,
    *,
    sentences: Sequence[Sequence[Span]] | None = None,
    batching: Batching | None = None,
) -> ContextSignals:
    """`context_signals` for P aligned pairs: one question, passage and title a row."""
    _check_list("questions", questions)
    _check_list("passages", passages)
    _check_length("passages", passages, len(questions), "questions")
    for what, given in (("titles", titles), ("sentences", sentences)):
        if given is not None:
            _check_length(what, given, len(questions), "questions")
    return context_signals(
        loaded,
        questions,
        [[passage] for passage in passages],
        None if titles is None else [[title] for title in titles],
        sentences=None if sentences is None else [[spans] for spans in sentences],
        batching=batching,
    )


@dataclass(frozen=True, slots=True)
class Scorer:
    """A network ready to score pairs: its forward pass, tokens and frame."""

    forward: Forward
    source: TokenSource
    frame: Frame
    batching: Batching = CPU_BATCHING

    @classmethod
    def of(cls, loaded: Any, forward: Forward | None = None) -> Scorer:
        """From a `LoadedProvence`; `forward` replaces its network (another back end)."""
        made = TorchForward(loaded.model) if forward is None else forward
        source = TokenSource(loaded.tokenizer)
        frame = Frame.of(loaded.tokenizer, loaded.config)
        on_cpu = getattr(made, "on_cpu", True)
        return cls(made, source, frame, CPU_BATCHING if on_cpu else ACCELERATOR_BATCHING)

    def __call__(
        self, pairs: Sequence[Pair], question: IntArray, *, batching: Batching | None = None
    ) -> ContextSignals:
        """Score pairs; equal ones once. `question` (P,) is passed through."""
        scores, place = self.prepare(pairs)
        self.run(scores, batching=batching)
        if not scores.finite.all():
            raise not_finite()
        return gather(scores, place, question)

    def prepare(self, pairs: Sequence[Pair]) -> tuple[BlockScores, IntArray]:
        """Tokenise and pack the distinct pairs; and the number of each given one among them."""
        first: dict[Pair, int] = {}
        place = np.array([first.setdefault(pair, len(first)) for pair in pairs], np.int64)
        return BlockScores(pack(list(first), self.source, self.frame)), place

    def run(self, scores: BlockScores, *, batching: Batching | None = None) -> None:
        """Score all blocks, in batches of their own."""
        _run(scores, self.forward, batching or self.batching)


def make_pairs(
    questions: Sequence[str],
    passages: Sequence[Sequence[str]],
    titles: Sequence[Sequence[str | None] | None] | None = None,
    sentences: Sequence[Sequence[Sequence[Span]]] | None = None,
) -> tuple[list[Pair], IntArray]:
    """Checked pairs in order, and the number of each one's question, (P,) int64."""
    _check_list("questions", questions)
    _check_list("passages_per_question", passages)
    _check_length("passages_per_question", passages, len(questions), "questions")
    if titles is not None:
        _check_length("titles", titles, len(questions), "questions")
    if sentences is not None:
        _check_length("sentences", sentences, len(questions), "questions")
    pairs: list[Pair] = []
    asked: list[int] = []
    for q, (question, own) in enumerate(zip(questions, passages, strict=True)):
        where = f"question {q}" if len(questions) > 1 else "the question"
        _check_text(where, question)
        if not question.strip():
            raise InputError(f"{where} is blank; expected a question to prune for.")
        _check_list(f"the passages of {where}", own)
        named = titles[q] if titles is not None else None
        if named is not None:
            _check_list(f"the titles of {where}", named)
            _check_length(f"the titles of {where}", named, len(own), "passages")
        borders = sentences[q] if sentences is not None else None
        if borders is not None:
            _check_length(f"the sentences of {where}", borders, len(own), "passages")
        for p, passage in enumerate(own):
            _check_text(f"passage {p} of {where}", passage)
            title = named[p] if named is not None else None
            if title is not None:
                _check_text(f"title {p} of {where}", title)
            spans = tuple((int(a), int(b)) for a, b in borders[p]) if borders is not None else None
            pairs.append(Pair(question, passage, title, spans))
            asked.append(q)
    return pairs, np.array(asked, np.int64)


def _check_text(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise InputError(f"{what} must be a string; found {type(value).__name__}: {value!r:.80}.")


def _check_list(what: str, value: object) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InputError(
            f"{what} must be a list of strings; found {type(value).__name__}."
            " Put a single text in a list."
        )


def _check_length(what: str, value: Sequence[Any], expected: int, of: str) -> None:
    if len(value) != expected:
        raise InputError(f"{what} has {len(value)} entries for {expected} {of}; give one for each.")


def batches(lengths: IntArray, batching: Batching) -> Iterator[IntArray]:
    """Blocks to run together, longest first, within `batching`. Each block once."""
    order = np.argsort(-lengths, kind="stable")
    ranked = -lengths[order]  # rising, as searchsorted wants it
    start = 0
    while start < len(order):
        longest = -int(ranked[start])
        shortest = longest * (1.0 - batching.slack)
        alike = int(np.searchsorted(ranked, -shortest, side="right"))
        stop = min(start + max(1, batching.tokens // longest), max(alike, start + 1))
        yield order[start:stop]
        start = stop


def _run(scores: BlockScores, forward: Forward, batching: Batching) -> None:
    lengths = scores.lengths
    for group in batches(lengths, batching):
        blocks = [(scores.packed, int(block)) for block in group]
        rank, keep = forward(*batch_arrays(blocks, int(lengths[group[0]])))
        for row, (_, block) in enumerate(blocks):
            scores.put(block, float(rank[row]), keep[row])


def gather(scores: BlockScores, place: IntArray, question: IntArray) -> ContextSignals:
    """Results of distinct pairs laid out for the pairs as they were given.

    `place` (P,) is the number of each given pair among the distinct ones, `question` (P,) that of
    its question. Numbers of a pair whose scores are not finite mean nothing.
    """
    packed, token = scores.packed, scores.token_keep_probability()
    if len(place) != len(scores.finite) or (place != np.arange(len(place))).any():
        packed, token = _repeat(packed, token, place)
    mean = segment_mean(token, packed.token_offset)
    return ContextSignals(
        question=question,
        relevance_logit=scores.relevance_logit(LOGIT_WITHOUT_TEXT)[place],
        blocks=scores.blocks[place],
        title_keep_probability=scores.title_keep_probability[place],
        packed=packed,
        keep_probability=np.clip(mean, 0.0, 1.0).astype(np.float32),
        token_keep_probability=token,
    )


def _repeat(packed: Packed, token: FloatArray, place: IntArray) -> tuple[Packed, FloatArray]:
    sentences = ranges(packed.sentence_offset, place)
    tokens = ranges(packed.token_offset, sentences)
    none = np.zeros(0, np.int64)
    made = Packed(
        frame=packed.frame,
        spans=packed.spans[sentences],
        sentence_offset=_borders(np.diff(packed.sentence_offset)[place]),
        token_offset=_borders(np.diff(packed.token_offset)[sentences]),
        ids=packed.ids[tokens],
        question_ids=[packed.question_ids[i] for i in place],
        title_ids=[packed.title_ids[i] for i in place],
        title_tokens=packed.title_tokens[place],
        truncated=packed.truncated[place],
        # Blocks were run once for all copies; none belongs to a row of this view.
        block_pair=none,
        block_start=none,
        block_end=none,
    )
    return made, token[tokens]


def _borders(counts: IntArray) -> IntArray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def ranges(offset: IntArray, rows: IntArray) -> IntArray:
    """Positions offset[r] .. offset[r + 1] - 1 of each row in turn, concatenated, int64."""
    sizes = np.diff(offset)[rows]
    total = int(sizes.sum())
    if not total:
        return np.zeros(0, np.int64)
    starts = np.repeat(offset[rows] - (np.cumsum(sizes) - sizes), sizes)
    return np.asarray(starts + np.arange(total), np.int64)
