"""The process: ready, draining, gone; clients that leave; models that do not load."""

import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

pytest.importorskip("uvicorn")
PROGRAM = Path(__file__).with_name("slow_server.py")


@contextmanager
def server(fails="no", drain=20):
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), fails, str(drain)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def state(url):
    try:
        answer = httpx.get(f"{url}/readyz", timeout=10)
    except httpx.TransportError:
        return None
    return answer.status_code, answer.json()["state"]


def ask(url, question, **more):
    body = {"question": question, "passages": ["a harbour at sea."], **more}
    return httpx.post(f"{url}/v1/prune", json=body, timeout=30)


def metric(url, name):
    lines = httpx.get(f"{url}/metrics", timeout=10).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def running():
    with server() as (process, url):
        until(lambda: state(url) == (200, "ready"))
        yield process, url


def test_a_client_that_leaves_frees_what_waits_for_the_model(running):
    _, url = running
    held = threading.Thread(target=ask, args=(url, "slow"))
    held.start()
    until(lambda: metric(url, "prunery_queue_requests") == 1)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as leaving:
        body = b'{"question": "endless", "passages": ["a harbour."]}'
        leaving.sendall(
            b"POST /v1/prune HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        until(lambda: metric(url, "prunery_queue_requests") == 2)
    until(lambda: metric(url, "prunery_queue_requests") <= 1)
    until(lambda: metric(url, "prunery_requests_cancelled_total") == 1)
    held.join()
    began = time.monotonic()
    assert ask(url, "where").status_code == 200  # the endless one never ran
    assert time.monotonic() - began < 20


def test_a_client_that_stays_is_answered_on_the_same_connection(running):
    _, url = running
    with httpx.Client(base_url=url) as client:
        for _ in range(3):
            body = {"question": "where", "passages": ["a harbour at sea."]}
            assert client.post("/v1/prune", json=body).status_code == 200


def test_sigterm_lets_requests_end_refuses_new_ones_and_exits_with_0():
    with server() as (process, url):
        until(lambda: state(url) == (200, "ready"))
        answers = []
        held = threading.Thread(target=lambda: answers.append(ask(url, "slow")))
        held.start()
        until(lambda: metric(url, "prunery_queue_requests") == 1)
        process.send_signal(signal.SIGTERM)
        until(lambda: state(url) == (503, "draining"))
        refused = ask(url, "where")
        assert refused.status_code == 503 and int(refused.headers["Retry-After"]) >= 1
        assert httpx.get(f"{url}/healthz").status_code == 200
        held.join()
        assert answers[0].status_code == 200
        assert process.wait(20) == 0


def test_a_request_longer_than_the_drain_gets_503_and_the_process_still_ends():
    with server(drain=0.3) as (process, url):
        until(lambda: state(url) == (200, "ready"))
        answers = []
        threads = [
            threading.Thread(target=lambda q=question: answers.append(ask(url, q)))
            for question in ("slow", "slow slow")
        ]
        for thread in threads:
            thread.start()
        until(lambda: metric(url, "prunery_queue_requests") == 2)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [503, 503]
        assert process.wait(20) == 0


def test_a_model_that_does_not_load_ends_the_process_with_1_and_one_line():
    command = (
        "from prunery.cli import main; main(['serve', '--port', '0', '--model', 'a=/no/such'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "/no/such" in errors[0] and "Traceback" not in done.stderr


def test_an_address_that_is_taken_is_wrong_input(running):
    _, url = running
    port = url.rsplit(":", 1)[1]
    command = f"from prunery.cli import main; main(['serve', '--port', '{port}'])"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and port in done.stderr and "--port" in done.stderr
