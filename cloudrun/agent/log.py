"""main.py's output on its way to the bucket: in order, byte for byte, and never in main.py's way."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from functools import partial

from cloudrun.agent.watch import Task, insist
from cloudrun.formats import frame
from cloudrun.storage import Bucket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cloudrun.agent.alone import AloneBucket

CHUNK = 4 << 20  # bytes of frames in one object
NEWEST = 8 << 20  # bytes that are kept in memory when the spool takes no more
GATHERING = 0.02  # of the pace: Python writes a line and its end one after the other


class Log:
    """Frames go in by `write`, and leave as objects 00000001, 00000002, … with one in flight.

    They wait in the spool, a file of at most `limit` bytes. What does not fit (or the disk is full) is
    kept in memory, the newest 8 MiB of it; what is dropped before that is replaced by a note. From a
    stranger's machine that goes on alone they leave now and then, all that there are in one archive.
    """

    def __init__(self, bucket: Bucket, prefix: str, limit: int, stranger: AloneBucket | None = None) -> None:
        self.sent = sum(1 for _ in bucket.names(prefix + "/"))  # after a reboot it goes on
        self._bucket, self._prefix, self._limit = bucket, prefix, limit
        self._stranger = stranger
        self._spool = os.open("spool", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.unlink("spool")
        self._read = self._written = 0
        self._ends: deque[int] = deque()  # places in the spool where a frame ends, a chunk apart
        self._newest: deque[bytes] = deque()
        self._newest_bytes = self._dropped = 0
        self._changed = threading.Condition()
        self._closing = False
        self.task = Task(self._send)

    def write(self, stream: str, data: bytes) -> None:
        piece = frame(time.time(), stream, data)
        with self._changed:
            if self._newest or not self._spooled(piece):
                self._keep(piece)
            self._changed.notify()

    def close(self) -> None:
        """What is written so far is all; `task` ends when it is sent."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def _spooled(self, piece: bytes) -> bool:
        try:
            full = self._written + len(piece) > self._limit
            if full or os.pwrite(self._spool, piece, self._written) < len(piece):
                return False
        except OSError:  # the disk is full
            return False
        self._written += len(piece)
        if self._written - (self._ends[-1] if self._ends else self._read) >= CHUNK:
            self._ends.append(self._written)
        return True

    def _keep(self, piece: bytes) -> None:
        self._newest.append(piece)
        self._newest_bytes += len(piece)
        while self._newest_bytes > NEWEST:
            oldest = self._newest.popleft()
            self._newest_bytes -= len(oldest)
            self._dropped += len(oldest) - oldest.index(b"\n") - 1

    def _send(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._written or self._newest)
                self._changed.wait_for(lambda: self._closing, GATHERING * self._bucket.write_pace)
                if self._stranger and self._is_alone():
                    self._changed.wait_for(lambda: self._closing, self._stranger.pause("log"))
                chunks = [self._next()]
                while self._is_alone() and (self._written or self._newest):
                    chunks.append(self._next())
            if not chunks[0]:
                return
            insist(partial(self._store, chunks), float("inf"), float("inf"))
            self.sent += len(chunks)
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closing, self._bucket.write_pace if len(chunks[-1]) < CHUNK // 2 else 0
                )

    def _is_alone(self) -> bool:
        return self._stranger is not None and self._stranger.alone

    def _store(self, chunks: list[bytes]) -> None:
        named = [(f"log/{self.sent + n:08d}", chunk) for n, chunk in enumerate(chunks, 1)]
        if self._stranger and self._stranger.alone:
            self._stranger.archive_logs(named)
        else:
            self._bucket.create(self._prefix[: -len("log")] + named[0][0], named[0][1])

    def _next(self) -> bytes:
        """Whole frames for one object, oldest first; empty when nothing waits."""
        if self._written:
            end = self._ends.popleft() if self._ends else self._written
            chunk = os.pread(self._spool, end - self._read, self._read)
            self._read = end
            if end == self._written:
                os.ftruncate(self._spool, 0)
                self._read = self._written = 0
            return chunk
        chunk = b"".join(self._newest)
        if self._dropped:
            chunk = frame(time.time(), "note", b"%d bytes of output dropped here" % self._dropped) + chunk
        self._newest.clear()
        self._newest_bytes = self._dropped = 0
        return chunk
