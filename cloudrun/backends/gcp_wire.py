"""What Compute Engine answers to a question, in JSON, and what its errors mean; for backends.gcp_api.

Through google.auth alone: the SDK has thousands of message classes, and to import them takes two seconds.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from cloudrun import account
from cloudrun.errors import CloudrunError, NoCapacity, UsageError

ENDPOINT = "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE"
GOOGLE = "https://compute.googleapis.com/compute/v1/"
SDK = "google.cloud.compute_v1"
TIMEOUT = (10.0, 30.0)  # seconds to connect, and for an answer
RETRIED_SECONDS = 20.0  # for what says that it will pass
TRANSIENT = (408, 429, 500, 502, 503, 504)
T = TypeVar("T")
CONNECTIONS = 16  # as many as threads that look for machines
SOLD_OUT = (
    *("ZONE_RESOURCE_POOL_EXHAUSTED", "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS", "UNSUPPORTED_OPERATION"),
    *("RESOURCE_POOL_EXHAUSTED", "INSUFFICIENT_CAPACITY", "RESOURCE_NOT_FOUND", "GCE_STOCKOUT"),
)


class ApiError(CloudrunError):
    """What the API answered. `code` is the HTTP status; 0: there was no answer."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class QuotaExceeded(CloudrunError):
    """`region`: where; empty: everywhere."""

    def __init__(self, text: str, region: str) -> None:
        super().__init__(text)
        self.region = region


class View:
    """A JSON object of an answer, to be read as the SDK's messages are: `vm.last_start_timestamp`."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._found = found

    def __getattr__(self, name: str) -> Any:
        """What is absent is empty. An int64 is a string in JSON."""
        if name.startswith("_"):
            raise AttributeError(name)
        first, *rest = name.split("_")
        found = self._found.get(first + "".join(map(str.title, rest)), EMPTY.get(name, ""))
        if isinstance(found, dict) and name != "labels":
            return View(found)
        if isinstance(found, list | tuple):
            return [View(each) if isinstance(each, dict) else each for each in found]
        return int(found) if EMPTY.get(name) == 0 else found


EMPTY: Mapping[str, Any] = {
    **{name: {} for name in ("labels", "metadata", "scheduling", "resource_status", "error")},
    **dict.fromkeys(("disks", "guest_accelerators", "items", "users", "errors"), ()),
    **dict.fromkeys(("disk_size_gb", "size_gb", "accelerator_count", "http_error_status_code"), 0),
}


class Soon:
    """What `make` returns, made on a thread from `start` on, at the latest when somebody wants it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._thread: threading.Thread | None = None
        self._value: Any = None
        self._error: Exception | None = None

    @property
    def begun(self) -> bool:
        return self._thread is not None

    def start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

    def get(self) -> Any:
        """Raises what `make` raised."""
        self.start()
        assert self._thread
        self._thread.join()
        if self._error:
            raise self._error
        return self._value

    def _run(self) -> None:
        try:
            self._value = self._make()
        except Exception as error:
            self._error = error


class Wire:
    """Questions about one project. Safe to use from several threads."""

    def __init__(self, project: str, environ: Mapping[str, str]) -> None:
        self.project, self._environ = project, environ
        self._url = (environ.get(ENDPOINT) or GOOGLE).rstrip("/")
        self.session = Soon(self._open)

    def ask(self, path: str, **query: Any) -> dict[str, Any]:
        """The answer about what is at `path`, in the project unless it names another.

        Raises ApiError; QuotaExceeded; UsageError without SDK or credentials.
        """
        whole = path if path.startswith("projects/") else f"projects/{self.project}/{path}"

        def once() -> dict[str, Any]:
            answer = self.session.get().get(f"{self._url}/{whole}", params=query, timeout=TIMEOUT)
            if answer.status_code >= 300:
                raise refusal(answer, self.project)
            found: dict[str, Any] = answer.json()
            return found

        return patiently(once, self.project)

    def pages(self, path: str, text: str) -> Iterator[dict[str, Any]]:
        """Of a list, with this filter."""
        query = {"filter": text} if text else {}
        while True:
            page = self.ask(path, **query)
            yield page
            if not page.get("nextPageToken"):
                return
            query["pageToken"] = page["nextPageToken"]

    def _open(self) -> Any:
        import logging

        from google.auth.transport.requests import AuthorizedSession
        from requests.adapters import HTTPAdapter

        if not importlib.util.find_spec(SDK):  # nobody needs it yet, and then it is too late to say so
            raise ImportError(SDK)
        logging.getLogger("google.auth").setLevel(logging.ERROR)  # what matters is raised as well
        session = AuthorizedSession(account.credentials(self._environ, self._environ.get(ENDPOINT, "")))
        for scheme in ("https://", "http://"):
            session.mount(scheme, HTTPAdapter(pool_maxsize=CONNECTIONS))
        return session


