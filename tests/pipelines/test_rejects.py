"""A user sees why rows were put aside: in the error, and in the table that was made."""

import json

import pytest

from prunery import cli
from prunery.errors import InputError
from prunery.pipelines.recipe import parse_recipe
from prunery.pipelines.run import run_recipe
from prunery.storage import Store

RECIPE = """
name: bad
bad_rows: {allowed}
steps:
  chats: {{step: read_chats, path: "{path}"}}
"""
GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def recipe(tmp_path, allowed):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(GOOD)] * 6 + ["no json"] * 4
    path.write_text("".join(line + "\n" for line in lines))
    return parse_recipe(RECIPE.format(allowed=allowed, path=path))


def test_too_many_are_named_in_the_error(tmp_path):
    store = Store(tmp_path / "store")
    with pytest.raises(InputError, match="rejected 4 of 10 rows") as caught:
        run_recipe(recipe(tmp_path, 0.1), store)
    said = str(caught.value).splitlines()
    assert len(said) == 4, "the first three reasons, a line each"
    for number, line in enumerate(said[1:], start=7):
        assert line.startswith(f"  rows.jsonl, row {number}: not a line of JSON")
    run_recipe(recipe(tmp_path, 0.5), store)
    with pytest.raises(InputError, match="rejected 4 of 10 rows") as again:
        run_recipe(recipe(tmp_path, 0.1), store)
    assert str(again.value) == str(caught.value), "of a table that is there as well"


def test_the_command_line_shows_them(tmp_path, capsys):
    store = Store(tmp_path / "store")
    run_recipe(recipe(tmp_path, 0.5), store)
    shown = {}
    for option in ("--rows=2", "--json"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["show", "chats", "--rejects", "--store", str(tmp_path / "store"), option])
        assert not stop.value.code
        shown[option] = capsys.readouterr().out
    assert shown["--rows=2"].count("not a line of JSON") == 2
    rows = json.loads(shown["--json"])["rows"]
    assert len(rows) == 4
    assert all("not a line of JSON" in row["reason"] for row in rows)
