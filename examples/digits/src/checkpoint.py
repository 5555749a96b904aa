"""The state between two epochs.

It is all a run needs to go on: the order of the images follows from the epoch.
"""

import json
from typing import List, NamedTuple, Optional

from src import digits, files, softmax


class State(NamedTuple):
    epoch: int  # finished ones
    batchsize: Optional[int]  # of the last epoch
    weights: List[List[float]]


def start():
    return State(epoch=0, batchsize=None, weights=softmax.untrained(digits.INPUTS))


def save(path, state):
    files.save(path, state._asdict())


def is_sound(state):
    counts_make_sense = state.epoch > 0 and state.batchsize > 0
    return counts_make_sense and softmax.fits(state.weights, digits.INPUTS)


def load(path):
    """The saved state, or the one to start from if there is none; ValueError if it is damaged."""
    if not path.exists():
        return start()
    saved = json.loads(path.read_text())
    try:
        state = State(**saved)
        sound = is_sound(state)
    except TypeError as error:
        raise ValueError("it holds something else") from error
    if not sound:
        raise ValueError("its values make no sense")
    return state
