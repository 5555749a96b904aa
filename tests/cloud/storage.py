"""An emulated Google Cloud Storage: the JSON API's object methods over HTTP, in memory.

    with Storage() as storage:
        storage.create_bucket("b")
        os.environ["STORAGE_EMULATOR_HOST"] = storage.url
        storage.faults.add("insert", "/receipt.json", cut="after")
        ...
        assert storage.counts()["insert"] == 2

Facts: https://cloud.google.com/storage/docs/json_api/v1 and .../docs/json_api/v1/status-codes.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .storage_faults import Faults, Log, Request
from .storage_http import Server
from .storage_objects import ApiError, Object, Objects, check, crc32c, md5
from .storage_uploads import Sessions

__all__ = ["Rule", "Storage", "Token", "crc32c", "md5"]


@dataclass(frozen=True)
class Rule:
    """One rule of a Credential Access Boundary: these permissions on names that begin so, in this bucket.

    https://cloud.google.com/iam/docs/downscoping-short-lived-credentials
    """

    prefix: str
    permissions: frozenset[str] | set[str] | tuple[str, ...]
    bucket: str = ""

    def allows(self, permission: str, bucket: str, name: str) -> bool:
        here = self.bucket in ("", bucket) and name.startswith(self.prefix)
        return here and permission in self.permissions


@dataclass
class Token:
    """`expires` in seconds since the epoch. Without rules it may do everything."""

    expires: float = float("inf")
    rules: list[Rule] | None = None
    principal: str = "someone@example.com"

    def allows(self, permission: str, bucket: str, name: str) -> bool:
        return self.rules is None or any(rule.allows(permission, bucket, name) for rule in self.rules)


@dataclass
class Rewrite:
    source: Object
    done: int = 0


@dataclass
class Storage:
    """A server while its context lasts. `tokens`: without it nobody is asked for one.

    `denied`: (principal or *, permission). `policies`: the bindings of a bucket's IAM policy.
    `rewrite_step`: bytes that one rewrite call copies. `clock`: seconds since the epoch.
    """

    tokens: dict[str, Token] | None = None
    clock: Callable[[], float] = time.time
    rewrite_step: int | None = None
    denied: set[tuple[str, str]] = field(default_factory=set)
    policies: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        self.store = Objects(self.clock)
        self.sessions = Sessions(self.store)
        self._rewrites: dict[str, Rewrite] = {}
        self._fields: dict[str, dict[str, Any]] = {}
        self._server = Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Storage:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def create_bucket(self, bucket: str, **fields: Any) -> None:
        """`fields` of the bucket's resource, where they differ from those of a bucket in us-central1."""
        self.store.create_bucket(bucket)
        self._fields[bucket] = fields

    def change_bucket(self, bucket: str, **fields: Any) -> None:
        self._fields[bucket] = {**self._fields.get(bucket, {}), **fields}

    def objects(self, bucket: str) -> dict[str, Object]:
        """What is in a bucket now, by name."""
        with self.store.lock:
            return dict(sorted(self.store.bucket(bucket).items()))

    @property
    def requests(self) -> list[Request]:
        return self.log.requests

    def counts(self) -> dict[str, int]:
        return self.log.counts()

    def cost(self) -> float:
        return self.log.cost()

    def allow(self, token: str, permission: str, bucket: str, name: str) -> None:
        """Raise 401 or 403 unless the bearer of this token may do this."""
        known = Token() if self.tokens is None else self.tokens.get(token)
        where = "bucket" if permission.endswith(".list") or ".buckets." in permission else "object"
        denied = (
            f"does not have {permission} access to the Google Cloud Storage {where}. "
            f"Permission '{permission}' denied on resource (or it may not exist)."
        )
        at = {"locationType": "header", "location": "Authorization"}
        if not token and self.tokens is not None:
            raise ApiError(401, "required", f"Anonymous caller {denied}", **at)
        if known is None or known.expires <= self.clock():
            raise ApiError(401, "authError", "Invalid Credentials", **at)
        if not known.allows(permission, bucket, name) or self._denies(known, permission):
            raise ApiError(403, "forbidden", f"{known.principal} {denied}")

    def _denies(self, known: Token, permission: str) -> bool:
        return bool({(known.principal, permission), ("*", permission)} & self.denied)

    def held(self, token: str, bucket: str, permissions: list[str]) -> dict[str, Any]:
        """https://cloud.google.com/storage/docs/json_api/v1/buckets/testIamPermissions"""
        self.store.bucket(bucket)
        found = []
        for permission in permissions:
            with suppress(ApiError):
                self.allow(token, permission, bucket, "")
                found.append(permission)
        kind = {"kind": "storage#testIamPermissionsResponse"}
        return {**kind, "permissions": found} if found else kind

    def policy(self, bucket: str) -> dict[str, Any]:
        """https://cloud.google.com/storage/docs/json_api/v1/buckets/getIamPolicy"""
        self.store.bucket(bucket)
        head = {"kind": "storage#policy", "resourceId": f"projects/_/buckets/{bucket}"}
        return {**head, "version": 1, "etag": "CAE=", "bindings": self.policies.get(bucket, [])}

    def insert(
        self,
        token: str,
        bucket: str,
        name: str,
        data: bytes,
        query: Mapping[str, str],
        described: dict[str, Any],
    ) -> Object:
        self.may_write(token, bucket, name)
        return self.store.put(bucket, name, data, query, described)

    def may_write(self, token: str, bucket: str, name: str) -> None:
        """Replacing an object takes the permission to delete as well."""
        self.allow(token, "storage.objects.create", bucket, name)
        if name in self.store.bucket(bucket):
            self.allow(token, "storage.objects.delete", bucket, name)

    def rewrite(
        self,
        token: str,
        source: tuple[str, str],
        target: tuple[str, str],
        query: Mapping[str, str],
        sent: dict,
    ) -> dict[str, Any]:
        """https://cloud.google.com/storage/docs/json_api/v1/objects/rewrite"""
        self.allow(token, "storage.objects.get", *source)
        self.may_write(token, *target)
        given = query.get("rewriteToken")
        if given is None:
            pinned = {"generation": query["sourceGeneration"]} if "sourceGeneration" in query else {}
            found = self.store.get(*source, pinned)
            check(found, query, "Source")
            progress = Rewrite(found)
        elif given in self._rewrites:
            progress = self._rewrites.pop(given)
        else:
            raise ApiError(400, "invalid", "Invalid rewrite token.")
        size = len(progress.source.data)
        progress.done = min(size, progress.done + (self.rewrite_step or size))
        answer = {"kind": "storage#rewriteResponse", "objectSize": str(size)}
        answer["totalBytesRewritten"] = str(progress.done)
        if progress.done < size:
            key = secrets.token_urlsafe(12)
            self._rewrites[key] = progress
            return {**answer, "done": False, "rewriteToken": key}
        kept = {"contentType": progress.source.content_type, "metadata": progress.source.metadata}
        new = self.store.put(*target, progress.source.data, query, sent or kept)
        return {**answer, "done": True, "resource": new.resource(self.url)}

    def compose(
        self, token: str, bucket: str, name: str, query: Mapping[str, str], sent: dict[str, Any]
    ) -> Object:
        """https://cloud.google.com/storage/docs/json_api/v1/objects/compose"""
        sources = sent.get("sourceObjects") or []
        if not 0 < len(sources) <= 32:
            raise ApiError(400, "invalid", "The number of source components provided must be 1 to 32.")
        found = []
        for source in sources:
            self.allow(token, "storage.objects.get", bucket, source["name"])
            pinned = {"generation": str(source["generation"])} if source.get("generation") else {}
            wanted = source.get("objectPreconditions") or {}
            found.append(self.store.get(bucket, source["name"], {**pinned, **wanted}))
        self.may_write(token, bucket, name)
        data = b"".join(item.data for item in found)
        parts = sum(item.parts or 1 for item in found)
        return self.store.put(bucket, name, data, query, sent.get("destination") or {}, parts=parts)

    def listing(self, bucket: str, query: Mapping[str, str]) -> dict[str, Any]:
        page = self.store.list(bucket, query)
        found: dict[str, Any] = {"kind": "storage#objects"}
        if page.items:
            found["items"] = [item.resource(self.url) for item in page.items]
        if page.prefixes:
            found["prefixes"] = page.prefixes
        if page.next_token:
            found["nextPageToken"] = page.next_token
        return found

    def bucket_resource(self, bucket: str) -> dict[str, Any]:
        self.store.bucket(bucket)
        return {
            "kind": "storage#bucket",
            "id": bucket,
            "name": bucket,
            "selfLink": f"{self.url}/storage/v1/b/{bucket}",
            "projectNumber": "1",
            "location": "US-CENTRAL1",
            "locationType": "region",
            "storageClass": "STANDARD",
            "metageneration": "1",
            "softDeletePolicy": {"retentionDurationSeconds": "604800"},
            "iamConfiguration": {
                "uniformBucketLevelAccess": {"enabled": True},
                "publicAccessPrevention": "inherited",
            },
            **self._fields.get(bucket, {}),
        }


def masked(value: Any, fields: str) -> Any:
    """Only what a partial response asks for, e.g. `items(name,size),nextPageToken` or `items/name`.

    https://cloud.google.com/storage/docs/json_api#partial-response
    """
    if not fields or fields == "*":
        return value
    if isinstance(value, list):
        return [masked(item, fields) for item in value]
    found: dict[str, Any] = {}
    for key, below in _terms(fields):
        if isinstance(value, dict) and key in value:
            part = masked(value[key], below)
            old = found.get(key)
            if isinstance(old, list) and part and isinstance(part[0], dict):
                part = [{**a, **b} for a, b in zip(old, part, strict=True)]
            found[key] = part
    return found


def _terms(fields: str) -> list[tuple[str, str]]:
    terms, depth, start = [], 0, 0
    for at, char in enumerate(fields + ","):
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            terms.append(fields[start:at])
            start = at + 1
    return [_term(term) for term in terms if term]


def _term(term: str) -> tuple[str, str]:
    slash, paren = term.find("/"), term.find("(")
    if slash >= 0 and (paren < 0 or slash < paren):
        return term[:slash], term[slash + 1 :]
    return (term[:paren], term[paren + 1 : -1]) if paren >= 0 else (term, "")
