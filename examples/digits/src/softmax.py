"""A softmax classifier and its training by mini-batch gradient descent, on plain lists.

The weights are ten rows, one per digit. A row times the inputs of an image is the digit's score.
"""

from math import exp, log
from operator import mul

CLASSES = 10
RATE = 0.5


def untrained(inputs):
    return [[0.0] * inputs for _ in range(CLASSES)]


def fits(weights, inputs):
    """Whether these can be weights for so many inputs; TypeError if they are not even rows."""
    return len(weights) == CLASSES and all(
        len(row) == inputs and all(isinstance(weight, float) for weight in row) for row in weights
    )


def train_epoch(weights, digits, batchsize):
    """The weights after one pass over the digits, and the mean loss on the way."""
    loss = 0.0
    for start in range(0, len(digits), batchsize):
        weights, batch_loss = train_batch(weights, digits[start : start + batchsize])
        loss += batch_loss
    return weights, loss / len(digits)


def train_batch(weights, batch):
    """The weights after one step, and the summed loss before it."""
    results = [loss_and_errors(weights, digit) for digit in batch]
    columns = list(zip(*(digit.inputs for digit in batch)))
    errors_by_class = zip(*(errors for _, errors in results))
    step = RATE / len(batch)
    stepped = [
        [weight - step * sum(map(mul, errors, column)) for weight, column in zip(row, columns)]
        for row, errors in zip(weights, errors_by_class)
    ]
    return stepped, sum(loss for loss, _ in results)


def loss_and_errors(weights, digit):
    """The cross entropy for one digit, and its derivative by each score."""
    values = scores(weights, digit.inputs)
    top = max(values)  # subtracted, because exp() of a large score overflows
    exps = [exp(value - top) for value in values]
    total = sum(exps)
    errors = [value / total for value in exps]
    errors[digit.label] -= 1.0
    return log(total) + top - values[digit.label], errors


def accuracy(weights, digits):
    return sum(classify(weights, digit.inputs) == digit.label for digit in digits) / len(digits)


def classify(weights, inputs):
    values = scores(weights, inputs)
    return values.index(max(values))


def scores(weights, inputs):
    return [sum(map(mul, row, inputs)) for row in weights]
