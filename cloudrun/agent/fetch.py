"""Bring the inputs, and for a continued run the outputs so far, from the bucket to the working directory.

The working directory is the current one: paths of up to 4,095 bytes work only relative to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from itertools import chain

from cloudrun.errors import CloudrunError, Corrupt
from cloudrun.formats import read_entry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable, Iterator

    from cloudrun.formats import Entry
    from cloudrun.storage import Bucket

WORKERS = 2
GROUP = 16 << 20  # files that lie together in one blob are read together, up to this many bytes
SPARE = 64 << 20  # bytes of free disk that must remain


class Fetch:
    """One fetch of everything. `stop` ends it early; `progress` can be asked meanwhile."""

    def __init__(self, bucket: Bucket, prefix: str, order: dict[str, Any]) -> None:
        self.bucket, self.prefix, self.order = bucket, prefix, order
        self.stop = threading.Event()
        self._blobs = prefix.split("/")[0] + "/blobs/"
        self._links: list[Entry] = []
        self._lock = threading.Lock()
        self._files = self._bytes = 0

    def progress(self) -> dict[str, int]:
        wanted = self.order["manifest"]
        done = {"files": self._files, "bytes": self._bytes}
        return dict(done, of_files=wanted["files"], of_bytes=wanted["bytes"])

    def inputs(self) -> None:
        """Raises CloudrunError or OSError."""
        wanted = self.order["manifest"]
        check_space(wanted["bytes"], wanted["files"])
        self._each(groups(self._manifest(wanted["sha256"])))
        for entry in self._links:  # last: no file can be written through a link
            os.symlink(entry.link, entry.path)
        for folder in self.order["folders"]:
            os.makedirs(folder, exist_ok=True)

    def outputs(self, entries: Iterable[Entry]) -> None:
        """Put saved outputs in place, over inputs of the same name."""
        for entry in entries:
            make_parent(entry.path)
            if entry.sha256:
                source = self.bucket.chunks(f"{self.prefix}/saved/{entry.sha256}")
                write_file(entry, source, f"the saved {entry.path}")
            else:
                os.makedirs(entry.path, exist_ok=True)

    def _manifest(self, sha256: str) -> Iterator[Entry]:
        name = self.prefix + "/manifest.jsonl"
        digest, lines = hashlib.sha256(), "../manifest.jsonl"
        with open(lines, "wb") as file:
            for piece in self.bucket.chunks(name):
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != sha256:
            raise Corrupt(f"{name} is damaged: its sha256 is not the one in the order")
        with open(lines, encoding="ascii") as text:
            for line in text:
                yield read_entry(json.loads(line), name, with_parts=True)

    def _each(self, groups: Iterator[list[Entry]]) -> None:
        """Fetch the groups on a few threads. Raises the first error."""
        errors: list[Exception] = []

        def work() -> None:
            while not errors and not self.stop.is_set():
                try:
                    with self._lock:
                        group = next(groups, None)
                    if group is None:
                        return
                    self._fetch_group(group)
                except (CloudrunError, OSError) as error:
                    errors.append(error)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _fetch_group(self, entries: list[Entry]) -> None:
        if len(entries) == 1:
            self._fetch_one(entries[0])
            return
        first, last = entries[0].parts[0], entries[-1].parts[0]
        together = b"".join(
            self.bucket.chunks(self._blobs + first[0], first[1], last[1] + last[2] - first[1])
        )
        for entry in entries:
            start = entry.parts[0][1] - first[1]
            make_parent(entry.path)
            self._write(entry, [together[start : start + entry.size]])

    def _fetch_one(self, entry: Entry) -> None:
        if entry.link:
            make_parent(entry.path)
            self._links.append(entry)
        elif not entry.sha256:
            os.makedirs(entry.path, exist_ok=True)
            os.chmod(entry.path, entry.mode | 0o700)
        else:
            make_parent(entry.path)
            whole = len(entry.parts) == 1 and entry.parts[0][0] == entry.sha256 and entry.size > GROUP
            if whole and self.bucket.clone(self._blobs + entry.sha256, entry.path):
                self._write(entry, file_chunks(entry.path), cloned=True)
            else:
                self._write(entry, chain.from_iterable(self._part(*part) for part in entry.parts))

    def _part(self, blob: str, offset: int, length: int) -> Iterator[bytes]:
        return self.bucket.chunks(self._blobs + blob, offset, length)

    def _write(self, entry: Entry, pieces: Iterable[bytes], *, cloned: bool = False) -> None:
        blobs = " ".join(sorted({self._blobs + part[0] for part in entry.parts}))
        write_file(entry, pieces, blobs, cloned=cloned)
        with self._lock:
            self._files += 1
            self._bytes += entry.size


def groups(manifest: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Neighbours whose contents follow one another in one blob, to be read in one go."""
    group: list[Entry] = []
    size = 0
    for entry in manifest:
        together = group and len(entry.parts) == 1 and entry.parts[0][0] == group[-1].parts[0][0]
        follows = together and entry.parts[0][1] == group[-1].parts[0][1] + group[-1].size
        if group and not (follows and size + entry.size <= GROUP):
            yield group
            group, size = [], 0
        if len(entry.parts) == 1:
            group.append(entry)
            size += entry.size
        else:
            yield [entry]
    if group:
        yield group


def write_file(entry: Entry, pieces: Iterable[bytes], source: str, *, cloned: bool = False) -> None:
    """Write one file and check its content. Raises Corrupt, naming the source."""
    digest = hashlib.sha256()
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | (0 if cloned else os.O_TRUNC)
    with open(os.open(entry.path, flags, 0o600), "wb", buffering=0) as file:
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


def make_parent(path: str) -> None:
    parent = path.rpartition("/")[0]
    if parent and not os.path.isdir(parent):
        os.makedirs(parent, exist_ok=True)


def check_space(size: int, files: int) -> None:
    """Raise unless the inputs fit on the machine's disk."""
    disk = os.statvfs(".")
    free = disk.f_bavail * disk.f_frsize
    if size + files * 4096 + SPARE > free:
        raise CloudrunError(
            f"the machine's disk is too small for the inputs: {size / 1e9:.1f} GB are needed, "
            f"{free / 1e9:.1f} GB are free; choose a larger disk or send less"
        )
