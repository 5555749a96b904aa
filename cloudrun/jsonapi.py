"""Cloud Storage's JSON API: what is sent, and what answers mean. Sent with the agent: Python 3.8.

https://cloud.google.com/storage/docs/json_api/v1 and .../docs/json_api/v1/status-codes
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from base64 import b64encode
from collections import namedtuple

from cloudrun.errors import BucketError, BucketRefused, Conflict, Missing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterable, Iterator

PIECE = 1 << 20  # bytes of a download in one go
ONE_REQUEST = 8 << 20  # bytes; more go into a session, which loses little when the connection is cut
TIMEOUT = (10.0, 40.0)  # seconds to connect, and for each answer: a rewrite may take 30
BINARY = "application/octet-stream"
MARK = "cloudrun-writer"  # in an object's metadata
PASSING = {408, 429, 500, 502, 503, 504}  # https://cloud.google.com/storage/docs/retry-strategy
RATES = {"rateLimitExceeded", "userRateLimitExceeded"}  # may come as 403 as well

# What is known of an object, and an object that is being read: `pieces` may end early, without an error.
Found = namedtuple("Found", "size md5 generation mark")
Stream = namedtuple("Stream", "size md5 generation pieces close")


class Beyond(BucketError):
    """A range begins after the object's end."""

    permanent = True


class Anew(BucketError):
    """It has to be sent from its start: the content is not what was announced, or its session is gone."""


class Outside(Exception):
    """Something went wrong in the content that we were given, and not in the bucket."""


class Content:
    """Bytes whose size and hashes are known before they are sent; they are read again for each try."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces, self.size = pieces, 0
        sha256, md5 = hashlib.sha256(), new_md5()
        for piece in pieces:
            sha256.update(piece)
            md5.update(piece)
            self.size += len(piece)
        self.sha256, self.md5 = sha256.hexdigest(), b64encode(md5.digest()).decode()

    def read(self, start: int = 0) -> Iterator[bytes | memoryview]:
        """From here to what was the end. Raises Anew if it ends earlier, Outside for its own errors."""
        at = 0
        try:
            for piece in self._pieces:
                skipped = max(0, start - at)
                at += len(piece)
                if skipped < len(piece):
                    yield memoryview(piece)[skipped : len(piece) - max(0, at - self.size)]
                if at >= self.size:
                    return
        except OSError as error:
            raise Outside(error) from None
        if at < self.size:
            raise Anew("what is being stored became shorter meanwhile; try again")


class Body:
    """A request's body, read anew for each try: `content` from `start` on, and what stands around it."""

    def __init__(self, content: Content, start: int = 0, head: bytes = b"", tail: bytes = b"") -> None:
        self._content, self._start, self._head, self._tail = content, start, head, tail

    def __len__(self) -> int:
        return len(self._head) + self._content.size - self._start + len(self._tail)

    def __iter__(self) -> Iterator[bytes | memoryview]:
        yield self._head
        yield from self._content.read(self._start)
        yield self._tail


def problem(status: int, body: bytes, bucket: str, path: str) -> BucketError:
    """What an answer that is no success means, in the service's own words, and what to do about it."""
    words, reason = _words(body)
    where = f"gs://{bucket}/{path}".rstrip("/")
    if status == 404 and "bucket does not exist" in words:
        make = f"make it (gcloud storage buckets create gs://{bucket}) or correct GCS_DIR"
        return BucketRefused(f"there is no bucket gs://{bucket}: {make}")
    if status == 400 and "match calculated" in words:
        return Anew(f"{where} is not what was to be stored: {words}; try again")
    if status == 410:
        return Anew(f"the upload of {where} was forgotten; try again")
    if status in PASSING or reason in RATES:
        return BucketError(f"Cloud Storage cannot answer for {where} now ({status} {words}); try again")
    kinds = {404: Missing(f"there is no {where}"), 412: Conflict(f"{where} was changed by somebody else")}
    kinds[416] = Beyond(f"{where} ends earlier")
    return kinds.get(status) or BucketRefused(
        f"Cloud Storage refuses {where}: {words}; {_advice(status, words)}"
    )


def _advice(status: int, words: str) -> str:
    if "billing" in words.lower():
        return "enable billing for the bucket's project, or choose another bucket with GCS_DIR"
    if status == 401:
        return "log in with `gcloud auth application-default login`; a machine needs a service account"
    if status == 403:
        return "the account in use needs the role roles/storage.objectAdmin on this bucket"
    return f"see whether GCS_DIR is right (status {status})"


def _words(body: bytes) -> tuple[str, str]:
    """(message, reason) of an answer in JSON, or in plain text as downloads are refused."""
    try:
        error: dict[str, Any] = json.loads(body)["error"]
        return str(error["message"]), str(error["errors"][0]["reason"])
    except (ValueError, LookupError, TypeError):
        return body[:300].decode("utf-8", "replace").strip() or "no reason given", ""


def described(path: str, content: Content, mark: str) -> bytes:
    """The object resource of an upload: the service refuses content that has another MD5."""
    resource: dict[str, Any] = {"name": path, "md5Hash": content.md5, "contentType": BINARY}
    if mark:
        resource["metadata"] = {MARK: mark}
    return json.dumps(resource).encode()


def multipart(resource: bytes, content: Content) -> tuple[dict[str, str], Body]:
    """Headers and body of an upload in one request."""
    boundary = os.urandom(16).hex()
    head = f"--{boundary}\r\nContent-Type: application/json\r\n\r\n".encode() + resource
    head += f"\r\n--{boundary}\r\nContent-Type: {BINARY}\r\n\r\n".encode()
    body = Body(content, 0, head, f"\r\n--{boundary}--\r\n".encode())
    kind = f'multipart/related; boundary="{boundary}"'
    return {"Content-Type": kind, "Content-Length": str(len(body))}, body


def stream_of(headers: Any, pieces: Iterator[bytes], close: Callable[[], None]) -> Stream:
    """What the headers of a download say; `X-Goog-Hash: crc32c=...,md5=...` is that of the whole object."""
    hashes = dict(item.strip().partition("=")[::2] for item in headers.get("X-Goog-Hash", "").split(","))
    length = headers.get("Content-Length") or headers.get("X-Goog-Stored-Content-Length", "0")
    size = headers.get("Content-Range", f"/{length}").rpartition("/")[2]
    return Stream(int(size), hashes.get("md5", ""), headers.get("X-Goog-Generation", ""), pieces, close)


def new_md5() -> Any:
    """MD5 is what the service checks; where law forbids it as a signature it is allowed for this."""
    return hashlib.md5(usedforsecurity=False) if sys.version_info >= (3, 9) else hashlib.md5()


def md5_of(data: bytes) -> str:
    md5 = new_md5()
    md5.update(data)
    return b64encode(md5.digest()).decode()
