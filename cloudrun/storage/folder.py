"""A bucket on a directory. Sent with the agent: standard library, Python 3.8.

Objects are files. What is created once is linked into place, what is replaced is renamed into place,
compare and swap holds a lock for the moment between looking and renaming.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import struct
import time
from contextlib import contextmanager, suppress

from cloudrun.background import Background
from cloudrun.errors import BucketError, BucketRefused, Conflict, Corrupt, Missing
from cloudrun.storage import MAX_OBJECT, check_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO, Callable, Iterable, Iterator

PIECE = 4 << 20
LOCK_SECONDS = 10.0  # a holder that was stopped (SIGSTOP) must not stop everybody
STALE_SECONDS = 24 * 3600.0
FICLONERANGE = 0x4020940D
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
REFUSALS |= {errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EFBIG}
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
OURS = (".tmp", ".lock")  # what stands beside the objects at the top


class FolderBucket:
    """See cloudrun.storage.Bucket. Only the owner can read what is stored here."""

    pace, slow_pace, write_pace = 0.01, 0.04, 0.12
    part_bytes = 64 << 20  # that hashing keeps two processors busy
    workers = 2

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self.url = "file://" + self.root

    def get(self, name: str, most: int = MAX_OBJECT) -> tuple[bytes, str]:
        size = 0
        with suppress(OSError):
            size = os.path.getsize(self._path(name))
        if size > most:
            raise Corrupt(f"{name} is damaged: it has {size} bytes")
        data = b"".join(self.chunks(name))
        return data, _version(data)

    def size(self, name: str) -> int | None:
        try:
            with self._translated(name, reading=True):
                status = os.stat(self._path(name))
        except Missing:
            return None
        return None if stat.S_ISDIR(status.st_mode) else status.st_size

    def chunks(self, name: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        path = self._path(name)
        with self._translated(name, reading=True), open(path, "rb", buffering=0) as file:
            left = os.fstat(file.fileno()).st_size - offset if length is None else length
            file.seek(offset)
            while left > 0:
                piece = file.read(min(left, PIECE))
                if not piece:
                    raise Corrupt(f"{path} is damaged: {left} bytes are missing")
                left -= len(piece)
                yield piece

    def create(self, name: str, content: bytes | Iterable[bytes]) -> bool:
        path, pieces = self._path(name), [content] if isinstance(content, bytes) else content
        with self._translated(name), self._written(pieces) as (temporary, digest):
            if self._link(temporary, path):
                return True
            if self._digest(name) == digest:
                return False
        raise Conflict(f"{name} exists already, with another content")

    def put(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with self._translated(name), self._written([data]) as (temporary, _):
            _with_parents(os.replace, temporary, path)

    def swap(self, name: str, data: bytes, version: str | None) -> str:
        path, written = self._path(name), self._written([data], durable=True)
        with self._translated(name), written as (temporary, _), self._lock(name):
            try:
                found: str | None = self.get(name)[1]
            except Missing:
                found = None
            if found != version:
                raise Conflict(f"{name} was replaced by somebody else")
            _with_parents(os.replace, temporary, path)
        return _version(data)

    def put_blob(self, prefix: str, content: Iterable[bytes], *, durable: bool = False) -> str:
        with self._translated(prefix), self._written(content, durable=durable) as (
            temporary,
            digest,
        ):
            self._link(temporary, self._path(prefix + digest))
            return digest

    def copy(self, source: str, target: str) -> None:
        path = self._path(target)
        with self._translated(target), self._written(self.chunks(source)) as (temporary, _):
            _with_parents(os.replace, temporary, path)

    def clone(self, name: str, path: str, offset: int) -> bool:
        with self._translated(name, reading=True):
            source = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.ioctl(target, FICLONERANGE, struct.pack("=qQQQ", source, 0, 0, offset))
        except OSError:
            return False
        finally:
            os.close(source)
            os.close(target)
        return True

    def names(self, prefix: str) -> Iterator[str]:
        with self._translated(prefix):
            for entry in self._entries(prefix):
                if entry.is_dir(follow_symlinks=False):
                    yield from self.names(prefix + entry.name + "/")
                else:
                    yield prefix + entry.name

    def dirs(self, prefix: str) -> list[str]:
        with self._translated(prefix):
            return [entry.name for entry in self._entries(prefix) if entry.is_dir()]

    def delete(self, name: str) -> None:
        with suppress(Missing), self._translated(name, reading=True):
            os.unlink(self._path(name))

    def time(self) -> float | None:
        return None

    def tidy(self) -> None:
        before = time.time() - STALE_SECONDS
        with suppress(OSError):
            for entry in os.scandir(os.path.join(self.root, ".tmp")):
                with suppress(FileNotFoundError):  # its writer has finished
                    if entry.stat(follow_symlinks=False).st_mtime < before:
                        os.unlink(entry.path)

    def _path(self, name: str) -> str:
        try:
            check_name(name)
            if name.partition("/")[0] in OURS:
                raise ValueError(name)
        except ValueError:
            raise BucketRefused(f"a bucket cannot hold an object called {name!r}") from None
        return os.path.join(self.root, name)

    def _entries(self, prefix: str) -> list[os.DirEntry[str]]:
        path = self._path(prefix[:-1]) if prefix else self.root
        try:
            entries = os.scandir(path)
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            if os.path.isdir(self.root):  # an object stands there
                return []
            raise
        with entries:  # a slash sorts as itself, so that the whole listing comes out sorted
            visible = [entry for entry in entries if prefix or entry.name not in OURS]
        return sorted(visible, key=lambda entry: entry.name + "/" * entry.is_dir())

    @contextmanager
    def _written(self, pieces: Iterable[bytes], *, durable: bool = False) -> Iterator[tuple[str, str]]:
        """A temporary file with this content, and the content's sha256; gone again at the end."""
        folder = os.path.join(self.root, ".tmp")
        path = os.path.join(folder, f"{os.getpid()}-{os.urandom(8).hex()}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            descriptor = os.open(path, flags, 0o600)
        except FileNotFoundError:
            _make_folder(folder)
            descriptor = os.open(path, flags, 0o600)
        try:
            with open(descriptor, "wb") as file:
                digest = _write_hashed(file, _content(pieces))
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            yield path, digest
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def _link(self, temporary: str, path: str) -> bool:
        try:
            _with_parents(os.link, temporary, path)
        except FileExistsError:
            if os.path.isdir(path):  # a directory of objects stands where the object should
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)) from None
            return False
        return True

    def _digest(self, name: str) -> str:
        digest = hashlib.sha256()
        for piece in self.chunks(name):
            digest.update(piece)
        return digest.hexdigest()

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        folder = os.path.join(self.root, ".lock")
        _make_folder(folder)
        path = os.path.join(folder, hashlib.sha256(name.encode()).hexdigest()[:2])  # 256 files at most
        with open(path, "wb") as file:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise BucketError(f"{path} has been locked for {LOCK_SECONDS:.0f} s") from None
                    time.sleep(0.005)
            yield

    @contextmanager
    def _translated(self, name: str, *, reading: bool = False) -> Iterator[None]:
        try:
            yield
        except _Outside as outside:
            raise outside.args[0] from None
        except OSError as error:
            if reading and isinstance(error, ABSENT):
                raise Missing(f"there is no {name} in {self.url}") from None
            kind = BucketRefused if error.errno in REFUSALS else BucketError
            hint = "repair that, or choose another folder with GCS_DIR"
            raise kind(f"the folder {self.root} cannot hold {name}: {error.strerror}; {hint}") from error


class _Outside(Exception):
    """Something went wrong in the content that we were given, and not in the bucket."""


def _content(pieces: Iterable[bytes]) -> Iterator[bytes]:
    try:
        yield from pieces
    except OSError as error:
        raise _Outside(error) from None


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _write_hashed(file: BinaryIO, pieces: Iterable[bytes]) -> str:
    """Hash on this thread; large content is written on another one at the same time."""
    digest, small = hashlib.sha256(), True
    writer = Background(file.write, 2)
    try:
        for piece in pieces:
            if small:
                file.write(piece)
                small = len(piece) < 1 << 20
            else:
                writer.put(piece)
            digest.update(piece)
        writer.finish()
    finally:
        writer.close()
    return digest.hexdigest()


def _with_parents(act: Callable[[str, str], None], temporary: str, path: str) -> None:
    try:
        act(temporary, path)
    except FileNotFoundError:
        _make_folder(os.path.dirname(path))
        act(temporary, path)


def _make_folder(path: str) -> None:
    """Private all the way down: the mode given to makedirs holds for the last directory only."""
    if not os.path.isdir(path):
        _make_folder(os.path.dirname(path))
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
