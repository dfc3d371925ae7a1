"""`PromptSpace`: prune a prompt's search space and search it, in a notebook, without a store.

The same functions as the steps of a recipe, so the same numbers. Each stage is a new object that
knows what made it and what it cost; none is ever changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ...errors import InputError, RecipeError
from ...pruners import rules
from ...pruners.contract import FloatArray, IntArray, Selection
from ...pruners.models.encoders import PACKAGED_NAME
from ...storage import row_id
from .asking import AnswerLog, Asker, AskOptions, Limits, RemoteBox
from .clusters import Algorithm, Clustered, cluster_words, clusters_wanted, unclustered
from .found import FoundPrompt
from .influence import Measured, measure_influence
from .own_box import LabelLogprobs, OwnBox
from .searching import run_search
from .stages import Stage, check_reward, check_words, frozen, made_by, of_some, shot_of, shots_of

VectorsOf = Callable[[list[str]], FloatArray]


@dataclass(frozen=True, eq=False)
class PromptSpace:
    """Candidate words, the rows that prompts are scored on, and the black box that answers.

    >>> space = PromptSpace.from_model(rows=texts, labels=codes, classes=["terrible", "great"])
    >>> small = space.cluster(k=2000).score().prune(keep=0.1)
    >>> found = small.search(method="genetic", prompts=1000)
    >>> found.verdict((held_texts, held_codes), test=(test_texts, test_codes)).prompt

    Attributes
    ----------
    box
        Anything with `label_logprobs(prompts, rows) -> (P, N, C)`, log probabilities in nats:
        see `BlackBox`. `classes` and `input_tokens` are used where it has them; without the
        second, tokens count as 0 and cannot be limited.
    rows, labels
        N texts and the codes (N,) of their classes, from 0. Kept in the order of their shots
        (place within the class as given), so that halving starts with as many of each class.
    words
        V distinct words or phrases.
    log
        Where answers are kept for good, so that nothing is asked twice; None for nowhere.
    vectors_of
        Words to vectors (V, d), for `cluster`; `from_model` sets it.
    batch
        Queries sent together, at most.
    history
        What made this space, the first stage first.
    parent
        The space before this one; None for the first.
    clusters, selection
        What the last stage decided about `parent.words`; None where it was another stage.
    influence
        Of the words of this space; None until `score`.

    Raises
    ------
    InputError
        There are no words or rows, a word is empty or stands twice, labels and rows disagree.
    """

    box: LabelLogprobs | RemoteBox
    rows: Sequence[str] = field(kw_only=True)
    labels: Sequence[int] | IntArray = field(kw_only=True)
    words: Sequence[str] = field(kw_only=True)
    log: AnswerLog | None = field(default=None, kw_only=True)
    vectors_of: VectorsOf | None = field(default=None, kw_only=True)
    batch: int = field(default=1024, kw_only=True)
    history: tuple[Stage, ...] = field(default=(), kw_only=True)
    parent: PromptSpace | None = field(default=None, kw_only=True)
    clusters: Clustered | None = field(default=None, kw_only=True)
    influence: Measured | None = field(default=None, kw_only=True)
    selection: Selection | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.parent is not None:
            return
        shots = shots_of(self.rows, self.labels, "rows")
        order = np.lexsort((shots.labels, shots.shot))
        words = tuple(self.words)
        check_words(words)
        made: dict[str, Any] = {
            "rows": tuple(shots.texts[place] for place in order),
            "labels": frozen(shots.labels[order]),
            "words": words,
            "box": self.box if isinstance(self.box, RemoteBox) else OwnBox.of(self.box, shots),
        }
        given = {"rows": made["rows"], "labels": made["labels"], "words": words}
        made["history"] = (made_by((), "words", {}, len(words), given=given),)
        for name, value in made.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_model(
        cls,
        model: str | Path = PACKAGED_NAME,
        *,
        rows: Sequence[str],
        labels: Sequence[int] | IntArray,
        classes: Sequence[str],
        words: Sequence[str] | None = None,
        how: AskOptions | None = None,
        log: AnswerLog | None = None,
        **task: Any,
    ) -> PromptSpace:
        """A space over one of the black boxes of a recipe.

        Parameters
        ----------
        model
            Folder, hub id, or name at an endpoint.
        classes
            The word that stands for each code.
        words
            Candidates; None takes the model's own vocabulary, filtered as `prompt_vocabulary`
            does.
        how
            Device, batches, and an endpoint's concurrency and key.
        task
            Other options of `prompt_task`: `black_box`, `template`, `base_url` and so on.

        Raises
        ------
        RecipeError, ModelError
            An option is wrong, or there is no such model.
        """
        from .boxes import open_box
        from .task import PromptTaskOptions

        model = str(model)
        try:
            options = PromptTaskOptions.model_validate({"model": model, **task})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the task"
            raise RecipeError(f"`from_model`, {where}: {first['msg']}.") from error
        asking = how or AskOptions()
        if words is None:
            words = _own_words(options.black_box, model)
        vectors_of = None if options.black_box == "endpoint" else _input_embeddings(model)
        box = open_box(options, list(classes), asking)
        batch = asking.concurrency if isinstance(box, RemoteBox) else asking.batch_tokens // 16
        return cls(
            box,
            rows=rows,
            labels=labels,
            words=words,
            log=log,
            vectors_of=vectors_of,
            batch=max(1, batch),
        )

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Of the last stage."""
        return self.history[-1].parameters

    @property
    def queries(self) -> int:
        """(prompt, row) pairs asked on the way to here."""
        return sum(stage.queries for stage in self.history)

    @property
    def tokens(self) -> int:
        """Tokens read and written on the way to here."""
        return sum(stage.tokens for stage in self.history)

    @cached_property
    def ids(self) -> IntArray:
        """(V,) int64, as `prompt_vocabulary` numbers words; they settle ties."""
        return frozen(np.array([row_id("prompt_word", word) for word in self.words], np.int64))

    def __repr__(self) -> str:
        return (
            f"PromptSpace({len(self.words):,} words, {len(self.rows)} rows, after"
            f" {' > '.join(stage.name for stage in self.history)}; {self.queries:,} queries,"
            f" {self.tokens:,} tokens)"
        )

    # -- stages --------------------------------------------------------------------------------

    def cluster(
        self,
        vectors: FloatArray | VectorsOf | None = None,
        k: int | None = None,
        *,
        seed: int = 0,
        algorithm: Algorithm = "kmeans",
    ) -> PromptSpace:
        """The word nearest to each of k centres, ordered by id; see `cluster_words`.

        Parameters
        ----------
        vectors
            (V, d) in the order of `words`, or what makes them; None for `vectors_of`.
        k
            None for the published 2000, and for nothing at all where there are at most twice as
            many words.
        """
        wanted = clusters_wanted(len(self.words), k)
        if wanted is None:
            made = unclustered(self.ids)
        else:
            rows = self._vectors(vectors)
            made = cluster_words(self.ids, rows, wanted, algorithm=algorithm, seed=seed)
        at = np.flatnonzero(made.keep)
        at = at[np.argsort(self.ids[at])]
        for array in (made.cluster, made.distance, made.keep):
            frozen(array)
        parameters = {"k": wanted, "seed": seed, "algorithm": algorithm}
        return self._narrowed("cluster", parameters, at, clusters=made)

    def score(
        self,
        reward: str = "log_likelihood",
        *,
        budget: Limits | None = None,
        halving: int | None = None,
        least: float = 0.1,
    ) -> PromptSpace:
        """What each word alone changes against the empty prompt, by every reward.

        Parameters
        ----------
        reward
            What halving ranks by; the others are computed as well.
        budget
            Of this stage; without one there is no limit.
        halving
            Rows of each class that a successive halving starts with; None asks about all rows.
        least
            Share of the words that halving leaves at the end, at least.

        Raises
        ------
        BudgetError
            The budget does not reach for all of it.
        """
        check_reward(reward)
        asker = self.asker(budget)
        made = measure_influence(
            asker,
            self._labels,
            shot_of(self._labels),
            self.words,
            self.ids,
            start_shots=halving,
            least=max(1, rules.count_of(len(self.words), least)),
            by=reward,
        )
        parameters = {"reward": reward, "halving": halving, "least": least}
        stage = made_by(self.history, "score", parameters, len(self.words), asker)
        return replace(
            self, history=(*self.history, stage), parent=self, influence=made, **_NOTHING
        )

    def prune(
        self,
        keep: float | None = None,
        *,
        count: int | None = None,
        method: str = "claps",
        reward: str = "log_likelihood",
        seed: int = 0,
    ) -> PromptSpace:
        """The words that a method keeps, best first; nothing is asked.

        Parameters
        ----------
        keep, count
            Share of the words (0.1 where neither is given), or their number.
        method
            `claps`, which needs `score` before it, or `random_prompts`, its control.
        reward
            The influence that `claps` ranks by.
        """
        from ..steps.prune_prompts import PrunePromptsOptions, prune_words

        check_reward(reward)
        if count is not None and keep is not None:
            raise InputError("`keep` and `count` both say how many words stay: give one of them.")
        v = len(self.words)
        if self.influence is None and method == "claps":
            raise InputError("`claps` ranks words by their influence. Call `score` first.")
        values = np.zeros(v) if self.influence is None else self.influence.influence[reward]
        known = np.ones(v, np.bool_) if self.influence is None else self.influence.finalist
        share = {} if count is not None else {"keep": 0.1 if keep is None else keep}
        try:
            options = PrunePromptsOptions(method=method, options=share, count=count, reward=reward)
        except ValidationError as error:
            raise InputError(f"prune: {error.errors()[0]['msg']}.") from error
        made = prune_words(options, self.ids, values.astype(np.float32), known, seed=seed)
        at = np.flatnonzero(made.keep)
        at = at[rules.best_first(made.score[at], self.ids[at])]
        parameters = {"method": method, **share, "reward": reward, "seed": seed}
        if count is not None:
            parameters["count"] = count
        return self._narrowed("prune", parameters, at, selection=made)

    def search(
        self,
        method: str = "genetic",
        *,
        length: int = 5,
        prompts: int = 1000,
        reward: str = "log_likelihood",
        seed: int = 0,
        budget: Limits | None = None,
        **options: Any,
    ) -> FoundPrompt:
        """The prompt of these words with the highest reward on the rows.

        Parameters
        ----------
        method
            greedy, genetic, particle_swarm or random; `options` are its own.
        length
            Words of a prompt.
        prompts
            How many are asked about, at most; each costs N queries.
        budget
            Of this stage; a search that reaches it ends with the best so far.

        Raises
        ------
        BudgetError
            The budget does not reach for one prompt.
        InputError, RecipeError
            There is no word left, or the search or an option is unknown.
        """
        check_reward(reward)
        asker = self.asker(budget)
        made = run_search(
            asker,
            self._labels,
            self.words,
            method=method,
            length=length,
            prompts=prompts,
            reward=reward,
            options=options,
            seed=seed,
        )
        parameters = {
            "method": method, "length": length, "prompts": prompts, "reward": reward,
            "seed": seed, **options,
        }  # fmt: skip
        stage = made_by(self.history, "search", parameters, len(self.words), asker)
        return FoundPrompt(self, made, (*self.history, stage))

    # -- what the stages share -----------------------------------------------------------------

    @property
    def _labels(self) -> IntArray:
        return np.asarray(self.labels, np.int64)

    def asker(self, budget: Limits | None, rows: Sequence[str] | None = None) -> Asker:
        limits = budget or Limits()
        if isinstance(self.box, OwnBox) and not self.box.counts:
            self.box.refuse(limits)
        texts = self.rows if rows is None else rows
        return Asker(self.box, texts, limits, self.log, self.batch)  # type: ignore[arg-type]

    def _vectors(self, given: FloatArray | VectorsOf | None) -> FloatArray:
        source = self.vectors_of if given is None else given
        if source is None:
            raise InputError(
                "`cluster` needs a vector for each word. Give `vectors`, an array (V, d) or a"
                " function of the words, or make the space with `from_model`."
            )
        made = np.asarray(source(list(self.words)) if callable(source) else source, np.float32)
        if made.ndim != 2 or len(made) != len(self.words):
            raise InputError(f"expected vectors ({len(self.words)}, d), found {made.shape}.")
        return made

    def _narrowed(
        self, name: str, parameters: Mapping[str, Any], at: IntArray, **made: Any
    ) -> PromptSpace:
        """The space of some of the words, in the order of `at`, with what is known of them."""
        words = tuple(self.words[place] for place in at)
        stage = made_by(self.history, name, parameters, len(at), given={"words": words})
        return replace(
            self,
            words=words,
            history=(*self.history, stage),
            parent=self,
            influence=None if self.influence is None else of_some(self.influence, at),
            **{**_NOTHING, **made},
        )


_NOTHING: dict[str, Any] = {"clusters": None, "selection": None}


def _own_words(kind: str, model: str) -> list[str]:
    from ...pruners.models.token_rows import tokenizer_home
    from ...pruners.models.tokenizers import load_tokenizer
    from .vocabulary import WordFilter, tokenizer_entries, vocabulary_rows

    if kind == "endpoint":
        raise InputError("the tokenizer of a model behind an endpoint is not here. Give `words`.")
    tokenizer = load_tokenizer(tokenizer_home(model))
    rows = vocabulary_rows(tokenizer_entries(tokenizer, word_start=True), WordFilter())
    return [row["text"] for row in rows if row["keep"]]


def _input_embeddings(model: str) -> VectorsOf:
    def vectors(words: list[str]) -> FloatArray:
        from ...pruners.models.token_rows import token_vectors
        from .. import models

        return token_vectors(models.encoder(model).path, words)

    return vectors
