"""A billing meter for local machines, independent of the package: it believes /proc and nothing else.

Every process that belongs to the test's own directory counts, apart from the test and the clients: its
environment, working directory, program, arguments or an open file mention that directory.
"""

import os
import threading
import time
from contextlib import suppress

PERIOD = 0.03


def pids():
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def read(path):
    with suppress(OSError), open(path, "rb") as file:
        return file.read()
    return b""


def link(path):
    with suppress(OSError):
        return os.fsencode(os.readlink(path))
    return b""


def mentions(pid, mark):
    top = f"/proc/{pid}"
    if any(mark in read(f"{top}/{name}") for name in ("environ", "cmdline")):
        return True
    if any(mark in link(f"{top}/{name}") for name in ("cwd", "exe")):
        return True
    with suppress(OSError):
        return any(mark in link(f"{top}/fd/{number}") for number in os.listdir(f"{top}/fd"))
    return False


class Meter(threading.Thread):
    """Runs from its making to `close`. `stretches`: from when to when a process was there, since boot."""

    def __init__(self, folder):
        super().__init__(daemon=True)
        self._mark = os.fsencode(str(folder))
        self._apart = set()
        self._before = pids()  # what was here already cannot belong to a directory that is new
        self._closed = threading.Event()
        self.stretches = []
        self._counting = False
        self.members = set()
        self.samples = 0
        self.start()

    def leave_out(self, pid):
        """A client: it is not part of the machine."""
        self._apart.add(pid)

    def run(self):
        while not self._closed.wait(PERIOD):
            self._sample()

    def close(self):
        self._closed.set()
        self.join()

    def _sample(self):
        there = pids()
        self._before &= there  # the number of a process that has ended may be given to another one
        found = {pid for pid in there - self._before - self._apart if mentions(pid, self._mark)}
        self.members = found - self._apart
        if self.members and self._counting:
            self.stretches[-1][1] = time.monotonic()
        elif self.members:
            self.stretches.append([time.monotonic()] * 2)
        self._counting = bool(self.members)
        self.samples += 1

    def look_again(self):
        """What is there now, and not just what was there at the last look."""
        seen = self.samples
        while self.samples < seen + 2:
            time.sleep(PERIOD / 2)
        return self.members

    @property
    def seconds(self):
        return sum(last - first for first, last in self.stretches)

    def wait_gone(self, seconds):
        """Until nothing of the machine is there, seen twice. Fails if that takes longer."""
        deadline, clean = time.monotonic() + seconds, 0
        seen = self.samples
        while clean < 2:
            if self.samples > seen:
                clean = clean + 1 if not self.members else 0
                seen = self.samples
            if time.monotonic() > deadline:
                shown = {pid: read(f"/proc/{pid}/cmdline").replace(b"\0", b" ")[:90] for pid in self.members}
                raise AssertionError(f"after {seconds} s these are still there: {shown}")
            time.sleep(PERIOD / 2)
