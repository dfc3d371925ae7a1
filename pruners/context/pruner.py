"""`ContextPruner`: retrieved passages reranked and pruned, in one forward pass each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...errors import InputError, ModelError
from ..contract import BoolArray, IntArray
from ..models.device import pick_device
from ..signals.context import Batching, ContextSignals, Forward, Scorer, gather, make_pairs
from ..signals.context_blocks import BlockScores, not_finite
from .options import Pattern, PruneOptions
from .packing import Pair
from .provence import Aggregation, OnEmpty
from .result import PrunedPassage, ScoredPassage, decide, rethreshold

Titles = Sequence[str | None] | Literal["first_sentence"] | None
Backend = Literal["torch", "onnx"]


class ContextPruner:
    """Prune and rerank retrieved passages with a Provence network.

    Threads may share one pruner; it holds no state of a call.

    >>> pruner = ContextPruner.from_pretrained("default")
    >>> passages = ["Emma is a novel. It was written by Jane Austen. The cover is blue."]
    >>> best = pruner.prune("who wrote Emma", passages, threshold=0.5)[0]
    >>> best.text, best.relevance, best.compression, best.sentences[0].reason
    """

    def __init__(
        self, loaded: Any, *, forward: Forward | None = None, batching: Batching | None = None
    ) -> None:
        """`loaded` is a `LoadedProvence`; `forward` replaces its network (another back end)."""
        self._loaded = loaded
        self._scorer = Scorer.of(loaded, forward)
        self._batching = batching

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str,
        device: str | None = None,
        dtype: str | None = None,
        *,
        backend: Backend = "torch",
    ) -> ContextPruner:
        """Load weights: "default" (shipped with Prunery), a folder, or a hub id.

        Parameters
        ----------
        device
            "cpu", "cuda", "cuda:1", "mps"; None or "auto" is the first of CUDA and CPU there is.
        dtype
            "float32", "bfloat16", "float16"; None or "auto" is bfloat16 where the device
            multiplies it natively, else float32. Near the threshold bfloat16 may decide
            otherwise than float32; say "float32" where decisions must be the same everywhere.
        backend
            "torch", or "onnx" (extra `onnx`, CPU only, float32 weights).

        Raises
        ------
        ModelError
            Nothing loadable there, a digest differs, or a back end is not installed.
        """
        from ..models.provence import load_provence

        if backend not in ("torch", "onnx"):
            raise InputError(f"`backend` must be torch or onnx; found {backend!r}.")
        place = pick_device(device)
        if backend == "onnx":
            from ..signals.onnx_forward import onnx_forward

            if place != "cpu" or dtype not in (None, "auto", "float32"):
                raise InputError(
                    f"backend onnx runs on the CPU in float32; found {place} and {dtype}."
                    " Leave device and dtype out, or use backend='torch'."
                )
            loaded = load_provence(path_or_id, device="cpu", dtype="float32")
            return cls(loaded, forward=onnx_forward(loaded))
        return cls(load_provence(path_or_id, device=place, dtype=pick_dtype(place, dtype)))

    @property
    def config(self) -> Any:
        """The checkpoint's `ProvenceConfig` (default threshold, aggregation, licence)."""
        return self._loaded.config

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, hexadecimal."""
        return str(self._loaded.digest)

    def prune(
        self,
        question: str,
        passages: Sequence[str],
        *,
        titles: Titles = None,
        threshold: float | None = None,
        aggregation: Aggregation | None = None,
        top_k: int | None = None,
        max_tokens: int | None = None,
        min_sentences: int = 0,
        keep_title: bool = True,
        protect: Sequence[Pattern] = (),
        on_empty: OnEmpty = "empty",
    ) -> list[PrunedPassage]:
        """Prune one question's passages.

        Parameters
        ----------
        question, passages
            A question that is not blank; its passages (an empty list gives an empty list).
        titles
            One title (or None) a passage, shown to the network before its sentences and in
            every block; never part of `text`. "first_sentence": each passage opens with it.
        threshold
            A sentence is kept where its score is strictly above; 0..1, higher keeps less.
            None is the checkpoint's.
        aggregation
            "mean": score is the mean keep probability of the sentence's tokens. "vote": score
            is the share of tokens above the threshold, kept where more than half (exactly half
            is dropped). None is the checkpoint's.
        top_k
            Only the so many most relevant passages are given back.
        max_tokens
            Most tokens of the kept text of all passages given back, with the titles kept.
        min_sentences
            At least so many sentences of every passage, its best ones.
        keep_title
            A title stays iff another sentence of its passage does; else it is judged by its
            own score.
        protect
            Regular expressions; a sentence in which one is found is kept.
        on_empty
            A passage of which nothing is left: "empty", "top1" (its best sentence) or
            "original" (all of it). `max_tokens` comes after and may still empty it.

        Returns
        -------
        list[PrunedPassage]
            By relevance, highest first, ties by place; `index` is the place in `passages`.

        Raises
        ------
        InputError
            An argument is no string, blank, misaligned or out of range; the message names it.
        BudgetError
            Protected sentences alone exceed `max_tokens`.
        ModelError
            The network gave a number that is not finite.
        """
        return self.prune_batch(
            [question],
            [passages],
            titles=titles if titles is None or isinstance(titles, str) else [titles],
            threshold=threshold,
            aggregation=aggregation,
            top_k=top_k,
            max_tokens=max_tokens,
            min_sentences=min_sentences,
            keep_title=keep_title,
            protect=protect,
            on_empty=on_empty,
        )[0]

    def prune_batch(
        self,
        questions: Sequence[str],
        passages_per_question: Sequence[Sequence[str]],
        *,
        titles: Sequence[Sequence[str | None] | None] | Literal["first_sentence"] | None = None,
        threshold: float | None = None,
        aggregation: Aggregation | None = None,
        top_k: int | None = None,
        max_tokens: int | None = None,
        min_sentences: int = 0,
        keep_title: bool = True,
        protect: Sequence[Pattern] = (),
        on_empty: OnEmpty = "empty",
    ) -> list[list[PrunedPassage]]:
        """Prune many questions' passages in shared batches: one list a question, as `prune`.

        `titles` holds one list (or None) a question. `top_k` and `max_tokens` hold for each
        question by itself. Equal (question, title, passage) are scored once.
        """
        options = PruneOptions(
            threshold=threshold,
            aggregation=aggregation,
            top_k=top_k,
            max_tokens=max_tokens,
            min_sentences=min_sentences,
            keep_title=keep_title,
            protect=protect,  # type: ignore[arg-type]  # made a tuple there
            on_empty=on_empty,
        )
        return self.prune_with(options, questions, passages_per_question, titles=titles)

    def prune_with(
        self,
        options: PruneOptions,
        questions: Sequence[str],
        passages_per_question: Sequence[Sequence[str]],
        *,
        titles: Sequence[Sequence[str | None] | None] | Literal["first_sentence"] | None = None,
    ) -> list[list[PrunedPassage]]:
        """`prune_batch` with options checked beforehand."""
        scored = self.score(questions, passages_per_question, titles=titles)
        made = iter(decide(scored, options))
        return [next(made) if len(own) else [] for own in passages_per_question]

    def score(
        self,
        questions: Sequence[str],
        passages_per_question: Sequence[Sequence[str]],
        *,
        titles: Sequence[Sequence[str | None] | None] | Literal["first_sentence"] | None = None,
    ) -> list[ScoredPassage]:
        """Run the network and decide nothing: what `decide` needs, question by question."""
        prepared = self.prepare(questions, passages_per_question, titles=titles)
        self._scorer.run(prepared.scores, batching=self._batching)
        return prepared.passages()

    def prepare(
        self,
        questions: Sequence[str],
        passages_per_question: Sequence[Sequence[str]],
        *,
        titles: Sequence[Sequence[str | None] | None] | Literal["first_sentence"] | None = None,
    ) -> PreparedPassages:
        """Cut, tokenise and pack, and run nothing: a service puts blocks of many calls together.

        Raises InputError as `prune` does.
        """
        if isinstance(titles, str) and titles != "first_sentence":
            raise InputError(
                f"`titles` must be a list, None or 'first_sentence'; found {titles!r:.80}."
            )
        first = titles == "first_sentence"
        given = None if first or isinstance(titles, str) else titles
        pairs, question = make_pairs(questions, passages_per_question, given)
        scores, place = self._scorer.prepare(pairs)
        numbers = [number for own in passages_per_question for number in range(len(own))]
        return PreparedPassages(scores, pairs, question, place, numbers, first, self.config)

    @property
    def scorer(self) -> Scorer:
        """The network with its tokens, frame and batching."""
        return self._scorer

    def rethreshold(self, results: Sequence[PrunedPassage], **changes: Any) -> list[PrunedPassage]:
        """Decide again for one question's results without the model; see `result.rethreshold`."""
        return rethreshold(results, **changes)


