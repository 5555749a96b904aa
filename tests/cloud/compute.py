"""An emulated Google Cloud: `with Cloud(folder) as cloud:` serves Compute Engine, metadata and tokens.

Requests and answers are held against Google's discovery document; what does not fit is kept in
`cloud.violations`, and no test may end with one. `cloud.meter` judges what was paid for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import discovery, errors
from .api_catalog import CatalogMethods
from .api_instances import InstanceMethods
from .clock import Clock
from .errors import ApiError
from .faults import Faults
from .iam import Permissions
from .instances import Instance
from .machines import Machine
from .project import Project, Timing, erase
from .server import Call, Cut, Reply, Server, json_reply
from .tokens import Tokens, TokenServer, bearer

PREFIX = "/compute/v1/"
SELF = "https://www.googleapis.com/compute/v1/projects/"  # how resources name themselves
REFRESH = "1//refresh-token-of-the-user"  # what the user once got by logging in

# Permissions are named after the methods, but for these.
PERMISSIONS = {"insert": "create", "aggregatedList": "list", "wait": "get", "getFromFamily": "get"}


@dataclass
class Request:
    """One request, kept for ever. `method` as in the discovery document; `status` 0: it got no answer."""

    time: float
    verb: str
    address: str
    method: str
    path: dict[str, str]
    query: dict[str, str]
    body: Any
    token: str
    problems: list[str]  # where it differs from the discovery document
    headers: dict[str, str]
    user: str = ""
    status: int = 0

    @property
    def permission(self) -> str:
        resource, _, verb = self.method.partition(".")
        return f"compute.{resource}.{PERMISSIONS.get(verb, verb)}"


class Cloud:
    """One project on its own servers of 127.0.0.1. `folder` holds disks and consoles."""

    def __init__(
        self,
        folder: Path,
        *,
        project: str = "test-project",
        timing: Timing | None = None,
        machines: bool = True,
        port: int = 0,
    ) -> None:
        self.clock = Clock()
        self.faults = Faults()
        self.tokens = Tokens(self.clock)
        self.all_machines: list[Machine] = []
        self.project = Project(
            project,
            SELF + project,
            folder,
            self.clock,
            timing or Timing(),
            self.tokens,
            self.faults,
            machines,
        )
        self.project.started = self.all_machines.append
        self.meter, self.quotas = self.project.meter, self.project.quotas
        self.operations = self.project.operations
        self.requests: list[Request] = []
        self.violations: list[str] = []
        self.logins = TokenServer(self.tokens, {REFRESH: self.project.user})
        self._methods = (InstanceMethods(self.project), CatalogMethods(self.project))
        self._compute = Server(self._answer, port)
        self._oauth = Server(self.logins.answer)
        self.iam = Permissions(self.project, self.faults)
        self._iam = Server(self.iam.answer)

    def __enter__(self) -> Cloud:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every machine and server; nothing is left but the consoles."""
        self.faults.closed.set()
        self.clock.close()
        for server in (self._compute, self._oauth, self._iam):
            server.close()
        for machine in self.all_machines:
            machine.close()
        for instance in list(self.project.instances.values()):
            instance.server.close()
        for disk in (self.project.folder / "disks").glob("*"):
            erase(disk)
        if self.clock.errors:
            raise self.clock.errors[0]

    # --- where it is

    @property
    def endpoint(self) -> str:
        """For `client_options={"api_endpoint": ...}`."""
        return f"http://127.0.0.1:{self._compute.port}"

    @property
    def compute_url(self) -> str:
        return self.endpoint + PREFIX

    @property
    def token_url(self) -> str:
        return f"http://127.0.0.1:{self._oauth.port}"

    def environ(self) -> dict[str, str]:
        """What a client has to export. No credentials: then it is anonymous."""
        return {
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": self.compute_url,
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_CLOUDRESOURCEMANAGER": f"http://127.0.0.1:{self._iam.port}/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_IAM": f"http://127.0.0.1:{self._iam.port}/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_IAMCREDENTIALS": f"{self.token_url}/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_STS": f"{self.token_url}/",
            "CLOUDSDK_AUTH_TOKEN_HOST": f"{self.token_url}/token",
            "GCLOUD_PROJECT": self.project.name,
            "NO_GCE_CHECK": "true",
        }

    # --- what tests do to it

    def instance(self, name: str) -> Instance:
        with self.clock.changed:
            return next(each for each in self.project.instances.values() if each.name == name)

    def machine(self, name: str) -> Machine:
        """The machine of this instance, once it boots."""
        assert self.clock.wait_for(lambda: self.instance(name).machine, 20), f"{name} does not boot"
        machine = self.instance(name).machine
        assert machine
        return machine

    def status(self, name: str) -> str:
        """The true state: `GONE` if there is no such instance."""
        with self.clock.changed:
            found = [each.status for each in self.project.instances.values() if each.name == name]
        return found[0] if found else "GONE"

    def wait(self, name: str, *states: str, seconds: float = 20.0) -> str:
        """Until it is in one of these states. Fails if that takes longer."""
        seen = self.clock.wait_for(lambda: self.status(name) in states, seconds)
        assert seen, f"{name} is {self.status(name)} and not {' or '.join(states)}"
        return self.status(name)

    def console(self, name: str) -> str:
        """What its last start wrote, even when it has ended."""
        path = self.instance(name).console
        return path.read_text(errors="replace") if path.exists() else ""

    def preempt(self, name: str) -> None:
        with self.clock.changed:
            self.instance(name).preempt()

    def host_error(self, name: str) -> None:
        with self.clock.changed:
            self.instance(name).host_error()

    def inserts(self) -> list[Request]:
        return [each for each in self.requests if each.method == "instances.insert"]

    # --- the API

    def _answer(self, call: Call) -> Reply:
        segments = call.segments[2:]
        found = discovery.route(call.verb, segments) if call.path.startswith(PREFIX) else None
        if found is None:
            self.violations.append(f"{call.verb} {call.path}: no method of the API")
            return Reply(404, b"Not Found", "text/html; charset=UTF-8")
        request = self._request(call, *found)
        method = found[0]
        try:
            reply = self.faults.answer(request, lambda: self._perform(method, request))
            request.status = reply.status
            return reply
        except ApiError as error:
            request.status = error.code
            return error.reply()
        except Exception as error:
            if not isinstance(error, Cut):
                self.violations.append(f"{request.method}: the emulator itself failed: {error!r}")
            raise

    def _request(self, call: Call, method: discovery.Method, path: dict[str, str]) -> Request:
        try:
            body = json.loads(call.body) if call.body else None
        except ValueError:
            self.violations.append(f"{method.name}: the body is no JSON")
            body = None
        problems = discovery.request_problems(method, path, call.query, body)
        token, headers = bearer(call), dict(call.headers.items())
        address = f"{call.path}?{sorted((k, v) for k, v in call.query.items() if k != 'requestId')}"
        request = Request(
            self.clock.now(),
            call.verb,
            address,
            method.name,
            path,
            call.query,
            body,
            token,
            problems,
            headers,
        )
        with self.clock.changed:
            self.violations += problems
            self.requests.append(request)
        return request

    def _perform(self, method: discovery.Method, request: Request) -> Reply:
        try:
            if request.problems:
                raise errors.bad_request(f"Invalid JSON payload received. {'; '.join(request.problems)}")
            with self.clock.changed:
                self._admit(request)
                shown = self._handler(method.name)(request)
        except ApiError as error:
            return error.reply()
        if shown is None:
            return Reply(204)
        with self.clock.changed:
            self.violations += discovery.response_problems(method, shown)
        return json_reply(shown)

    def _handler(self, name: str) -> Callable[[Request], Any]:
        for methods in self._methods:
            if handler := getattr(methods, name.replace(".", "_"), None):
                found: Callable[[Request], Any] = handler
                return found
        self.violations.append(f"{name}: not emulated")
        raise ApiError(501, "notImplemented", f"{name} is not emulated")

    def _admit(self, request: Request) -> None:
        """Who asks, and whether that is allowed."""
        grant = self.tokens.valid(request.token)
        if grant is None and (request.token or not self.faults.anonymous):
            raise errors.unauthorized()
        if grant and grant.instance in self.faults.offline:
            raise Cut
        request.user = grant.principal if grant else self.project.user
        asked = request.permission
        if "compute.googleapis.com" in self.faults.disabled:
            raise errors.api_disabled(self.project.name)
        if {(request.user, asked), ("*", asked)} & self.faults.denied:
            raise errors.forbidden(asked, request.address.partition("?")[0].removeprefix(PREFIX))
        if (
            request.path["project"] not in (self.project.name, self.project.number)
            and "image" not in request.method
        ):
            raise errors.not_found(f"projects/{request.path['project']}")


def real(folder: Path, **options: Any) -> Cloud:
    """With the times of the real service, `boot` and the like replaced as wanted."""
    return Cloud(folder, timing=replace(Timing.real(), **options))
