"""Bring the inputs, and for a continued run the outputs so far, from the bucket to the working directory.

The working directory is the current one: paths of up to 4,095 bytes work only relative to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain, groupby, islice

from cloudrun.agent.watch import Task, Watch
from cloudrun.errors import CloudrunError, Corrupt
from cloudrun.formats import Entry, read_entry

WORKERS = 2
LARGE = 16 << 20  # bytes from which on it is worth while to ask for a clone
SPARE = 64 << 20  # bytes of free disk that must remain


class Fetch:
    """One fetch of everything. `stop` ends it early; `progress` tells meanwhile how far it is."""

    def __init__(self, watch: Watch) -> None:
        self.bucket, self.prefix, self.order = watch.bucket, watch.prefix, watch.order
        self.stop = threading.Event()
        self._blobs = self.prefix.split("/")[0] + "/blobs/"
        self._links: list[Entry] = []
        self._lock = threading.Lock()
        manifest = self.order["manifest"]
        self.progress = {"files": 0, "bytes": 0, "of_files": manifest["files"], "of_bytes": manifest["bytes"]}

    def inputs(self) -> None:
        """Raises CloudrunError or OSError."""
        wanted = self.order["manifest"]
        check_space(wanted["bytes"], wanted["files"])
        groups = groupby(self._files(wanted["sha256"]), together)
        tasks = [Task(self._work, groups) for _ in range(WORKERS)]
        for task in tasks:
            while task.is_alive():
                task.join()
            if task.error:
                raise task.error
        for entry in self._links:  # last: no file can be written through a link
            os.symlink(entry.link, make_parent(entry.path))
        for folder in self.order["folders"]:
            os.makedirs(folder, exist_ok=True)

    def outputs(self, entries: Iterable[Entry]) -> None:
        """Put saved outputs in place, over inputs of the same name."""
        for entry in entries:
            with suppress(OSError):  # a file that may not be written, or a link that leads elsewhere
                os.unlink(entry.path)
            if entry.sha256:
                source = f"{self.prefix}/saved/{entry.sha256}"
                write_file(entry, self.bucket.chunks(source), source)
            else:
                os.makedirs(entry.path, exist_ok=True)

    def _files(self, sha256: str) -> Iterator[Entry]:
        """The manifest's entries that have content; the others are dealt with here."""
        name = self.prefix + "/manifest.jsonl"
        digest, lines = hashlib.sha256(), "../manifest.jsonl"
        with open(lines, "wb") as file:
            for piece in self.bucket.chunks(name):
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != sha256:
            raise Corrupt(f"{name} is damaged: its sha256 is not the one in the order")
        with open(lines, encoding="ascii") as text:
            for entry in (read_entry(json.loads(line), name, with_parts=True) for line in text):
                if entry.sha256:
                    yield entry
                elif entry.link:
                    self._links.append(entry)
                else:
                    os.makedirs(entry.path, exist_ok=True)
                    os.chmod(entry.path, entry.mode | 0o700)

    def _work(self, groups: Iterator[tuple[str, Iterator[Entry]]]) -> None:
        """One of a few threads; what goes wrong in one ends all."""
        try:
            while not self.stop.is_set():
                with self._lock:
                    group = [entry for _, entries in islice(groups, 1) for entry in entries]
                if not group:
                    return
                self._fetch(group)
        except BaseException:
            self.stop.set()
            raise

    def _fetch(self, group: list[Entry]) -> None:
        entry = group[0]
        if together(entry) != entry.path:
            start = min(entry.parts[0][1] for entry in group)
            stop = max(entry.parts[0][1] + entry.size for entry in group)
            chunks = self.bucket.chunks(self._blobs + together(entry), start, stop - start)
            content = memoryview(b"".join(chunks))
            for entry in group:
                self._write(entry, [content[entry.parts[0][1] - start :][: entry.size]])
        elif len(entry.parts) == 1 and entry.size > LARGE and self._cloned(entry):
            self._write(entry, file_chunks(entry.path), cloned=True)
        else:
            parts = (self.bucket.chunks(self._blobs + blob, *where) for blob, *where in entry.parts)
            self._write(entry, chain.from_iterable(parts))

    def _cloned(self, entry: Entry) -> bool:
        return self.bucket.clone(self._blobs + entry.sha256, make_parent(entry.path))

    def _write(self, entry: Entry, pieces: Iterable[bytes | memoryview], *, cloned: bool = False) -> None:
        write_file(entry, pieces, " ".join({self._blobs + part[0] for part in entry.parts}), cloned=cloned)
        with self._lock:
            self.progress["files"] += 1
            self.progress["bytes"] += entry.size


def together(entry: Entry) -> str:
    """The same for neighbours that one blob was packed of, so that they are read in one go."""
    packed = len(entry.parts) == 1 and entry.parts[0][0] != entry.sha256
    return str(entry.parts[0][0] if packed else entry.path)


def write_file(
    entry: Entry, pieces: Iterable[bytes | memoryview], source: str, *, cloned: bool = False
) -> None:
    """Write one file and check its content. Raises Corrupt, naming the source."""
    digest = hashlib.sha256()
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | (0 if cloned else os.O_TRUNC)
    with open(os.open(make_parent(entry.path), flags, 0o600), "wb", buffering=0) as file:
        for piece in pieces:
            digest.update(piece)
            while piece and not cloned:
                piece = piece[file.write(piece) :]
        os.fchmod(file.fileno(), entry.mode)
    if digest.hexdigest() != entry.sha256:
        raise Corrupt(f"{entry.path} is damaged in the bucket: {source}")


def file_chunks(path: str) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        yield from iter(lambda: file.read(1 << 20), b"")


def make_parent(path: str) -> str:
    """The path, when its directory exists."""
    parent = path.rpartition("/")[0]
    if parent and not os.path.isdir(parent):
        os.makedirs(parent, exist_ok=True)
    return path


def check_space(size: int, files: int) -> None:
    """Raise unless the inputs fit on the machine's disk."""
    disk = os.statvfs(".")
    free = disk.f_bavail * disk.f_frsize
    if size + files * 4096 + SPARE > free:
        needs = f"{size / 1e9:.1f} GB for the inputs, {free / 1e9:.1f} GB are free"
        raise CloudrunError(f"the machine's disk is too small: {needs}; choose a larger disk or send less")
