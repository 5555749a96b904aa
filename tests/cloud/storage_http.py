"""HTTP of the emulated Cloud Storage: which method a request is, and how it is answered or cut off."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote

from .storage_faults import MESSAGES, Fault, Request
from .storage_objects import ApiError, Object
from .storage_uploads import from_json, given_hashes, multipart

if TYPE_CHECKING:
    from .storage import Storage

MOST_RANGE = 1 << 62


@dataclass
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | memoryview = b""


class Cut(Exception):
    """The connection ends here."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, storage: Storage) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, storage))  # type: ignore[arg-type]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class Headers(dict[str, str]):
    """By name, whatever its case."""

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    rbufsize = 1 << 18
    server_version, sys_version = "UploadServer", ""

    def __init__(self, storage: Storage, *arguments: Any) -> None:
        self.storage = storage
        super().__init__(*arguments)

    def log_message(self, *_: Any) -> None:
        """The storage keeps a log of its own."""

    def parse_request(self) -> bool:
        """The base class takes most of a request's time to parse its headers as those of a mail."""
        self.requestline = self.raw_requestline.decode("latin-1")
        words = self.requestline.split()
        if len(words) != 3:
            self.close_connection = True
            return False
        self.command, self.path, self.request_version = words
        headers = Headers()
        while (line := self.rfile.readline()) not in (b"\r\n", b"\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        self.headers = headers  # type: ignore[assignment]
        self.close_connection = (headers.get("Connection") or "").lower() == "close"
        return True

    def handle_one_request(self) -> None:
        if self.storage.faults.refusing:
            self.close_connection = True
            return
        with suppress(ConnectionError):
            super().handle_one_request()
            return
        self.close_connection = True

    def serve(self) -> None:
        """A line is in the log before the client has its answer, so that a test can look at it at once."""
        self.incoming = 0
        kind, name = "unknown", ""
        path, _, query = self.path.partition("?")
        self.query = dict(parse_qsl(query, keep_blank_values=True))
        self.parts = [unquote(part) for part in path.split("/")[1:]]
        self.token = (self.headers.get("Authorization") or "").partition("Bearer ")[2]
        try:
            if self.storage.faults.refusing:
                raise Cut
            kind, name = self.kind()
            call = self.storage.log.call(kind, name, self.headers.get("User-Agent") or "")
            answer, fault = self.answer(kind, self.storage.faults.take(call))
            body = answer.body[: fault.truncate] if fault else answer.body
            self.note(kind, name, answer.status, len(body))
            self.send(answer, body)
        except Cut:
            self.note(kind, name, 0, 0)
            self.cut()

    def note(self, kind: str, name: str, status: int, sent: int) -> None:
        found = Request(kind, self.command, self.path, name, status, self.incoming, sent, self.token)
        self.storage.log.add(found)

    def cut(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = serve

    # --- what is asked

    def kind(self) -> tuple[str, str]:
        """(kind, object name); the kinds are the methods `_do_...` below."""
        parts = self.parts[1:] if self.parts[0] in ("upload", "download") else self.parts
        name = parts[5] if len(parts) > 5 else ""
        if self.parts[0] == "upload":
            return self._upload_kind()
        if self.command == "GET":
            if parts[4:5] == ["iam"]:
                return ("permissions" if parts[5:] == ["testPermissions"] else "policy"), ""
            if self.query.get("alt") == "media" and name:
                return "read", name
            return ("get" if name else "list" if len(parts) == 5 else "bucket"), name
        if self.command == "DELETE":
            return "delete", name
        if len(parts) > 6:
            return ("compose" if parts[6] == "compose" else "rewrite"), parts[-1] if len(parts) > 7 else name
        return "unknown", name

    def _upload_kind(self) -> tuple[str, str]:
        key = self.query.get("upload_id")
        if key is None:
            return ("start" if self.query.get("uploadType") == "resumable" else "insert"), self._upload_name()
        name = ""
        with suppress(ApiError):
            name = self.storage.sessions.find(key).name
        if self.command == "DELETE":
            return "cancel", name
        asks = (self.headers.get("Content-Range") or "").startswith("bytes */")
        return ("status" if asks else "chunk"), name

    def _upload_name(self) -> str:
        if "name" not in self.query:
            if self.query.get("uploadType") == "multipart":
                with suppress(ApiError, ValueError):
                    return str(
                        multipart(self.body(), self.headers.get("Content-Type") or "")[0].get("name", "")
                    )
            else:
                with suppress(ApiError):
                    return str(from_json(self.body()).get("name", ""))
        return self.query.get("name", "")

    def body(self, most: int | None = None) -> bytes:
        """The request's body, read once."""
        if self.incoming == 0:
            self._body = self._read(most)
            self.incoming = len(self._body)
        return self._body

    def _read(self, most: int | None) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        length = int(self.headers.get("Content-Length") or 0)
        wanted = length if most is None else min(most, length)
        data = self.rfile.read(wanted)
        if len(data) < wanted:
            raise Cut  # the client died while it was sending
        return data

    # --- what is answered

    def answer(self, kind: str, fault: Fault | None) -> tuple[Answer, Fault | None]:
        if fault and fault.cut == "before":
            if fault.keep is not None:
                data = self.body(fault.keep)
                if kind == "chunk":
                    where = self.headers.get("Content-Range") or ""
                    self.storage.sessions.keep(self.query["upload_id"], where, data)
            fault.wait()
            raise Cut
        data = self.body()
        try:
            if fault and fault.status:
                reason, message = MESSAGES.get(fault.status, ("invalid", "Error"))
                raise ApiError(fault.status, fault.reason or reason, fault.message or message)
            answer = self._act(kind, data)
        except ApiError as error:
            answer = self._refusal(kind, error)
        except (ValueError, KeyError, TypeError) as error:
            answer = self._refusal(kind, ApiError(400, "invalid", f"Bad Request: {error!r}"))
        if fault:
            fault.wait()
            if fault.cut == "after":
                raise Cut
        return answer, fault

    def _refusal(self, kind: str, error: ApiError) -> Answer:
        """Downloads are refused in plain text, everything else in JSON."""
        if kind == "read":
            return Answer(error.status, {"Content-Type": "text/html; charset=UTF-8"}, error.message.encode())
        return self._json(error.body(), error.status)

    def _json(self, value: Mapping[str, Any], status: int = 200) -> Answer:
        from .storage import masked

        if status < 300:
            value = masked(value, self.query.get("fields", ""))
        body = json.dumps(value).encode()
        return Answer(status, {"Content-Type": "application/json; charset=UTF-8"}, body)

    def _object(self, found: Object) -> Answer:
        return self._json(found.resource(self.storage.url))

    def _act(self, kind: str, data: bytes) -> Answer:
        return getattr(self, "_do_" + kind)(data)

    def _where(self) -> tuple[str, str]:
        parts = self.parts[1:] if self.parts[0] in ("upload", "download") else self.parts
        return parts[3], parts[5] if len(parts) > 5 else ""

    def _do_unknown(self, data: bytes) -> Answer:
        raise ApiError(404, "notFound", "Not Found")

    def _do_bucket(self, data: bytes) -> Answer:
        self.storage.allow(self.token, "storage.buckets.get", self.parts[3], "")
        return self._json(self.storage.bucket_resource(self.parts[3]))

    def _do_permissions(self, data: bytes) -> Answer:
        asked = [value for name, value in parse_qsl(self.path.partition("?")[2]) if name == "permissions"]
        return self._json(self.storage.held(self.token, self.parts[3], asked))

    def _do_policy(self, data: bytes) -> Answer:
        self.storage.allow(self.token, "storage.buckets.getIamPolicy", self.parts[3], "")
        return self._json(self.storage.policy(self.parts[3]))

    def _do_list(self, data: bytes) -> Answer:
        self.storage.allow(self.token, "storage.objects.list", self.parts[3], self.query.get("prefix", ""))
        return self._json(self.storage.listing(self.parts[3], self.query))

    def _do_get(self, data: bytes) -> Answer:
        self.storage.allow(self.token, "storage.objects.get", *self._where())
        return self._object(self.storage.store.get(*self._where(), self.query))

    def _do_read(self, data: bytes) -> Answer:
        self.storage.allow(self.token, "storage.objects.get", *self._where())
        found = self.storage.store.get(*self._where(), self.query)
        headers, size = found.headers(), len(found.data)
        wanted = self.headers.get("Range") or ""
        first, dash, last = wanted.replace("bytes=", "").partition("-")
        if not dash:
            return Answer(200, headers, found.data)
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        if start >= size:
            text = "The requested range cannot be satisfied."
            raise ApiError(416, "requestedRangeNotSatisfiable", text)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Answer(206, headers, memoryview(found.data)[start:stop])

    def _do_delete(self, data: bytes) -> Answer:
        self.storage.allow(self.token, "storage.objects.delete", *self._where())
        self.storage.store.delete(*self._where(), self.query)
        return Answer(204)

    def _do_rewrite(self, data: bytes) -> Answer:
        at = self.parts.index("copyTo" if "copyTo" in self.parts[6:7] else "rewriteTo", 6)
        target = self.parts[at + 2], self.parts[at + 4]
        sent = from_json(data)
        if self.parts[at] == "rewriteTo":
            return self._json(self.storage.rewrite(self.token, self._where(), target, self.query, sent))
        query = {key: value for key, value in self.query.items() if key != "rewriteToken"}
        while "resource" not in (
            done := self.storage.rewrite(self.token, self._where(), target, query, sent)
        ):
            query["rewriteToken"] = done["rewriteToken"]
        return self._json(done["resource"])

    def _do_compose(self, data: bytes) -> Answer:
        return self._object(self.storage.compose(self.token, *self._where(), self.query, from_json(data)))

    def _do_insert(self, data: bytes) -> Answer:
        kind = self.headers.get("Content-Type") or ""
        if self.query.get("uploadType") == "multipart":
            described, data = multipart(data, kind)
        else:
            described = {"contentType": kind} if kind else {}
        described.update(given_hashes(self.headers.get("X-Goog-Hash") or ""))
        name = self.query.get("name") or described.get("name", "")
        found = self.storage.insert(self.token, self.parts[4], name, data, self.query, described)
        return self._object(found)

    def _do_start(self, data: bytes) -> Answer:
        described = from_json(data)
        described.setdefault("contentType", self.headers.get("X-Upload-Content-Type") or "")
        bucket, name = self.parts[4], self.query.get("name") or described.get("name", "")
        self.storage.store.bucket(bucket)
        self.storage.may_write(self.token, bucket, name)
        key = self.storage.sessions.start(bucket, name, self.query, described)
        host = self.headers.get("Host") or self.storage.url.partition("//")[2]  # as the client knows it
        place = f"http://{host}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"
        return Answer(200, {"Location": place, "X-GUploader-UploadID": key})

    def _do_chunk(self, data: bytes) -> Answer:
        key, hashes = self.query["upload_id"], given_hashes(self.headers.get("X-Goog-Hash") or "")
        found = self.storage.sessions.put(key, self.headers.get("Content-Range") or "", data, hashes)
        if found is None:
            headers = self.storage.sessions.find(key).kept()
            # Clients in Go would follow a 308 as a redirection, and ask for another answer.
            if self.headers.get("X-GUploader-No-308") == "yes":
                return Answer(200, {**headers, "X-HTTP-Status-Code-Override": "308"})
            return Answer(308, headers)
        return self._object(found)

    _do_status = _do_chunk

    def _do_cancel(self, data: bytes) -> Answer:
        self.storage.sessions.cancel(self.query["upload_id"])
        return Answer(499)

    def send(self, answer: Answer, body: bytes | memoryview) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        if len(body) < len(answer.body):
            self.cut()
