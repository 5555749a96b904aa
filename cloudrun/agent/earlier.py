"""What the last run left on a machine that is kept: files that are still as they were sent stay.

Nothing is stored twice, and nothing that main.py can write is believed: a private index has each file's
inode, size and times as they were when it had been checked, and whoever changes a file changes these.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import lru_cache

from cloudrun.agent.account import Account
from cloudrun.agent.fetch import make_parent
from cloudrun.formats import Entry, read_entry
from cloudrun.processes import remove_tree

INDEXES = "/var/cache/cloudrun"


class Earlier:
    """Moves the project's directory aside, where only root can change it, and enters a new, empty one."""

    def __init__(self, account: Account, project: str) -> None:
        top = account.home("cloudrun")
        self._aside, work = f"{top}/.{project}.before", f"{top}/{project}"
        remove_tree(self._aside)
        os.mkdir(self._aside, 0o700)
        with suppress(FileNotFoundError):
            os.rename(work, self._aside + "/work")
        os.mkdir(work, 0o700)
        os.chdir(work)
        os.makedirs(INDEXES, 0o700, exist_ok=True)
        self._index = f"{INDEXES}/{account.user.pw_name}.{project}"
        self._known: dict[str, list[object]] = {}
        with suppress(OSError, ValueError):
            with open(self._index) as file:
                self._known = json.load(file)
            os.unlink(self._index)  # from here on the files are moved

    def take(self, manifest: str) -> dict[str, int]:
        """Move what is as it is to be into its place, remove the rest. Returns the sizes of what stayed."""
        taken = {}
        for entry in _files_of(manifest):
            old = os.path.join(self._aside, "work", entry.path)
            with suppress(OSError):
                if self._known.get(entry.path) == _key(entry, old) and _is_real(os.path.dirname(old)):
                    os.rename(old, make_parent(entry.path))
                    os.chmod(entry.path, entry.mode)
                    taken[entry.path] = entry.size
        remove_tree(self._aside)
        return taken

    def note(self, manifest: str, but: Collection[str]) -> None:
        """Remember how the inputs are now, `but` those that are no more what was sent."""
        files = (entry for entry in _files_of(manifest) if entry.path not in but)
        self._known = {entry.path: _key(entry, entry.path) for entry in files}

    def keep(self) -> None:
        """Make what was noted outlive this run. May take long."""
        # A file that a power failure emptied can have the size and times of a whole one.
        ctypes.CDLL(None).syncfs(os.open(".", os.O_RDONLY))
        with open(self._index + ".new", "w") as file:
            json.dump(self._known, file)
        os.replace(self._index + ".new", self._index)


def _files_of(manifest: str) -> Iterator[Entry]:
    with open(manifest, encoding="ascii") as lines:
        for entry in (read_entry(json.loads(line), manifest, with_parts=True) for line in lines):
            if entry.sha256:
                yield entry


def _key(entry: Entry, path: str) -> list[object]:
    """Without the device, whose number may be another one after each boot."""
    status = os.lstat(path)
    return [entry.sha256, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


@lru_cache(maxsize=1)
def _is_real(folder: str) -> bool:
    """No link on the way: what somebody moved elsewhere is not ours to take."""
    return os.path.realpath(folder) == folder
