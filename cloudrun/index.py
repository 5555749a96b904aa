"""What is known of the project's files from the last time: it saves hashing, and decides nothing else.

A line per file: the stat that it had, a tab, its manifest line. Losing the index costs time only.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from json.encoder import encode_basestring_ascii as quote

SETTLED_NS = 2_000_000_000  # a file that changed this recently may change again without a new mtime


def index_path(bucket_url: str, project: str) -> str | None:
    """Where the index of this directory lives; None where there is no place for it."""
    import platformdirs

    folder = platformdirs.user_cache_dir("cloudrun")
    if not os.path.isabs(folder):
        return None
    key = f"{os.getcwd()}\n{bucket_url}\n{project}"
    return os.path.join(folder, "index", hashlib.sha256(os.fsencode(key)).hexdigest()[:32])


def stat_key(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def settled(status: os.stat_result) -> bool:
    return time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS


class Index:
    """Maps a path to (stat, manifest line)."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._known: dict[str, tuple[str, str]] = {}
        if path:
            with suppress(OSError, ValueError), open(path, encoding="ascii") as file:
                for line in file:
                    key, _, entry = line.rstrip("\n").partition("\t")
                    self._known[entry[8 : entry.index(',"mode":')]] = (key, entry)

    def line(self, path: str, status: os.stat_result) -> str | None:
        """The manifest line of a file that is as it was, or None."""
        known = self._known.get(quote(path))
        return known[1] if known and known[0] == stat_key(status) else None

    def write(self, lines: Iterable[tuple[os.stat_result, str]]) -> None:
        """Replace the index. A disk that is full or read-only costs the next send some time, no more."""
        if not self._path:
            return
        temporary = f"{self._path}.{os.getpid()}"
        with suppress(OSError):
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            with open(temporary, "w", encoding="ascii") as file:
                file.writelines(f"{stat_key(status)}\t{line}\n" for status, line in lines)
            os.replace(temporary, self._path)
