"""What a recipe will do before it does it: which steps are done, and what the others will ask.

Steps that ask a black box nothing, and that must be done to know how much others will ask, are
run: they read the data, draw the few rows, list and cluster the words. Nothing is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...storage import Store, Table
from ..engine import table_key
from ..progress import Progress
from ..recipe import Recipe, Step
from ..run import context_of
from ..steps import STEPS
from ..steps.prompt_influence import InfluenceOptions, least_words
from ..steps.prune_prompts import PrunePromptsOptions
from ..steps.search_prompts import SearchPromptsOptions
from ..steps.test_prompts import TestPromptsOptions, finalists
from .asking import AnswerLog, AskOptions
from .boxes import box_digests, open_box
from .plan_asks import Passed, Pool, contest_asks, influence_asks, search_asks
from .plan_bounds import Asks, Bound
from .tables import TEST, TRAIN, VALIDATION
from .task import classes_of, task_of
from .verdict import CONTROL, EMPTY, FOUND, MANUAL
from .words import Shots, rows_of, words_of

if TYPE_CHECKING:
    pass

ASKING = ("prompt_influence", "search_prompts", "test_prompts")
# What may be run to know sizes; `prune_prompts` once its influences are there.
_FREE = ("read_dataset", "prompt_task", "prompt_vocabulary", "cluster_tokens", "prune_prompts")
_CONTEST = (VALIDATION, TEST)

State = Literal["done", "made now", "to do"]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: whether its table is there, and what it will ask if it is not."""

    name: str
    step: str
    state: State
    asks: Asks | None = None


