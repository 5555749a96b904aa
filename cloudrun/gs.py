"""What every `gs://` bucket does, whoever speaks to Cloud Storage for it. Sent with the agent: Python 3.8.

A generation is the version of an object, and generation 0 that of one that does not exist: see
https://cloud.google.com/storage/docs/request-preconditions. Whoever sends a request again after a lost
reply can meet its own write: each conditional write carries a writer's mark to recognise it by.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from contextlib import suppress

from cloudrun.errors import BucketError, BucketRefused, Conflict, Corrupt, Missing, UsageError
from cloudrun.jsonapi import ONE_REQUEST, Anew, Beyond, Content, md5_of
from cloudrun.storage import MAX_NAME, MAX_OBJECT, check_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Iterable, Iterator, TypeVar

    from cloudrun.jsonapi import Found, Stream

    T = TypeVar("T")

ASK_FIRST = 1 << 20  # bytes; a smaller blob is sent as quickly as one asks whether it is there
TRIES = 3  # for content that changes while it is read
BUCKET_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")
PATIENCE = 32.0  # seconds; https://cloud.google.com/storage/docs/retry-strategy


class Patience:
    """How long it is worth while to try again: so many seconds, with pauses that double."""

    def __init__(self, seconds: float) -> None:
        self._end, self._pause = time.monotonic() + seconds, 0.1

    def wait(self) -> bool:
        """False if there is no time left, else a pause: a random one, so that not all come back at once."""
        left = self._end - time.monotonic()
        if left > 0:
            time.sleep(min(left, self._pause * (0.5 + os.urandom(1)[0] / 512)))
            self._pause = min(2 * self._pause, 8.0)
        return left > 0


class GsBucket(ABC):
    """See cloudrun.storage.Bucket. How to speak to the service is left to who derives from this.

    They raise what `problem` makes of an answer, and try again as long as it is worth while.
    """

    pace, slow_pace, write_pace = 0.25, 2.0, 1.6  # 0.02 USD per hour of a chatty program: see bench/
    part_bytes = ONE_REQUEST  # larger ones are hashed for so long that the line is idle meanwhile
    workers = 8

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self.bucket, _, prefix = url[len("gs://") :].rstrip("/").partition("/")
        self.url, self._prefix = url.rstrip("/"), prefix + "/" if prefix else ""
        self._patience = patience
        try:
            check_name(self.bucket + "/" + (prefix or "x"))
            if not BUCKET_LETTERS.issuperset(self.bucket):
                raise ValueError(self.bucket)
        except ValueError:
            raise UsageError(f"GCS_DIR={url!r}: not gs://bucket/directory") from None

    def time(self) -> float | None:
        return None

    # --- what the service can do; `generation` "" means any

    @abstractmethod
    def _find(self, path: str) -> Found | None:
        """What is told of an object, None if there is none."""

    @abstractmethod
    def _open(self, path: str, start: int, stop: int | None, generation: str) -> Stream:
        """Raises Missing or Beyond. Tries once: what was read of it must not be read again."""

    @abstractmethod
    def _insert(self, path: str, content: Content, generation: str, mark: str) -> str:
        """The new generation. Raises Conflict, and Anew if the content is not what it was."""

    @abstractmethod
    def _list(self, prefix: str, delimiter: str) -> Iterator[tuple[list[str], list[str]]]:
        """Page by page, names and the prefixes that end in the delimiter."""

    @abstractmethod
    def _rewrite(self, source: str, target: str) -> None:
        """Copy inside the bucket. Raises Missing."""

    @abstractmethod
    def _remove(self, path: str) -> None:
        """Raises Missing."""

    # --- the contract

    def get(self, name: str, most: int = MAX_OBJECT) -> tuple[bytes, str]:
        return self._again(lambda: self._get(name, most))

    def _get(self, name: str, most: int) -> tuple[bytes, str]:
        stream = self._open(self._path(name), 0, None, "")
        try:
            if stream.size > most:
                raise Corrupt(f"{name} is damaged: it has {stream.size} bytes")
            data = b"".join(stream.pieces)
        finally:
            stream.close()
        if len(data) != stream.size or stream.md5 not in ("", md5_of(data)):
            raise BucketError(f"{self.url}/{name} arrives damaged; try again")
        return data, stream.generation

    def size(self, name: str) -> int | None:
        found = self._find(self._path(name))
        return None if found is None else int(found.size)

    def chunks(self, name: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        path, patience = self._path(name), Patience(self._patience)
        if length == 0 and self._find(path) is None:
            raise Missing(f"there is no {name} in {self.url}")
        at, generation = offset, ""
        stop = None if length is None else offset + length
        while stop is None or at < stop:
            try:
                stream = self._open(path, at, stop, generation)
                generation, end = stream.generation, stream.size if stop is None else min(stop, stream.size)
                try:
                    for piece in stream.pieces:
                        at += len(piece)
                        patience = Patience(self._patience)
                        yield piece
                finally:
                    stream.close()
                if at >= end:
                    break
                raise BucketError(f"{self.url}/{name} arrives incomplete; try again")
            except Beyond:
                break
            except BucketError as error:
                if isinstance(error, Missing) and generation:
                    text = f"{self.url}/{name} was replaced while it was read; try again"
                    raise BucketError(text) from None
                if error.permanent or not patience.wait():
                    raise
        if stop is not None and at < stop:
            raise Corrupt(f"{self.url}/{name} is damaged: {stop - at} bytes are missing")

    def create(self, name: str, content: bytes | Iterable[bytes]) -> bool:
        body = Content([content if isinstance(content, bytes) else b"".join(content)])
        path, mark = self._path(name), os.urandom(8).hex()
        try:
            self._insert(path, body, "0", mark)
            return True
        except Conflict:
            found = self._find(path)
            if found and found.mark == mark:
                return True
            if found and (found.size, found.md5) == (body.size, body.md5):
                return False
        raise Conflict(f"{name} exists already, with another content")

    def put(self, name: str, data: bytes) -> None:
        self._insert(self._path(name), Content([data]), "", "")

    def swap(self, name: str, data: bytes, version: str | None) -> str:
        path, mark = self._path(name), os.urandom(8).hex()
        try:
            return self._insert(path, Content([data]), version or "0", mark)
        except Conflict:
            found = self._find(path)
            if found and found.mark == mark:  # the content alone could be that of somebody who was faster
                return str(found.generation)
        raise Conflict(f"{name} was replaced by somebody else")

    def put_blob(self, prefix: str, content: Iterable[bytes], *, durable: bool = False) -> str:
        for _ in range(TRIES):
            body = Content(content)
            path = self._path(prefix + body.sha256)
            if body.size > ASK_FIRST and self._find(path):
                return body.sha256
            with suppress(Anew):
                with suppress(Conflict):  # it is there
                    self._insert(path, body, "0", "")
                return body.sha256
        raise BucketError(f"what {self.url}/{prefix} should hold changed while it was read; try again")

    def copy(self, source: str, target: str) -> None:
        self._rewrite(self._path(source), self._path(target))

    def clone(self, name: str, path: str, offset: int) -> bool:
        if self.size(name) is None:
            raise Missing(f"there is no {name} in {self.url}")
        return False

    def names(self, prefix: str) -> Iterator[str]:
        start = len(self._prefix)
        for names, _ in self._list(self._below(prefix), ""):
            # A name that ends in a slash is a folder that somebody made in a browser.
            yield from (name[start:] for name in names if not name.endswith("/"))

    def dirs(self, prefix: str) -> list[str]:
        below = self._below(prefix)
        return [found[len(below) : -1] for _, page in self._list(below, "/") for found in page]

    def delete(self, name: str) -> None:
        with suppress(Missing):
            self._remove(self._path(name))

    def tidy(self) -> None:
        """Nothing: what was not finished does not exist, and the service forgets it within a week."""
        return None

    def _again(self, act: Callable[[], T]) -> T:
        """What `act` returns, as soon as it does, and as long as it is worth while to try."""
        patience = Patience(self._patience)
        while True:
            try:
                return act()
            except BucketError as error:
                if error.permanent or isinstance(error, Anew) or not patience.wait():
                    raise

    def _path(self, name: str) -> str:
        try:
            check_name(name)
            if len((self._prefix + name).encode()) > MAX_NAME:
                raise ValueError(name)
        except ValueError:
            raise BucketRefused(f"{self.url} cannot hold an object called {name!r}") from None
        return self._prefix + name

    def _below(self, prefix: str) -> str:
        return self._path(prefix[:-1]) + "/" if prefix else self._prefix
