"""Who may do what: the methods of Resource Manager and IAM that say so, for one project.

Facts: the discovery documents cloudresourcemanager.v1 and iam.v1 of google-api-python-client.
"""

from __future__ import annotations

import json
from typing import Any

from . import errors
from .errors import ApiError
from .faults import Faults
from .project import Project
from .server import Call, Reply, json_reply
from .tokens import bearer

RESOURCES, IAM = "cloudresourcemanager.googleapis.com", "iam.googleapis.com"
EXTERNAL_ADDRESSES = "constraints/compute.vmExternalIpAccess"


class Permissions:
    """`bindings` is the project's policy, `constraints` what its organisation demands, by constraint."""

    def __init__(self, project: Project, faults: Faults) -> None:
        self.project, self.faults = project, faults
        self.bindings: list[dict[str, Any]] = []
        self.constraints: dict[str, dict[str, Any]] = {}
        self.accounts = {project.service_account}  # service accounts that exist
        self.calls: list[Call] = []

    def answer(self, call: Call) -> Reply:
        self.calls.append(call)
        try:
            return json_reply(self._perform(call))
        except ApiError as error:
            return error.reply()

    def _perform(self, call: Call) -> dict[str, Any]:
        grant = self.project.tokens.valid(bearer(call))
        if grant is None and (bearer(call) or not self.faults.anonymous):
            raise errors.unauthorized()
        principal = grant.principal if grant else self.project.user
        resource, _, method = call.path.removeprefix("/v1/").partition(":")
        service = IAM if "/serviceAccounts/" in resource else RESOURCES
        if service in self.faults.disabled:
            raise errors.api_disabled(self.project.name, service)
        self._check_exists(resource)
        sent = json.loads(call.body or b"{}")
        if (call.verb, method) == ("POST", "testIamPermissions"):
            return self._test(principal, sent)
        if (call.verb, method, service) == ("POST", "getIamPolicy", RESOURCES):
            self._demand(principal, "resourcemanager.projects.getIamPolicy")
            return {"version": 1, "etag": "BwXhqDLNuw8=", "bindings": self.bindings}
        if (call.verb, method, service) == ("POST", "getEffectiveOrgPolicy", RESOURCES):
            self._demand(principal, "orgpolicy.policy.get")
            wanted = sent["constraint"]
            return {"constraint": wanted, "listPolicy": self.constraints.get(wanted, {"allValues": "ALLOW"})}
        raise ApiError(404, "notFound", "Method not found.")

    def _check_exists(self, resource: str) -> None:
        place, _, account = resource.partition("/serviceAccounts/")
        if account:
            if account not in self.accounts:
                raise ApiError(404, "notFound", f"Unknown service account: {account}")
        elif place != f"projects/{self.project.name}":
            # Whether it exists is for those who may see it.
            raise ApiError(403, "forbidden", "The caller does not have permission")

    def _test(self, principal: str, sent: dict[str, Any]) -> dict[str, Any]:
        """None of them: an empty object, without a list."""
        if set(sent) != {"permissions"} or any("*" in each for each in sent["permissions"]):
            raise errors.bad_request("Invalid JSON payload received.")
        held = [each for each in sent["permissions"] if not self._denied(principal, each)]
        return {"permissions": held} if held else {}

    def _denied(self, principal: str, permission: str) -> bool:
        return bool({(principal, permission), ("*", permission)} & self.faults.denied)

    def _demand(self, principal: str, permission: str) -> None:
        if self._denied(principal, permission):
            raise ApiError(403, "forbidden", "The caller does not have permission")
