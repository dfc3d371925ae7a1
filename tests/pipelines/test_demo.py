"""The questions of the demo can be answered from the documentation that this Python ships with."""

import json
from importlib import resources

from prunery.pipelines.answers import holds_answer
from prunery.pipelines.recipe import load_recipe


def questions():
    text = resources.files("prunery.pipelines.recipes").joinpath("python_docs_questions.jsonl")
    return [json.loads(line) for line in text.read_text("utf-8").splitlines()]


def test_every_answer_stands_in_the_documentation():
    from pydoc_data.topics import topics

    missing = [
        row["id"]
        for row in questions()
        if not any(holds_answer(text, row["answers"]) for text in topics.values())
    ]
    assert missing == []


def test_answers_are_specific():
    # A string found in a tenth of all topics would survive any pruning.
    from pydoc_data.topics import topics

    for row in questions():
        hits = sum(holds_answer(text, row["answers"]) for text in topics.values())
        assert hits <= len(topics) // 10, row


def test_there_are_about_forty_and_none_twice():
    rows = questions()
    assert 38 <= len(rows) <= 50
    assert len({row["id"] for row in rows}) == len({row["question"] for row in rows}) == len(rows)


def test_no_question_gives_its_answer_away():
    for row in questions():
        assert not holds_answer(row["question"], row["answers"]), row["id"]


def test_the_recipe_names_every_stage():
    steps = [step.step for step in load_recipe("rag").steps]
    for step in ("chunk", "embed", "index", "retrieve", "context_signals", "prune_context"):
        assert step in steps
    assert steps[-1] == "report"
