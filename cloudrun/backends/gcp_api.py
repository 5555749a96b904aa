"""The Compute Engine API: questions over the wire, changes through google-cloud-compute, for backends.gcp.

The SDK is imported on a thread when a run starts, because that takes longer than most scans; all others
wait for it only when they have something to change. Every call has a timeout of its own and none of the
library's retries: it never retries a mutation.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from cloudrun.backends.gcp_wire import ENDPOINT, ApiError, Soon, View, Wire, failed, patiently

TIMEOUT = 30.0  # seconds for one request
OPERATION_SECONDS = 300.0
NOTHING = "NO_RESULTS_ON_PAGE"


class Compute:
    """Methods of one project. Safe to make before anything is known to work: it asks for nothing."""

    def __init__(self, project: str, environ: Mapping[str, str]) -> None:
        self.project = project
        self._environ, self._wire, self._sdk = environ, Wire(project, environ), Soon(self._load)

    def warm_up(self) -> None:
        """Begin to import what changes need."""
        self._sdk.start()

    def ready(self) -> None:
        """Wait for what was begun: a run's time counts from its order on. Raises UsageError without it."""
        patiently(self._wire.session.get, self.project)
        if self._sdk.begun:
            patiently(self._sdk.get, self.project)

    def read(self, path: str, **query: Any) -> View:
        """The resource at this path. Raises ApiError; QuotaExceeded; UsageError as `ready`."""
        return View(self._wire.ask(path, **query))

    def vm(self, zone: str, name: str) -> View:
        return self.read(f"zones/{zone}/instances/{name}")

    def begin(self, method: str, zone: str, kind: str = "Instances", **request: Any) -> str:
        """The name of a mutation's operation. Its request id makes it happen once, however often it is tried.

        Raises as `read` does.
        """
        request = {"project": self.project, "zone": zone, "request_id": str(uuid.uuid4()), **request}

        def once() -> str:
            act = getattr(self._sdk.get()[kind], method)
            return str(act(request=request, timeout=TIMEOUT, retry=None).name)

        return patiently(once, self.project)

    def change(self, method: str, zone: str, **request: Any) -> None:
        """A mutation, done when its operation is.

        Raises NoCapacity, QuotaExceeded or ApiError as the operation ended.
        """
        name = self.begin(method, zone, **request)
        operation, until, pause = View({}), time.monotonic() + OPERATION_SECONDS, 0.05
        while operation.status != "DONE":
            if time.monotonic() > until:
                raise ApiError(f"{method} has not ended for {OPERATION_SECONDS:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 2.0)
            with suppress(ApiError):  # it goes on, whether we hear of it or not
                operation = self.read(f"zones/{zone}/operations/{name}")
        for error in operation.error.errors:
            raise failed(error.code, error.message, zone, operation.http_error_status_code)

    def listed(self, text: str = "", kind: str = "instances") -> list[tuple[str, View]]:
        """(zone, resource) of all that this filter lets through; it may be some seconds old."""
        found = []
        for page in self._wire.pages(f"aggregated/{kind}", text):
            if missing := page.get("unreachables"):  # what is there is left out, and nothing else says so
                raise ApiError(f"{', '.join(missing)} cannot be listed now")
            for place, here in page.get("items", {}).items():
                warning = here.get("warning", {})
                if warning.get("code", NOTHING) != NOTHING:
                    raise ApiError(f"{place} cannot be listed now: {warning.get('message')}")
                found += [(place.rpartition("/")[2], View(each)) for each in here.get(kind, ())]
        return found

    def named(self, zones: list[str], name: str) -> list[tuple[str, View]]:
        """(zone, instance) of the instances of this name, as they are now."""
        found = []
        for zone in zones:
            try:
                found.append((zone, self.vm(zone, name)))
            except ApiError as error:
                if error.code != 404:
                    raise
        return found

    def operations(self, zone: str, *kinds: str) -> list[View]:
        """What happened in a zone, Google's own doing among it; it is forgotten after about two weeks."""
        text = " OR ".join(f'(operationType="{kind}")' for kind in kinds)
        pages = self._wire.pages(f"zones/{zone}/operations", text)
        return [View(each) for page in pages for each in page.get("items", ())]

    def __getattr__(self, name: str) -> Any:
        """The SDK's own classes, by name. Raises UsageError as `ready`."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(patiently(self._sdk.get, self.project)["v1"], name)

    def _load(self) -> dict[str, Any]:
        """The SDK, and its clients by name."""
        from google.cloud import compute_v1

        options = {"credentials": self._wire.session.get().credentials}
        if endpoint := self._environ.get(ENDPOINT):
            parts = urlsplit(endpoint)
            options["client_options"] = {"api_endpoint": f"{parts.scheme}://{parts.netloc}"}
        clients = {name: getattr(compute_v1, name + "Client")(**options) for name in ("Instances", "Disks")}
        return {"v1": compute_v1, **clients}
