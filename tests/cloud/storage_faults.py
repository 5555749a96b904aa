"""What can go wrong between a client and Cloud Storage, and what was asked of it: faults, log, prices."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# https://cloud.google.com/storage/pricing: operations in a single region, standard storage, by the thousand
CLASS_A = {"insert", "start", "list", "rewrite", "compose", "patch"}
CLASS_B = {"get", "read", "bucket"}
PRICE_A, PRICE_B = 0.005, 0.0004

MESSAGES = {
    400: ("invalid", "Bad Request"),
    401: ("authError", "Invalid Credentials"),
    403: ("forbidden", "The caller does not have permission"),
    408: ("timeout", "Request timed out"),
    410: ("gone", "The upload session is gone"),
    429: (
        "rateLimitExceeded",
        "The object exceeded the rate limit for object mutation operations (create, update, and delete). "
        "Please reduce your request rate. See https://cloud.google.com/storage/docs/gcs429.",
    ),
    500: ("backendError", "We encountered an internal error. Please try again."),
    502: ("backendError", "Bad Gateway"),
    503: ("backendError", "Service Unavailable. Please try again."),
    504: ("backendError", "Gateway Timeout"),
}


@dataclass(frozen=True)
class Call:
    """A request: what kind of method, of which object, how many such came before, and whose library asks."""

    kind: str
    name: str
    nth: int
    user_agent: str = ""


@dataclass(frozen=True)
class Request:
    """A line of the log. A status of 0: the client got no answer."""

    kind: str
    method: str
    path: str
    name: str
    status: int
    bytes_in: int
    bytes_out: int
    token: str


@dataclass
class Fault:
    """What happens to a request. `left` requests are hit; the others pass.

    `status` (with `body` instead of the service's words); `cut`: the connection ends "before" or "after" the
    effect, without an answer; `truncate`: the body of a download ends after so many bytes; `keep`: of an
    upload that is cut before its effect only so many bytes arrive (a resumable one keeps them);
    `hold`: the answer waits for this event, or for so many seconds.
    """

    matches: Callable[[Call], bool]
    left: float
    status: int = 0
    reason: str = ""
    message: str = ""
    cut: str = ""
    truncate: int | None = None
    keep: int | None = None
    hold: threading.Event | float | None = None

    def wait(self) -> None:
        if isinstance(self.hold, threading.Event):
            self.hold.wait(60)
        elif self.hold:
            threading.Event().wait(self.hold)


class Faults:
    """Faults that are switched on from outside, each for some requests."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.refusing = False

    def add(
        self,
        kind: str | Callable[[Call], bool] = "",
        name: str = "",
        *,
        nth: int | None = None,
        times: float = 1,
        **what: object,
    ) -> Fault:
        """The next `times` requests of this kind (any), whose name ends so (any), from the nth on."""

        def matches(call: Call) -> bool:
            same = not kind or call.kind in str(kind).split("|")
            return same and call.name.endswith(name) and (nth is None or call.nth >= nth)

        fault = Fault(kind if callable(kind) else matches, times, **what)  # type: ignore[arg-type]
        with self._lock:
            self._faults.append(fault)
        return fault

    def take(self, call: Call) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.left > 0 and fault.matches(call):
                    fault.left -= 1
                    return fault
        return None

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        """Meanwhile every connection ends as soon as it is made, or as soon as it is used."""
        self.refusing = True
        try:
            yield
        finally:
            self.refusing = False


class Log:
    """Every request, and counts of them."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._nth: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def call(self, kind: str, name: str, user_agent: str = "") -> Call:
        with self._lock:
            self._nth[kind, name] += 1
            return Call(kind, name, self._nth[kind, name] - 1, user_agent)

    def add(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def clear(self) -> None:
        with self._lock:
            self.requests.clear()

    def counts(self) -> dict[str, int]:
        """Requests by kind, by class (A, B, free), all, and bytes in and out."""
        with self._lock:
            requests = list(self.requests)
        found: Counter[str] = Counter(request.kind for request in requests)
        a = sum(found[kind] for kind in CLASS_A)
        b = sum(found[kind] for kind in CLASS_B)
        sums = {"A": a, "B": b, "free": len(requests) - a - b, "all": len(requests)}
        sums["bytes_in"] = sum(request.bytes_in for request in requests)
        sums["bytes_out"] = sum(request.bytes_out for request in requests)
        return {**found, **sums}

    def cost(self) -> float:
        """USD for the requests so far."""
        counts = self.counts()
        return counts["A"] * PRICE_A / 1000 + counts["B"] * PRICE_B / 1000
