"""Reads the images and sets a fifth of them aside."""

import gzip
import random
from typing import List, NamedTuple

PIXELS = 64
BRIGHTEST = 16
INPUTS = PIXELS + 1


class Digit(NamedTuple):
    inputs: List[float]  # the pixels from 0 to 1, then a constant 1 whose weight is the bias
    label: int


def read(path):
    """All digits of a gzipped CSV file; ValueError if a row is not an image and its label."""
    with gzip.open(str(path), "rt", encoding="ascii") as lines:
        digits = [parse(line) for line in lines]
    if not digits:
        raise ValueError("it is empty")
    return digits


def parse(line):
    *pixels, label = map(int, line.split(","))
    if len(pixels) != PIXELS or not 0 <= label <= 9:
        raise ValueError(f"a row must have {PIXELS} pixels and a label from 0 to 9")
    return Digit([pixel / BRIGHTEST for pixel in pixels] + [1.0], label)


def split(digits, seed):
    """The digits to train with and the fifth held out."""
    # Shuffled, because long stretches of the file count 0, 1, ... 9: every fifth image would be
    # a zero or a five there.
    shuffled = list(digits)
    random.Random(seed).shuffle(shuffled)
    held_out = len(shuffled) // 5
    return shuffled[held_out:], shuffled[:held_out]
