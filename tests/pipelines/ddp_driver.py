"""One process of a training by two, over gloo: writes what it saw to a file of its own."""

import json
import sys
from pathlib import Path

from prunery import OnlineSelection

from .tiny_training import Chosen, chats, trainer, weights


def lopsided(sample, position):
    """Nothing of the second batch of a window stays, and two samples of the first."""
    return (sample // 7) % 8 < 2


def main(folder: Path) -> None:
    rows = chats(16)
    learner = trainer(
        folder,
        rows,
        OnlineSelection(method=Chosen(rule=lopsided), decisions=folder / "decisions.jsonl"),
        max_steps=2,
        ddp_backend="gloo",
        train_sampling_strategy="sequential",
        optim="sgd",
    )
    learner.train()
    found = {
        "world": learner.args.world_size,
        "counts": learner.counts,
        "windows": [[tuple(b["input_ids"].shape) for b in window] for window in learner.windows],
        "weights": {
            name: one.flatten().tolist()
            for name, one in weights(learner.accelerator.unwrap_model(learner.model)).items()
        },
    }
    (folder / f"seen-{learner.args.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
