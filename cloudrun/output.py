"""main.py's output on its last stretch: from the bucket to our stdout and stderr, byte for byte.

Unless that is a terminal: then only what cannot harm it.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from collections.abc import Callable

from cloudrun.errors import Corrupt, Missing
from cloudrun.formats import read_frames
from cloudrun.report import Report
from cloudrun.storage import Bucket
from cloudrun.terminal import Filter

PIPE_PIECE = 4096  # select promises that so much can be written to a pipe without blocking
WAIT_SECONDS = 0.1
SMALL = 1 << 20  # bytes; a larger chunk may be followed by another one at once


class Output:
    """Prints an attempt's log chunks in order.

    `tick` is called while a slow reader makes us wait; when it returns True the rest is dropped.
    `closed`: nobody reads our stdout any more, as in `cloudrun main.py | head -1`.
    """

    def __init__(self, bucket: Bucket, prefix: str, report: Report, tick: Callable[[], bool]) -> None:
        self.printed = 0
        self.closed = False
        self._bucket, self._prefix, self._report, self._tick = bucket, prefix, report, tick
        self._lost: set[int] = set()
        self._filters = {fd: Filter() for fd in (1, 2) if os.isatty(fd)}
        self._dropping = False
        self._next = 0.0

    def step(self, *, hurry: bool = False) -> bool:
        """Print the next chunk; False if it is not there yet. `hurry`: look, though it may be too soon."""
        if not hurry and time.monotonic() < self._next:
            return False
        name = f"{self._prefix}/{self.printed + 1:08d}"
        try:
            chunk = self._bucket.get(name)[0]
        except Missing:
            return False
        except Corrupt as error:  # too large: what comes after it, the receipt above all, is there to be read
            self._report.warn(str(error))
            chunk = b""
        self.printed += 1
        if len(chunk) < SMALL:  # no other one is written before so long; looking for it would cost money
            self._next = time.monotonic() + 0.8 * self._bucket.write_pace
        try:
            for _, stream, data in read_frames(chunk, name):
                if stream == "note":
                    self._report.warn(bytes(data).decode("utf-8", "replace"))
                else:
                    self._write(1 if stream == "out" else 2, data)
        except Corrupt as error:
            self._report.warn(str(error))
        return True

    def _write(self, fd: int, data: memoryview) -> None:
        if fd in self._lost or self._dropping or not data:
            return
        self._report.clear()
        try:
            self._write_all(fd, memoryview(self._filters[fd](bytes(data))) if fd in self._filters else data)
        except OSError as error:
            self._lost.add(fd)
            self.closed = self.closed or (error.errno == errno.EPIPE and fd == 1)
            if error.errno not in (errno.EPIPE, errno.EIO):
                self._report.warn(f"cannot print the output here: {error.strerror}; see cloudrun logs")
        self._report.unfinished = data[-1] != 10 and fd in self._filters

    def _write_all(self, fd: int, data: memoryview) -> None:
        plain = stat.S_ISREG(os.fstat(fd).st_mode)
        while data:
            if plain:
                data = data[os.write(fd, data) :]
                continue
            _, ready, _ = select.select([], [fd], [], WAIT_SECONDS)
            try:
                if ready:
                    data = data[os.write(fd, data[:PIPE_PIECE]) :]
                    continue
            except BlockingIOError:  # somebody else made it so, and filled it
                pass
            self._dropping = self._tick()
            if self._dropping:
                return
