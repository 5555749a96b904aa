"""A bucket of Cloud Storage without Google's library, for the machine. Sent with the agent: Python 3.8.

https://cloud.google.com/storage/docs/json_api/v1 and .../docs/performing-resumable-uploads
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
from collections import deque, namedtuple
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial
from urllib.parse import quote, urlencode, urlsplit

from cloudrun.errors import BucketError, BucketRefused, Missing
from cloudrun.gs import PATIENCE, GsBucket, Patience
from cloudrun.jsonapi import (
    BINARY,
    MARK,
    ONE_REQUEST,
    PASSING,
    PIECE,
    TIMEOUT,
    Anew,
    Body,
    Content,
    Found,
    Outside,
    Stream,
    described,
    multipart,
    problem,
    stream_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterator

TOKEN = "/computeMetadata/v1/instance/service-accounts/default/token"
FRESH_SECONDS = 240.0  # the metadata server has a new token when the old one is good for 5 minutes
LOST = (OSError, http.client.HTTPException)  # what a connection dies of

Answer = namedtuple("Answer", "status headers body")


class RestBucket(GsBucket):
    """See cloudrun.storage.Bucket."""

    def __init__(self, url: str, patience: float = PATIENCE, token: Handed | None = None) -> None:
        super().__init__(url, patience)
        emulator = os.environ.get("STORAGE_EMULATOR_HOST")
        self._wire = Wire(emulator or "https://storage.googleapis.com")
        metadata = os.environ.get("GCE_METADATA_HOST") or ("" if emulator else "metadata.google.internal")
        self._token = token or Token(metadata, f"gs://{self.bucket}")

    def time(self) -> float | None:
        date = parsedate_to_datetime(self._wire.date) if self._wire.date else None
        return date.timestamp() if date else None

    def _find(self, path: str) -> Found | None:
        query = {"fields": "size,md5Hash,generation,metadata"}
        try:
            found = json.loads(self._ask("GET", self._object(path), path, query).body)
        except Missing:
            return None
        mark = found.get("metadata", {}).get(MARK, "")
        return Found(int(found["size"]), found.get("md5Hash", ""), found["generation"], mark)

    def _open(self, path: str, start: int, stop: int | None, generation: str) -> Stream:
        query = {"alt": "media", **({"generation": generation} if generation else {})}
        headers = {}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        target = f"/download{self._object(path)}?{urlencode(query)}"
        exchange = self._send("GET", target, headers)
        if exchange.status >= 300:
            raise self._refusal(self._whole(exchange), path)
        return stream_of(exchange.headers, self._pieces(exchange), exchange.close)

    def _pieces(self, exchange: Exchange) -> Iterator[bytes]:
        try:
            while piece := exchange.read(PIECE):
                yield piece
        except LOST as error:
            raise self._unreachable(error) from None

    def _insert(self, path: str, content: Content, generation: str, mark: str) -> str:
        query = {"fields": "generation", **({"ifGenerationMatch": generation} if generation else {})}
        resource = described(path, content, mark)
        if content.size > ONE_REQUEST:
            answer = self._in_a_session(path, content, query, resource)
        else:
            headers, body = multipart(resource, content)
            query["uploadType"] = "multipart"
            answer = self._ask("POST", self._uploads(), path, query, headers, body)
        return str(json.loads(answer.body)["generation"])

    def _in_a_session(self, path: str, content: Content, query: dict[str, str], resource: bytes) -> Answer:
        """A session that is gone begins anew."""
        begin = partial(self._begin, path, query, resource)
        return self._fill(begin(), content, path, begin)

    def fill(self, session: str, content: Content) -> None:
        """Store content in a session that was opened in advance, from where it was broken off.

        Raises BucketRefused or Conflict if the session is over.
        """
        place = urlsplit(session)
        self._fill(f"{place.path}?{place.query}", content, "what is sent late", None)

    def _fill(self, session: str, content: Content, path: str, begin: Callable[[], str] | None) -> Answer:
        """Send what is missing, and after a cut ask how much that is."""
        patience, at, ask = Patience(self._patience), 0, begin is None
        while True:
            answer = self._put(session, at, content, patience, ask=ask)
            ask = False
            if answer.status < 300:
                return answer
            now = int(answer.headers.get("Range", "bytes=0--1").partition("-")[2]) + 1
            if answer.status == 308 and now > at:
                patience, at = Patience(self._patience), now
                continue
            gone = answer.status in (404, 410)
            if answer.status not in {308, 404, 410, *PASSING} or (gone and begin is None):
                raise BucketRefused("the session is over") if gone else self._refusal(answer, path)
            if not patience.wait():
                raise problem(503, b"the upload does not get on", self.bucket, path)
            if gone and begin:
                session, at = begin(), 0

    def _begin(self, path: str, query: dict[str, str], resource: bytes) -> str:
        headers = {"Content-Type": "application/json", "X-Upload-Content-Type": BINARY}
        query = {"uploadType": "resumable", **query}
        answer = self._ask("POST", self._uploads(), path, query, headers, resource)
        place = urlsplit(answer.headers["Location"])
        return f"{place.path}?{place.query}"

    def _put(
        self, session: str, at: int, content: Content, patience: Patience, *, ask: bool = False
    ) -> Answer:
        """One attempt to send all from here on; if the connection is lost, what the session says it has.

        `ask`: no more than what it has.
        """
        size = content.size
        while True:
            body: bytes | Body = b"" if ask else Body(content, at)
            here = "*" if ask else f"{at}-{size - 1}"
            headers = {"Content-Range": f"bytes {here}/{size}", "Content-Length": str(len(body))}
            try:
                return self._whole(self._send("PUT", session, headers, body))
            except BucketError as error:
                if isinstance(error, Anew) or not patience.wait():
                    raise
            ask = True

    def _list(self, prefix: str, delimiter: str) -> Iterator[tuple[list[str], list[str]]]:
        query = {"prefix": prefix, "delimiter": delimiter, "fields": "items(name),prefixes,nextPageToken"}
        while True:
            wanted = {key: value for key, value in query.items() if value}
            page = json.loads(self._ask("GET", f"/storage/v1/b/{self.bucket}/o", prefix, wanted).body)
            yield [item["name"] for item in page.get("items", ())], page.get("prefixes", [])
            if not page.get("nextPageToken"):
                return
            query["pageToken"] = page["nextPageToken"]

    def _rewrite(self, source: str, target: str) -> None:
        query = {"fields": "rewriteToken,done"}
        where = f"{self._object(source)}/rewriteTo/b/{self.bucket}/o/{quote(target, safe='')}"
        while True:
            headers = {"Content-Length": "0"}
            answer = json.loads(self._ask("POST", where, source, query, headers).body)
            if answer.get("done"):
                return
            query["rewriteToken"] = answer["rewriteToken"]

    def _remove(self, path: str) -> None:
        self._ask("DELETE", self._object(path), path)

    # --- requests

    def _object(self, path: str) -> str:
        return f"/storage/v1/b/{self.bucket}/o/{quote(path, safe='')}"

    def _uploads(self) -> str:
        return f"/upload/storage/v1/b/{self.bucket}/o"

    def _ask(
        self,
        method: str,
        target: str,
        path: str,
        query: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
        body: Any = b"",
    ) -> Answer:
        """Until it is answered. Every request here may be sent twice."""
        where = f"{target}?{urlencode(query or {})}"

        def once() -> Answer:
            answer = self._whole(self._send(method, where, headers or {}, body))
            if answer.status >= 300:
                raise self._refusal(answer, path)
            return answer

        return self._again(once)

    def _send(self, method: str, target: str, headers: dict[str, str], body: Any = b"") -> Exchange:
        if method != "PUT":  # a session needs no token, and would refuse one that has expired
            headers = {**headers, **self._token.header()}
        try:
            return self._wire.send(method, target, headers, body)
        except Outside as outside:
            raise outside.args[0] from None
        except LOST as error:
            raise self._unreachable(error) from None

    def _whole(self, exchange: Exchange) -> Answer:
        try:
            return Answer(exchange.status, exchange.headers, exchange.read())
        except LOST as error:
            raise self._unreachable(error) from None
        finally:
            exchange.close()

    def _refusal(self, answer: Answer, path: str) -> BucketError:
        if answer.status == 401 and self._token.forget():
            return BucketError(f"the token for {self.url} has expired; try again")
        return problem(answer.status, answer.body, self.bucket, path)

    def _unreachable(self, error: Exception) -> BucketError:
        return BucketError(f"cannot reach Cloud Storage for {self.url}: {error!r}; try again")


class Wire:
    """Connections to one host that stay open between requests. Safe to use from several threads."""

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        self._host, self._context = place.netloc, None
        if place.scheme == "https":
            import ssl

            self._context = ssl.create_default_context()
        self._idle: deque[http.client.HTTPConnection] = deque()
        self.date = ""  # of the last answer

    def send(self, method: str, target: str, headers: dict[str, str], body: bytes | Body) -> Exchange:
        with suppress(IndexError, ConnectionError):  # the service closes what was idle for some minutes
            return self._exchange(self._idle.pop(), method, target, headers, body)
        return self._exchange(self._new(), method, target, headers, body)

    def _exchange(self, connection: Any, *request: Any) -> Exchange:
        try:
            connection.request(request[0], request[1], request[3] or None, request[2])
            response = connection.getresponse()
            self.date = response.headers.get("Date", "")
            return Exchange(connection, response, self._idle)
        except BaseException:
            connection.close()
            raise

    def _new(self) -> http.client.HTTPConnection:
        """Connected, within another time than the one that an answer may take."""
        if self._context is None:
            connection = http.client.HTTPConnection(self._host, timeout=TIMEOUT[0])
        else:
            connection = http.client.HTTPSConnection(self._host, timeout=TIMEOUT[0], context=self._context)
        connection.connect()
        connection.sock.settimeout(TIMEOUT[1])
        return connection


class Exchange:
    """A request that is being answered. A connection that nothing is left to read from is used again."""

    def __init__(self, connection: http.client.HTTPConnection, response: Any, idle: Any) -> None:
        self._connection, self._response, self._idle = connection, response, idle
        self.status, self.headers, self.read = response.status, response.headers, response.read

    def close(self) -> None:
        whole = self._response.isclosed() and not self._response.length
        if whole and not self._response.will_close:
            self._idle.append(self._connection)
        else:
            self._connection.close()


class Token:
    """An access token of the machine's service account, and a new one before it expires.

    https://cloud.google.com/compute/docs/access/authenticate-workloads#applications
    """

    def __init__(self, host: str, wanted: str) -> None:
        self._host, self._wanted = host, wanted
        self._lock, self._value = threading.Lock(), ""
        self._born, self._until = 0.0, 0.0

    def header(self) -> dict[str, str]:
        if not self._host:
            return {}
        with self._lock:
            if time.monotonic() > self._until:
                self._fetch()
            return {"Authorization": f"Bearer {self._value}"}

    def forget(self) -> bool:
        """Ask for another one the next time; False if this one is new."""
        with self._lock:
            aged = bool(self._host) and self._born + 5 < time.monotonic()
            if aged:
                self._until = 0.0
            return aged

    def _fetch(self) -> None:
        try:
            connection = http.client.HTTPConnection(self._host, timeout=TIMEOUT[0])
            connection.request("GET", TOKEN, headers={"Metadata-Flavor": "Google"})
            response = connection.getresponse()
            status, body = response.status, response.read()
            connection.close()
        except LOST as error:
            raise BucketError(f"the metadata server does not answer: {error!r}; try again") from None
        if status == 404:
            raise BucketRefused(f"this machine has no service account, and {self._wanted} needs one: set it")
        if status != 200:
            raise BucketError(f"the metadata server gives no token (status {status}); try again")
        found = json.loads(body)
        self._value, self._born = found["access_token"], time.monotonic()
        self._until = self._born + max(found["expires_in"] - FRESH_SECONDS, 1.0)


class Handed:
    """A token that was handed over, with the seconds that it is good for: there is nowhere to get another."""

    def __init__(self, value: str, seconds: float) -> None:
        self._value, self.life, self._end = "", 0.0, 0.0
        self.take(value, seconds)

    def take(self, value: str, seconds: float) -> bool:
        """Use this one from now on, if it is good for longer."""
        longer = value != self._value and seconds > self.left()
        if longer:
            self._value, self.life, self._end = value, seconds, time.monotonic() + seconds
        return longer

    def age(self, seconds: float) -> None:
        """It was made so long ago."""
        self._end -= seconds

    def left(self) -> float:
        return max(self._end - time.monotonic(), 0.0)

    def header(self) -> dict[str, str]:
        if not self.left():
            raise BucketRefused("the token that this machine was given has expired")
        return {"Authorization": f"Bearer {self._value}"}

    def forget(self) -> bool:
        """The service refuses it: there is no other one."""
        self._end = 0.0
        return False
