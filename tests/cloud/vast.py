"""An emulated vast.ai: `with Vast(folder) as vast:` serves its API, and its containers are real processes.

What a request has that the service does not know is kept in `vast.violations`, and no test may end with
one. `vast.meter` judges what was paid for. Sources are named as in the other emulator: a page of
docs.vast.ai, "measured" with vastai 1.9.1, "field report" of a public project, or "assumed".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import vast_checks, vast_errors, vast_offers
from .clock import Clock
from .errors import ApiError
from .machines import Machine
from .project import erase
from .server import Call, Cut, Reply, Server, json_reply
from .tokens import bearer
from .vast_account import Market, VastTiming
from .vast_api import InstanceMethods
from .vast_api_account import AccountMethods
from .vast_contract import Contract

ROUTES = {
    "POST /api/v0/bundles": "bundles.search",
    "PUT /api/v0/asks/#": "asks.create",
    "GET /api/v0/instances": "instances.list_old",
    "DELETE /api/v0/instances": "instances.delete_many",
    "GET /api/v0/instances/#": "instances.get",
    "PUT /api/v0/instances/#": "instances.put",
    "DELETE /api/v0/instances/#": "instances.delete",
    "PUT /api/v0/instances/reboot/#": "instances.reboot",
    "PUT /api/v0/instances/recycle/#": "instances.recycle",
    "PUT /api/v0/instances/bid_price/#": "instances.bid_price",
    "GET /api/v1/instances": "instances.list",
    "GET /api/v0/users/current": "users.current",
    "GET /api/v0/gpu_names/unique": "gpu_names.unique",
}
OPEN = {"gpu_names.unique"}  # without a key
OWN = {"instances.get", "instances.put", "instances.delete"}  # what a container's key is good for
# Least seconds between two calls of one key (docs.vast.ai, "Rate Limits"; the 429 names them).
THROTTLES = {"asks.create": 4.5, "instances.get": 2.0, "instances.list": 1.0, "instances.delete": 3.0}


@dataclass
class Request:
    """One request, kept for ever. `key` in words: account, an instance's id, or what was sent."""

    time: float
    verb: str
    path: str
    method: str
    number: int  # the id in the path, or 0
    query: dict[str, str]
    body: Any
    key: str
    status: int = 0  # it got no answer

    @property
    def address(self) -> str:
        return f"{self.verb} {self.path}?{sorted(self.query.items())}"


