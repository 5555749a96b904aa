"""Uploads in one request and in sessions. Facts: https://cloud.google.com/storage/docs/uploads-downloads,
.../docs/resumable-uploads and .../docs/performing-resumable-uploads."""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .storage_objects import ApiError, Object, Objects, check, invalid

QUANTUM = 256 << 10  # every piece of a session but the last is a multiple of this
WEEK = 7 * 24 * 3600.0
RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(?:(\d+)|\*)\Z")


def from_json(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data or b"{}")
    except ValueError:
        raise ApiError(400, "parseError", "Parse Error") from None
    if not isinstance(found, dict):
        raise ApiError(400, "parseError", "Parse Error")
    return found


def given_hashes(header: str) -> dict[str, str]:
    """Of `X-Goog-Hash: crc32c=...,md5=...` what an object resource would say."""
    keys = {"crc32c": "crc32c", "md5": "md5Hash"}
    pairs = (item.strip().partition("=") for item in header.split(",") if item.strip())
    return {keys[name]: value for name, _, value in pairs if name in keys}


BLANK = re.compile(rb"\n\n|\r\n\r\n")


def multipart(data: bytes, content_type: str) -> tuple[dict[str, Any], bytes]:
    """(object resource, content) of a multipart/related body; gsutil ends its lines with a newline alone."""
    found = re.search(r"""boundary=["']?([^;"']+)""", content_type)
    if not found:
        raise invalid("Multipart must have a boundary")
    boundary = b"--" + found[1].encode()
    first = data.index(boundary) + len(boundary)
    second = data.index(boundary, first)
    end = data.rindex(boundary + b"--")
    above, blank = BLANK.search(data, first, second), BLANK.search(data, second, end)
    if above is None or blank is None:
        raise invalid("Missing end boundary in multipart body.")
    described = from_json(data[above.end() : second].rstrip())
    kind = re.search(rb"content-type:\s*([^\r\n]+)", data[second : blank.start() + 1].lower())
    if kind:
        described.setdefault("contentType", kind[1].decode())
    return described, data[blank.end() : end - len(blank[0]) // 2]


@dataclass
class Session:
    """An upload in pieces. Whoever knows its id may write: no token is asked for."""

    bucket: str
    name: str
    query: Mapping[str, str]
    described: dict[str, Any]
    expires: float
    data: bytearray = field(default_factory=bytearray)
    total: int | None = None
    done: Object | None = None
    cancelled: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def kept(self) -> dict[str, str]:
        return {"Range": f"bytes=0-{len(self.data) - 1}"} if self.data else {}


class Sessions:
    """All sessions. `put` answers None while an upload is not complete: 308."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._sessions: dict[str, Session] = {}

    def start(self, bucket: str, name: str, query: Mapping[str, str], described: dict[str, Any]) -> str:
        with self._objects.lock:
            check(self._objects.bucket(bucket).get(name), query)
        key = secrets.token_urlsafe(24)
        self._sessions[key] = Session(bucket, name, query, described, self._objects.clock() + WEEK)
        return key

    def find(self, key: str) -> Session:
        session = self._sessions.get(key)
        if session is None:
            raise ApiError(404, "notFound", "Not Found")
        if session.cancelled:
            raise ApiError(499, "clientClosedRequest", "Client Closed Request")
        if session.expires < self._objects.clock() and session.done is None:
            raise ApiError(410, "uploadExpired", "The upload session has expired.")
        return session

    def cancel(self, key: str) -> None:
        session = self.find(key)
        session.cancelled = session.done is None
        session.data.clear()

    def open(self) -> int:
        """Sessions that were begun, and neither finished nor cancelled."""
        return sum(not (found.done or found.cancelled) for found in self._sessions.values())

    def put(self, key: str, content_range: str, data: bytes, hashes: Mapping[str, str]) -> Object | None:
        session = self.find(key)
        with session.lock:
            if session.done is None and self._take(session, content_range, data):
                described = {**session.described, **hashes}
                session.done = self._objects.put(
                    session.bucket, session.name, bytes(session.data), session.query, described
                )
                session.data = bytearray()
            return session.done

    def keep(self, key: str, content_range: str, data: bytes) -> None:
        """What arrived before the connection was cut."""
        session = self.find(key)
        with session.lock:
            start = len(data) // QUANTUM * QUANTUM
            offset = int((RANGE.match(content_range) or [0, 0])[1] or 0) if content_range else 0
            if session.done is None and offset <= len(session.data):
                session.data += data[len(session.data) - offset : start]

    def _take(self, session: Session, content_range: str, data: bytes) -> bool:
        """Add a piece; whether that was the last one."""
        found = RANGE.match(
            content_range or f"bytes 0-{len(data) - 1}/{len(data)}" * bool(data) or "bytes */0"
        )
        if not found:
            raise invalid("Failed to parse Content-Range header.")
        if found[3]:
            session.total = int(found[3])
        if found[1]:
            start, have = int(found[1]), len(session.data)
            if int(found[2]) - start + 1 != len(data):
                raise invalid("Invalid request. The number of bytes uploaded does not match Content-Range.")
            if start > have:
                text = f"According to the Content-Range header, the upload offset is {start} byte(s)"
                more = f", which exceeds already uploaded size of {have} byte(s)."
                raise ApiError(503, "backendError", f"Invalid request. {text}{more}")
            if start + len(data) != session.total and len(data) % QUANTUM:
                raise invalid("Invalid request. The size of a piece must be a multiple of 262144 bytes.")
            session.data += memoryview(data)[have - start :]
        return session.total is not None and len(session.data) == session.total
