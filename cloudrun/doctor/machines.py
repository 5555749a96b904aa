"""What machines are made of: network, image, type, quota; and the clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any

from cloudrun.doctor import NONE, OK, UNKNOWN, WRONG, Finding, clock
from cloudrun.doctor.google import Google, Refused

# In regions.get; of the others no quota is listed there.
METRICS = {
    **{name: f"NVIDIA_{name}_GPUS" for name in ("L4", "T4", "P4", "V100", "P100")},
    **{"A100-40GB": "NVIDIA_A100_GPUS", "A100-80GB": "NVIDIA_A100_80GB_GPUS"},
}
EVERYWHERE = "GPUS_ALL_REGIONS"
ADDRESSES = "constraints/compute.vmExternalIpAccess"


def _there(google: Google, check: str, path: str, mend: str) -> Finding:
    """Whether there is such a resource; `path` as it stands in an instance's order, or a whole URL."""
    path = path.partition("/compute/v1/")[2] or path
    try:
        google.compute(path)
    except Refused as error:
        if error.code not in (400, 404):
            raise
        return Finding(check, WRONG, f"there is no {path}", mend)
    return Finding(check, OK, path)


def network(google: Google) -> Iterator[Finding]:
    project = f"--project={google.project}"
    if subnet := google.vm.get("VM_SUBNET"):
        mend = f"gcloud compute networks subnets list {project}"
        mend += "\nexport VM_SUBNET=regions/REGION/subnetworks/NAME"
        yield _there(google, "subnet", subnet, mend)
        return
    named = google.vm.get("VM_NETWORK", "")
    mend = f"gcloud compute networks list {project}\nexport VM_NETWORK=global/networks/NAME"
    if not named:
        mend = f"gcloud compute networks create default --subnet-mode=auto {project}"
    yield _there(google, "network", named or "global/networks/default", mend)


def address(google: Google) -> Iterator[Finding]:
    check = "external address"
    if not google.external:
        yield Finding(check, NONE, "VM_EXTERNAL_IP is off")
        return
    policy = google.resources("getEffectiveOrgPolicy", {"constraint": ADDRESSES}).get("listPolicy", {})
    if policy.get("allValues") == "ALLOW" or not policy:
        yield Finding(check, OK, "allowed for every machine")
    elif policy.get("allValues") == "DENY":
        words = "your organisation forbids them; then the network needs Cloud NAT or Private Google Access"
        yield Finding(check, WRONG, words, "export VM_EXTERNAL_IP=0")
    else:
        yield Finding(check, UNKNOWN, "your organisation allows them for machines that it names")


def image(google: Google) -> Iterator[Finding]:
    name = google.what_is_wanted().image
    owner = name.split("/")[1] if name.startswith("projects/") else google.project
    mend = f"gcloud compute images list --project={owner} --no-standard-images"
    yield _there(
        google, "image", name, mend + "\nexport VM_IMAGE=projects/PROJECT/global/images/family/FAMILY"
    )


def types(google: Google) -> Iterator[Finding]:
    wanted, project = google.what_is_wanted(), f"--project={google.project}"
    shape = wanted.shape
    kinds = [("machine-types", "machineTypes", shape.machine_type)]
    if shape.accelerator:
        kinds.append(("accelerator-types", "acceleratorTypes", shape.accelerator))
    for zone in wanted.zones:
        for command, resource, name in kinds:
            mend = f'gcloud compute {command} list --filter="name={name}" --format="value(zone)" {project}'
            mend += "\nexport VM_ZONE=ZONE"
            yield _there(google, f"type in {zone}", f"zones/{zone}/{resource}/{name}", mend)


def quota(google: Google) -> Iterator[Finding]:
    wanted = google.what_is_wanted()
    shape = wanted.shape
    if not shape.gpus:
        yield Finding("GPU quota", NONE, f"{shape.machine_type} has no GPU")
        return
    yield _enough(google, EVERYWHERE, "all regions", google.compute("").get("quotas", []))
    metric = METRICS.get(shape.gpu, "")
    if not metric:
        words = f"of {shape.gpu} Compute Engine lists no quota"
        yield Finding("GPU quota", UNKNOWN, words, _page(google))
        return
    for region in google.regions:
        quotas = google.compute(f"regions/{region}").get("quotas", [])
        yield _enough(google, "PREEMPTIBLE_" * wanted.spot + metric, region, quotas)


def _enough(google: Google, metric: str, where: str, quotas: list[dict[str, Any]]) -> Finding:
    gpus = google.what_is_wanted().shape.gpus
    found = [each for each in quotas if each.get("metric") == metric]
    if not found:
        return Finding(metric, UNKNOWN, f"no such quota is listed for {where}", _page(google))
    limit, usage = found[0].get("limit", 0), found[0].get("usage", 0)
    words = f"{usage:g} of {limit:g} in use in {where}"
    if limit - usage >= gpus:
        return Finding(metric, OK, words)
    return Finding(
        metric, WRONG, f"{words}, and a machine needs {gpus}: ask for {usage + gpus:g}", _page(google)
    )


def _page(google: Google) -> str:
    return f"https://console.cloud.google.com/iam-admin/quotas?project={google.project}"


def time_of_day(google: Google) -> Iterator[Finding]:
    """Any answer has a date, a refusal too."""
    import requests

    url = f"{google.endpoint('storage')}storage/v1/b/{google.bucket or 'none'}"
    try:
        date = requests.get(url, timeout=5).headers.get("Date", "")
        skew = parsedate_to_datetime(date).timestamp() - time.time()
    except (requests.exceptions.RequestException, ValueError, TypeError):
        yield Finding("clock", UNKNOWN, "Google cannot be reached to compare it with")
        return
    yield clock(skew, "Google's")
