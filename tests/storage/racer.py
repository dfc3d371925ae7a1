"""Run as a script: one of several writers of the same table, all ready before any commits.

racer.py URI STORAGE_OPTIONS_AS_JSON SALT FOLDER NAME RACERS
"""

import json
import sys
import time
from pathlib import Path

import rows as data

from prunery.errors import StoreError
from prunery.storage import Store


def main() -> None:
    uri, options, salt, folder, name, racers = sys.argv[1:]
    store = Store(uri, storage_options=json.loads(options))
    with store.write(**data.arguments()) as writer:
        for i in range(2):
            with writer.shard(i) as shard:
                shard.write(data.rows(i, 20, salt))
        Path(folder, f"{name}.ready").touch()
        stop = time.monotonic() + 60
        while len(list(Path(folder).glob("*.ready"))) < int(racers):
            if time.monotonic() > stop:
                raise SystemExit("the other racers did not come")
            time.sleep(0.001)
        try:
            sys.stdout.write(writer.commit().logical_digest)
        except StoreError as error:
            sys.stdout.write(f"StoreError: {error}")


if __name__ == "__main__":
    main()
