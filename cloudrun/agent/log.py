"""main.py's output on its way to the bucket: in order, byte for byte, and never in main.py's way."""

from __future__ import annotations

import threading
import time
from collections import deque
from functools import partial
from tempfile import TemporaryFile

from cloudrun.agent.watch import insist
from cloudrun.formats import frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cloudrun.storage import Bucket

CHUNK = 4 << 20  # bytes of frames in one object
MEMORY = 8 << 20  # bytes that wait in memory before they wait on the disk
INTERVAL = 0.12  # seconds between two objects, so that a chatty program does not make thousands


class Log:
    """Frames go in by `write`, and leave as objects 00000001, 00000002, … with one in flight.

    What the bucket cannot take at once waits in memory, then in a file of at most `spool` bytes; after
    that the newest 8 MiB are kept, the middle is dropped, and a note in its place says how much.
    """

    def __init__(self, bucket: Bucket, prefix: str, spool: int) -> None:
        self.sent = 0
        self._bucket, self._prefix, self._spool_limit = bucket, prefix, spool
        self._lock = threading.Condition()
        self._head: deque[bytes] = deque()
        self._tail: deque[bytes] = deque()
        self._head_bytes = self._tail_bytes = self._dropped = 0
        self._spool = TemporaryFile(dir=".")  # noqa: SIM115, it lives as long as this object
        self._spool_written = self._spool_read = 0
        self._closing = False
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def write(self, stream: str, data: bytes) -> None:
        piece = frame(time.time(), stream, data)
        with self._lock:
            if not self._tail and self._spool_read == self._spool_written and self._head_bytes < MEMORY:
                self._head.append(piece)
                self._head_bytes += len(piece)
            elif self._tail or not self._spooled(piece):
                self._keep_newest(piece)
            self._lock.notify()

    def close(self, seconds: float) -> None:
        """Send what is left, as far as that is possible within so many seconds."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        self._thread.join(seconds)

    def _spooled(self, piece: bytes) -> bool:
        if self._spool_written + len(piece) > self._spool_limit:
            return False
        try:
            self._spool.seek(self._spool_written)
            self._spool.write(piece)
            self._spool.flush()
        except OSError:  # the disk is full
            return False
        self._spool_written += len(piece)
        return True

    def _keep_newest(self, piece: bytes) -> None:
        self._tail.append(piece)
        self._tail_bytes += len(piece)
        while self._tail_bytes > MEMORY:
            oldest = self._tail.popleft()
            self._tail_bytes -= len(oldest)
            self._dropped += len(oldest) - oldest.index(b"\n") - 1

    def _send(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closing or self._waiting())
                chunk = self._next()
                if not chunk:
                    return
            name = f"{self._prefix}/{self.sent + 1:08d}"
            insist(partial(self._bucket.create, name, chunk), float("inf"), lambda: None)
            self.sent += 1
            with self._lock:
                if len(chunk) < CHUNK // 2:
                    self._lock.wait_for(lambda: self._closing, INTERVAL)

    def _waiting(self) -> bool:
        return bool(self._head or self._tail or self._spool_read < self._spool_written)

    def _next(self) -> bytes:
        """Whole frames for one object, oldest first; empty when nothing waits."""
        pieces, size = [], 0
        while self._head and size < CHUNK:
            pieces.append(self._head.popleft())
            size += len(pieces[-1])
        self._head_bytes -= size
        if size < CHUNK and self._spool_read < self._spool_written:
            self._spool.seek(self._spool_read)
            while size < CHUNK and self._spool_read < self._spool_written:
                header = self._spool.readline()
                pieces.append(header + self._spool.read(int(header.split()[2])))
                self._spool_read += len(pieces[-1])
                size += len(pieces[-1])
            if self._spool_read == self._spool_written:
                self._spool_read = self._spool_written = 0
                self._spool.truncate(0)
        if size < CHUNK and self._spool_written == 0 and self._tail:
            if self._dropped:
                pieces.append(frame(time.time(), "note", b"%d bytes of output dropped here" % self._dropped))
                self._dropped = 0
            pieces.extend(self._tail)
            self._tail.clear()
            self._tail_bytes = 0
        return b"".join(pieces)
