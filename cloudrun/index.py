"""What is known of the project's files from the last time: it saves hashing, and decides nothing else.

A line per file: the stat that it had, a tab, its manifest line.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from json.encoder import encode_basestring_ascii as quote

from cloudrun.cache import cache_path, keep, read

SETTLED_NS = 2_000_000_000  # a file that changed this recently may change again without a new mtime


def index_path(bucket_url: str, project: str) -> str | None:
    """Where the index of this directory lives; None where there is no place for it."""
    key = f"{os.getcwd()}\n{bucket_url}\n{project}"
    return cache_path("index", hashlib.sha256(os.fsencode(key)).hexdigest()[:32])


def stat_key(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def settled(key: str) -> bool:
    """Whether a file with this `stat_key` has been left alone for a while."""
    _, modified, changed, _ = key.split(" ")
    return time.time_ns() - max(int(modified), int(changed)) > SETTLED_NS


class Index:
    """Knows the manifest line of each file that is as it was."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        if path:
            with suppress(OSError, ValueError):
                self._known = _read(path)

    def take(self, path: str, status: os.stat_result) -> str | None:
        """The manifest line of a file that is as it was, or None. To be asked once for each."""
        key, _, line = self._known.pop(quote(path), "").partition("\t")
        return line if key == stat_key(status) else None

    def write(self, lines: Iterable[tuple[str, str]]) -> None:
        """Replace the index by these `stat_key`s and manifest lines."""
        if self._path:
            keep(self._path, (f"{key}\t{line}\n".encode("ascii") for key, line in lines))


def _read(path: str) -> dict[str, str]:
    """Raises OSError; ValueError if it is damaged."""
    known = {}
    for piece in read(path):
        for line in piece.decode("ascii").split("\n")[:-1]:
            start = line.index("\t") + 9  # past {"path":
            known[line[start : line.index(',"mode":', start)]] = line
    return known
