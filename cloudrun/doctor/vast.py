"""The checks of `cloudrun doctor` for machines of vast.ai, which belong to strangers.

Nothing is rented; a token is made as for a machine, and with it one small object that is deleted again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any
from urllib.parse import quote

from cloudrun import handover
from cloudrun.backends.vast_money import charges_query
from cloudrun.doctor import NONE, OK, UNKNOWN, WRONG, Finding, sdk, together
from cloudrun.doctor.access import credentials
from cloudrun.doctor.gcp import STORAGE
from cloudrun.doctor.google import TIMEOUT, Google, Refused
from cloudrun.errors import BucketError, BucketRefused

SERVER = "https://console.vast.ai"
KEYS, BILLING = "https://cloud.vast.ai/manage-keys/", "https://cloud.vast.ai/billing/"
SECONDS = 10.0  # for an answer of vast.ai
EXCHANGE, ALLOWED, FORBIDDEN = "machine's token", "machine's token, allowed", "machine's token, forbidden"


def examine(environ: Mapping[str, str]) -> Iterator[Finding]:
    google = Google(environ)
    google.wanted = None  # no zone is meant: a bucket is as near to one stranger as to another
    yield from sdk("vast")
    yield from together({"credentials": partial(credentials, google, "storage")})
    checks = {name: partial(check, google) for name, check in STORAGE.items()}
    yield from together(
        {"VAST_API_KEY": partial(account, environ), **checks, EXCHANGE: partial(token, google)}
    )


def account(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the key is accepted, and there is something to spend. The answer's copy of it is not shown."""
    key = environ.get("VAST_API_KEY", "")
    if not key:
        return  # the settings' own line says it
    from requests.exceptions import RequestException
    from vastai.api.client import VastClient

    os.environ["NETRC"] = os.devnull  # an entry in ~/.netrc would replace the key
    client = VastClient(key, (environ.get("VAST_URL") or SERVER).rstrip("/"), retry=1, timeout=SECONDS)
    try:
        answer = client.get("/users/current/")
        found = answer.json() if answer.status_code < 300 else {}
    except (RequestException, ValueError) as error:
        yield Finding("VAST_API_KEY", UNKNOWN, f"vast.ai cannot be asked: {type(error).__name__}")
        return
    if answer.status_code == 401 or "auth_error" in answer.text:
        yield Finding(
            "VAST_API_KEY", WRONG, "vast.ai does not accept it", f"export VAST_API_KEY=KEY  # {KEYS}"
        )
        return
    if not isinstance(found.get("credit"), int | float):
        words = f"vast.ai does not say what there is to spend (status {answer.status_code})"
        yield Finding("VAST_API_KEY", UNKNOWN, words)
        return
    yield Finding("VAST_API_KEY", OK, f"accepted, that of {found.get('email') or 'nobody it names'}")
    yield from charges(client)
    credit = float(found["credit"])
    if credit > 0:
        yield Finding("vast.ai credit", OK, f"{credit:.2f} USD")
    else:
        yield Finding(
            "vast.ai credit", WRONG, f"{credit:.2f} USD: nothing can be rented", f"add some: {BILLING}"
        )


def charges(client: Any) -> Iterator[Finding]:
    """What an instance cost, and that it is gone, is known from them when its client is not there."""
    check, now = "vast.ai charges", time.time()
    status = client.get("/charges/", query_args=charges_query(now)).status_code
    if status < 300:
        yield Finding(check, OK, "the key may see them")
    elif status in (401, 403, 404):
        words = f"the key may not see them (status {status}), and what has ended cannot be told from them"
        yield Finding(check, WRONG, words, f"give the key the permission billing_read: {KEYS}")
    else:
        yield Finding(check, UNKNOWN, f"the service answers {status}")


def token(google: Google) -> Iterator[Finding]:
    """A trial exchange, and what comes of it: one object that it may make, and one that it may not."""
    if not google.bucket or google.session is None:
        raise Refused("there is no bucket, or nobody to ask for it")
    project = f"doctor-{os.urandom(8).hex()}"
    prefix, url = f"{project}/runs/trial", f"gs://{google.bucket}/{google.directory}".rstrip("/")
    try:
        found = handover.exchange(handover.boundary(url, project, prefix, 1, []), google.environ)
    except BucketRefused as error:
        flag = f" --project={google.project}" if google.project else ""
        yield Finding(EXCHANGE, WRONG, str(error), f"gcloud services enable sts.googleapis.com{flag}")
        return
    except BucketError as error:
        yield Finding(EXCHANGE, UNKNOWN, str(error))
        return
    if found is None:
        yield Finding(EXCHANGE, NONE, "no credentials, as for an emulator: machines get none either")
        return
    yield Finding(
        EXCHANGE, OK, f"Google makes one of yours that may do less, for {found.seconds / 60:.0f} min"
    )
    yield from _probe(google, found.value, f"{prefix}/attempts/1/probe", may=True)
    yield from _probe(google, found.value, f"{project}/probe", may=False)


def _probe(google: Google, value: str, name: str, *, may: bool) -> Iterator[Finding]:
    """Write an object as the machine would, and remove it as who we are."""
    import requests

    check, path = ALLOWED if may else FORBIDDEN, "/".join(filter(None, (google.directory, name)))
    query = {"uploadType": "media", "name": path, "ifGenerationMatch": "0"}
    whole, headers = f"gs://{google.bucket}/{path}", {"Authorization": f"Bearer {value}"}
    url = f"{google.endpoint('storage')}upload/storage/v1/b/{google.bucket}/o"
    answer = requests.post(url, params=query, headers=headers, data=b"{}", timeout=TIMEOUT)
    status = answer.status_code
    if status < 300:
        _remove(google, path)
    if may and status < 300:
        yield Finding(check, OK, "it writes what a run writes")
    elif status == 403 and not may:
        yield Finding(check, OK, "it is refused everything else")
    elif may and status in (401, 403):
        words = f"{whole} cannot be written with it (status {status}): may your own account write there?"
        yield Finding(check, WRONG, words, google.grant(google.member))
    elif status < 300:
        words = f"{whole} was written with it: a stranger's machine could do that too; do not rent one"
        yield Finding(check, WRONG, words, "export CLOUDRUN_BACKEND=gcp")
    else:
        yield Finding(check, UNKNOWN, f"the service answers {status}")


def _remove(google: Google, path: str) -> Any:
    return google.storage(f"/o/{quote(path, safe='')}", verb="DELETE")
