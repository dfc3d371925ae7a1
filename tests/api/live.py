"""A service of this process on a real port, with models that a test can script."""

import socket
import threading
import time
from contextlib import contextmanager

import uvicorn

from prunery.api.app import create_app
from prunery.api.settings import Settings
from prunery.pruners.context import ContextPruner

from ..pruners.context.scripted import scripted
from ..pruners.context.standin import small_provence

QUESTION = "who painted the harbour"
PASSAGES = [
    "The weather was cold. Nobody went out.",
    "The harbour was painted by Turner. He stayed for a week. The inn was full.",
    "A harbour is a place for boats.",
]


class Poisoned:
    """A forward pass that gives no number for rows holding a token."""

    def __init__(self, forward, token):
        self.forward, self.token = forward, token
        self.on_cpu = True

    def __call__(self, ids, mask, types):
        rank, keep = self.forward(ids, mask, types)
        rank = rank.copy()
        rank[(ids == self.token).any(1)] = float("nan")
        return rank, keep


def scripted_pruner(poison=None):
    """Relevant: harbour, more so painted; passages holding the word `poison` have no score."""
    words = {"harbour": 0.9, "painted": 0.9, "turner": 0.9}
    loaded, forward = scripted(words, other=0.1, rank={"harbour": 0.5, "painted": 1.5})
    loaded.config.licence = "Apache-2.0"
    if poison:
        forward = Poisoned(forward, loaded.tokenizer.convert_tokens_to_ids(poison))
    return ContextPruner(loaded, forward=forward)


def small_pruner(**options):
    """A real network of two layers, with random weights."""
    return ContextPruner(small_provence(**options))


def application(pruner=None, **settings):
    """An application whose model `default` is the pruner; wait for it with `started`."""
    made = Settings(models={"default": "default"}, port=0, **settings)
    return create_app(made, pruners={"default": pruner or scripted_pruner("poison")})


@contextmanager
def live(app):
    """Serve an application on a free port of this machine; gives its URL once it is ready."""
    config = uvicorn.Config(app, log_config=None, lifespan="on", ws="none")
    server = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        end = time.monotonic() + 60
        while app.state.service.state != "ready":
            assert time.monotonic() < end and thread.is_alive(), app.state.service.state
            time.sleep(0.01)
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join(30)
