"""A service in a process of its own whose clocks are short.

Run as a program: `hostile_server.py HEAD_SECONDS BODY_SECONDS`; prints its address.
"""

import sys
from pathlib import Path


def main(head_seconds, seconds):
    from prunery.api import protocol
    from prunery.api.server import serve
    from prunery.api.settings import Limits, Settings
    from tests.api.live import scripted_pruner

    protocol.HEAD_SECONDS = float(head_seconds)
    settings = Settings(port=0, limits=Limits(seconds=float(seconds)))

    def tell(url):
        sys.stdout.write(f"{url}\n")
        sys.stdout.flush()

    serve(settings, ready=tell, pruners={"default": scripted_pruner()})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main(*sys.argv[1:])
