"""Send the project: hash what changed, pack small files together, store what the bucket lacks."""

from __future__ import annotations

import hashlib
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cloudrun.errors import CloudrunError
from cloudrun.formats import Entry, entry_line, shown
from cloudrun.index import Index, settled, stat_key
from cloudrun.project import Found
from cloudrun.storage import Bucket

SMALL = 4 << 20  # bytes; smaller files share a blob
PACK = 16 << 20  # bytes in such a blob
PIECE = 1 << 20
TRIES = 3  # for a file that changes while it is read
BLOB = re.compile(r'\["([0-9a-f]{64})",')

Progress = Callable[[int, int], None]  # files and bytes done since the last call


@dataclass
class Sent:
    """The manifest, a line per entry; `files` and `size` (bytes) are those of regular files."""

    lines: list[str]
    files: int
    size: int

    def manifest(self) -> Iterator[bytes]:
        for start in range(0, len(self.lines), 4096):
            yield ("\n".join(self.lines[start : start + 4096]) + "\n").encode("ascii")


@dataclass
class Plan:
    """`lines` has a manifest line for everything that need not be sent, and None for the rest."""

    found: list[Found]
    lines: list[str | None]
    files: int = 0
    size: int = 0
    new_files: int = 0
    new_size: int = 0


def plan(found: list[Found], index: Index, bucket: Bucket, project: str) -> Plan:
    """What has to be sent: what changed since it was last hashed, and what the bucket no longer has."""
    lines = [_known_line(item, index) for item in found]
    blobs = {blob for line in lines if line for blob in BLOB.findall(line)}
    lost = {blob for blob in blobs if bucket.size(f"{project}/blobs/{blob}") is None}
    if lost:
        lines = [None if line and lost.intersection(BLOB.findall(line)) else line for line in lines]
    result = Plan(found, lines)
    for item, line in zip(found, lines, strict=True):
        if _is_file(item):
            result.files += 1
            result.size += item.status.st_size
            if line is None:
                result.new_files += 1
                result.new_size += item.status.st_size
    return result


def send(plan: Plan, index: Index, bucket: Bucket, project: str, progress: Progress) -> Sent:
    """Store every blob that is missing. Raises CloudrunError for a file that keeps changing."""
    sender = _Sender(bucket, f"{project}/blobs/", progress)
    results = list(plan.lines)
    statuses: dict[int, os.stat_result] = {}
    try:
        for number, item in enumerate(plan.found):
            if results[number] is not None:
                continue
            if item.status.st_size < SMALL:
                sender.pack(number, item.path)
            else:
                results[number] = sender.store(item.path, statuses, number)
        sender.finish()
    finally:
        sender.close()
    for number, line, status in sender.packed:
        results[number], statuses[number] = line, status
    lines = [line for line in results if line is not None]
    if plan.new_files:
        pairs = (
            (statuses.get(i, item.status), line)
            for i, (item, line) in enumerate(zip(plan.found, lines, strict=True))
        )
        index.write((status, line) for status, line in pairs if '"sha256"' in line and settled(status))
    return Sent(lines, plan.files, plan.size)


def _is_file(item: Found) -> bool:
    return not item.link and (item.status.st_mode & 0o170000) == 0o100000


def _known_line(item: Found, index: Index) -> str | None:
    if item.link:
        return entry_line(Entry(item.path, link=item.link))
    if not _is_file(item):
        return entry_line(Entry(item.path, item.status.st_mode & 0o777))
    return index.line(item.path, item.status)


