"""Send the project: hash what changed, pack small files together, store what the bucket lacks."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from cloudrun.background import Background, side_by_side
from cloudrun.errors import CloudrunError
from cloudrun.formats import READ_PIECE, Entry, digest_of, entry_line, shown
from cloudrun.index import Index, settled, stat_key
from cloudrun.project import Found
from cloudrun.storage import Bucket

SMALL = 4 << 20  # bytes; smaller files share a blob
PACK = 8 << 20  # bytes in such a blob at most: Cloud Storage takes so much in one request
DROP_SECONDS = 1.0  # for what is on its way when the user wants the end
TRIES = 3  # for a file that changes while it is read
FRESH_NS = 100_000_000  # one write sets the times when it begins: in so long it has ended
BLOB = re.compile(r'\["([0-9a-f]{64})",')

Progress = Callable[[int, int], None]  # files and bytes done since the last call
Part = tuple[str, int, int]  # blob, offset, length
_Member = tuple[int, Entry, str, bytes]  # of a pack: place in the plan, what it is, its stat, its content


@dataclass
class Plan:
    """`lines` has a manifest line for everything that need not be sent, and None for the rest.

    `files` and `size` (bytes) are those of regular files.
    """

    found: list[Found]
    lines: list[str | None]
    files: int = 0
    size: int = 0
    new_files: int = 0
    new_size: int = 0

    def manifest(self) -> Iterator[bytes]:
        """Once everything is sent: in pieces, because there may be 100,000 lines."""
        for start in range(0, len(self.lines), 4096):
            yield "".join(f"{line}\n" for line in self.lines[start : start + 4096]).encode("ascii")


def plan(found: list[Found], index: Index, bucket: Bucket, project: str) -> Plan:
    """What has to be sent: what changed since it was last hashed, and what the bucket no longer has."""
    lines = [_known_line(item, index) for item in found]
    lost = _lost({blob for line in lines if line for blob in BLOB.findall(line)}, bucket, project)
    if lost:
        lines = [None if line and lost.intersection(BLOB.findall(line)) else line for line in lines]
    pairs = [*zip(found, lines, strict=True)]
    old = [item.status.st_size for item, line in pairs if line and '"sha256"' in line]
    new = [item.status.st_size for item, line in pairs if line is None]
    return Plan(found, lines, len(old) + len(new), sum(old) + sum(new), len(new), sum(new))


def _lost(blobs: set[str], bucket: Bucket, project: str) -> set[str]:
    """Those that the bucket does not have; asked side by side, because each answer takes a round trip."""
    names = sorted(blobs)  # a question is mostly waiting
    sizes = side_by_side(lambda blob: bucket.size(f"{project}/blobs/{blob}"), names, 2 * bucket.workers)
    return {blob for blob, size in zip(names, sizes, strict=True) if size is None}


def send(plan: Plan, index: Index, bucket: Bucket, project: str, progress: Progress) -> Plan:
    """Store every blob that is missing. Raises CloudrunError for a file that keeps changing."""
    sender = _Sender(bucket, f"{project}/blobs/", progress, plan.lines)
    try:
        for number, item in enumerate(plan.found):
            if plan.lines[number] is None:
                if item.status.st_size < SMALL:
                    sender.pack(number, item.path)
                else:
                    sender.store(number, item.path, item.status.st_size)
        sender.finish()
    except BaseException:
        sender.drop(DROP_SECONDS)
        raise
    sender.close()
    lines = [line for line in sender.lines if line is not None]
    if plan.new_files:
        pairs = (
            (sender.keys.get(number) or stat_key(item.status), line)
            for number, (item, line) in enumerate(zip(plan.found, lines, strict=True))
            if '"sha256"' in line
        )
        index.write((key, line) for key, line in pairs if settled(key))
    return Plan(plan.found, [*lines], plan.files, plan.size)


def _known_line(item: Found, index: Index) -> str | None:
    if item.link:
        return entry_line(Entry(item.path, link=item.link))
    if stat.S_ISDIR(item.status.st_mode):
        return entry_line(Entry(item.path, item.status.st_mode & 0o777))
    return index.take(item.path, item.status)


class _Sender:
    """Packs on the calling thread; others store packs, large files and their parts.

    `lines` gets the manifest lines of what was sent, `keys` the stat of each as it was read.
    """

    def __init__(self, bucket: Bucket, blobs: str, progress: Progress, lines: list[str | None]) -> None:
        self.lines = list(lines)
        self.keys: dict[int, str] = {}
        self._bucket, self._blobs, self._progress = bucket, blobs, progress
        self._members: list[_Member] = []
        self._size = 0
        self._jobs = Background(lambda job: job(), 1, bucket.workers)
        self.close, self.drop = self._jobs.close, self._jobs.drop

    def pack(self, number: int, path: str) -> None:
        data, status = read_consistently(path)
        sha256 = hashlib.sha256(data).hexdigest()
        entry = Entry(path, status.st_mode & 0o777, len(data), sha256)
        if self._size + len(data) > PACK:
            self._hand_over()
        self._members.append((number, entry, stat_key(status), data))
        self._size += len(data)

    def store(self, number: int, path: str, size: int) -> None:
        """A file for itself: whole beside other files, or its parts beside each other."""
        if size > self._bucket.part_bytes:
            self._store(number, path, self._side_by_side)
        else:
            self._jobs.put(partial(self._store, number, path, map))

    def finish(self) -> None:
        """Store what is left. Raises what went wrong on a thread."""
        self._hand_over()
        self._jobs.finish()

    def _hand_over(self) -> None:
        if self._members:
            self._jobs.put(partial(self._store_pack, self._members))
            self._members, self._size = [], 0

    def _store_pack(self, members: list[_Member]) -> None:
        blob = self._bucket.put_blob(self._blobs, [data for *_, data in members])
        offset = 0
        for number, entry, key, data in members:
            placed = entry._replace(parts=((blob, offset, len(data)),))
            self.lines[number], self.keys[number] = entry_line(placed), key
            offset += len(data)
        self._progress(len(members), offset)

    def _store(self, number: int, path: str, each: Callable[..., Iterable[Part]]) -> None:
        step = self._bucket.part_bytes
        for _ in range(TRIES):
            with _opened(path) as file:
                status = still(file, path)
                size = status.st_size
                starts = range(0, max(size, 1), step)
                pieces = [_Piece(file, path, at, min(step, size - at), self._jobs.check) for at in starts]
                parts = tuple(each(self._store_piece, pieces))
                if not _changed(file, status) and sum(length for *_, length in parts) == size:
                    whole = digest_of(parts) if len(parts) > 1 else parts[0][0]
                    entry = Entry(path, status.st_mode & 0o777, size, whole, parts)
                    self.lines[number], self.keys[number] = entry_line(entry), stat_key(status)
                    self._progress(1, 0)
                    return
            self._progress(0, -sum(length for *_, length in parts))
        raise _unstable(path)

    def _store_piece(self, piece: _Piece) -> Part:
        sha256 = self._bucket.put_blob(self._blobs, piece)
        self._progress(0, piece.length)
        return sha256, 0, piece.length

    def _side_by_side(self, act: Callable[[_Piece], Part], pieces: list[_Piece]) -> list[Part]:
        """Like map, on all threads at once."""
        results: dict[int, Part] = {}

        def one(number: int) -> None:
            results[number] = act(pieces[number])

        for number in range(len(pieces)):
            self._jobs.put(partial(one, number))
        self._jobs.finish()
        return [results[number] for number in range(len(pieces))]


class _Piece:
    """A stretch of a file, read anew each time it is iterated; `length` bytes were there the last time.

    `check` raises if nobody wants them any more.
    """

    def __init__(self, file: int, path: str, offset: int, wanted: int, check: Callable[[], None]) -> None:
        self.length, self._check = 0, check
        self._file, self._path, self._offset, self._wanted = file, path, offset, wanted

    def __iter__(self) -> Iterator[bytes]:
        self.length = 0
        while self.length < self._wanted:
            self._check()
            wanted = min(READ_PIECE, self._wanted - self.length)
            data = _read(self._file, self._path, wanted, self._offset + self.length)
            if not data:  # the file became shorter
                return
            self.length += len(data)
            yield data


@contextmanager
def _opened(path: str) -> Iterator[int]:
    """A file descriptor. Raises CloudrunError naming the file."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CloudrunError(f"{shown(path)} vanished while the project was being sent; run again") from None
    except OSError as error:
        hint = "make it readable or leave it out"
        raise CloudrunError(f"cannot read {shown(path)}: {error.strerror}; {hint}") from None
    try:
        yield file
    finally:
        os.close(file)


