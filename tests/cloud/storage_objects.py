"""Buckets in memory as Cloud Storage keeps them: generations, preconditions, checksums, sorted listings.

Every answer costs the same whatever the number of objects. Facts: JSON API v1 reference,
https://cloud.google.com/storage/docs/json_api/v1/objects and .../docs/request-preconditions.
"""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any
from urllib.parse import quote

try:
    import google_crc32c
except ImportError:  # a server without it answers the same, slower
    google_crc32c = None

PAGE = 1000  # the most that one answer lists
POLYNOMIAL = 0x82F63B78  # of CRC-32C, reflected


class ApiError(Exception):
    """An answer that is no success, with the service's own words."""

    def __init__(self, status: int, reason: str, message: str, **more: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        domain = "usageLimits" if status == 429 else "global"
        self.detail = {"message": message, "domain": domain, "reason": reason, **more}

    def body(self) -> dict[str, Any]:
        return {"error": {"code": self.status, "message": self.message, "errors": [self.detail]}}


def not_met() -> ApiError:
    text = "At least one of the pre-conditions you specified did not hold."
    return ApiError(412, "conditionNotMet", text, locationType="header", location="If-Match")


def no_object(bucket: str, name: str) -> ApiError:
    return ApiError(404, "notFound", f"No such object: {bucket}/{name}")


def invalid(message: str) -> ApiError:
    return ApiError(400, "invalid", message)


def crc32c(data: bytes) -> str:
    if google_crc32c is not None:
        value = google_crc32c.value(data)
    else:
        value = 0xFFFFFFFF
        for byte in data:
            value ^= byte
            for _ in range(8):
                value = value >> 1 ^ POLYNOMIAL * (value & 1)
        value ^= 0xFFFFFFFF
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


@dataclass
class Object:
    """One generation of an object."""

    bucket: str
    name: str
    data: bytes
    generation: int
    content_type: str = "application/octet-stream"
    metadata: dict[str, str] = field(default_factory=dict)
    metageneration: int = 1
    parts: int = 0  # more than none: composed, so that there is no MD5
    created: float = 0.0

    def __post_init__(self) -> None:
        self.crc32c = crc32c(self.data)
        self.md5 = None if self.parts else md5(self.data)

    @property
    def etag(self) -> str:
        return base64.b64encode(self.generation.to_bytes(8, "big") + b"\x01").decode()

    def resource(self, url: str) -> dict[str, Any]:
        path = f"/b/{self.bucket}/o/{quote(self.name, safe='')}"
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self.created)) + f".{self.created % 1:.3f}"[-4:]
        found = {
            "kind": "storage#object",
            "id": f"{self.bucket}/{self.name}/{self.generation}",
            "selfLink": f"{url}/storage/v1{path}",
            "mediaLink": f"{url}/download/storage/v1{path}?generation={self.generation}&alt=media",
            "name": self.name,
            "bucket": self.bucket,
            "generation": str(self.generation),
            "metageneration": str(self.metageneration),
            "contentType": self.content_type,
            "storageClass": "STANDARD",
            "size": str(len(self.data)),
            "crc32c": self.crc32c,
            "etag": self.etag,
            "timeCreated": when + "Z",
            "updated": when + "Z",
        }
        if self.md5:
            found["md5Hash"] = self.md5
        if self.parts:
            found["componentCount"] = self.parts
        if self.metadata:
            found["metadata"] = self.metadata
        return found

    def headers(self) -> dict[str, str]:
        hashes = f"crc32c={self.crc32c}" + (f",md5={self.md5}" if self.md5 else "")
        return {
            "Content-Type": self.content_type,
            "Last-Modified": formatdate(self.created, usegmt=True),
            "X-Goog-Generation": str(self.generation),
            "X-Goog-Metageneration": str(self.metageneration),
            "X-Goog-Hash": hashes,
            "X-Goog-Storage-Class": "STANDARD",
            "X-Goog-Stored-Content-Length": str(len(self.data)),
            "X-Goog-Stored-Content-Encoding": "identity",
            "ETag": self.etag,
        }


@dataclass
class Listing:
    items: list[Object]
    prefixes: list[str]
    next_token: str | None


