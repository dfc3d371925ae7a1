"""Step `prompt_vocabulary`: the words that a prompt may be made of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from ...errors import RecipeError
from ...storage import Table, file_digest
from ..engine import Job, Plan, Rows, Slot, StepContext, StepOptions, StepSpec
from ..prompts.tables import VOCABULARY
from ..prompts.task import PromptTaskOptions, task_of
from ..prompts.vocabulary import WordFilter, file_entries, tokenizer_entries, vocabulary_rows


class PromptVocabularyOptions(StepOptions):
    """Options of `prompt_vocabulary`.

    Attributes
    ----------
    source
        `model`: the entries of the task's own tokenizer; `tokenizer`: of the one named in
        `tokenizer`; `file`: the lines of `path`.
    tokenizer
        Folder or hub id.
    path
        A text file with a word or phrase a line.
    word_start
        Of a tokenizer: keep only what starts a word.
    letters_only
        Keep only words of letters (of any script); None is true for a tokenizer and false for a
        file, whose words somebody chose. The published filter is false.
    least_characters
        Keep only words of at least so many; None is 2 for a tokenizer and 1 for a file. The
        published filter is 1.
    pattern
        A regular expression that the whole word has to match.
    most
        Keep only the first so many by token id, which with most tokenizers are the most
        frequent; of a file the first lines.
    """

    paths: ClassVar[tuple[str, ...]] = ("path",)

    source: Literal["model", "tokenizer", "file"] = "model"
    tokenizer: str | None = None
    path: str | None = None
    word_start: bool = True
    letters_only: bool | None = None
    least_characters: int | None = Field(default=None, ge=1)
    pattern: str | None = None
    most: int | None = Field(default=None, ge=1)

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"`pattern` is no regular expression ({error})") from error
        return value

    @model_validator(mode="after")
    def _agree(self) -> PromptVocabularyOptions:
        for name, value in (("tokenizer", self.tokenizer), ("path", self.path)):
            source = "file" if name == "path" else name
            if (value is not None) != (self.source == source):
                raise ValueError(f"`{name}` belongs to `source: {source}`, and that needs one")
        return self

    def wanted(self) -> WordFilter:
        """The filter, what depends on the source filled in."""
        file = self.source == "file"
        letters, least = self.letters_only, self.least_characters
        return WordFilter(
            letters_only=not file if letters is None else letters,
            least_characters=(1 if file else 2) if least is None else least,
            pattern=self.pattern,
            most=self.most,
        )


def plan(
    options: PromptVocabularyOptions, inputs: Mapping[str, Table], context: StepContext
) -> Plan:
    """One shard; the digest of the tokenizer or of the file in the key.

    Raises
    ------
    RecipeError
        `source: model` of a model behind an endpoint, whose tokenizer is not here.
    ModelError, InputError
        The tokenizer, or the file, is not there.
    """
    wanted = options.wanted()
    identity = {
        "source": options.source,
        "word_start": options.word_start and options.source != "file",
        "letters_only": wanted.letters_only,
        "least_characters": wanted.least_characters,
        "pattern": wanted.pattern,
        "most": wanted.most,
    }
    if options.source == "file":
        path = Path(str(options.path))
        next(file_entries(path), None)  # says what is wrong before the digest fails on it
        return Plan(
            VOCABULARY,
            1,
            {**identity, "source_digest": file_digest(path)},
            notes={"path": str(path)},
        )
    from ...pruners.models.tokenizers import load_tokenizer, tokenizer_sha256

    folder = _tokenizer_folder(options, task_of(inputs["task"]))
    digest = tokenizer_sha256(load_tokenizer(folder))
    return Plan(VOCABULARY, 1, identity, models={"tokenizer": digest}, payload=str(folder))


def _tokenizer_folder(options: PromptVocabularyOptions, task: PromptTaskOptions) -> Path:
    from ...pruners.models.token_rows import tokenizer_home

    if options.source == "tokenizer":
        return tokenizer_home(str(options.tokenizer))
    if task.black_box == "endpoint":
        raise RecipeError(
            "`source: model`: the tokenizer of a model behind an endpoint is not here. Name one"
            " with `source: tokenizer`, or give words with `source: file`."
        )
    return tokenizer_home(task.model)


def shard(job: Job, index: int, out: Rows) -> None:
    """Write every entry with its reason."""
    options: PromptVocabularyOptions = job.options  # type: ignore[assignment]
    if options.source == "file":
        entries = file_entries(Path(str(options.path)))
    else:
        from ...pruners.models.tokenizers import load_tokenizer

        tokenizer = load_tokenizer(job.plan.payload)
        entries = tokenizer_entries(tokenizer, word_start=options.word_start)
    rows = vocabulary_rows(entries, options.wanted())
    out.write(pa.Table.from_pylist(rows, VOCABULARY))
    dropped = Counter(row["reason"] for row in rows if not row["keep"])
    out.count(sum(row["keep"] for row in rows), dropped)


SPEC = StepSpec(
    name="prompt_vocabulary",
    version=1,
    options=PromptVocabularyOptions,
    inputs={"task": Slot(("prompt_task",))},
    plan=plan,
    shard=shard,
    about="The words that a prompt may be made of, each with the reason why it is in or out.",
)
