"""A bucket of Google Cloud Storage through Google's own library, which knows every kind of credentials."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from io import BytesIO
from typing import Any

from cloudrun import account
from cloudrun.errors import BucketError, BucketRefused, Missing, UsageError
from cloudrun.gs import PATIENCE, GsBucket
from cloudrun.jsonapi import (
    BINARY,
    MARK,
    ONE_REQUEST,
    PIECE,
    TIMEOUT,
    Anew,
    Content,
    Found,
    Outside,
    Stream,
    described,
    multipart,
    problem,
    stream_of,
)

UPLOAD_PIECE = 4 << 20  # bytes of an upload in one request; the library has up to twice as much in memory
LOGIN = "log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"


class GcsBucket(GsBucket):
    """See cloudrun.storage.Bucket. `credentials`: of google.auth; the default ones otherwise."""

    def __init__(self, url: str, patience: float = PATIENCE, credentials: Any = None) -> None:
        super().__init__(url, patience)
        # The library would look the bucket up in the background, with a permission that we do not need.
        os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
        try:
            from google.cloud import storage
            from google.cloud.storage.retry import DEFAULT_RETRY
        except ImportError:
            raise UsageError(f"GCS_DIR={url} needs Google's library: pip install 'cloudrun[gcp]'") from None
        self._retry = DEFAULT_RETRY.with_delay(0.1, 8.0, 2.0).with_timeout(patience)
        endpoint = os.environ.get("STORAGE_EMULATOR_HOST", "")
        with self._translated(""):
            self._client = storage.Client(
                project=None, credentials=credentials or account.credentials(os.environ, endpoint)
            )
            _widen(self._client._http, 2 * self.workers)
        self._booted: float | None = None  # when this computer was booted, by the service's clock
        self._client._http.hooks["response"].append(self._hear)
        self._bucket = self._client.bucket(self.bucket)

    def time(self) -> float | None:
        return None if self._booted is None else self._booted + _since_boot()

    def _hear(self, answer: Any, **_: object) -> None:
        """What time it is there, as every answer says."""
        with suppress(TypeError, ValueError):  # something between may have left it out
            self._booted = parsedate_to_datetime(answer.headers.get("Date")).timestamp() - _since_boot()

    def _find(self, path: str) -> Found | None:
        blob = self._blob(path)
        try:
            with self._translated(path):
                blob.reload(timeout=TIMEOUT, retry=self._retry)
        except Missing:
            return None
        return Found(blob.size, blob.md5_hash, str(blob.generation), (blob.metadata or {}).get(MARK, ""))

    def _open(self, path: str, start: int, stop: int | None, generation: str) -> Stream:
        url = f"{self._client.api_endpoint}/download/storage/v1{self._blob(path).path}"
        headers = {"Accept-Encoding": "identity"}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        query = {"alt": "media", **({"generation": generation} if generation else {})}
        with self._translated(path):
            answer = self._client._http.get(url, params=query, headers=headers, stream=True, timeout=TIMEOUT)
            if answer.status_code >= 300:
                raise problem(answer.status_code, answer.content, self.bucket, path)
        return stream_of(answer.headers, self._pieces(path, answer), answer.close)

    def _pieces(self, path: str, answer: Any) -> Iterator[bytes]:
        with self._translated(path):
            yield from answer.iter_content(PIECE)

    def _insert(self, path: str, content: Content, generation: str, mark: str) -> str:
        insert = self._in_a_session if content.size > ONE_REQUEST else self._at_once
        return str(self._again(lambda: insert(path, content, generation, mark)))

    def _at_once(self, path: str, content: Content, generation: str, mark: str) -> str:
        """Not by the library, which keeps three copies in memory, and builds them for half of the time."""
        headers, body = multipart(described(path, content, mark), content)
        query = {"uploadType": "multipart", "fields": "generation"}
        if generation:
            query["ifGenerationMatch"] = generation
        url = f"{self._client.api_endpoint}/upload/storage/v1{self._bucket.path}/o"
        with self._translated(path):
            answer = self._client._http.post(url, params=query, data=body, headers=headers, timeout=TIMEOUT)
            if answer.status_code >= 300:
                raise problem(answer.status_code, answer.content, self.bucket, path)
            return str(answer.json()["generation"])

    def _in_a_session(self, path: str, content: Content, generation: str, mark: str) -> str:
        blob = self._blob(path)
        blob.md5_hash = content.md5  # of the first reading: the service refuses what has changed since
        if mark:
            blob.metadata = {MARK: mark}
        with self._translated(path, absent=Anew("the upload was forgotten; try again")):
            blob.upload_from_file(
                _File(content),
                size=content.size,
                content_type=BINARY,
                if_generation_match=int(generation) if generation else None,
                checksum=None,
                timeout=TIMEOUT,
                retry=self._retry,
            )
        return str(blob.generation)

    def session(self, name: str) -> str:
        """The URL of an upload session: whoever knows it can create this object, within a week."""
        path = self._path(name)
        with self._translated(path):
            url = self._blob(path).create_resumable_upload_session(
                content_type=BINARY,
                if_generation_match=0,
                checksum=None,
                client=self._client,
                timeout=TIMEOUT,
                retry=self._retry,
            )
        return str(url)

    def cancel(self, session: str) -> None:
        """End an upload session. Only one of this bucket: the URL may come from a machine that is not ours.

        Nothing is said about one that is over; the service forgets all of them within a week.
        https://cloud.google.com/storage/docs/performing-resumable-uploads#cancel-upload
        """
        import requests

        if session.startswith(f"{self._client.api_endpoint}/upload/storage/v1{self._bucket.path}/o?"):
            with suppress(requests.RequestException):  # without a token: it needs none
                requests.delete(session, headers={"Content-Length": "0"}, timeout=TIMEOUT)

    def _list(self, prefix: str, delimiter: str) -> Iterator[tuple[list[str], list[str]]]:
        fields = "prefixes,nextPageToken" if delimiter else "items(name),nextPageToken"
        with self._translated(prefix):
            found = self._client.list_blobs(
                self._bucket,
                prefix=prefix or None,
                delimiter=delimiter or None,
                fields=fields,
                timeout=TIMEOUT,
                retry=self._retry,
            )
            for page in found.pages:
                yield [blob.name for blob in page], list(page.prefixes)

    def _rewrite(self, source: str, target: str) -> None:
        token, blob = None, self._blob(target)
        with self._translated(source):
            while True:
                token, _, _ = blob.rewrite(
                    self._blob(source), token=token, timeout=TIMEOUT, retry=self._retry
                )
                if token is None:
                    return

    def _remove(self, path: str) -> None:
        with self._translated(path):
            self._blob(path).delete(timeout=TIMEOUT, retry=self._retry)

    def _blob(self, path: str) -> Any:
        return self._bucket.blob(path, chunk_size=UPLOAD_PIECE)

    @contextmanager
    def _translated(self, path: str, absent: BucketError | None = None) -> Iterator[None]:
        from google.api_core.exceptions import GoogleAPICallError, RetryError
        from google.auth.exceptions import GoogleAuthError, TransportError
        from requests import RequestException

        try:
            yield
        except Outside as outside:
            raise outside.args[0] from None
        except RetryError as error:
            raise self._problem(error.cause, path) from None
        except (GoogleAPICallError, TransportError, RequestException, ConnectionError) as error:
            found = self._problem(error, path)
            raise absent if absent and isinstance(found, Missing) else found from None
        except GoogleAuthError as error:
            raise BucketRefused(f"{self.url} needs Google credentials: {error}; {LOGIN}") from None

    def _problem(self, error: Any, path: str) -> BucketError:
        answer = getattr(error, "response", None)
        if answer is not None:
            return problem(answer.status_code, answer.content, self.bucket, path)
        return BucketError(f"cannot reach Cloud Storage for {self.url}: {error}; try again")


class _File:
    """Content as the library wants to read it: so many bytes at a time, and never from the start again."""

    def __init__(self, content: Content) -> None:
        self._pieces, self._rest, self._at = content.read(), memoryview(b""), 0

    def tell(self) -> int:
        return self._at

    def read(self, wanted: int) -> bytes:
        found = BytesIO()  # gives away what it holds without a copy
        while left := wanted - found.tell():
            if not self._rest:
                self._rest = memoryview(next(self._pieces, b""))
            if not self._rest:
                break
            found.write(self._rest[:left])
            self._rest = self._rest[left:]
        self._at += found.tell()
        return found.getvalue()


def _since_boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)  # which nobody can set


def _widen(session: Any, connections: int) -> None:
    """As many connections as threads: the library keeps 10, and throws away and warns beyond that.

    https://github.com/googleapis/python-storage/issues/253
    """
    from requests.adapters import HTTPAdapter

    for each, tries in ((session, 0), (session._auth_request.session, 3)):  # as many as the library's own
        for scheme in ("https://", "http://"):
            each.mount(scheme, HTTPAdapter(pool_maxsize=connections, max_retries=tries))
