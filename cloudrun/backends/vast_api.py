"""The REST API of vast.ai through its own client: one request, its answer, and what an error means.

The client tries nothing twice here: a mutation that is sent again can rent a second machine.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

from cloudrun.errors import CloudrunError, NoCapacity, Refused, UsageError

SERVER = "https://console.vast.ai"
TIMEOUT = 20.0  # seconds for one request
RETRIED_SECONDS = 30.0  # for a question whose trouble will pass
PASSING = (0, 429, 500, 502, 503, 504)
GONE = "no_such_instance"  # the service's own word for a container that is not there
PAGE, MOST_PAGES = 25, 400
TAKEN_WORDS = ("no_such_ask", "no longer available", "not available")
NO_MONEY = {
    "insufficient_credit": "add credit at https://cloud.vast.ai/billing/",
    "spend_rate_limit": "a new account may spend so much in an hour only: wait, or ask vast.ai for more",
}
SKEW = 3.0  # seconds to which clocks that are right may differ, of which a date has none but whole ones


class ApiError(CloudrunError):
    """What was answered. `code`: the HTTP status, 0: there was no answer that can be read. `slug`: its kind.

    `pause`: seconds after which the service wants to be asked again.
    """

    def __init__(self, text: str, code: int = 0, slug: str = "", pause: float = 0.0) -> None:
        super().__init__(f"vast.ai: {text}")
        self.code, self.slug, self.pause = code, slug, pause

    @property
    def passes(self) -> bool:
        return self.code in PASSING and self.slug != "search_quota_exceeded"


class Api:
    """Safe to make before anything is known to work: it only begins to import the client."""

    def __init__(self, key: str, environ: Mapping[str, str]) -> None:
        self._key, self._server = key, (environ.get("VAST_URL") or SERVER).rstrip("/")
        self._error: Exception | None = None
        self._ahead = 0.0  # seconds that the service's clock is before ours
        self._ready = threading.Thread(target=self._load, daemon=True)
        self._ready.start()

    def ask(
        self, path: str, query: dict[str, Any] | None = None, *, patience: float = RETRIED_SECONDS
    ) -> dict[str, Any]:
        """The answer to a question, asked again for so long while its trouble will pass. Raises ApiError."""
        return self._again("get", path, query, None, patience)

    def search(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._again("post", "/bundles/", None, body, RETRIED_SECONDS)

    def act(self, verb: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Change something, asked once: who gets no answer does not know whether it was done."""
        return self._once(verb, path, None, body)

    def listed(self) -> list[dict[str, Any]]:
        """Every instance of the account. Raises ApiError where the list is not plainly all of them."""
        rows: list[dict[str, Any]] = []
        token: str | None = None
        for _ in range(MOST_PAGES):
            query = {"limit": str(PAGE), **({"after_token": token} if token else {})}
            answer = self.ask("/api/v1/instances/", query)
            page = answer.get("instances")
            if not isinstance(page, list) or not all(isinstance(row, dict) for row in page):
                break
            rows, token = rows + page, answer.get("next_token")
            if not token:
                if answer.get("total_instances", -1) > len(rows) or (not rows and not _says_none(answer)):
                    break
                return rows
        raise ApiError("its list of instances cannot be read: whether there is one is not known")

    def fetched(self, url: str) -> str | None:
        """The text at a URL that the service gave, without our key; None while there is none."""
        self.ready()
        try:
            answer = self._requests.get(url, timeout=TIMEOUT)
        except self._requests.exceptions.RequestException:
            return None
        return str(answer.text) if answer.status_code == 200 else None

    def now(self) -> float:
        """Seconds since the epoch by the clock of the service, by which it bills: ours may be wrong."""
        return time.time() + self._ahead

    def warm_up(self) -> None:
        """Its client is being imported already: whoever looks needs it as well."""

    def ready(self) -> None:
        """Wait for the client. Raises UsageError if there is none."""
        self._ready.join()
        if isinstance(self._error, ImportError):
            raise UsageError("the vast backend needs its client: pip install 'cloudrun[vast]'") from None
        if self._error:
            raise CloudrunError(f"the client of vast.ai cannot be used: {self._error}") from None

    def _load(self) -> None:
        try:
            import logging

            import requests
            from vastai.api.client import VastClient

            os.environ["NETRC"] = os.devnull  # an entry in ~/.netrc would replace our key in each request
            logging.getLogger("vastai").handlers.clear()  # it prints on stderr; what matters is raised
            self._requests = requests
            self._client = VastClient(self._key, self._server, retry=1, timeout=TIMEOUT)
        except Exception as error:
            self._error = error

    def _again(self, verb: str, path: str, query: Any, body: Any, patience: float) -> dict[str, Any]:
        until, pause = time.monotonic() + patience, 0.5
        while True:
            try:
                return self._once(verb, path, query, body)
            except ApiError as error:
                if not error.passes or time.monotonic() >= until:
                    raise
                time.sleep(max(pause, error.pause))
            pause = min(2 * pause, 8.0)

    def _once(self, verb: str, path: str, query: Any, body: Any) -> dict[str, Any]:
        self.ready()
        try:
            answer = getattr(self._client, verb)(path, query_args=query, json_data=body)
        except self._requests.exceptions.RequestException as error:
            why = "no answer in time" if isinstance(error, self._requests.Timeout) else "no connection"
            raise ApiError(f"{self._server} cannot be reached ({why}): is this computer online?") from None
        found = None
        with suppress(ValueError, TypeError):
            ahead = parsedate_to_datetime(answer.headers.get("Date")).timestamp() - time.time()
            self._ahead = ahead if abs(ahead) > SKEW else 0.0
        with suppress(ValueError):
            found = answer.json()
        if answer.status_code >= 400:
            raise _refusal(answer.status_code, found, answer.text, answer.headers.get("Retry-After"))
        if isinstance(found, list):  # the list of scheduled jobs
            return {"list": found}
        if not isinstance(found, dict):
            raise ApiError("its answer cannot be read")
        if found.get("success") is False and "new_contract" not in found:
            raise _refusal(answer.status_code, found, answer.text, None)
        return found


def _says_none(answer: dict[str, Any]) -> bool:
    return answer.get("total_instances") == 0 and answer.get("success") is True


def _refusal(code: int, body: object, text: str, retry_after: str | None) -> CloudrunError:
    """Bodies are JSON with a slug and a text, or a text only; a wrong key can be a 404."""
    found = body if isinstance(body, dict) else {}
    slug = str(found.get("error") or "")
    words = str(found.get("msg") or found.get("message") or found.get("detail") or slug or text)[:300]
    if code == 401 or slug == "auth_error":
        return UsageError(f"vast.ai does not accept VAST_API_KEY: {words}")
    pause = re.search(r"threshold=(\d+(?:\.\d+)?)", words)
    seconds = 1.1 * float(pause[1]) if pause else 0.0
    if retry_after and retry_after.isdecimal():
        seconds = max(seconds, min(float(retry_after), 60.0))
    return ApiError(words, code, slug, seconds)


def nothing_made(error: CloudrunError, what: str) -> CloudrunError | None:
    """The error of a create call that has certainly made nothing; None where nobody knows that."""
    if not isinstance(error, ApiError):
        return Refused(str(error))  # our key
    if error.slug in NO_MONEY:
        return Refused(f"{error}: {NO_MONEY[error.slug]}")
    text = f"{error.slug} {error}"
    if error.code in (400, 404, 410) and any(word in text for word in TAKEN_WORDS):
        return NoCapacity(f"{what} was taken by somebody else")
    return Refused(str(error)) if 400 <= error.code < 500 else None  # our order, or too many for too long
