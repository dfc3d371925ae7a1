"""Step `search_prompts`: the best prompt of a few words, within a hard budget."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
from pydantic import Field, model_validator

from ...errors import RecipeError
from ...storage import Table, TableWriter, row_id
from ..engine import (
    ChoosingOptions,
    Job,
    Plan,
    Slot,
    StepContext,
    StepSpec,
    use_threads,
    write_whole,
)
from ..prompts.asking import HOW_ALONE, AskOptions
from ..prompts.search import SEARCHES, make_search
from ..prompts.tables import REWARDS, SEARCH
from ..prompts.task import task_of
from ..prompts.words import rows_of, words_of


class SearchPromptsOptions(ChoosingOptions, AskOptions):
    """Options of `search_prompts`: a search with its own options, the budget, and these.

    Attributes
    ----------
    method
        greedy, genetic, particle_swarm or random.
    length
        Words of a prompt.
    prompts
        Prompts that are asked about, at most; each costs a query for every training row.
    reward
        What is searched for; see `prompt_rewards.rewards`.
    """

    method: str = "genetic"
    length: int = Field(default=5, ge=1, le=1000)
    prompts: int = Field(default=1000, ge=1)
    reward: str = "log_likelihood"

    @classmethod
    def options_of(cls, method: str) -> list[str] | None:
        """The options of a search."""
        # a list, as a recipe may hold what has no hash
        return list(SEARCHES[method].model_fields) if method in [*SEARCHES] else None

    @model_validator(mode="after")
    def _known(self) -> SearchPromptsOptions:
        if self.reward not in REWARDS:
            raise ValueError(f"`reward` is one of {', '.join(REWARDS)}")
        try:
            make_search(self.method, self.options)
        except RecipeError as error:
            raise ValueError(str(error).rstrip(".")) from error
        return self

    def identity(self) -> dict[str, object]:
        """What enters the key: the limits too, as they decide where the search stops.

        Prices count only where money is limited.
        """
        how = set(HOW_ALONE)
        if self.max_cost is not None:
            how -= {"input_price", "output_price"}
        made = self.model_dump(exclude=how)
        made["options"] = make_search(self.method, self.options).model_dump()
        return made


def plan(options: SearchPromptsOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """No shards of its own: every round hangs on the answers before it."""
    from ..prompts.boxes import box_digests

    return Plan(SEARCH, None, options.identity(), models=box_digests(task_of(inputs["task"])))


def finish(job: Job, writer: TableWriter) -> None:
    """Search, and write a row for each prompt asked.

    Raises
    ------
    BudgetError
        The budget does not reach for one prompt.
    """
    from ..prompts.boxes import open_asker, warn_unseen
    from ..prompts.searching import run_search

    options: SearchPromptsOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    task = job.input("task")
    rows, words = rows_of(task), words_of(job.input("words"))
    asker = open_asker(task, rows.texts, options)
    made = run_search(
        asker,
        rows.labels,
        words.texts,
        method=options.method,
        length=options.length,
        prompts=options.prompts,
        reward=options.reward,
        options=options.options,
        seed=job.seed,
    )
    warn_unseen(asker)
    last = len(made.asked) - 1
    found = [
        {
            "id": row_id("search", place),
            "round": one.round,
            "prompt": one.prompt,
            "words": [int(words.ids[word]) for word in one.words],
            "reward": one.reward,
            "accuracy": one.accuracy,
            "best": one.best,
            "queries": one.queries,
            "tokens": one.tokens,
            "stop": made.stop if place == last else "",
        }
        for place, one in enumerate(made.asked)
    ]
    write_whole(writer, pa.Table.from_pylist(found, SEARCH))


SPEC = StepSpec(
    name="search_prompts",
    version=1,
    options=SearchPromptsOptions,
    inputs={
        "task": Slot(("prompt_task",)),
        "words": Slot(("prune_prompts", "cluster_tokens", "prompt_vocabulary")),
    },
    plan=plan,
    finish=finish,
    about="The best prompt of a few words of the vocabulary, within a hard budget.",
)