@dataclass(frozen=True, slots=True)
class PreparedPassages:
    """Passages of some questions, tokenised and packed.

    Attributes
    ----------
    scores
        Of the distinct pairs of question, title and passage; run its blocks, then ask for
        `passages`.
    pairs
        As given, P of them; `question` and `index` (P,) are the places of each in the call.
    place
        (P,) int64, number of each pair among the distinct ones.
    title_first
        Whether each passage opens with its title.
    config
        The checkpoint's `ProvenceConfig`.
    """

    scores: BlockScores
    pairs: Sequence[Pair]
    question: IntArray
    place: IntArray
    index: Sequence[int]
    title_first: bool
    config: Any

    @property
    def finite(self) -> BoolArray:
        """(P,) bool, whether each passage's scores are numbers."""
        return self.scores.finite[self.place]

    def passages(self) -> list[ScoredPassage]:
        """What `decide` needs of every passage, question by question.

        Raises ModelError where a score is not finite, or not all blocks were run.
        """
        if not self.scores.finite.all():
            raise not_finite()
        return [one for one in self.finite_passages() if one is not None]

    def finite_passages(self) -> list[ScoredPassage | None]:
        """As `passages`, with None for a passage whose scores are not finite."""
        if self.scores.left:
            raise ModelError(f"{self.scores.left} blocks have no score yet; run them first.")
        signals = gather(self.scores, self.place, self.question)
        texts = [(pair.passage, pair.title) for pair in self.pairs]
        made = _scored(
            signals,
            self.index,
            texts,
            self.title_first,
            self.config.threshold,
            self.config.aggregation,
        )
        fine = self.finite
        return [one if fine[number] else None for number, one in enumerate(made)]


