"""The checks of `cloudrun doctor` on Google Cloud.

Nothing is made, changed or billed, but for one small object in the bucket that is deleted again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from cloudrun.doctor import Finding, sdk, together
from cloudrun.doctor.access import act_as, compute_api, credentials, machine, permissions, storage_api
from cloudrun.doctor.bucket import bucket, objects, probe
from cloudrun.doctor.google import Google
from cloudrun.doctor.machines import address, image, network, quota, time_of_day, types

STORAGE: dict[str, Callable[[Google], Iterator[Finding]]] = {
    "storage API": storage_api,
    "storage.objects": objects,
    "bucket": bucket,
    "bucket write": probe,
    "clock": time_of_day,
}
CHECKS: dict[str, Callable[[Google], Iterator[Finding]]] = {
    "compute API": compute_api,
    "permissions": permissions,
    "iam.serviceAccounts.actAs": act_as,
    "machine's account": machine,
    "network": network,
    "external address": address,
    "image": image,
    "type": types,
    "GPU quota": quota,
    **STORAGE,
}


def examine(environ: Mapping[str, str], service: str = "compute") -> Iterator[Finding]:
    """`service`: storage for machines that are elsewhere, whose bucket is there."""
    google = Google(environ)
    yield from sdk()
    yield from together({"credentials": partial(credentials, google, service)})
    checks = CHECKS if service == "compute" else STORAGE
    yield from together({name: partial(check, google) for name, check in checks.items()})
