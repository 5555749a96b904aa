"""What is known of the project's files from the last time: it saves hashing, and decides nothing else.

A line per file: the stat that it had, a tab, its manifest line. The last line is the sha256 of the others.
Losing the index, or finding it damaged, costs time only.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from json.encoder import encode_basestring_ascii as quote

SETTLED_NS = 2_000_000_000  # a file that changed this recently may change again without a new mtime


def cache_folder() -> str | None:
    """Where we keep what only saves time; None where there is no place for it."""
    import platformdirs

    try:
        folder = platformdirs.user_cache_dir("cloudrun")
    except RuntimeError:  # there is no home; older versions return a path with ~
        return None
    return folder if os.path.isabs(folder) else None


def index_path(bucket_url: str, project: str) -> str | None:
    """Where the index of this directory lives."""
    folder = cache_folder()
    key = f"{os.getcwd()}\n{bucket_url}\n{project}"
    name = hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
    return os.path.join(folder, "index", name) if folder else None


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
        """Replace the index by these `stat_key`s and manifest lines.

        A disk that is full or read-only costs the next send some time, no more.
        """
        if not self._path:
            return
        temporary = f"{self._path}.{os.getpid()}"
        digest = hashlib.sha256()
        try:
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            with open(temporary, "wb") as file:
                for key, line in lines:
                    data = f"{key}\t{line}\n".encode("ascii")
                    digest.update(data)
                    file.write(data)
                file.write(digest.hexdigest().encode("ascii"))
            os.replace(temporary, self._path)
        except OSError:
            with suppress(OSError):
                os.unlink(temporary)


def _read(path: str) -> dict[str, str]:
    """Raises ValueError if it is damaged."""
    known, digest, last = {}, hashlib.sha256(), b""
    with open(path, "rb") as file:
        for last in file:
            if last.endswith(b"\n"):
                digest.update(last)
                line = last[:-1].decode("ascii")
                start = line.index("\t") + 9  # past {"path":
                known[line[start : line.index(',"mode":', start)]] = line
    if last.decode("ascii") != digest.hexdigest():
        raise ValueError(path)
    return known