class Vast:
    """One account on a server of 127.0.0.1. `folder` holds the disks and logs of its containers."""

    def __init__(
        self,
        folder: Path,
        *,
        timing: VastTiming | None = None,
        machines: bool = True,
        key: str = "vast-key-of-the-account",
        port: int = 0,
    ) -> None:
        self.clock = Clock()
        self.key = key
        self.all_machines: list[Machine] = []
        self.market = Market(folder, self.clock, timing or VastTiming(), key, machines)
        self.market.started = self.all_machines.append
        self.faults, self.meter, self.instances = self.market.faults, self.market.meter, self.market.contracts
        self.requests: list[Request] = []
        self.violations: list[str] = []
        self._methods = (InstanceMethods(self.market), AccountMethods(self.market))
        self._last: dict[tuple[str, str], float] = {}
        self._server = Server(self._answer, port)

    def __enter__(self) -> Vast:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every container and the server; nothing is left but the logs."""
        self.faults.closed.set()
        self.clock.close()
        self._server.close()
        for machine in self.all_machines:
            machine.close()
        erase(self.market.folder / "containers")
        if self.clock.errors:
            raise self.clock.errors[0]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.port}"

    def environ(self) -> dict[str, str]:
        """What a client has to export."""
        return {"VAST_URL": self.url, "VAST_API_KEY": self.key, "NO_PROXY": "127.0.0.1"}

    # --- what tests do to it

    @property
    def offers(self) -> list[dict[str, Any]]:
        return self.market.offers

    @offers.setter
    def offers(self, offers: list[dict[str, Any]]) -> None:
        self.market.offers = offers

    @property
    def credit(self) -> float:
        return self.market.credit

    @credit.setter
    def credit(self, dollars: float) -> None:
        self.market.credit = dollars

    def wait(self, number: int, actual: str | None, seconds: float = 10.0) -> Contract:
        """The contract when it has this actual_status, or is "destroyed"."""
        contract = self.instances[number]

        def there() -> bool:
            return ("destroyed" if contract.gone else contract.actual) == actual

        assert self.clock.wait_for(there, seconds), f"{number} is {contract.actual}, not {actual}"
        return contract

    def outbid(self, number: int) -> None:
        """Somebody bids more, or rents on demand: the processes are killed, and it waits for its turn."""
        with self.clock.changed:
            self.instances[number].lose_bid()

    def resume(self, number: int) -> None:
        """Its turn, after `outbid` or a start that was queued."""
        with self.clock.changed:
            self.instances[number].resume()

    def offline(self, number: int) -> None:
        """The host is lost."""
        with self.clock.changed:
            self.instances[number].lose_host()

    def back(self, number: int) -> None:
        """The host is there again."""
        with self.clock.changed:
            self.instances[number].regain_host()

    def freeze(self, number: int) -> None:
        """The container is paused, and billed."""
        with self.clock.changed:
            self.instances[number].freeze()

    def restart(self, number: int) -> None:
        """The host restarts the container on its disk: onstart runs again."""
        with self.clock.changed:
            self.instances[number].reboot()

    # --- the API

    def _answer(self, call: Call) -> Reply:
        found = route(call)
        if found is None:
            self.violations.append(f"{call.verb} {call.path}: no method of the API")
            return Reply(404, b"Not Found", "text/html; charset=utf-8")
        request = self._request(call, *found)
        try:
            reply = self.faults.answer(request, lambda: self._perform(call, request))
            request.status = reply.status
            return reply
        except Exception as error:
            if not isinstance(error, Cut):
                self.violations.append(f"{request.method}: the emulator itself failed: {error!r}")
            raise

    def _request(self, call: Call, method: str, number: int) -> Request:
        try:
            body = json.loads(call.body) if call.body else None
        except ValueError:
            self.violations.append(f"{method}: the body is no JSON")
            body = None
        # vastai 1.9.1 leaves the slash out there, too (measured).
        if call.path.startswith("/api/v0/") and not call.path.endswith("/") and method != "users.current":
            self.violations.append(f"{method}: no slash at the end of {call.path}")
        request = Request(
            self.clock.now(),
            call.verb,
            call.path,
            method,
            number,
            call.query,
            body,
            self._whose(bearer(call)),
        )
        with self.clock.changed:
            self.requests.append(request)
        return request

    def _whose(self, key: str) -> str:
        if key == self.key:
            return "account"
        own = (str(each.id) for each in self.instances.values() if each.key == key and not each.gone)
        return next(own, f"unknown {key!r}")

    def _perform(self, call: Call, request: Request) -> Reply:
        try:
            with self.clock.changed:
                self._admit(request)
                self._check(request)
                answer = self._handler(request.method)(request)
        except ApiError as error:
            return error.reply()
        return answer if isinstance(answer, Reply) else json_reply(answer)

    def _admit(self, request: Request) -> None:
        """Who asks, whether that is allowed, and not too often."""
        if request.method in OPEN:
            return
        if request.key.startswith("unknown"):
            raise vast_errors.bad_key(self.faults.bad_key)
        if request.key != "account" and not (request.method in OWN and request.key == str(request.number)):
            raise vast_errors.forbidden(request.method)
        threshold = THROTTLES.get(request.method, 0.0)
        last = self._last.get((request.method, request.key), 0.0)
        if request.time - last < threshold * self.market.timing.throttle_scale:
            raise vast_errors.too_many_requests(threshold)
        self._last[request.method, request.key] = request.time

    def _check(self, request: Request) -> None:
        problems = vast_checks.problems(request.method, request.body)
        if request.method == "bundles.search":
            problems = vast_offers.problems(request.body or {})
        self.violations += problems
        if problems:
            raise vast_errors.Refusal(400, "invalid_args", "; ".join(problems))

    def _handler(self, method: str) -> Any:
        name = method.replace(".", "_")
        return next(getattr(each, name) for each in self._methods if hasattr(each, name))


def route(call: Call) -> tuple[str, int] | None:
    """The method of a request, and the number in its path."""
    numbers = [part for part in call.segments if part.isdigit()]
    shape = "/".join("#" if part.isdigit() else part for part in call.segments)
    method = ROUTES.get(f"{call.verb} /{shape}")
    return (method, int(numbers[0]) if numbers else 0) if method else None
