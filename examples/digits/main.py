"""Trains a classifier of handwritten digits: the example project of cloudrun.

EPOCHS and BATCHSIZE come from the environment. All paths are relative to the project directory,
where main.py is started.
"""

import os
import random
import sys
import time
import zlib
from pathlib import Path

from src import checkpoint, digits, files, softmax

DEFAULTS = {"EPOCHS": 20, "BATCHSIZE": 32}
SEED = 1998  # any number will do, as long as a resumed run uses the same one

DATA = Path("data/digits.csv.gz")
CHECKPOINT = Path("checkpoint/weights.json")
WEIGHTS = Path("model/weights.json")
METRICS = Path("model/metrics.json")


def main():
    started = time.monotonic()
    epochs, batchsize = settings(os.environ)
    train, test = read_digits()
    for path in (CHECKPOINT, WEIGHTS):
        path.parent.mkdir(exist_ok=True)
    state = resume(epochs)
    while state.epoch < epochs:
        state = train_epoch(state, batchsize, train, test)
    write_model(state, train, test, seconds=time.monotonic() - started)


def settings(environ):
    """EPOCHS and BATCHSIZE; ends the program if one of them is not a positive number."""
    texts = {name: environ.get(name, str(default)) for name, default in DEFAULTS.items()}
    wrong = [f"{name}={text}" for name, text in texts.items() if not is_positive(text)]
    if wrong:
        print("Not a whole number of at least 1:", ", ".join(wrong), file=sys.stderr)
        sys.exit(2)
    return int(texts["EPOCHS"]), int(texts["BATCHSIZE"])


def is_positive(text):
    try:
        return int(text) > 0
    except ValueError:
        return False


def read_digits():
    try:
        return digits.split(digits.read(DATA), SEED)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        sys.exit(f"Cannot read {DATA} ({error}). Is this the project directory?")


def resume(epochs):
    """The state to go on from. A damaged one ends the program: a new start would overwrite it."""
    try:
        state = checkpoint.load(CHECKPOINT)
    except (OSError, ValueError) as error:
        sys.exit(f"Cannot resume from {CHECKPOINT} ({error}). Delete it to start over.")
    if state.epoch:
        plan = f"going on to {epochs}" if state.epoch < epochs else "nothing left to train"
        print(f"Resuming from {CHECKPOINT} after epoch {state.epoch}: {plan}.", file=sys.stderr)
    return state


def train_epoch(state, batchsize, train, test):
    epoch = state.epoch + 1
    # Seeded by the epoch, not once for the run: a resumed run sees the images in the same order.
    shuffled = list(train)
    random.Random(SEED + epoch).shuffle(shuffled)
    weights, loss = softmax.train_epoch(state.weights, shuffled, batchsize)
    state = checkpoint.State(epoch, batchsize, weights)
    checkpoint.save(CHECKPOINT, state)  # first, so that an epoch the user has seen is never lost
    accuracy = softmax.accuracy(weights, test)
    print(f"epoch {epoch} loss {loss:.4f} accuracy {accuracy:.4f}", flush=True)
    return state


def write_model(state, train, test, *, seconds):
    files.save(WEIGHTS, state.weights)
    metrics = {
        "accuracy": softmax.accuracy(state.weights, test),
        "epochs": state.epoch,
        "batchsize": state.batchsize,
        "train_size": len(train),
        "test_size": len(test),
        "seconds": round(seconds, 3),
    }
    files.save(METRICS, metrics)


if __name__ == "__main__":
    main()
