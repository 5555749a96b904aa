"""The Compute Engine API through google-cloud-compute: calls, errors and operations, for backends.gcp.

The SDK is imported on a thread, because that takes longer than most scans. Every call has a timeout of its
own and none of the library's retries: of its reads one can hang for minutes, and it never retries a mutation.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from cloudrun import account
from cloudrun.errors import CloudrunError, NoCapacity, UsageError

TIMEOUT = 30.0  # seconds for one request
RETRIED_SECONDS = 20.0  # for what says that it will pass
OPERATION_SECONDS = 300.0
TRANSIENT = (408, 429, 500, 502, 503, 504)
SOLD_OUT = (
    *("ZONE_RESOURCE_POOL_EXHAUSTED", "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS", "UNSUPPORTED_OPERATION"),
    *("RESOURCE_POOL_EXHAUSTED", "INSUFFICIENT_CAPACITY", "RESOURCE_NOT_FOUND", "GCE_STOCKOUT"),
)
ENDPOINT = "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE"


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


class Compute:
    """Methods of one project. Safe to make before anything is known to work: it only begins to import."""

    def __init__(self, project: str, environ: Mapping[str, str]) -> None:
        self.project = project
        self._environ, self._endpoint = environ, environ.get(ENDPOINT, "")
        self._clients: dict[str, Any] = {}
        self._error: Exception | None = None
        self._ready = threading.Thread(target=self._load, daemon=True)
        self._ready.start()

    def ready(self) -> None:
        """Wait for the SDK and the credentials. Raises UsageError if there is none of them."""
        self._ready.join()
        if isinstance(self._error, ImportError):
            raise UsageError("the gcp backend needs its SDK: pip install 'cloudrun[gcp]'") from None
        if self._error:
            raise _translated(self._error, self.project) from None

    def call(self, service: str, method: str, **request: Any) -> Any:
        """One request, tried again while the service says that its trouble will pass.

        Raises ApiError; QuotaExceeded; UsageError without SDK or credentials.
        """
        self.ready()
        act = getattr(self._clients[service], method)
        request = {"project": self.project, **request}
        until, pause = time.monotonic() + RETRIED_SECONDS, 0.5
        while True:
            try:
                return act(request=request, timeout=TIMEOUT, retry=None)
            except Exception as error:
                found = _translated(error, self.project)
                passes = isinstance(found, ApiError) and found.code in (0, *TRANSIENT)
                if not passes or time.monotonic() > until:
                    raise found from None
            time.sleep(pause)
            pause = min(2 * pause, 4.0)

    def begin(self, method: str, zone: str, **request: Any) -> Any:
        """The operation of a mutation. Its request id makes it happen once, however often it is tried."""
        return self.call("Instances", method, zone=zone, request_id=str(uuid.uuid4()), **request)

    def change(self, method: str, zone: str, **request: Any) -> None:
        """A mutation, done when its operation is.

        Raises NoCapacity, QuotaExceeded or ApiError as the operation ended.
        """
        operation = self.begin(method, zone, **request)
        done, until, pause = self._v1.Operation.Status.DONE, time.monotonic() + OPERATION_SECONDS, 0.05
        while operation.status != done:
            if time.monotonic() > until:
                raise ApiError(f"{method} has not ended for {OPERATION_SECONDS:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 2.0)
            with suppress(ApiError):  # it goes on, whether we hear of it or not
                operation = self.call("ZoneOperations", "get", zone=zone, operation=operation.name)
        errors = list(operation.error.errors)
        if errors:
            raise _failed(errors[0].code, errors[0].message, zone, operation.http_error_status_code)

    def listed(self, text: str) -> list[tuple[str, Any]]:
        """(zone, instance) of all instances that this filter lets through; it may be some seconds old."""
        found = []
        for page in self._every(self.call("Instances", "aggregated_list", filter=text).pages):
            if page.unreachables:  # what is there is left out, and nothing else says so
                raise ApiError(f"{', '.join(page.unreachables)} cannot be listed now")
            for place, here in page.items.items():
                if here.warning.code not in ("", "NO_RESULTS_ON_PAGE"):
                    raise ApiError(f"{place} cannot be listed now: {here.warning.message}")
                found += [(place.rpartition("/")[2], vm) for vm in here.instances]
        return found

    def named(self, zones: list[str], name: str) -> list[tuple[str, Any]]:
        """(zone, instance) of the instances of this name, as they are now."""
        found = []
        for zone in zones:
            try:
                found.append((zone, self.call("Instances", "get", zone=zone, instance=name)))
            except ApiError as error:
                if error.code != 404:
                    raise
        return found

    def operations(self, zone: str, kind: str) -> list[Any]:
        """What happened in a zone, Google's own doing among it; it is forgotten after about two weeks."""
        return self._every(self.call("ZoneOperations", "list", zone=zone, filter=f'operationType="{kind}"'))

    def _every(self, pages: Any) -> list[Any]:
        """All items of a list; the second page is fetched here. Raises ApiError."""
        try:
            return list(pages)
        except Exception as error:
            raise _translated(error, self.project) from None

    def __getattr__(self, name: str) -> Any:
        """The SDK's own classes, by name."""
        if name.startswith("_"):
            raise AttributeError(name)
        self.ready()
        return getattr(self._v1, name)

    def _load(self) -> None:
        try:
            import logging

            from google.cloud import compute_v1

            logging.getLogger("google.auth").setLevel(logging.ERROR)  # what matters is raised as well
            self._v1 = compute_v1
            options = {"credentials": account.credentials(self._environ, self._endpoint)}
            if self._endpoint:
                parts = urlsplit(self._endpoint)
                options["client_options"] = {"api_endpoint": f"{parts.scheme}://{parts.netloc}"}
            for name in ("Instances", "ZoneOperations", "Images"):
                self._clients[name] = getattr(compute_v1, name + "Client")(**options)
        except Exception as error:
            self._error = error


