"""A service in a process of its own, whose network takes as long as the question says.

Run as a program: `slow_server.py FAILS DRAIN_SECONDS`; prints its address.
"""

import sys
import time
from pathlib import Path

SLEEPS = {"slow": 2.0, "endless": 60.0}


def pruner():
    from prunery.pruners.context import ContextPruner
    from tests.pruners.context.scripted import scripted

    loaded, forward = scripted({"harbour": 0.9}, rank={"harbour": 1.0})
    ids = {int(loaded.tokenizer.convert_tokens_to_ids(word)): s for word, s in SLEEPS.items()}

    def sleeping(given, mask, types):
        time.sleep(max((ids.get(int(i), 0.0) for i in given.ravel()), default=0.0))
        return forward(given, mask, types)

    return ContextPruner(loaded, forward=sleeping)


def main(fails, drain):
    from prunery.api.server import serve
    from prunery.api.settings import Settings

    models = {"default": "/no/such/folder" if fails == "yes" else "default"}
    settings = Settings(port=0, models=models, drain_seconds=float(drain), workers=1)
    pruners = None if fails == "yes" else {"default": pruner()}

    def tell(url):
        sys.stdout.write(f"{url}\n")
        sys.stdout.flush()

    serve(settings, ready=tell, pruners=pruners)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main(*sys.argv[1:])
