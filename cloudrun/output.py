"""main.py's output on its last stretch: from the bucket to our stdout and stderr, byte for byte."""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Callable

from cloudrun.errors import CloudrunError, Missing
from cloudrun.formats import read_frames
from cloudrun.report import Report
from cloudrun.storage import Bucket

PIPE_PIECE = 4096  # select promises that so much can be written to a pipe without blocking
WAIT_SECONDS = 0.1


class OutputClosed(CloudrunError):
    """Nobody reads our stdout any more, as in `cloudrun main.py | head -1`."""


class Output:
    """Prints an attempt's log chunks in order. `tick` is called while a slow reader makes us wait."""

    def __init__(self, bucket: Bucket, prefix: str, report: Report, tick: Callable[[], None]) -> None:
        self.printed = 0
        self.at_line_start = True
        self._bucket, self._prefix, self._report, self._tick = bucket, prefix, report, tick
        self._closed: set[int] = set()

    def step(self) -> bool:
        """Print the next chunk; False if it is not there yet. Raises OutputClosed."""
        name = f"{self._prefix}/{self.printed + 1:08d}"
        if self._bucket.size(name) is None:
            return False
        try:
            chunk = self._bucket.get(name)[0]
        except Missing:
            return False
        self.printed += 1
        for _, stream, data in read_frames(chunk, name):
            if stream == "note":
                self._report.warn(bytes(data).decode("utf-8", "replace"))
            else:
                self._write(1 if stream == "out" else 2, data)
        return True

    def _write(self, fd: int, data: memoryview) -> None:
        if fd in self._closed or not data:
            return
        self._report.clear()
        try:
            self._write_all(fd, data)
        except OSError as error:
            self._closed.add(fd)
            if error.errno == errno.EPIPE and fd == 1:
                raise OutputClosed("nobody reads the output any more") from None
        self.at_line_start = data[-1] == 10

    def _write_all(self, fd: int, data: memoryview) -> None:
        plain = stat.S_ISREG(os.fstat(fd).st_mode)
        while data:
            if plain:
                data = data[os.write(fd, data) :]
                continue
            _, ready, _ = select.select([], [fd], [], WAIT_SECONDS)
            if ready:
                data = data[os.write(fd, data[:PIPE_PIECE]) :]
            else:
                self._tick()
