"""A service in a process of its own, to be killed: `fault_server.py PORT`."""

import sys
from pathlib import Path


def main(port):
    from prunery.api.server import serve
    from prunery.api.settings import Settings
    from tests.api.live import small_pruner

    serve(Settings(port=int(port)), pruners={"default": small_pruner(max_length=128)})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main(*sys.argv[1:])
