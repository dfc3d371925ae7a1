"""Run as a script: trains in a store and kills itself with SIGKILL at a given moment.

classifier_driver.py STORE MOMENT    step:N, before the N-th optimiser step (from 0);
                                     state:N, before the N-th state is saved
"""

import os
import signal
import sys

import torch

from prunery.pipelines import classifier, classifier_state
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps import STEPS
from prunery.storage import Store

OPTIONS = {
    "model": "cnn",
    "hidden": 16,
    "epochs": 4,
    "batch_size": 8,
    "runs": 2,
    "gradient_norm": "last_layer",
}


def train(store):
    """The step, on the table `data` of a store."""
    step = STEPS["train_classifier"]
    return step(step.options(**OPTIONS), {"data": "data"}, StepContext(store, "dyn", threads=1))


def kill_at(number, owner, name):
    """Kill this process before the call of that number."""
    original, calls = getattr(owner, name), []

    def counted(*arguments):
        calls.append(None)
        if len(calls) > number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(owner, name, counted)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, number = sys.argv[2].split(":")
    if what == "step":
        kill_at(int(number), classifier.Trainer, "_step")
    else:
        kill_at(int(number), classifier_state, "save_state")
    train(Store(sys.argv[1]))
