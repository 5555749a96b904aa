"""What a machine that belongs to a stranger is given: a token for an hour, and upload sessions for later.

The token is our own, exchanged for one that may do next to nothing: read the project's blobs and this run,
add what a machine adds, replace two objects. It is short-lived, and renewed as long as a client is there.
https://cloud.google.com/iam/docs/downscoping-short-lived-credentials

A session is a URL: whoever knows it can write one object, once, if that does not exist yet, for a week.
https://cloud.google.com/storage/docs/resumable-uploads
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from cloudrun import account
from cloudrun.background import side_by_side
from cloudrun.errors import BucketError, BucketRefused, CloudrunError, Corrupt, Missing
from cloudrun.formats import canonical, parse
from cloudrun.order import Order
from cloudrun.storage import Bucket

if TYPE_CHECKING:
    from cloudrun.storage.gcs import GcsBucket

HOURS = 160.0  # the longest run on a stranger's machine: a session is forgotten after 168
RETRY_SECONDS = 10.0  # after a token that could not be made
RENEW = 0.4  # of a token's life, after which it gets a fresh one
COUNT = 24  # of sessions for saves, and of those for the log
WORKERS = 16
TOPS = 6  # outputs that the machine may copy under their own names: a condition must not get too long
STS = "CLOUDSDK_API_ENDPOINT_OVERRIDES_STS"  # gcloud's own
STORAGE = "STORAGE_EMULATOR_HOST"
ALONE_LATER = (
    "if no command follows it, the machine goes on alone when its token ends, in an hour: then its output "
    "comes with its end, and `cloudrun stop` ends it at once"
)
ACCESS = "urn:ietf:params:oauth:token-type:access_token"
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"


class Token(NamedTuple):
    """`seconds` from now until it expires."""

    value: str
    seconds: float


def give(bucket: Bucket, order: Order, attempt: int) -> dict[str, Any]:
    """What the boot of a stranger's machine has in addition; its sessions are opened, and in the bucket.

    Nothing where nobody is asked for credentials, as by an emulator. Raises BucketError.
    """
    token = _token(bucket, order, attempt)
    if token is None:
        return {}
    name = sessions_name(order, attempt)
    if bucket.size(name) is None:
        with suppress(BucketError):  # our own write whose reply was lost is there
            bucket.put(name, canonical(_open(cast("GcsBucket", bucket), order, attempt)))
    return {"token": token.value, "token_left": token.seconds}


def renew(bucket: Bucket, order: Order, attempt: int) -> float:
    """Hand a fresh token over. Returns the seconds that it is good for. Raises BucketError."""
    token = _token(bucket, order, attempt)
    if token is None:
        return float("inf")
    bucket.put(token_name(order), canonical({"token": token.value, "seconds": token.seconds}))
    return token.seconds


class Renewals:
    """Hands fresh tokens over as long as a client is there, well before the old ones end.

    `tell`: hears why one could not be made; it is tried again.
    """

    def __init__(self, bucket: Bucket, order: Order, attempt: int, tell: Callable[[str], None]) -> None:
        self._what, self._tell = (bucket, order, attempt), tell
        self._due = 0.0 if order.stranger else float("inf")

    def step(self) -> None:
        """On a thread: it may take seconds, and signals must not wait."""
        if time.monotonic() > self._due:
            self._due = float("inf")
            threading.Thread(target=self._renew, daemon=True).start()

    def _renew(self) -> None:
        pause = RETRY_SECONDS
        try:
            pause = RENEW * renew(*self._what)
        except CloudrunError as error:
            self._tell(str(error))
        self._due = time.monotonic() + pause


def token_name(order: Order) -> str:
    return order.prefix + "/token.json"


def sessions_name(order: Order, attempt: int) -> str:
    return f"{order.prefix}/attempts/{attempt}/sessions.json"


# --- the token


def _token(bucket: Bucket, order: Order, attempt: int) -> Token | None:
    if not bucket.url.startswith("gs://"):
        return None
    allowed = boundary(bucket.url, order.project, order.prefix, attempt, order.outputs)
    return exchange(allowed, os.environ)


def exchange(allowed: dict[str, Any], environ: Mapping[str, str]) -> Token | None:
    """None if nobody is asked for credentials there. Raises BucketError."""
    from google.auth.exceptions import GoogleAuthError, TransportError
    from google.auth.transport.requests import Request
    from google.oauth2 import sts

    base = environ.get(STS, "https://sts.googleapis.com/").rstrip("/")
    try:
        found = account.acting(environ, environ.get(STORAGE, ""))
        if account.anonymous(found):
            return None
        found.refresh(Request())  # now, so that what is made of it is good for as long as can be
        answer = sts.Client(f"{base}/v1/token").exchange_token(
            Request(),
            grant_type=EXCHANGE,
            subject_token=found.token,
            subject_token_type=ACCESS,
            requested_token_type=ACCESS,
            additional_options=allowed,
        )
    except TransportError as error:
        raise BucketError(f"cannot reach Google for a token for the machine: {error}; try again") from None
    except GoogleAuthError as error:
        raise BucketRefused(
            f"Google gives no token for the machine: {error}; "
            "enable its service with `gcloud services enable sts.googleapis.com`"
        ) from None
    return Token(str(answer["access_token"]), float(answer.get("expires_in") or _left(found)))


def _left(found: Any) -> float:
    """Of credentials that were just renewed. What is made of them is good for no longer."""
    from google.auth import _helpers

    return float((found.expiry - _helpers.utcnow()).total_seconds()) if found.expiry else 3600.0


def boundary(url: str, project: str, prefix: str, attempt: int, outputs: list[str]) -> dict[str, Any]:
    """All that the token may do: see the table below. What stands in the bucket already stays as it is,
    so that no machine can change what later clients believe: the order, claims, the bill.
    """
    bucket, _, directory = url.removeprefix("gs://").partition("/")
    top = directory + "/" if directory else ""
    run, here = f"{top}{prefix}/", f"{top}{prefix}/attempts/{attempt}/"
    added = [here, *(run + name for name in ("saved/", "receipt.json", "outputs.json"))]
    table = (
        ("legacyObjectReader", [f"{top}{project}/blobs/"]),
        ("objectViewer", [run]),
        ("objectCreator", [*added, *(f"{run}{path}/" for path in outputs[:TOPS])]),
        ("objectUser", [run + "outputs.json", here + "state.json"]),  # to replace is to delete as well
    )
    rules = [_rule(bucket, role, names) for role, names in table]
    return {"accessBoundary": {"accessBoundaryRules": rules}}


def _rule(bucket: str, role: str, names: list[str]) -> dict[str, Any]:
    objects = f"projects/_/buckets/{bucket}/objects/"
    terms = [f"resource.name.startsWith({json.dumps(objects + name)})" for name in names]
    if role == "objectViewer":
        listed = "api.getAttribute('storage.googleapis.com/objectListPrefix', '')"
        terms += [f"{listed}.startsWith({json.dumps(name)})" for name in names]
    return {
        "availableResource": f"//storage.googleapis.com/projects/_/buckets/{bucket}",
        "availablePermissions": [f"inRole:roles/storage.{role}"],
        "availabilityCondition": {"expression": " || ".join(terms)},
    }


# --- the sessions


def _open(bucket: GcsBucket, order: Order, attempt: int) -> dict[str, list[str]]:
    """Many at the same time: one after the other they would take seconds. Raises BucketError."""
    late = f"{order.prefix}/attempts/{attempt}/late/"
    names = {kind: [f"{kind}-{n:03d}" for n in range(1, COUNT + 1)] for kind in ("save", "log")}
    names["receipt"] = ["receipt"]
    every = [name for each in names.values() for name in each]
    urls = side_by_side(lambda name: bucket.session(late + name), every, WORKERS)
    found = dict(zip(every, urls, strict=True))
    return {kind: [found[name] for name in each] for kind, each in names.items()}


def take_back(bucket: Bucket, order: Order) -> None:
    """The sessions that were not used, and the token, when no machine of the run is left."""
    if not order.stranger or not bucket.url.startswith("gs://"):
        return
    bucket.delete(token_name(order))
    for attempt in bucket.dirs(order.prefix + "/attempts/"):
        name = f"{order.prefix}/attempts/{attempt}/sessions.json"
        try:
            kinds = parse(bucket.get(name)[0], name)
        except (Missing, Corrupt):
            continue
        lists = [urls for urls in kinds.values() if isinstance(urls, list)]
        ours = [url for urls in lists for url in urls if isinstance(url, str)]
        side_by_side(cast("GcsBucket", bucket).cancel, ours, WORKERS)
        bucket.delete(name)
