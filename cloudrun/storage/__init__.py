"""The bucket: the only place where client and machine meet.

`Bucket` is the whole contract. Adding a storage is a file beside this one and a line in `open_bucket`.
Sent with the agent: standard library, Python 3.8.
"""

from __future__ import annotations

from cloudrun.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterable, Iterator, Protocol
else:
    Protocol = object

MAX_OBJECT = 64 << 20  # bytes of what is read in one go, log chunks among it
MAX_NAME = 1024  # bytes, Cloud Storage's own limit


class Bucket(Protocol):
    """Objects under one directory of a bucket, by name. Safe to use from several threads.

    A name is 1 to 1,024 bytes of UTF-8 without control characters, and none of its parts between
    slashes is empty, `.` or `..`. Every method raises `BucketRefused` for a name that the storage
    cannot hold or when it says no for good (full, read-only, forbidden), and `BucketError` when it
    cannot be reached.
    """

    url: str
    pace: float  # seconds between two looks for what should come soon, the next piece of output
    slow_pace: float  # seconds between two looks for the rest: each costs money in a cloud
    write_pace: float  # seconds between two pieces of output
    part_bytes: int  # a larger file is cut into parts of this size
    workers: int  # threads that sending or fetching at the same time pays for

    def get(self, name: str, most: int = MAX_OBJECT) -> tuple[bytes, str]:
        """The content and its version, which changes with the content.

        Raises Missing; Corrupt if it has more bytes than `most`: a stranger's machine may write anything.
        """

    def size(self, name: str) -> int | None:
        """Bytes of the object, or None where there is none."""

    def chunks(self, name: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The bytes of a range, in pieces of at most 4 MiB. Raises Missing; Corrupt if it is short."""

    def create(self, name: str, content: bytes | Iterable[bytes]) -> bool:
        """Store an object that must not exist yet, all of it or nothing.

        Our own earlier write whose reply was lost is success: an object with equal content gives
        False instead of True. Raises Conflict if there is one with another content.
        """

    def put(self, name: str, data: bytes) -> None:
        """Store or replace, whatever was there; readers see the old or the new content."""

    def swap(self, name: str, data: bytes, version: str | None) -> str:
        """Replace exactly this version (None: there is no object) and return the new version.

        Raises Conflict if somebody was faster.
        """

    def put_blob(self, prefix: str, content: Iterable[bytes], *, durable: bool = False) -> str:
        """Store content under `prefix` + its sha256, and return the sha256. Already there is success.

        `content` can be iterated several times: a storage may have to know the name, or to try again.
        What the content itself raises while it is read comes out as it is, and nothing is stored.
        `durable`: when this returns, the content outlives a power failure.
        """

    def copy(self, source: str, target: str) -> None:
        """Copy inside the bucket, replacing the target. Raises Missing."""

    def clone(self, name: str, path: str, offset: int) -> bool:
        """Put the object at this place of the file `path`, sharing its storage, if the file system can.

        False: it cannot, and the file, which is made if there is none, got nothing.
        """

    def names(self, prefix: str) -> Iterator[str]:
        """Full names of all objects below `prefix`, which is empty or ends in a slash, sorted."""

    def dirs(self, prefix: str) -> list[str]:
        """The next parts of the names below `prefix` that have more parts after them, sorted."""

    def delete(self, name: str) -> None:
        """Absent is success."""

    def time(self) -> float | None:
        """Seconds since the epoch by the service's own clock, as of its last answer or now.

        None if it has none, or has not answered yet.
        """

    def tidy(self) -> None:
        """Remove what killed writers left behind."""


def open_bucket(url: str, *, agent: bool = False) -> Bucket:
    """The bucket of a URL: `file:///directory` or `gs://bucket/directory`. Raises UsageError for another.

    `agent`: with nothing but the standard library, and the credentials of the machine.
    """
    if url.startswith("file:///"):
        from cloudrun.storage.folder import FolderBucket

        return FolderBucket(url[len("file://") :])
    if url.startswith("gs://") and agent:
        from cloudrun.storage.rest import RestBucket

        return RestBucket(url)
    if url.startswith("gs://"):
        from cloudrun.storage.gcs import GcsBucket

        return GcsBucket(url)
    raise UsageError(f"GCS_DIR={url}: not gs://bucket/directory or file:///directory")


def check_name(name: str) -> None:
    """Raise ValueError unless every storage can hold an object of this name."""
    encoded = name.encode("utf-8", "strict")  # a lone surrogate is a ValueError
    if not 0 < len(encoded) <= MAX_NAME or any(ord(c) < 32 or ord(c) == 127 for c in name):
        raise ValueError(name)
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(name)
