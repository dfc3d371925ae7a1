"""The command line without a model: arguments, exit codes, reading of passages."""

import json
import re
import subprocess
import sys

import pytest

from prunery import cli
from prunery._version import __version__
from prunery.errors import InputError
from prunery.pruners.catalogue import METHODS, markdown_table


def run(capsys, *arguments):
    """Exit code, standard output, standard error of one command in this process."""
    try:
        cli.main(list(arguments))
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"prunery {__version__}\n", "")


def test_unknown_command_is_an_input_error(capsys):
    code, _, err = run(capsys, "prnue")
    assert code == 2
    assert "prnue" in err


def test_methods_as_json_names_every_method(capsys):
    code, out, _ = run(capsys, "methods", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)] == list(METHODS)
    assert all(row["about"] for row in json.loads(out))


def test_readme_holds_the_generated_table(root):
    assert markdown_table() in (root / "README.md").read_text()


def test_a_method_in_the_table_needs_a_golden_case(root):
    """A name of the catalogue without a test file that names its class is unfinished."""
    tests = "\n".join(path.read_text() for path in (root / "tests" / "pruners").rglob("test_*.py"))
    for method in METHODS.values():
        # Made by name, or handed to a case that several share; an import alone is no test.
        assert re.search(rf"\b{method.__name__}[(,]", tests), method.__name__


def test_unknown_recipe_names_the_known_ones(capsys, tmp_path):
    code, _, err = run(capsys, "run", "no-such-recipe", "--plain", "--store", str(tmp_path))
    assert code == 2
    assert "no-such-recipe" in err
    assert "rag" in err


def test_unknown_option_in_set_names_the_known_ones(capsys, tmp_path):
    arguments = ["run", "rag", "--plain", "--store", str(tmp_path), "--set", "sead=3"]
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "sead" in err
    assert "seed" in err


def test_unknown_table_is_a_failure_that_names_the_store(capsys, tmp_path):
    code, _, err = run(capsys, "show", "nothing-here", "--store", str(tmp_path))
    assert code in (1, 2)
    assert "nothing-here" in err


def test_row_id_must_be_a_number(capsys, tmp_path):
    code, _, err = run(capsys, "explain", "chunks", "abc", "--store", str(tmp_path))
    assert code == 2
    assert "abc" in err


def test_ls_of_an_empty_store(capsys, tmp_path):
    assert run(capsys, "ls", "--store", str(tmp_path), "--json")[:2] == (0, "[]\n")


def test_reader_that_goes_away_is_no_error():
    code = "import prunery.cli as c; c.main(['methods'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert "Traceback" not in err


class TestPassages:
    def test_plain_text_is_cut_at_blank_lines(self):
        assert cli._passages_of("One.\nTwo.\r\n\r\nThree.\n", "x") == (
            ["One.\nTwo.", "Three.\n"],
            None,
        )

    def test_json_lines_with_titles(self):
        content = '{"text": "a", "title": "T"}\n\n"b"\n'
        assert cli._passages_of(content, "x") == (["a", "b"], ["T", None])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"text": "a"}\n{"text": 3}\n', "x, line 2"),
            ('{"text": "a"}\n{oops\n', "x, line 2: not JSON"),
            ("\n \n", "no passages"),
        ],
    )
    def test_bad_lines_are_named(self, content, message):
        with pytest.raises(InputError, match=message):
            cli._passages_of(content, "x")

    def test_missing_question(self, capsys):
        code, _, err = run(capsys, "prune")
        assert code == 2
        assert "question" in err

    def test_passages_twice(self, capsys, tmp_path):
        code, _, err = run(capsys, "prune", "why?", "a", "--passages", str(tmp_path / "p.txt"))
        assert code == 2
        assert "--passages" in err

    def test_unreadable_file(self, capsys, tmp_path):
        code, _, err = run(capsys, "prune", "why?", "--passages", str(tmp_path / "none.txt"))
        assert code == 2
        assert "none.txt" in err
