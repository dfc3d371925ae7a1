"""What `prunery doctor` finds on machines that lack something."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import prefect
import pytest

from prunery.errors import ModelError
from prunery.pipelines import doctor
from prunery.pipelines.doctor import Finding, examine
from prunery.storage.backend import LocalBackend

from ..test_cli import run


def only(name, monkeypatch, store, **options):
    """The finding of that name; the model's check, which takes long, is left out."""
    monkeypatch.setattr(doctor, "_model", lambda name: Finding(f"model {name}", "ok", ""))
    return next(one for one in examine(str(store), **options) if one.name == name)


@pytest.fixture
def server():
    """A Prefect server as far as its health and version go; `answers` may be changed."""
    answers = {"/api/health": (200, True), "/api/admin/version": (200, prefect.__version__)}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = answers[self.path]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args):
            pass

    made = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}/api", answers
    made.shutdown()
    made.server_close()


def test_a_store_is_tried_and_left_as_it_was(tmp_path, monkeypatch):
    assert only("store", monkeypatch, tmp_path).state == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_not_there_is_not_made(tmp_path, monkeypatch):
    found = only("store", monkeypatch, tmp_path / "a" / "b")
    assert (found.state, "can be made" in found.found) == ("ok", True)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_writes_over_what_exists_fails(tmp_path, monkeypatch):
    def create(self, path, data):
        self.replace(path, data)
        return True

    monkeypatch.setattr(LocalBackend, "create", create)
    found = only("store", monkeypatch, tmp_path)
    assert found.state == "fail"
    assert "two runs could both commit" in found.found
    assert list(tmp_path.iterdir()) == []


def test_a_slow_store_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "SLOW_COMMIT_SECONDS", 0.0)
    assert only("store", monkeypatch, tmp_path).state == "warn"


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "ENOUGH_DISK", 2**60)
    assert only("disk", monkeypatch, tmp_path).state == "warn"


def test_little_memory_and_a_container_s_limit(tmp_path):
    info, limit = tmp_path / "info", tmp_path / "max"
    info.write_text("MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n")
    limit.write_text("max\n")
    assert doctor._memory(info, limit) == Finding("memory", "ok", "16.0 of 32.0 GiB free")
    limit.write_text(str(2 * 2**30))
    found = doctor._memory(info, limit)
    assert (found.state, found.found) == ("warn", "2.0 of 2.0 GiB free")
    assert doctor._memory(tmp_path / "none").state == "ok"


def test_a_container_s_cores(tmp_path):
    assert doctor._cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor._cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert doctor._cpu_quota(tmp_path) == 1.5


def test_a_library_of_a_wrong_version(tmp_path, monkeypatch):
    assert only("libraries", monkeypatch, tmp_path).state == "ok"
    needs = ["numpy<1", "no-such-thing>=2", "other; extra == 'demo'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: needs)
    found = only("libraries", monkeypatch, tmp_path)
    assert found.state == "fail"
    assert "is not <1" in found.found
    assert "no-such-thing is not installed" in found.found
    assert "other" not in found.found


def test_a_model_that_is_not_there():
    with pytest.raises(ModelError):
        doctor._model("no/such-model")
    checked = list(examine(".", models=["no/such-model"]))
    [found] = [one for one in checked if one.name == "model no/such-model"]
    assert found.state == "fail"
    assert checked[-1].name == "prefect"  # the others were looked at all the same


def test_the_shipped_model_prunes():
    assert doctor._model("default").state == "ok"


def test_prefect(tmp_path, monkeypatch, server):
    url, answers = server
    assert only("prefect", monkeypatch, tmp_path).state == "ok"
    assert only("prefect", monkeypatch, tmp_path, prefect_url=url).state == "ok"
    answers["/api/admin/version"] = (200, "1.0")
    assert only("prefect", monkeypatch, tmp_path, prefect_url=url).state == "warn"
    answers["/api/health"] = (500, "down")
    assert only("prefect", monkeypatch, tmp_path, prefect_url=url).state == "fail"
    gone = only("prefect", monkeypatch, tmp_path, prefect_url="http://127.0.0.1:9/api")
    assert gone.state == "fail"
    assert "--plain" in gone.advice


def test_the_command_ends_with_1_on_a_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_model", lambda name: Finding(f"model {name}", "ok", "fine"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    code, out, _ = run(capsys, "doctor", "--store", str(tmp_path))
    assert code == 0
    assert "model default" in out
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    code, out, _ = run(capsys, "doctor", "--store", str(tmp_path), "--json")
    assert code == 1
    assert json.loads(out)[-1]["state"] == "fail"
