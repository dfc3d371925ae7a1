"""`prunery serve`: what it refuses before anything is loaded, and what it logs."""

import logging
import time

import pytest
from fastapi.testclient import TestClient

from prunery.cli import main

from .live import application


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "just-a-name"], "NAME=PATH_OR_ID"),
        (["--model", "a=x", "--model", "a=y"], "twice"),
        (["--host", "0.0.0.0"], "--keys FILE"),
        (["--timeout", "0"], "`seconds`"),
        (["--store", "/no/such/store"], "no store at"),
        (["--port", "70000"], "70000"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_a_log_line_says_what_was_asked_and_nothing_of_the_text(caplog):
    with (
        caplog.at_level(logging.INFO, logger="prunery.access"),
        TestClient(application(), base_url="http://127.0.0.1") as client,
    ):
        while client.get("/readyz").status_code != 200:
            time.sleep(0.01)
        caplog.clear()
        client.post("/v1/prune", json={"question": "secret", "passages": ["secret."]})
        client.get("/no%0Asuch%0Apath")
    lines = [one.getMessage() for one in caplog.records if one.name == "prunery.access"]
    assert len(lines) == 2
    assert " POST /v1/prune 200 " in lines[0] and "secret" not in lines[0]
    assert "\n" not in lines[1] and " 404 " in lines[1]