@dataclass(frozen=True, slots=True)
class RecipePlan:
    """The steps of a recipe in order."""

    recipe: str
    steps: list[StepPlan]

    @property
    def total(self) -> Asks | None:
        """Sum over the steps that will ask; None where none will."""
        made = [step.asks for step in self.steps if step.asks is not None]
        if not made:
            return None
        tokens = [asks.tokens for asks in made]
        money = [asks.money for asks in made]
        return Asks(
            sum(asks.prompts for asks in made),
            sum(asks.queries for asks in made),
            sum(asks.sent for asks in made),
            None if None in tokens else sum(t for t in tokens if t is not None),
            None if None in money else sum(m for m in money if m is not None),
            all(asks.exact for asks in made),
            all(asks.sent_exact for asks in made),
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        total = self.total
        return {
            "recipe": self.recipe,
            "steps": [asdict(step) for step in self.steps],
            "total": asdict(total) if total else None,
        }

    def lines(self) -> list[str]:
        """In words: a line a step, then the sum."""
        head = (
            "step",
            "",
            "state",
            "prompts",
            "queries",
            "sent",
            "tokens, at most",
            "money, at most",
        )
        rows = [_cells(step.name, step.step, step.state, step.asks) for step in self.steps]
        total = self.total
        if total is not None:
            rows.append(_cells("all", "", "", total))
        shown = [n for n in range(len(head)) if n < 3 or any(row[n] for row in rows)]
        width = {n: max(len(row[n]) for row in [head, *rows]) for n in shown}
        made = [
            "  ".join(
                row[n].ljust(width[n]) if n < 3 else row[n].rjust(width[n]) for n in shown
            ).rstrip()
            for row in ([head, *rows] if len(shown) > 3 else rows)
        ]
        made += [
            f"{step.name}: {step.asks.note}" for step in self.steps if step.asks and step.asks.note
        ]
        if total is not None:
            made.append(
                "A query is one prompt on one row, charged to the budget whether it is sent or"
                " found in the log of answers."
            )
        return made


def _cells(name: str, kind: str, state: str, made: Asks | None) -> tuple[str, ...]:
    if made is None:
        return name, kind, state, "", "", "", "", ""

    def most(value: int, exact: bool) -> str:
        return f"{value:,}" if exact else f"at most {value:,}"

    return (
        name,
        kind,
        state,
        most(made.prompts, made.exact),
        most(made.queries, made.exact),
        most(made.sent, made.sent_exact),
        "" if made.tokens is None else f"{made.tokens:,}",
        "" if made.money is None else f"{made.money:,.4f}",
    )


def plan_recipe(
    recipe: Recipe,
    store: Store,
    *,
    progress: Progress | None = None,
    threads: int | None = None,
) -> RecipePlan:
    """The state of every step, and what those to do will ask; see the module.

    Raises
    ------
    PruneryError
        A step that had to be run failed, or an option does not fit what it found.
    """
    return RecipePlan(recipe.name, _Planner(recipe, store, progress, threads).walk())


class _Planner:
    """Walks a recipe with the keys of the tables that are there."""

    def __init__(
        self, recipe: Recipe, store: Store, progress: Progress | None, threads: int | None
    ) -> None:
        self._recipe, self._store = recipe, store
        self._progress, self._threads = progress, threads
        self._keys: dict[str, str] = {}
        self._passed: dict[str, Passed] = {}
        self._made: dict[str, Asks] = {}
        self._bounds: dict[str, Bound] = {}
        self._needed = self._ancestors(s.name for s in recipe.steps if s.step in ASKING)

    def walk(self) -> list[StepPlan]:
        """Every step in order."""
        return [self._one(step) for step in self._recipe.steps]

    def _ancestors(self, names: Any) -> set[str]:
        found: set[str] = set()
        left = list(names)
        while left:
            for source in self._recipe.step(left.pop()).inputs.values():
                if source not in found:
                    found.add(source)
                    left.append(source)
        return found

    def _one(self, step: Step) -> StepPlan:
        state = self._state(step)
        asks: Callable[[Step], Asks] | None = {
            "prompt_influence": self._influence,
            "search_prompts": self._search,
            "test_prompts": self._contest,
        }.get(step.step)
        if state != "to do" or asks is None:
            return StepPlan(step.name, step.step, state)
        self._made[step.name] = asks(step)
        return StepPlan(step.name, step.step, state, self._made[step.name])

    def _state(self, step: Step) -> State:
        if any(source not in self._keys for source in step.inputs.values()):
            return "to do"
        spec = STEPS[step.step]
        inputs = {role: self._keys[name] for role, name in step.inputs.items()}
        context = context_of(
            self._recipe, step, self._store, progress=self._progress, threads=self._threads
        )
        key = table_key(spec, step.options, inputs, context)
        if self._store.exists(key):
            self._keys[step.name] = key
            return "done"
        if step.step in _FREE and step.name in self._needed:
            self._keys[step.name] = spec(step.options, inputs, context).key
            return "made now"
        return "to do"

    # -- what a step is given ------------------------------------------------------------------

    def _table(self, name: str) -> Table:
        return self._store.table(self._keys[name])

    def _rows(self, step: Step, part: str) -> Shots:
        return rows_of(self._table(step.inputs["task"]), part)

    def _log(self, step: Step, how: AskOptions) -> AnswerLog | None:
        """The log of answers, where there is one already."""
        if not how.remember:
            return None
        from .answer_log import SqliteLog, log_path

        task = self._table(step.inputs["task"])
        options = task_of(task)
        path = log_path(options, options.words(classes_of(task)), box_digests(options))
        return SqliteLog(path) if path.exists() else None

    def _bound(self, step: Step, how: AskOptions) -> Bound:
        """Bounds from the task's black box, where opening it loads no large model."""
        name = step.inputs["task"]
        if name not in self._bounds:
            task = self._table(name)
            options = task_of(task)
            cheap = options.black_box in ("encoder", "endpoint")
            box = open_box(options, classes_of(task), how) if cheap else None
            self._bounds[name] = Bound(box, options)
        return self._bounds[name]

    def _earlier(self, step: Step, kind: str) -> list[Step]:
        """Steps of a kind before this one that ask about the same task and remember it."""
        made: list[Step] = []
        for other in self._recipe.steps:
            if other.name == step.name:
                break
            same = other.step == kind and other.inputs["task"] == step.inputs["task"]
            if same and isinstance(other.options, AskOptions) and other.options.remember:
                made.append(other)
        return made

    def _pool(self, step: Step) -> Pool:
        """The words that a search moves among."""
        name = step.inputs["words"]
        if name in self._keys:
            texts = words_of(self._table(name)).texts
            return Pool(len(texts), texts, decided=True)
        prune = self._recipe.step(name)
        options = _options(prune, PrunePromptsOptions)
        measured = self._recipe.step(prune.inputs["influence"])
        texts = words_of(self._table(measured.inputs["words"])).texts
        count = options.kept_of(len(texts))
        # Strictly above a percentile there may be none, and at most one more than a share.
        strict = options.rule == "percentile"
        return Pool(min(len(texts), count + strict), texts, decided=False, exact=not strict)

    def _pass_before(self, step: Step) -> Passed | None:
        """The influence pass, still to be done, that a search comes after."""
        wanted = step.inputs["words"]
        before = [other.name for other in self._earlier(step, "prompt_influence")]
        if wanted not in self._keys:  # what is pruned was asked by that pass and no other
            measured = self._recipe.step(wanted).inputs["influence"]
            before = [name for name in before if name == measured]
        return next((self._passed[name] for name in before if name in self._passed), None)

    # -- what a step asks ----------------------------------------------------------------------

    def _influence(self, step: Step) -> Asks:
        options = _options(step, InfluenceOptions)
        words = words_of(self._table(step.inputs["words"])).texts
        made, self._passed[step.name] = influence_asks(
            options,
            self._rows(step, TRAIN),
            words,
            least_words(options, len(words)),
            self._log(step, options),
            self._bound(step, options),
        )
        return made

    def _search(self, step: Step) -> Asks:
        options = _options(step, SearchPromptsOptions)
        return search_asks(
            options,
            self._rows(step, TRAIN),
            self._pool(step),
            self._pass_before(step),
            self._log(step, options),
            self._bound(step, options),
            seed=self._recipe.seed,
            others=bool(self._earlier(step, "search_prompts")),
            rungs=self._rungs(step),
        )

    def _rungs(self, step: Step) -> int:
        """How often a word alone was asked about, at most, a few more rows each time."""
        shots = task_of(self._table(step.inputs["task"])).shots
        halved = [_options(s, InfluenceOptions).halving for s in self._earlier(step, ASKING[0])]
        return max(
            [1 + math.ceil(math.log2(shots / start)) for start in halved if start], default=1
        )

    def _contest(self, step: Step) -> Asks:
        options = _options(step, TestPromptsOptions)
        manual = task_of(self._table(step.inputs["task"])).manual.strip()
        found = self._finalists(step, "search", options.finalists)
        known: dict[str, str | None] = {FOUND: None, EMPTY: ""}
        if isinstance(found, list) and len(found) == 1:
            known[FOUND] = found[0]
        if manual:
            known[MANUAL] = manual
        if "control" in step.inputs:
            control = self._finalists(step, "control", 1)
            known[CONTROL] = control[0] if isinstance(control, list) else None
        bound = self._bound(step, options)
        searches = [
            self._recipe.step(step.inputs[r]) for r in ("search", "control") if r in step.inputs
        ]
        pools = [(self._pool(s), _options(s, SearchPromptsOptions).length) for s in searches]
        costliest = [bound.longest(pool.candidates, length) for pool, length in pools]
        return contest_asks(
            options,
            [self._rows(step, part) for part in _CONTEST],
            known,
            found,
            _may_coincide(known, {word for pool, _ in pools for word in pool.candidates}),
            self._log(step, options),
            bound,
            costliest,
        )

    def _finalists(self, step: Step, role: str, count: int) -> list[str] | int:
        """The finalists of a search, or how many they will be."""
        name = step.inputs[role]
        if name in self._keys:
            return finalists(self._table(name), count)
        return min(count, self._made[name].prompts)


def _may_coincide(known: Mapping[str, str | None], words: set[str]) -> bool:
    """Whether two contenders may turn out to be the same prompt."""
    texts = [text for text in known.values() if text is not None]
    if len(set(texts)) < len(texts) or list(known.values()).count(None) > 1:
        return True
    if None not in known.values():
        return False
    return any(text and all(word in words for word in text.split()) for text in texts)


def _options(step: Step, kind: type[Any]) -> Any:
    assert isinstance(step.options, kind)  # each step has the options of its spec
    return step.options