class _Sender:
    """Packs on the calling thread, stores packs on another one."""

    def __init__(self, bucket: Bucket, blobs: str, progress: Progress) -> None:
        self.packed: list[tuple[int, str, os.stat_result]] = []
        self._bucket, self._blobs, self._progress = bucket, blobs, progress
        self._members: list[tuple[int, str, str, os.stat_result]] = []
        self._pieces: list[bytes] = []
        self._size = 0
        self._queue: queue.Queue[tuple[list[tuple[int, str, str, os.stat_result]], list[bytes]] | None] = (
            queue.Queue(1)
        )
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def pack(self, number: int, path: str) -> None:
        data, status = read_consistently(path)
        self._members.append((number, path, hashlib.sha256(data).hexdigest(), status))
        self._pieces.append(data)
        self._size += len(data)
        if self._size >= PACK:
            self._hand_over()

    def store(self, path: str, statuses: dict[int, os.stat_result], number: int) -> str:
        for _ in range(TRIES):
            with _opened(path) as file:
                status = os.fstat(file)
                reader = _Reader(file, path, status.st_size, self._bucket.part_bytes, self._progress)
                parts = []
                for piece in reader.parts():
                    sha256 = self._bucket.put_blob(self._blobs, piece)
                    parts.append((sha256, 0, reader.part_size))
                if not _changed(file, path, status) and reader.done == status.st_size:
                    whole = reader.whole.hexdigest() if reader.whole else parts[0][0]
                    statuses[number] = status
                    self._progress(1, 0)
                    return entry_line(
                        Entry(path, status.st_mode & 0o777, status.st_size, whole, tuple(parts))
                    )
            self._progress(0, -reader.done)
        raise _unstable(path)

    def finish(self) -> None:
        if self._pieces:
            self._hand_over()

    def close(self) -> None:
        """Wait for the thread. Raises what went wrong there."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _hand_over(self) -> None:
        if self._error is not None:
            raise self._error
        if self._thread is None:
            self._thread = threading.Thread(target=self._store_packs, daemon=True)
            self._thread.start()
        self._queue.put((self._members, self._pieces))
        self._members, self._pieces, self._size = [], [], 0

    def _store_packs(self) -> None:
        while True:
            job = self._queue.get()
            if job is None:
                return
            try:
                if self._error is None:
                    self._store_pack(*job)
            except Exception as error:  # raised again on the main thread, by the next call or by close
                self._error = error

    def _store_pack(self, members: list[tuple[int, str, str, os.stat_result]], pieces: list[bytes]) -> None:
        blob, offset = self._bucket.put_blob(self._blobs, pieces), 0
        for (number, path, sha256, status), piece in zip(members, pieces, strict=True):
            parts = ((blob, offset, len(piece)),)
            line = entry_line(Entry(path, status.st_mode & 0o777, len(piece), sha256, parts))
            self.packed.append((number, line, status))
            offset += len(piece)
        self._progress(len(members), offset)


class _Reader:
    """Reads a large file once, in parts; `whole` hashes it all if there is more than one."""

    def __init__(self, file: int, path: str, size: int, part_bytes: int, progress: Progress) -> None:
        self.done = self.part_size = 0
        self.whole = hashlib.sha256() if size > part_bytes else None
        self._file, self._path, self._size = file, path, size
        self._part_bytes, self._progress = part_bytes, progress

    def parts(self) -> Iterator[Iterator[bytes]]:
        while self.done < self._size:
            self.part_size = 0
            yield self._part()
            if not self.part_size:  # the file became shorter
                return

    def _part(self) -> Iterator[bytes]:
        while self.part_size < self._part_bytes:
            wanted = min(PIECE, self._part_bytes - self.part_size, self._size - self.done)
            piece = _read(self._file, self._path, wanted)
            if not piece:
                return
            if self.whole:
                self.whole.update(piece)
            self.done += len(piece)
            self.part_size += len(piece)
            self._progress(0, len(piece))
            yield piece


class _opened:
    """A file descriptor for a `with` block; errors name the file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> int:
        try:
            self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CloudrunError(
                f"cannot read {shown(self._path)}: {error.strerror}; make it readable or leave it out"
            ) from None
        return self._file

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def read_consistently(path: str) -> tuple[bytes, os.stat_result]:
    """The content of a small file as it was at one moment, and its stat. Raises CloudrunError."""
    for _ in range(TRIES):
        with _opened(path) as file:
            status = os.fstat(file)
            data = _read(file, path, status.st_size + 1)
            if len(data) == status.st_size and not _changed(file, path, status):
                return data, status
    raise _unstable(path)


def _read(file: int, path: str, wanted: int) -> bytes:
    try:
        return os.read(file, wanted)
    except OSError as error:
        raise CloudrunError(f"cannot read {shown(path)}: {error.strerror}") from None


def _changed(file: int, path: str, before: os.stat_result) -> bool:
    return stat_key(os.fstat(file)) != stat_key(before)


def _unstable(path: str) -> CloudrunError:
    return CloudrunError(
        f"{shown(path)} changed while it was being sent, {TRIES} times; run again when nobody writes to it"
    )
