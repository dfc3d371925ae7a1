"""What is asked: a black box, templates, words for the classes. It enters every later key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from ...errors import RecipeError
from ...pruners.models.encoders import PACKAGED_NAME
from ...pruners.signals.black_box import Template
from ...pruners.signals.encoder_labels import TEMPERATURE
from ...storage import Table
from ..engine import StepOptions

BoxKind = Literal["encoder", "causal", "masked", "seq2seq", "endpoint"]

_TEMPLATES: dict[str, str] = {
    "encoder": "{text}",
    "causal": "{text} {prompt}",
    "masked": "{text} {prompt} {mask} .",
    "seq2seq": "{prompt} {text}",
    "endpoint": "{text} {prompt}",
}
_LABEL_TEMPLATE = "{prompt} {label}"
_NETWORKS = ("causal", "masked", "seq2seq")
# Options that mean something to some kinds of black boxes alone.
_BELONGS: dict[str, tuple[str, ...]] = {
    "base_url": ("endpoint",),
    "protocol": ("endpoint",),
    "top_logprobs": ("endpoint",),
    "dtype": ("encoder", *_NETWORKS),
    "label_template": ("encoder",),
    "temperature": ("encoder",),
    "verbaliser_tokens": _NETWORKS,
}


class PromptTaskOptions(StepOptions):
    """Options of `prompt_task`.

    Attributes
    ----------
    black_box
        encoder (sentence embeddings, off line by default), causal, masked or seq2seq (Hugging
        Face models), or endpoint (an HTTP server with the OpenAI protocol that gives log
        probabilities).
    model
        Folder or hub id; for an endpoint the name it is asked for.
    base_url
        Of an endpoint, such as http://127.0.0.1:8000/v1.
    protocol
        Of an endpoint: `completions` or `chat`.
    top_logprobs
        Log probabilities that an endpoint is asked for.
    dtype
        Of a model on this machine.
    template
        The text that the model reads, with {text} and {prompt}, and {mask} for a masked one;
        None takes the usual one of its kind. The prompt after the text lets a causal model read
        each text once for all prompts.
    label_template
        The encoder's descriptions of the classes, with {label}.
    verbalisers
        Class name to the word that stands for it; classes not named stand for themselves.
    verbaliser_tokens
        Of a network on this machine; an endpoint scores by first tokens. `all` scores every
        token of a word, `first` (as published) the first alone, which then must differ between
        classes.
    temperature
        What the encoder's cosines are divided by.
    manual
        A prompt written by hand, that a found one must beat; "" for none.
    shots, validation_shots
        Rows of each class that are searched on, and that judge what was found.
    test_rows
        Rows of the test part at most; None takes all rows of the test split.
    draw
        `random` draws shots by a hash of (seed, id); `first` takes them in the order of the
        data, as published.
    """

    black_box: BoxKind = "encoder"
    model: str = PACKAGED_NAME
    base_url: str | None = None
    protocol: Literal["completions", "chat"] = "completions"
    top_logprobs: int = Field(default=20, ge=1, le=1000)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    template: str | None = None
    label_template: str = _LABEL_TEMPLATE
    verbalisers: dict[str, str] = Field(default_factory=dict)
    verbaliser_tokens: Literal["all", "first"] = "all"
    temperature: float = Field(default=TEMPERATURE, gt=0)
    manual: str = ""
    shots: int = Field(default=16, ge=1)
    validation_shots: int = Field(default=16, ge=1)
    test_rows: int | None = Field(default=None, ge=1)
    draw: Literal["random", "first"] = "random"

    @model_validator(mode="after")
    def _agree(self) -> PromptTaskOptions:
        for name in sorted(self.model_fields_set & set(_BELONGS)):
            if self.black_box not in _BELONGS[name]:
                raise ValueError(
                    f"`{name}` means nothing to `black_box: {self.black_box}`; it belongs to"
                    f" {', '.join(_BELONGS[name])}"
                )
        if self.black_box == "endpoint" and self.base_url is None:
            raise ValueError("`black_box: endpoint` needs `base_url`, such as https://host/v1")
        try:
            text, label = self.templates()
            if self.black_box == "encoder":
                text.check(needs=["text"], allows=["prompt"])
                label.check(needs=["label"], allows=["prompt"])
                if not (text.has("prompt") or label.has("prompt")):
                    raise RecipeError("`template` or `label_template` needs {prompt}")
            else:
                mask = ["mask"] if self.black_box == "masked" else []
                text.check(needs=["text", "prompt", *mask], allows=[])
        except RecipeError as error:
            raise ValueError(str(error).rstrip(".")) from error
        return self

    def templates(self) -> tuple[Template, Template]:
        """The template of the text and that of the labels (which the encoder alone uses)."""
        return Template(self.template or _TEMPLATES[self.black_box]), Template(self.label_template)

    def words(self, classes: Sequence[str]) -> list[str]:
        """The word of each class, in the order of the classes.

        Raises
        ------
        RecipeError
            A verbaliser names no class, is empty, or stands for two classes.
        """
        for name in self.verbalisers:
            if name not in classes:
                raise RecipeError(
                    f"`verbalisers` names the class {name!r}; the data has {', '.join(classes)}."
                )
        made = [self.verbalisers.get(name, name).strip() for name in classes]
        for number, word in enumerate(made):
            if not word:
                raise RecipeError(f"the word for class {classes[number]!r} is empty. Give one.")
            if word in made[:number]:
                raise RecipeError(
                    f"{word!r} stands for the classes {classes[made.index(word)]!r} and"
                    f" {classes[number]!r}. Give each a word of its own in `verbalisers`."
                )
        return made

    def identity(self) -> dict[str, Any]:
        """What enters keys: everything that means something here, the template spelt out."""
        foreign = {name for name, kinds in _BELONGS.items() if self.black_box not in kinds}
        return {**self.model_dump(exclude=foreign), "template": self.templates()[0].source}


def task_of(task: Table) -> PromptTaskOptions:
    """The options that a `prompt_task` table was made with."""
    stored: Mapping[str, Any] = task.manifest.options
    known = {name: stored[name] for name in PromptTaskOptions.model_fields if name in stored}
    return PromptTaskOptions.model_validate(known)


def classes_of(task: Table) -> list[str]:
    """Names of the classes of a `prompt_task` table, in the order of their codes."""
    return [str(name) for name in task.manifest.notes["classes"]]
