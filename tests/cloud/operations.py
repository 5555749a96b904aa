"""Operations: what every change answers with, and what the provider does by itself."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import Any

from .clock import Clock, rfc3339
from .errors import Failure


def number(*parts: Any) -> str:
    """An id: a uint64 as the service writes it."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return str(10**18 + int.from_bytes(digest[:7], "big"))


@dataclass
class Operation:
    """RUNNING until `finish`; then DONE, with an error or without."""

    name: str
    kind: str
    root: str  # URL of the project
    zone: str
    target: str
    target_id: str
    user: str
    started: float
    request_id: str = ""
    message: str = ""
    ended: float | None = None
    failure: Failure | None = None

    @property
    def done(self) -> bool:
        return self.ended is not None

    def view(self) -> dict[str, Any]:
        place = f"{self.root}/zones/{self.zone}"
        shown: dict[str, Any] = {
            "kind": "compute#operation",
            "id": number(self.name),
            "name": self.name,
            "zone": place,
            "operationType": self.kind,
            "targetLink": self.target,
            "targetId": self.target_id,
            "status": "DONE" if self.done else "RUNNING",
            "user": self.user,
            "progress": 100 if self.done else 0,
            "insertTime": rfc3339(self.started),
            "startTime": rfc3339(self.started),
            "selfLink": f"{place}/operations/{self.name}",
        }
        if self.ended is not None:
            shown["endTime"] = rfc3339(self.ended)
        if self.request_id:
            shown["clientOperationId"] = self.request_id
        if self.message:
            shown["statusMessage"] = self.message
        if self.failure:
            status, phrase, entry = self.failure
            shown |= {"httpErrorStatusCode": status, "httpErrorMessage": phrase, "error": {"errors": [entry]}}
        return shown


class Operations:
    """All operations of a project, oldest first, and which request made which."""

    def __init__(self, clock: Clock, root: str) -> None:
        self._clock, self._root = clock, root
        self._all: dict[tuple[str, str], Operation] = {}
        self._by_request: dict[tuple[str, str], Operation] = {}
        self._numbers = itertools.count(1)

    def start(self, kind: str, zone: str, target: str, target_id: str, user: str) -> Operation:
        now = self._clock.now()
        n = next(self._numbers)
        name = f"operation-{int(now * 1000)}-{n:013x}-{number(n)[:8]}-{number(now, n)[:8]}"
        operation = Operation(name, kind, self._root, zone, target, target_id, user, now)
        self._all[zone, name] = operation
        return operation

    def finish(self, operation: Operation, failure: Failure | None = None) -> None:
        if not operation.done:
            operation.ended, operation.failure = self._clock.now(), failure

    def get(self, zone: str, name: str) -> Operation | None:
        return self._all.get((zone, name))

    def forget(self, zone: str, name: str) -> None:
        self._all.pop((zone, name), None)

    def of_zone(self, zone: str) -> list[Operation]:
        return [each for (where, _), each in self._all.items() if where == zone]

    def kinds(self, target: str = "") -> list[str]:
        """What was done, in order; `target`: the name of one instance."""
        return [each.kind for each in self._all.values() if each.target.endswith(target)]

    def replay(self, what: str, request_id: str) -> Operation | None:
        """The operation that this request already led to: the same id means the same request."""
        return self._by_request.get((what, request_id))

    def remember(self, what: str, request_id: str, operation: Operation) -> None:
        operation.request_id = request_id
        self._by_request[what, request_id] = operation