def patiently(act: Callable[[], T], project: str) -> T:
    """What `act` returns, tried again while the service says that its trouble will pass."""
    until, pause = time.monotonic() + RETRIED_SECONDS, 0.5
    while True:
        try:
            return act()
        except Exception as error:
            found = _translated(error, project)
            passes = isinstance(found, ApiError) and found.code in (0, *TRANSIENT)
            if not passes or time.monotonic() > until:
                raise found from None
        time.sleep(pause)
        pause = min(2 * pause, 4.0)


def _translated(error: Exception, project: str) -> CloudrunError:
    """What requests, google.auth and the SDK raise, and that they are not there."""
    if isinstance(error, CloudrunError):
        return error
    if isinstance(error, ImportError):
        return UsageError("the gcp backend needs its SDK: pip install 'cloudrun[gcp]'")
    from google.auth.exceptions import GoogleAuthError, TransportError
    from requests.exceptions import RequestException

    answer = getattr(error, "response", None)
    if answer is not None:
        return refusal(answer, project)
    if isinstance(error, RequestException | TransportError):
        return ApiError(f"Compute Engine cannot be reached: {error}")
    if isinstance(error, GoogleAuthError):
        return UsageError(f"Google credentials: {error}\nlog in: gcloud auth application-default login")
    return ApiError(f"{type(error).__name__}: {error}", -1)


def refusal(answer: Any, project: str) -> CloudrunError:
    """What an answer means that is no success: that of requests, which the SDK's errors have as well."""
    code, found = answer.status_code, {}
    try:
        found = answer.json()["error"]
        text = str(found["message"])
    except (ValueError, LookupError, TypeError):
        text = f"Compute Engine answers {code} {answer.reason}"
    parts = (*found.get("errors", ()), *found.get("details", ()))
    reasons = {str(each.get("reason")) for each in parts}
    if reasons & {"SERVICE_DISABLED", "accessNotConfigured"}:
        enable = f"gcloud services enable compute.googleapis.com --project={project}"
        return ApiError(f"the Compute Engine API is not enabled in {project}: {enable}", code)
    if code == 403 and reasons & {"rateLimitExceeded", "userRateLimitExceeded"}:
        return ApiError(text, 429)
    return quota(text) if "quotaExceeded" in reasons else ApiError(text, code)


def failed(code: str, text: str, zone: str, status: int) -> CloudrunError:
    """What the error of an operation means."""
    if code in SOLD_OUT or "STOCKOUT" in text or "failed to start due to preemption" in text:
        return NoCapacity(f"{zone} has no such machine now")
    return quota(text) if code == "QUOTA_EXCEEDED" else ApiError(f"{code}: {text}", status)


def quota(text: str) -> QuotaExceeded:
    """GPUS_ALL_REGIONS holds everywhere, the others in one region."""
    page = "https://console.cloud.google.com/iam-admin/quotas"
    _, in_region, rest = text.partition("in region ")
    if "GPUS_ALL_REGIONS" in text or not in_region:
        ask = "GPUS_ALL_REGIONS (all regions)" if "GPUS_ALL_REGIONS" in text else "this quota"
        return QuotaExceeded(f"{text}\nno zone can help: ask Google for more of {ask}, {page}", "")
    region = rest.split()[0].strip(".'\"")
    return QuotaExceeded(
        f"{text} ask Google for more, or add zones of other regions to VM_ZONE: {page}", region
    )
