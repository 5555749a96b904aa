"""Bring the inputs, and for a continued run the outputs so far, from the bucket to the working directory.

The working directory is the current one: paths of up to 4,095 bytes work only relative to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import groupby, islice

from cloudrun.agent.watch import Task, Watch
from cloudrun.errors import CloudrunError, Corrupt
from cloudrun.formats import READ_PIECE, Entry, read_entry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cloudrun.agent.earlier import Earlier

LARGE = 16 << 20  # bytes from which on it is worth while to ask for a clone
SPARE = 64 << 20  # bytes of free disk that must remain


class Fetch:
    """One fetch of everything. `stop` ends it early; `progress` tells meanwhile how far it is.

    `earlier` has what need not be fetched, if there is such a thing.
    """

    def __init__(self, watch: Watch) -> None:
        self.bucket, self.prefix, self.order = watch.bucket, watch.prefix, watch.order
        self.stop = threading.Event()
        self._blobs = self.prefix.split("/")[0] + "/blobs/"
        self._links: list[Entry] = []
        self._modes: list[tuple[str, int]] = []
        self._lock = threading.Lock()
        manifest = self.order["manifest"]
        self.manifest = os.path.abspath("manifest.jsonl")  # out of main.py's reach
        self.earlier: Earlier | None = None
        self._taken: dict[str, int] = {}
        self.progress = {"files": 0, "bytes": 0, "of_files": manifest["files"], "of_bytes": manifest["bytes"]}

    def inputs(self) -> None:
        """Raises CloudrunError or OSError."""
        wanted = self.order["manifest"]
        self._read_manifest(wanted["sha256"])
        if self.earlier:
            self._taken = self.earlier.take(self.manifest)
            self.progress.update(files=len(self._taken), bytes=sum(self._taken.values()))
        check_space(wanted["bytes"] - self.progress["bytes"], wanted["files"] - self.progress["files"])
        groups = groupby(self._pieces(), together)
        tasks = [Task(self._work, groups) for _ in range(self.bucket.workers)]
        for task in tasks:
            while task.is_alive():
                task.join()
            if task.error:
                raise task.error
        for path, mode in self._modes:  # a file that is written in pieces may be one that nobody may write
            os.chmod(path, mode)
        for entry in self._links:  # last: no file can be written through a link
            os.symlink(entry.link, make_parent(entry.path))
        for folder in self.order["folders"]:
            make_folder(folder)

    def outputs(self, entries: Iterable[Entry]) -> None:
        """Put saved outputs in place, over inputs of the same name."""
        for entry in entries:
            with suppress(OSError):  # a file that may not be written, or a link that leads elsewhere
                os.unlink(entry.path)
            if entry.sha256:
                source = f"{self.prefix}/saved/{entry.sha256}"
                write_file(entry, self.bucket.chunks(source), source)
            else:
                make_folder(entry.path)

    def _read_manifest(self, sha256: str) -> None:
        name, digest = self.prefix + "/manifest.jsonl", hashlib.sha256()
        with open(self.manifest, "wb") as file:
            for piece in self.bucket.chunks(name):
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != sha256:
            raise Corrupt(f"{name} is damaged: its sha256 is not the one in the order")

    def _pieces(self) -> Iterator[tuple[Entry, int]]:
        """What has content, piece by piece, each with its place in its file; the rest is dealt with here."""
        name = self.prefix + "/manifest.jsonl"
        with open(self.manifest, encoding="ascii") as text:
            for entry in (read_entry(json.loads(line), name, with_parts=True) for line in text):
                if entry.path in self._taken:
                    continue
                if len(entry.parts) > 1:
                    self._modes.append((entry.path, entry.mode))
                    yield from pieces_of(entry)
                elif entry.sha256:
                    yield entry, 0
                elif entry.link:
                    self._links.append(entry)
                else:
                    make_folder(entry.path)
                    os.chmod(entry.path, entry.mode | 0o700)

    def _work(self, groups: Iterator[tuple[object, Iterator[tuple[Entry, int]]]]) -> None:
        """One of a few threads; what goes wrong in one ends all."""
        try:
            while not self.stop.is_set():
                with self._lock:
                    group = [piece for _, pieces in islice(groups, 1) for piece in pieces]
                if not group:
                    return
                self._fetch(group)
        except BaseException:
            self.stop.set()
            raise

    def _fetch(self, group: list[tuple[Entry, int]]) -> None:
        entry, at = group[0]
        blob, start, _ = source_of(entry)
        if blob != entry.sha256:
            start = min(source_of(entry)[1] for entry, _ in group)
            stop = max(source_of(entry)[1] + entry.size for entry, _ in group)
            content = memoryview(b"".join(self.bucket.chunks(self._blobs + blob, start, stop - start)))
            for entry, at in group:
                self._write(entry, at, [content[source_of(entry)[1] - start :][: entry.size]])
        elif entry.size > LARGE and self.bucket.clone(self._blobs + blob, make_parent(entry.path), at):
            self._write(entry, at, Stretch(entry.path, at, entry.size), cloned=True)
        else:
            content_of = self.bucket.chunks(self._blobs + blob, start, entry.size)
            self._write(entry, at, content_of if entry.size else [])

    def _write(
        self, entry: Entry, at: int, pieces: Iterable[bytes | memoryview], *, cloned: bool = False
    ) -> None:
        write_file(entry, pieces, self._blobs + source_of(entry)[0], at=at, cloned=cloned)
        with self._lock:
            self.progress["files"] += at == 0
            self.progress["bytes"] += entry.size


def pieces_of(entry: Entry) -> Iterator[tuple[Entry, int]]:
    """Each part of a file as a file that begins somewhere, and may be written while it is made."""
    at = 0
    for part in entry.parts:
        blob, _, length = part
        yield entry._replace(mode=0o600, size=length, sha256=blob, parts=(part,)), at
        at += length


def source_of(entry: Entry) -> tuple[str, int, int]:
    """(blob, offset, length) of what is in one piece; an empty file needs none."""
    return entry.parts[0] if entry.parts else (entry.sha256, 0, 0)


def together(piece: tuple[Entry, int]) -> object:
    """The same for neighbours that one blob was packed of, so that they are read in one go."""
    entry, at = piece
    blob = source_of(entry)[0]
    return blob if blob != entry.sha256 else (entry.path, at)


def write_file(
    entry: Entry, pieces: Iterable[bytes | memoryview], source: str, *, at: int = 0, cloned: bool = False
) -> None:
    """Write a file, or its piece that begins `at`, and check its content. Raises Corrupt with the source."""
    digest = hashlib.sha256()
    target = os.open(make_parent(entry.path), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with open(target, "wb", buffering=0) as file:
        file.seek(at)
        for piece in pieces:
            digest.update(piece)
            while piece and not cloned:
                piece = piece[file.write(piece) :]
        os.fchmod(file.fileno(), entry.mode)
    if digest.hexdigest() != entry.sha256:
        raise Corrupt(f"{entry.path} is damaged in the bucket: {source}")


class Stretch:
    """The bytes of a file from a place on, read anew each time this is iterated.

    `inside`: raises PermissionError for one that is not there, whatever its path seemed to be.
    """

    def __init__(self, path: str, at: int = 0, length: int = sys.maxsize, inside: str = "") -> None:
        self._path, self._at, self._length, self._inside = path, at, length, inside

    def __iter__(self) -> Iterator[bytes]:
        left = self._length
        with open(self._path, "rb", buffering=0) as file:
            opened = f"/proc/{os.getpid()}/fd/{file.fileno()}"
            try:
                real = os.readlink(opened)
            except OSError:  # ENAMETOOLONG: so deep that the kernel cannot tell where
                real = self._inside
            if not real.startswith(self._inside):
                raise PermissionError(f"{self._path} is not inside of the project")
            file.seek(self._at)
            while left and (data := file.read(min(left, READ_PIECE))):
                left -= len(data)
                yield data


def make_parent(path: str) -> str:
    """The path, when its directory exists."""
    missing, parent = [], path.rpartition("/")[0]
    while parent and not os.path.isdir(parent):
        missing.append(parent)
        parent = parent.rpartition("/")[0]
    for folder in reversed(missing):  # os.makedirs calls itself, and Python's stack is not that deep
        with suppress(FileExistsError):  # another thread was faster
            os.mkdir(folder)
    return path


def make_folder(path: str) -> None:
    make_parent(path + "/")


def check_space(size: int, files: int) -> None:
    """Raise unless the inputs fit on the machine's disk."""
    disk = os.statvfs(".")
    free = disk.f_bavail * disk.f_frsize
    if size + files * 4096 + SPARE > free:
        needs = f"{size / 1e9:.1f} GB for the inputs, {free / 1e9:.1f} GB are free"
        raise CloudrunError(f"the machine's disk is too small: {needs}; choose a larger disk or send less")
