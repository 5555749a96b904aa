"""The metadata server of one instance (D:metadata/overview). Which instance asks is told by the port."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .server import Call, Cut, Reply

if TYPE_CHECKING:
    from .instances import Instance

ROOT = ["computeMetadata", "v1"]
FOREVER = 3600.0 * 24


class MetadataServer:
    def __init__(self, instance: Instance) -> None:
        self.instance = instance

    def answer(self, call: Call) -> Reply:
        if self.instance.name in self.instance.project.faults.offline or self.instance.gone:
            raise Cut
        if call.headers.get("X-Forwarded-For") or call.headers.get("Metadata-Flavor") != "Google":
            return text("Missing Metadata-Flavor:Google header.", 403)
        if not call.path.strip("/"):
            return text("computeMetadata/\n")  # how google-auth asks whether this is a VM of Google's
        if call.segments[:2] != ROOT:
            return text("Not found.", 404)
        path = [part for part in call.segments[2:] if part]
        if path[:2] == ["instance", "guest-attributes"]:
            return self.guest_attributes(call, path[2:])
        if call.verb != "GET":
            return text("Method not allowed.", 405)
        if path[:2] == ["instance", "service-accounts"] and path[3:] == ["token"]:
            return self.token(path[2], call.query.get("scopes", ""))
        return self.read(call, path)

    # --- reading, and waiting for a change

    def read(self, call: Call, path: list[str]) -> Reply:
        clock = self.instance.project.clock
        with clock.changed:
            shown = self.render(call, path)
            if call.query.get("wait_for_change", "").lower() == "true":
                # 0 means "now": whatever is there differs from it.
                known = call.query.get("last_etag") or etag(shown)
                seconds = float(call.query.get("timeout_sec") or FOREVER)
                clock.wait_for(lambda: self.instance.gone or etag(self.render(call, path)) != known, seconds)
                shown = self.render(call, path)
        return shown

    def render(self, call: Call, path: list[str]) -> Reply:
        value: Any = self.tree()
        for part in path:
            if not isinstance(value, dict) or part not in value:
                return text("The requested URL was not found on this server.", 404)
            value = value[part]
        as_json = call.query.get("alt") == "json"
        if call.query.get("recursive", "").lower() == "true" and call.query.get("alt") != "text":
            value, as_json = (camel(value), True) if path[-1:] != ["attributes"] else (value, True)
        elif isinstance(value, dict):
            value = "".join(
                f"{name}/\n" if isinstance(each, dict) else f"{name}\n" for name, each in value.items()
            )
        elif isinstance(value, list) and not as_json:
            value = "".join(f"{each}\n" for each in value)
        return with_etag(
            text(json.dumps(value) if as_json else str(value), kind="json" if as_json else "text")
        )

    def tree(self) -> dict[str, Any]:
        instance, project = self.instance, self.instance.project
        place = f"projects/{project.number}"
        return {
            "instance": {
                "attributes": instance.metadata,
                "description": instance.body.get("description", ""),
                "disks": {"0": {"device-name": "persistent-disk-0", "index": "0", "mode": "READ_WRITE"}},
                "hostname": f"{instance.name}.{instance.zone}.c.{project.name}.internal",
                "id": instance.id,
                "image": instance.disk.image.partition("/v1/")[2],
                "machine-type": f"{place}/machineTypes/{instance.plan.kind.name}",
                "maintenance-event": instance.maintenance,
                "name": instance.name,
                "network-interfaces": {"0": {"access-configs": {"0": {"external-ip": instance.address}}}},
                "preempted": "TRUE" if instance.preempted else "FALSE",
                "scheduling": self.scheduling(),
                "service-accounts": self.accounts(),
                "tags": instance.body.get("tags", {}).get("items", []),
                "zone": f"{place}/zones/{instance.zone}",
            },
            "project": {
                "attributes": {},
                "numeric-project-id": project.number,
                "project-id": project.name,
            },
        }

    def scheduling(self) -> dict[str, str]:
        wanted = self.instance.scheduling
        return {
            "automatic-restart": "TRUE"
            if wanted.get("automaticRestart", not self.instance.spot)
            else "FALSE",
            "on-host-maintenance": wanted.get("onHostMaintenance", "MIGRATE"),
            "preemptible": "TRUE" if self.instance.spot else "FALSE",
        }

    # --- the service account

    def accounts(self) -> dict[str, Any]:
        if not (email := self.instance.account):
            return {}
        shown = {"aliases": ["default"], "email": email, "scopes": list(self.scopes())}
        return {"default": shown, email: shown}

    def scopes(self) -> tuple[str, ...]:
        accounts = self.instance.body.get("serviceAccounts") or [{}]
        return tuple(accounts[0].get("scopes", ()))

    def token(self, account: str, scopes: str) -> Reply:
        email, tokens = self.instance.account, self.instance.project.tokens
        if not email or account not in ("default", email):
            return text("The requested URL was not found on this server.", 404)
        wanted = tuple(scopes.split(",")) if scopes else self.scopes()
        token = tokens.issue(email, instance=self.instance.name, scopes=wanted)
        answer = {"access_token": token, "expires_in": tokens.left(token), "token_type": "Bearer"}
        return text(json.dumps(answer), kind="json")

    # --- guest attributes

    def guest_attributes(self, call: Call, path: list[str]) -> Reply:
        if self.instance.metadata.get("enable-guest-attributes", "").lower() != "true":
            return text("Guest attributes endpoint access is disabled.", 403)
        attributes = self.instance.attributes
        with self.instance.project.clock.changed:
            if call.verb == "PUT" and len(path) == 2:
                attributes.setdefault(path[0], {})[path[1]] = call.body.decode(errors="replace")
                return text("")
            if call.verb == "DELETE" and len(path) == 2:
                with suppress(KeyError):
                    del attributes[path[0]][path[1]]
                return text("")
            found = attributes.get(path[0], {}).get(path[1]) if len(path) == 2 else None
        return text("Not found.", 404) if found is None else text(found)


def text(body: str, status: int = 200, kind: str = "text") -> Reply:
    headers = (("Metadata-Flavor", "Google"), ("Server", "Metadata Server for VM"))
    return Reply(status, body.encode(), f"application/{kind}", headers)


def etag(reply: Reply) -> str:
    return hashlib.sha256(reply.body).hexdigest()[:16]


def with_etag(reply: Reply) -> Reply:
    return reply._replace(headers=(*reply.headers, ("ETag", etag(reply))))


def camel(value: Any) -> Any:
    """Recursive answers spell names in another way, except those that the user gave."""
    if not isinstance(value, dict):
        return value
    words = {name: name.split("-") for name in value}
    return {
        parts[0] + "".join(part.title() for part in parts[1:]): value[name]
        if name == "attributes"
        else camel(value[name])
        for name, parts in words.items()
    }
