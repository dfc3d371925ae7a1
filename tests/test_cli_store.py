"""The command line over a real store: one small run, then every command that reads it."""

import json

import pytest
import yaml

from prunery import cli
from prunery.storage import Store

from .small_run import RECIPE, write_corpus
from .tiny_models import tiny_encoder, tiny_provence


def command(*arguments):
    """Run a command in this process; its exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return stop.value.code or 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(recipe file, store folder) after one run through the command line."""
    folder = write_corpus(tmp_path_factory.mktemp("cli"))
    models = tmp_path_factory.mktemp("cli-models")
    recipe = folder / "small.yaml"
    recipe.write_text(RECIPE.format(encoder=tiny_encoder(models), model=tiny_provence(models)))
    store = folder / "store"
    arguments = ["run", str(recipe), "--plain", "--store", str(store), "--set", "seed=2"]
    assert command(*arguments) == 0
    return recipe, store


@pytest.fixture
def run(capsys, place):
    """A function that runs a command on the store: exit code, output, errors."""

    def made(*arguments):
        capsys.readouterr()
        code = command(*arguments, "--store", str(place[1]))
        out = capsys.readouterr()
        return code, out.out, out.err

    return made


def rows_of(place, name):
    return Store(place[1]).table(name).to_table().to_pylist()


def test_rerun_finds_every_table_and_says_the_same(run, place):
    before = Store(place[1]).names()
    code, out, _ = run("run", str(place[0]), "--plain", "--set", "seed=2", "--json")
    told = json.loads(out)
    assert code == 0
    assert Store(place[1]).names() == before
    steps = yaml.safe_load(place[0].read_text())["steps"]
    assert set(told["steps"]) == set(steps)


def test_ls_names_every_step(run, place):
    code, out, _ = run("ls", "--json")
    listed = {name for row in json.loads(out) for name in row["names"]}
    assert code == 0
    assert set(yaml.safe_load(place[0].read_text())["steps"]) <= listed
    assert "prune" in run("ls")[1]


def test_show_prints_manifest_and_rows(run, place):
    code, out, _ = run("show", "chunks", "--rows", "2", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["manifest"]["name"] == "chunks"
    assert {"step", "key", "parents", "logical_digest", "parts", "kept", "dropped"} <= set(
        told["manifest"]
    )
    assert told["rows"] == json.loads(json.dumps(rows_of(place, "chunks")[:2]))
    key = told["manifest"]["key"]
    assert run("show", key[:10])[0] == 0


def test_explain_a_dropped_sentence(run, place):
    row = next(row for row in rows_of(place, "prune") if not row["keep"])
    code, out, _ = run("explain", "prune", str(row["id"]))
    assert code == 0
    assert row["reason"] in out
    assert f"{row['score']:.3f}"[:4] in out


def test_explain_a_near_duplicate_names_its_rival(run, place):
    row = next(row for row in rows_of(place, "distinct") if not row["keep"])
    code, out, _ = run("explain", "distinct", str(row["id"]), "--json")
    assert code == 0
    assert str(row["rival"]) in out
    kept = {r["id"] for r in rows_of(place, "distinct") if r["keep"]}
    assert row["rival"] in kept


def test_explain_an_unknown_row(run):
    code, _, err = run("explain", "prune", "12345")
    assert code == 2
    assert "12345" in err


def test_lineage_begins_with_sources_and_ends_with_the_table(run):
    told = json.loads(run("lineage", "report", "--json")[1])
    assert told[-1]["name"] == "report"
    seen = set()
    for row in told:
        assert set(row["parents"]) <= seen
        seen.add(row["key"])


def test_verify_then_a_flipped_byte(run, place):
    code, out, _ = run("verify")
    assert code == 0
    assert "0 problems" in out
    store = Store(place[1])
    part = (
        place[1] / "tables" / store.resolve("signals") / store.manifest("signals").parts[0]["path"]
    )
    whole = part.read_bytes()
    spoilt = bytearray(whole)
    spoilt[len(whole) // 2] ^= 1
    part.write_bytes(bytes(spoilt))
    try:
        code, out, err = run("verify", "signals")
        assert code == 1
        assert part.name in out + err
    finally:
        part.write_bytes(whole)
    assert run("verify", "signals")[0] == 0


def test_report_is_copied_out(run, tmp_path):
    out = tmp_path / "r.html"
    code, printed, _ = run("report", "--out", str(out))
    assert code == 0
    assert printed.strip() == str(out)
    page = out.read_text()
    assert "<script>alert(" not in page
    assert "kiwi" in page


def test_gc_dry_run_deletes_nothing_and_gc_spares_named_tables(run, place):
    before = sorted(path for path in place[1].rglob("*.parquet"))
    assert run("gc", "--dry-run", "--older-than", "0")[0] == 0
    assert sorted(place[1].rglob("*.parquet")) == before
    assert run("gc", "--older-than", "0")[0] == 0
    assert run("verify")[0] == 0
    assert "chunks" in run("ls")[1]


def test_prune_from_arguments(capsys, place):
    model = yaml.safe_load(place[0].read_text())["steps"]["signals"]["model"]
    arguments = ["prune", "What is red?", "The tomato is red. It rains.", "Olives."]
    assert command(*arguments, "--model", model, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert sorted(item["index"] for item in told) == [0, 1]
    assert [item["relevance"] for item in told] == sorted(
        (item["relevance"] for item in told), reverse=True
    )
    first = next(item for item in told if item["index"] == 0)
    assert [(s["start"], s["end"]) for s in first["sentences"]] == [(0, 19), (19, 28)]
