"""What machines that went on alone stored late: archives, taken apart by whoever comes to the bucket next.

All of it is a stranger's data: sizes and counts are bounded, names are checked, contents are hashed here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from cloudrun.config import USUAL, Bounds
from cloudrun.errors import Conflict, Corrupt, Missing
from cloudrun.formats import HEX64, parse
from cloudrun.order import Order
from cloudrun.pull import MAX_OUTPUTS, outputs_in
from cloudrun.receipt import FIELDS, MAX_RECEIPT
from cloudrun.runs import attempt_object, last_attempt
from cloudrun.storage import MAX_OBJECT, Bucket

MAX_INDEX = 64 << 20  # bytes of an archive's first line
ARCHIVE = re.compile(r"(log|save)-[0-9]{3}\Z")
CHUNK = re.compile(r"log/[0-9]{8}\Z")
TRIES = 5  # to replace outputs.json, if others do so at the same time


class Piece(NamedTuple):
    """So many bytes of an object, read anew each time."""

    bucket: Bucket
    object: str
    name: str
    start: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        return self.bucket.chunks(self.object, self.start, self.size)

    def read(self, most: int) -> bytes:
        if self.size > most:
            raise Corrupt(f"{self.object} is damaged: {self.name} has {self.size} bytes")
        return b"".join(self.chunks())


class Contents:
    """Of a piece, for a bucket that wants to iterate them several times."""

    def __init__(self, piece: Piece) -> None:
        self._piece = piece

    def __iter__(self) -> Iterator[bytes]:
        return self._piece.chunks()


def collect(
    bucket: Bucket, order: Order, tell: Callable[[str], None] = lambda text: None, bounds: Bounds = USUAL
) -> None:
    """Put what arrived late where it belongs: chunks of the log and outputs first, then the receipt.

    An archive is removed when all of it is in its place; one that is torn, or lies, is left and told of.
    Can be broken off and repeated. `bounds`: of all archives of an attempt together. Raises BucketError.
    """
    if not order.stranger:
        return
    for attempt in bucket.dirs(order.prefix + "/attempts/"):
        if attempt.isdigit():
            _Late(bucket, order, int(attempt), bounds).collect(tell)


def is_alone(order: Order, state: dict[str, Any]) -> bool:
    """Whether a machine that says this of itself hears nobody any more, and nobody it."""
    return order.stranger and state.get("alone") is True


def may_go_on(bucket: Bucket, order: Order, state: dict[str, Any]) -> bool:
    """Whether a machine that is gone without a word had nobody to say it to, well before the deadline.

    Its host may have started it again: then it can read nothing any more, and not know whose turn it is.
    """
    return is_alone(order, state) and order.left(bucket) > 0


def goes_alone(bucket: Bucket, order: Order) -> bool:
    attempt = last_attempt(bucket, order) if order.stranger else 0
    return is_alone(order, attempt_object(bucket, order, attempt, "state") or {})


class _Late:
    """What one attempt stored late."""

    def __init__(self, bucket: Bucket, order: Order, attempt: int, bounds: Bounds) -> None:
        self.bucket, self.order, self.attempt, self.bounds = bucket, order, attempt, bounds
        self.files, self.bytes = 0, 0
        self.top = f"{order.prefix}/attempts/{attempt}/"

    def collect(self, tell: Callable[[str], None]) -> None:
        late = self.top + "late/"
        names = [name[len(late) :] for name in self.bucket.names(late)]
        for name in sorted(filter(ARCHIVE.match, names)) + ["receipt"] * ("receipt" in names):
            act = self.receipt if name == "receipt" else self.logs if name[0] == "l" else self.saves
            try:
                act(late + name)
                self.bucket.delete(late + name)
            except Missing:  # somebody else was faster
                continue
            except Corrupt as error:
                tell(str(error))

    def receipt(self, name: str) -> None:
        data = self.bucket.get(name, MAX_RECEIPT)[0]
        if parse(data, name, **FIELDS)["attempt"] != self.attempt:
            raise Corrupt(f"{name} is damaged: it is that of another attempt")
        with suppress(Conflict):
            self.bucket.create(self.order.prefix + "/receipt.json", data)

    def logs(self, name: str) -> None:
        for piece in self.pieces(name):
            if not CHUNK.match(piece.name):
                raise Corrupt(f"{name} is damaged: {piece.name[:200]!r} has no place in it")
            with suppress(Conflict):
                self.bucket.create(self.top + piece.name, piece.read(MAX_OBJECT))

    def saves(self, name: str) -> None:
        *saved, last = self.pieces(name)
        if last.name != "outputs.json" or not all(_is_saved(piece.name) for piece in saved):
            raise Corrupt(f"{name} is damaged: it holds something else than outputs")
        here = set()
        for piece in saved:
            here.add(self.bucket.put_blob(self.order.prefix + "/saved/", Contents(piece)))
            if piece.name[6:] not in here:
                raise Corrupt(f"{name} is damaged: {piece.name} is not what its name says")
        self.outputs(last.read(MAX_OUTPUTS), name, here)

    def pieces(self, name: str) -> list[Piece]:
        """Raises Corrupt if it would be too much, together with what was taken before; and Missing."""
        size = self.bucket.size(name)
        if size is None:
            raise Missing(f"there is no {name}")
        found, most = [], self.bounds.gigabytes * 1e9
        if self.bytes + size <= most:
            found = pieces(self.bucket, name, size)
        if not found or self.files + len(found) > self.bounds.files:
            raised = "CLOUDRUN_FETCH_FILES" if found else "CLOUDRUN_FETCH_GB"
            raise Corrupt(f"{name} is more than is to come home: raise {raised} and run `cloudrun pull`")
        self.bytes, self.files = self.bytes + size, self.files + len(found)
        return found

    def outputs(self, data: bytes, source: str, here: set[str]) -> None:
        """Replace outputs.json, if these are newer and all that they name is stored."""
        name, ours = self.order.prefix + "/outputs.json", _number(data, source)
        if ours[0] != self.attempt:
            raise Corrupt(f"{source} is damaged: its outputs are those of another attempt")
        for sha256 in {entry.sha256 for entry in outputs_in(data, source, self.order)} - {"", *here}:
            if self.bucket.size(f"{self.order.prefix}/saved/{sha256}") is None:
                raise Corrupt(f"{source} is damaged: it names {sha256}, which is not there")
        for _ in range(TRIES):
            before, version = b"", None
            with suppress(Missing):
                before, version = self.bucket.get(name, MAX_OUTPUTS)
            if before and _number(before, name) >= ours:
                return
            with suppress(Conflict):
                self.bucket.swap(name, data, version)
                return
        raise Conflict(f"{name} is replaced by somebody else again and again; try again")


def pieces(bucket: Bucket, name: str, size: int) -> list[Piece]:
    """What is in an archive of so many bytes, at least one. Raises Corrupt for one that is torn."""
    head = b""
    for piece in bucket.chunks(name):
        head += piece
        if b"\n" in piece or len(head) > MAX_INDEX:
            break
    index, newline, _ = head.partition(b"\n")
    found, at = [], len(index) + len(newline)
    for each in parse(index if newline else b"", name, objects=list)["objects"]:
        if not (isinstance(each, list) and [type(value) for value in each] == [str, int] and each[1] >= 0):
            raise Corrupt(f"{name} is damaged: {str(each)[:200]!r} is no entry of it")
        found.append(Piece(bucket, name, each[0], at, each[1]))
        at += each[1]
    if at != size or not found:
        raise Corrupt(f"{name} is damaged: it has {size} bytes, and should have {at}")
    return found


def _is_saved(name: str) -> bool:
    return name.startswith("saved/") and bool(HEX64.match(name[6:]))


def _number(data: bytes, name: str) -> tuple[int, int]:
    """(attempt, sequence) of an outputs.json: the larger one is newer."""
    found = parse(data, name, attempt=int, sequence=int)
    return found["attempt"], found["sequence"]
