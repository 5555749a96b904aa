"""What /proc says about processes. Sent with the agent: standard library, Python 3.8."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterable

WRITING = os.O_WRONLY | os.O_RDWR


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def stat_of(pid: int) -> list[bytes]:
    """/proc/<pid>/stat from its third field on: state, parent, group, … Empty if there is no such process."""
    with suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()
    return []


def parents() -> dict[int, int]:
    """The parent of every process that is not a zombie."""
    stats = ((pid, stat_of(pid)) for pid in pids())
    return {pid: int(stat[1]) for pid, stat in stats if stat and stat[0] not in (b"Z", b"X")}


def below(roots: Iterable[int], parent_of: dict[int, int]) -> set[int]:
    """The roots' children, their children and so on, without the roots themselves."""
    roots, found = set(roots), set(roots)
    while True:
        more = {pid for pid, parent in parent_of.items() if parent in found} - found
        if not more:
            return found - roots
        found |= more


def descendants() -> set[int]:
    return below([os.getpid()], parents())


def send(signum: int, targets: Iterable[int]) -> None:
    for pid in targets:
        with suppress(OSError):
            os.kill(pid, signum)


def kill_descendants(limit: float) -> bool:
    """SIGKILL until nothing is left below this process; False if that took longer than `limit` seconds."""
    deadline = time.monotonic() + limit
    while True:
        left = descendants()
        if not left or time.monotonic() > deadline:
            return not left
        for pid in left:  # with its group: no member can fork while that is killed, so no fork bomb escapes
            with suppress(OSError):
                group = os.getpgid(pid)
                os.kill(pid if group in (0, 1, os.getpgrp()) else -group, signal.SIGKILL)
        time.sleep(0.005)


def remove_tree(path: str) -> None:
    """However deep it is: Python's own way calls itself for each level. What cannot be removed stays."""
    import subprocess

    subprocess.run(["rm", "-rf", "--", path], stderr=subprocess.DEVNULL, check=False)


def open_for_writing(owners: Iterable[int]) -> set[tuple[int, int]]:
    """(device, inode) of every regular file that one of these processes has open or mapped for writing."""
    found = set()
    for pid in owners:
        with suppress(OSError):
            for number in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError, ValueError, IndexError):
                    with open(f"/proc/{pid}/fdinfo/{number}", "rb") as file:
                        flags = int(file.read().split(b"flags:", 1)[1].split(None, 1)[0], 8)
                    if flags & WRITING:
                        status = os.stat(f"/proc/{pid}/fd/{number}")
                        found.add((status.st_dev, status.st_ino))
        with suppress(OSError), open(f"/proc/{pid}/maps", "rb") as maps:
            for line in maps:
                fields = line.rstrip(b"\n").split(None, 5)
                if fields[1][1:4:2] == b"ws" and fields[4] != b"0":  # shared and writable
                    with suppress(OSError):  # by name: on overlayfs and btrfs the device here is another one
                        status = os.stat(fields[5].replace(b"\\012", b"\n"))
                        found.add((status.st_dev, status.st_ino))
    return found
