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
from .vast_jobs import JobMethods
from .vast_results import PREFIX as RESULTS
from .vast_results import ResultMethods
from .vast_throttle import Throttle

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
    "PUT /api/v0/instances/request_logs/#": "instances.request_logs",
    "PUT /api/v0/instances/command/#": "instances.command",
    "POST /api/v0/instances/#/ssh": "instances.attach_ssh",
    "GET /api/v0/instances/#/ssh": "instances.list_ssh",
    "DELETE /api/v0/instances/#/ssh/#": "instances.detach_ssh",
    "GET /api/v1/instances": "instances.list",
    "GET /api/v0/ssh": "ssh.list",
    "POST /api/v0/ssh": "ssh.create",
    "DELETE /api/v0/ssh/#": "ssh.delete",
    "GET /api/v0/commands/schedule_job": "schedule.list",
    "POST /api/v0/commands/schedule_job": "schedule.create",
    "PUT /api/v0/commands/schedule_job/#": "schedule.update",
    "DELETE /api/v0/commands/schedule_job/#": "schedule.delete",
    "GET /api/v0/charges": "charges.list",
    "GET /api/v0/users/current": "users.current",
    "GET /api/v0/gpu_names/unique": "gpu_names.unique",
}
OPEN = {"gpu_names.unique"}  # without a key
OWN = {"instances.get", "instances.put", "instances.delete"}  # what a container's key is good for


@dataclass
class Request:
    """One request, kept for ever. `key` in words: account, job, an instance's id, or what was sent."""

    time: float
    verb: str
    path: str
    method: str
    numbers: tuple[int, ...]  # the ids in the path
    query: dict[str, str]
    body: Any
    key: str
    status: int = 0  # it got no answer

    @property
    def number(self) -> int:
        return self.numbers[0] if self.numbers else 0

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
        self._jobs, self._results = JobMethods(self.market), ResultMethods(self.market)
        self._methods = (
            InstanceMethods(self.market),
            AccountMethods(self.market),
            self._jobs,
            self._results,
        )
        self._throttle = Throttle(self.market.timing.throttle_scale)
        self._server = Server(self._answer, port)
        self.market.url, self.market.call = self.url, self._call_of_job

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

    def destroy(self, number: int) -> None:
        """As a container does itself, or a person on the web page."""
        with self.clock.changed:
            self.instances[number].destroy()

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

    def thaw(self, number: int) -> None:
        with self.clock.changed:
            self.instances[number].thaw()

    def crash(self, number: int) -> None:
        """Its process 1 ends."""
        with self.clock.changed:
            self.instances[number].crash()

    def restart(self, number: int) -> None:
        """The host restarts the container on its disk: onstart runs again."""
        with self.clock.changed:
            self.instances[number].reboot()

    @property
    def jobs(self) -> dict[int, dict[str, Any]]:
        return self._jobs.jobs

    @property
    def fired(self) -> list[tuple[int, float, int]]:
        """What jobs did: number, time, and the status they got."""
        return self._jobs.fired

    def fire_jobs(self) -> None:
        """All scheduled jobs, now and not at their hour."""
        with self.clock.changed:
            for number in list(self.jobs):
                self._jobs.fire(number)

    # --- the API

    def _call_of_job(self, verb: str, path: str, body: Any) -> Reply:
        call = Call(verb, path, {}, {}, json.dumps(body).encode())
        try:
            return self._answer(call, "job")
        except Cut:
            return Reply(0)

    def _answer(self, call: Call, whose: str = "") -> Reply:
        if call.path.startswith(RESULTS):
            return self._results.answer(call)
        found = route(call)
        if found is None:
            self.violations.append(f"{call.verb} {call.path}: no method of the API")
            return Reply(404, b"Not Found", "text/html; charset=utf-8")
        request = self._request(call, *found, whose or self._whose(call))
        try:
            reply = self.faults.answer(request, lambda: self._perform(request))
            request.status = reply.status
            return reply
        except Exception as error:
            if not isinstance(error, Cut):
                self.violations.append(f"{request.method}: the emulator itself failed: {error!r}")
            raise

    def _request(self, call: Call, method: str, numbers: tuple[int, ...], whose: str) -> Request:
        try:
            body = json.loads(call.body) if call.body else None
        except ValueError:
            self.violations.append(f"{method}: the body is no JSON")
            body = None
        # vastai 1.9.1 leaves the slash out there, too (measured).
        if call.path.startswith("/api/v0/") and not call.path.endswith("/") and method != "users.current":
            self.violations.append(f"{method}: no slash at the end of {call.path}")
        now = self.clock.now()
        request = Request(now, call.verb, call.path, method, numbers, call.query, body, whose)
        with self.clock.changed:
            self.requests.append(request)
        return request

    def _whose(self, call: Call) -> str:
        key = bearer(call)
        if key == self.key:
            return "account"
        if "api_key" in call.query:  # it works, and it ends up in logs
            self.violations.append(f"{call.verb} {call.path}: a key in the address")
        with self.clock.changed:
            own = (str(each.id) for each in self.instances.values() if each.key == key and not each.gone)
            return next(own, f"unknown {key!r}")

    def _perform(self, request: Request) -> Reply:
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
        if request.key == "job":
            return
        if request.key != "account":
            self._admit_container(request)
        self._throttle.check(request.method, request.key, request.time)

    def _admit_container(self, request: Request) -> None:
        if self.instances[int(request.key)].offer["machine_id"] in self.faults.offline:
            raise Cut
        if request.method not in OWN or request.key != str(request.number):
            raise vast_errors.forbidden(request.method)

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


def route(call: Call) -> tuple[str, tuple[int, ...]] | None:
    """The method of a request, and the numbers in its path."""
    shape = "/".join("#" if part.isdigit() else part for part in call.segments)
    method = ROUTES.get(f"{call.verb} /{shape}")
    return (method, tuple(int(part) for part in call.segments if part.isdigit())) if method else None