def _translated(error: Exception, project: str) -> CloudrunError:
    """What the SDK raised: requests' errors come through it as they are (gcp.md: never retried by it)."""
    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.exceptions import GoogleAuthError, TransportError
    from requests.exceptions import RequestException

    if isinstance(error, GoogleAPICallError):
        reasons = {str(item.get("reason")) for item in error.errors if isinstance(item, dict)}
        code, text = int(error.code or 0), str(error.message)
        if error.reason == "SERVICE_DISABLED" or "accessNotConfigured" in reasons:
            enable = f"gcloud services enable compute.googleapis.com --project={project}"
            return ApiError(f"the Compute Engine API is not enabled in {project}: {enable}", code)
        if code == 403 and reasons & {"rateLimitExceeded", "userRateLimitExceeded"}:
            return ApiError(text, 429)
        if "quotaExceeded" in reasons:
            return _quota(text)
        return ApiError(text, code)
    if isinstance(error, RequestException | TransportError):
        return ApiError(f"Compute Engine cannot be reached: {error}")
    if isinstance(error, GoogleAuthError):
        return UsageError(f"Google credentials: {error}\nlog in: gcloud auth application-default login")
    if isinstance(error, CloudrunError):
        return error
    return ApiError(f"{type(error).__name__}: {error}", -1)


def _failed(code: str, text: str, zone: str, status: int) -> CloudrunError:
    if code in SOLD_OUT or "STOCKOUT" in text or "failed to start due to preemption" in text:
        return NoCapacity(f"{zone} has no such machine now")
    if code == "QUOTA_EXCEEDED":
        return _quota(text)
    return ApiError(f"{code}: {text}", status)


def _quota(text: str) -> QuotaExceeded:
    """gcp.md 3.2: GPUS_ALL_REGIONS holds everywhere, the others in one region."""
    page = "https://console.cloud.google.com/iam-admin/quotas"
    _, in_region, rest = text.partition("in region ")
    if "GPUS_ALL_REGIONS" in text or not in_region:
        ask = "GPUS_ALL_REGIONS (all regions)" if "GPUS_ALL_REGIONS" in text else "this quota"
        return QuotaExceeded(f"{text}\nno zone can help: ask Google for more of {ask}, {page}", "")
    region = rest.split()[0].strip(".'\"")
    return QuotaExceeded(
        f"{text} ask Google for more, or add zones of other regions to VM_ZONE: {page}", region
    )
