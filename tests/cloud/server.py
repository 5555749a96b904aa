"""HTTP servers on a free port of 127.0.0.1, whose connections can be cut and which end at once."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

HOST = "127.0.0.1"


class Cut(Exception):
    """The connection is reset instead of an answer."""


class Call(NamedTuple):
    """One request as it arrived. `path` still has its percent signs, because names may contain slashes."""

    verb: str
    path: str
    query: dict[str, str]
    headers: Any
    body: bytes

    @property
    def segments(self) -> list[str]:
        return [unquote(part) for part in self.path.strip("/").split("/")]


class Reply(NamedTuple):
    status: int
    body: bytes = b""
    kind: str = "application/json; charset=UTF-8"
    headers: tuple[tuple[str, str], ...] = ()


def json_reply(value: Any, status: int = 200) -> Reply:
    return Reply(status, json.dumps(value, indent=2).encode())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 65536  # headers and body in one packet
    server: Server

    def answer(self) -> None:
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        call = Call(self.command, url.path, query, self.headers, self.rfile.read(length))
        try:
            reply = self.server.answer(call)
        except Cut:
            # Zero linger makes the close a reset: what a client sees when a connection breaks.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.kind)
        self.send_header("Content-Length", str(len(reply.body)))
        for name, value in reply.headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = answer

    def log_message(self, *_: Any) -> None:
        """Nothing: every request is kept by whoever answers it."""


class Server(ThreadingHTTPServer):
    """Answers with `answer(call)`, which may raise Cut, on a thread per connection."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, answer: Callable[[Call], Reply], port: int = 0) -> None:
        super().__init__((HOST, port), Handler)
        self.answer = answer
        self.port: int = self.server_address[1]
        self._open: set[socket.socket] = set()
        self._accepting = threading.Thread(target=self._accept, name=f"http-{self.port}", daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        # serve_forever looks only twice a second whether it should end.
        while True:
            try:
                connection, address = self.socket.accept()
            except OSError:
                self.socket.close()
                return
            self._open.add(connection)
            self.process_request(connection, address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        # No shutdown(2) first, as the base class does: after it a close is never a reset.
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else is a bug of ours and shown."""
        import sys

        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def stop_listening(self) -> None:
        """Without waiting: for whoever holds a lock that an answer may need."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """No connection survives: a client must not go on talking to what has ended."""
        for each in (self.socket, *list(self._open)):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self.server_close()