def read_consistently(path: str) -> tuple[bytes, os.stat_result]:
    """The content of a small file as it was at one moment, and its stat. Raises CloudrunError."""
    for _ in range(TRIES):
        with _opened(path) as file:
            status = still(file, path)
            data = _read(file, path, status.st_size + 1, 0)
            while len(data) < status.st_size and (more := _read(file, path, status.st_size, len(data))):
                data += more  # some file systems give less than was asked for
            if len(data) == status.st_size and not _changed(file, status):
                return data, status
    raise _unstable(path)


def still(file: int, path: str) -> os.stat_result:
    """The stat of a regular file; one that was written to a moment ago is given that moment."""
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise CloudrunError(f"{shown(path)} was replaced by something that is no file; run again")
    ages = (time.time_ns() - when for when in (status.st_mtime_ns, status.st_ctime_ns))
    if any(0 <= age < FRESH_NS for age in ages):
        time.sleep(FRESH_NS / 1e9)
    return status


def _read(file: int, path: str, wanted: int, offset: int) -> bytes:
    try:
        return os.pread(file, wanted, offset)
    except OSError as error:
        raise CloudrunError(f"cannot read {shown(path)}: {error.strerror}") from None


def _changed(file: int, before: os.stat_result) -> bool:
    return stat_key(os.fstat(file)) != stat_key(before)


def _unstable(path: str) -> CloudrunError:
    return CloudrunError(
        f"{shown(path)} changed while it was being sent, {TRIES} times; run again when nobody writes to it"
    )
