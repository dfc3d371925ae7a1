"""`builtin:python-docstrings`: labelled texts that are there without a download."""

import importlib
import inspect
import logging
from collections import Counter

import pytest

from prunery.pipelines import builtin_chats, builtin_texts
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps import STEPS
from prunery.storage import Store

SPEC = STEPS["read_dataset"]


def read(store, name="data", seed=0, **options):
    options = SPEC.options(path=builtin_texts.NAME, **options)
    return SPEC(options, {}, StepContext(store=store, name=name, seed=seed))


def test_every_chapter_has_many_texts_and_none_stands_twice():
    rows = builtin_texts.docstrings()
    chapters = Counter(chapter for _, chapter in rows)
    assert sorted(chapters) == [
        "files and folders",
        "network protocols",
        "numbers and mathematics",
        "text and strings",
        "threads and processes",
    ]
    assert min(chapters.values()) >= 150  # far above 60, and no chapter drowns the others
    assert max(chapters.values()) < 3 * min(chapters.values())
    texts = [text for text, _ in rows]
    assert len({text.casefold() for text in texts}) == len(texts)
    for text in texts:
        assert len(text) >= builtin_texts.SHORTEST
        assert text == " ".join(text.split()) and " at 0x" not in text


def test_texts_are_first_paragraphs_under_their_modules_chapter():
    chapter = dict(builtin_texts.docstrings())
    for module, name, wanted in [
        ("shutil", "copytree", "files and folders"),
        ("smtplib", "SMTP.sendmail", "network protocols"),
        ("statistics", "median", "numbers and mathematics"),
        ("threading", "Thread.join", "threads and processes"),
        ("builtins", "str.center", "text and strings"),
    ]:
        thing = importlib.import_module(module)
        for part in name.split("."):
            thing = getattr(thing, part)
        first = inspect.cleandoc(thing.__doc__).split("\n\n")[0]
        assert chapter[" ".join(first.split())] == wanted


def test_texts_do_not_hang_on_what_is_imported(monkeypatch):
    def shout(self):
        """A method that some library adds to the loggers of everyone, for whatever reason."""

    first = builtin_texts.docstrings()
    builtin_texts.docstrings.cache_clear()
    monkeypatch.setattr(logging.Logger, "shout", shout, raising=False)
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    here = builtin_chats.docstrings(["logging"])
    assert "logging.Logger.shout" in dict(here["logging"])
    assert builtin_texts.docstrings() == first


def test_no_module_stands_in_two_chapters():
    chapters = builtin_texts._CHAPTERS.values()
    names = [name for names in chapters for name in names]
    assert len(set(names)) == len(names)
    assert all(list(names) == sorted(names) for names in chapters)


def test_a_python_that_does_not_start_is_an_error(monkeypatch):
    from prunery.errors import PruneryError

    monkeypatch.setattr(builtin_chats.sys, "executable", "/nowhere/python")
    builtin_texts.docstrings.cache_clear()
    with pytest.raises(PruneryError, match=r"python-docstrings: could not collect"):
        builtin_texts.docstrings()


def test_read_dataset_reads_them_as_text(tmp_path):
    store = Store(tmp_path / "store")
    manifest = read(store)
    rows = store.table("data").to_table().to_pylist()
    assert manifest.notes["kind"] == "text"
    assert manifest.notes["classes"] == [
        "files and folders",
        "network protocols",
        "numbers and mathematics",
        "text and strings",
        "threads and processes",
    ]
    assert [(row["text"], manifest.notes["classes"][row["label"]]) for row in rows] == list(
        builtin_texts.docstrings()
    )
    assert rows[3]["source"] == f"{builtin_texts.NAME}#4"
    assert {row["split"] for row in rows} == {"train", "test"}
    assert read(store, "again").key == manifest.key


def test_their_digest_enters_the_key(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    first = read(store).key
    fewer = builtin_texts.docstrings()[:-1]
    monkeypatch.setattr(builtin_texts, "docstrings", lambda: fewer)
    assert read(store).key != first
