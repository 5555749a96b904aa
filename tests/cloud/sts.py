"""Google's Security Token Service: a token is exchanged for one that may do less in Cloud Storage.

https://cloud.google.com/iam/docs/downscoping-short-lived-credentials and
https://cloud.google.com/storage/docs/access-control/iam-roles
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote

from .storage import Rule

GRANT = "urn:ietf:params:oauth:grant-type:token-exchange"
ACCESS = "urn:ietf:params:oauth:token-type:access_token"
OBJECT = "storage.objects."
ROLES = {
    "roles/storage.legacyObjectReader": {"get"},
    "roles/storage.objectViewer": {"get", "list"},
    "roles/storage.objectCreator": {"create"},
    "roles/storage.objectUser": {"create", "delete", "get", "list", "update"},
    "roles/storage.objectAdmin": {"create", "delete", "get", "list", "update"},
}
BUCKET = "//storage.googleapis.com/projects/_/buckets/"
TEXT = r"""('[^'\\]*'|"(?:[^"\\]|\\.)*")"""
NAME = re.compile(rf"resource\.name\.startsWith\({TEXT}\)\Z")
LISTED = re.compile(
    rf"api\.getAttribute\('storage\.googleapis\.com/objectListPrefix', ''\)\.startsWith\({TEXT}\)\Z"
)


class Unfit(ValueError):
    """What the service would refuse."""


def boundary(options: str) -> list[Rule]:
    """The rules of a Credential Access Boundary, as the client library encodes it: at most ten."""
    wanted = json.loads(unquote(options))["accessBoundary"]["accessBoundaryRules"]
    if not 0 < len(wanted) <= 10:
        raise Unfit("a boundary has 1 to 10 rules")
    return [rule for each in wanted for rule in _rules(each)]


def _rules(wanted: dict[str, Any]) -> list[Rule]:
    bucket = wanted["availableResource"]
    if not bucket.startswith(BUCKET) or "/" in bucket[len(BUCKET) :]:
        raise Unfit(f"{bucket} is no bucket")
    bucket, found = bucket[len(BUCKET) :], set()
    for permission in wanted["availablePermissions"]:
        found |= ROLES[permission.removeprefix("inRole:")]
    allowed = {OBJECT + verb for verb in found}
    condition = wanted.get("availabilityCondition")
    if condition is None:
        return [Rule("", allowed, bucket)]
    return [_rule(term.strip(), allowed, bucket) for term in condition["expression"].split("||")]


def _rule(term: str, allowed: set[str], bucket: str) -> Rule:
    """The name of a resource says nothing about a listing, whose resource is the bucket."""
    objects, named, listed = f"projects/_/buckets/{bucket}/objects/", NAME.match(term), LISTED.match(term)
    if named:
        name = _text(named[1])
        if not name.startswith(objects):
            raise Unfit(f"{name} is nothing in this bucket")
        return Rule(name[len(objects) :], allowed - {OBJECT + "list"}, bucket)
    if listed:
        return Rule(_text(listed[1]), allowed & {OBJECT + "list"}, bucket)
    raise Unfit(f"{term} is no condition that is known here")


def _text(literal: str) -> str:
    return literal[1:-1] if literal[0] == "'" else str(json.loads(literal))