class Objects:
    """All buckets. What is looked at and then changed is so under one lock: strongly consistent."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.lock = threading.RLock()
        self._buckets: dict[str, dict[str, Object]] = {}
        self._names: dict[str, list[str]] = {}
        self._generation = 0

    def create_bucket(self, bucket: str) -> None:
        with self.lock:
            self._buckets.setdefault(bucket, {})
            self._names.setdefault(bucket, [])

    def bucket(self, bucket: str) -> dict[str, Object]:
        if bucket not in self._buckets:
            raise ApiError(404, "notFound", "The specified bucket does not exist.")
        return self._buckets[bucket]

    def get(self, bucket: str, name: str, query: Mapping[str, str]) -> Object:
        """The live object. There is no older generation to ask for."""
        with self.lock:
            found = self.bucket(bucket).get(name)
            if found is None or query.get("generation", str(found.generation)) != str(found.generation):
                raise no_object(bucket, name)
            check(found, query)
            return found

    def put(
        self,
        bucket: str,
        name: str,
        data: bytes,
        query: Mapping[str, str],
        described: Mapping[str, Any],
        *,
        parts: int = 0,
    ) -> Object:
        """Store under preconditions, all or nothing. `described` is the object resource that was sent."""
        check_name(name)
        new = Object(bucket, name, data, 0, parts=parts)
        check_hashes(new, described)
        new.content_type = described.get("contentType") or new.content_type
        new.metadata = dict(described.get("metadata") or {})
        with self.lock:
            objects = self.bucket(bucket)
            check(objects.get(name), query)
            new.created = self.clock()
            self._generation = max(self._generation + 1, int(new.created * 1e6))
            new.generation = self._generation
            if name not in objects:
                insort(self._names[bucket], name)
            objects[name] = new
        return new

    def delete(self, bucket: str, name: str, query: Mapping[str, str]) -> None:
        with self.lock:
            found = self.get(bucket, name, query)
            del self.bucket(bucket)[found.name]
            names = self._names[bucket]
            del names[bisect_left(names, name)]

    def list(self, bucket: str, query: Mapping[str, str]) -> Listing:
        """A page. A prefix that ends in the delimiter stands for all names below it, and costs one look."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        most = min(int(query.get("maxResults") or PAGE), PAGE)
        start = max(prefix, query.get("startOffset", ""))
        with suppress(ValueError):
            start = max(start, base64.b64decode(query.get("pageToken", "")).decode())
        result = Listing([], [], None)
        with self.lock:
            objects, names = self.bucket(bucket), self._names[bucket]
            at = bisect_left(names, start)
            while at < len(names) and names[at].startswith(prefix):
                name = names[at]
                if "endOffset" in query and name >= query["endOffset"]:
                    break
                if len(result.items) + len(result.prefixes) == most:
                    result.next_token = base64.b64encode(name.encode()).decode()
                    break
                below = name.find(delimiter, len(prefix)) if delimiter else -1
                if below < 0:
                    result.items.append(objects[name])
                    at += 1
                else:
                    result.prefixes.append(name[: below + len(delimiter)])
                    at = bisect_right(names, result.prefixes[-1] + "\U0010ffff" * 4, at)
        return result


def check(found: Object | None, query: Mapping[str, str], source: str = "") -> None:
    """Raise 412 unless all preconditions hold; the generation of what is not there is 0.

    `source` is "Source" for those on the source of a copy.
    """
    now = {"Generation": found.generation if found else 0, "Metageneration": found and found.metageneration}
    for what, value in now.items():
        name = f"if{source}{what}"
        match, no_match = query.get(name + "Match"), query.get(name + "NotMatch")
        if match is not None and (value is None or int(match) != value):
            raise not_met()
        if no_match is not None and value is not None and int(no_match) == value:
            raise not_met()


def check_name(name: str) -> None:
    """https://cloud.google.com/storage/docs/objects#naming"""
    if not name:
        raise ApiError(400, "required", "Required")
    if len(name.encode()) > 1024:
        raise invalid("The maximum object length is 1024 characters, but got a name with more.")
    if name in (".", "..") or "\r" in name or "\n" in name or name.startswith(".well-known/acme-challenge/"):
        raise invalid(f"Disallowed unicode characters present in object name '{name!r}'")


def check_hashes(new: Object, described: Mapping[str, Any]) -> None:
    for key, label, actual in (("md5Hash", "MD5", new.md5), ("crc32c", "CRC32C", new.crc32c)):
        given = described.get(key)
        if given and given != actual:
            text = f'Provided {label} hash "{given}" doesn\'t match calculated {label} hash "{actual}".'
            raise invalid(text)