def _scored(
    signals: ContextSignals,
    places: Sequence[int],
    texts: Sequence[tuple[str, str | None]],
    first: bool,
    threshold: float,
    aggregation: Aggregation,
) -> list[ScoredPassage]:
    packed = signals.packed
    logits = signals.relevance_logit.tolist()
    blocks = signals.blocks.tolist()
    title_scores = signals.title_keep_probability.tolist()
    title_tokens = packed.title_tokens.tolist()
    made = []
    for number, (place, (passage, title)) in enumerate(zip(places, texts, strict=True)):
        a, b = packed.sentence_offset[number], packed.sentence_offset[number + 1]
        low, high = packed.token_offset[a], packed.token_offset[b]
        made.append(
            ScoredPassage(
                question=int(signals.question[number]),
                index=place,
                passage=passage,
                starts=packed.spans[a:b, 0],
                ends=packed.spans[a:b, 1],
                keep_probability=signals.keep_probability[a:b],
                token_offset=packed.token_offset[a : b + 1] - low,
                token_keep_probability=signals.token_keep_probability[low:high],
                relevance_logit=logits[number],
                blocks=blocks[number],
                truncated=bool(packed.truncated[number]),
                title=title,
                title_tokens=title_tokens[number],
                title_keep_probability=title_scores[number],
                title_first=first and bool(b > a),
                threshold=threshold,
                aggregation=aggregation,
            )
        )
    return made


def pick_dtype(device: str, dtype: str | None) -> str:
    """ "auto" or None to "bfloat16" where the device multiplies it natively, else "float32"."""
    if dtype not in (None, "auto"):
        if dtype not in ("float32", "bfloat16", "float16"):
            raise InputError(
                f"`dtype` must be float32, bfloat16, float16 or auto; found {dtype!r}."
            )
        return str(dtype)
    return "bfloat16" if _native_bfloat16(device) else "float32"


@functools.lru_cache(maxsize=8)
def _native_bfloat16(device: str) -> bool:
    import torch

    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported())
    if device != "cpu":
        return False
    # Elsewhere bfloat16 is emulated, and slower than float32.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    asks = [getattr(torch.cpu, name, None) for name in names]
    return any(bool(ask()) for ask in asks if ask is not None)
