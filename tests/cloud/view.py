"""An instance as the API shows it, and the fingerprints that guard its labels and metadata."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from . import catalog
from .clock import rfc3339
from .instances import Instance


def fingerprint(value: Any) -> str:
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    return base64.urlsafe_b64encode(digest[:8]).decode()


def label_fingerprint(instance: Instance) -> str:
    return fingerprint([instance.id, instance.body.get("labels", {})])


def metadata_fingerprint(instance: Instance) -> str:
    return fingerprint([instance.id, instance.body.get("metadata", {}).get("items", [])])


def view(instance: Instance) -> dict[str, Any]:
    body, place = instance.body, f"{instance.project.root}/zones/{instance.zone}"
    shown: dict[str, Any] = {
        "kind": "compute#instance",
        "id": instance.id,
        "name": instance.name,
        "zone": place,
        "selfLink": instance.link,
        "creationTimestamp": rfc3339(instance.created),
        "machineType": f"{place}/machineTypes/{instance.plan.kind.name}",
        "status": instance.status,
        "labels": body.get("labels", {}),
        "labelFingerprint": label_fingerprint(instance),
        "metadata": {
            "kind": "compute#metadata",
            "fingerprint": metadata_fingerprint(instance),
            "items": body.get("metadata", {}).get("items", []),
        },
        "tags": {**body.get("tags", {}), "fingerprint": fingerprint(body.get("tags", {}))},
        "scheduling": scheduling(instance),
        "disks": [boot_disk(instance)],
        "networkInterfaces": [
            interface(instance, n, each) for n, each in enumerate(body["networkInterfaces"])
        ],
        "serviceAccounts": accounts(instance),
        "deletionProtection": body.get("deletionProtection", False),
        "canIpForward": False,
        "startRestricted": False,
        "cpuPlatform": "Unknown CPU Platform" if instance.status == "TERMINATED" else "Intel Skylake",
        "resourceStatus": resource_status(instance),
    }
    shown["fingerprint"] = fingerprint([instance.id, instance.status, body])
    if instance.plan.gpus:
        url = f"{place}/acceleratorTypes/{instance.plan.gpu}"
        shown["guestAccelerators"] = [{"acceleratorType": url, "acceleratorCount": instance.plan.gpus}]
    times = {"lastStartTimestamp": instance.last_start, "lastStopTimestamp": instance.last_stop}
    shown |= {name: rfc3339(when) for name, when in times.items() if when is not None}
    if instance.message:
        shown["statusMessage"] = instance.message
    if "description" in body:
        shown["description"] = body["description"]
    return shown


def scheduling(instance: Instance) -> dict[str, Any]:
    """With what the service fills in: SPOT implies TERMINATE, no restart and the action STOP."""
    spot, wanted = instance.spot, instance.scheduling
    shown = {
        "provisioningModel": "SPOT" if spot else "STANDARD",
        "preemptible": spot,
        "automaticRestart": not spot,
        "onHostMaintenance": "TERMINATE" if spot else "MIGRATE",
        **({"instanceTerminationAction": "STOP"} if spot else {}),
    }
    return {**shown, **wanted, "preemptible": spot}


def resource_status(instance: Instance) -> dict[str, Any]:
    if instance.limit is None:
        return {"scheduling": {}}
    return {"scheduling": {"terminationTimestamp": rfc3339(instance.limit)}}


def boot_disk(instance: Instance) -> dict[str, Any]:
    ordered = next(each for each in instance.body["disks"] if each.get("boot"))
    disk = instance.disk
    return {
        "kind": "compute#attachedDisk",
        "type": "PERSISTENT",
        "mode": "READ_WRITE",
        "boot": True,
        "index": 0,
        "autoDelete": instance.plan.auto_delete,
        "deviceName": ordered.get("deviceName", "persistent-disk-0"),
        "diskSizeGb": str(disk.gigabytes),
        "interface": "SCSI",
        "source": f"{instance.project.root}/zones/{disk.zone}/disks/{disk.name}",
    }


def interface(instance: Instance, index: int, ordered: dict[str, Any]) -> dict[str, Any]:
    root = instance.project.root
    region = catalog.region_of(instance.zone)
    shown = {
        "kind": "compute#networkInterface",
        "name": f"nic{index}",
        "network": f"{root}/global/networks/default",
        "subnetwork": f"{root}/regions/{region}/subnetworks/default",
        "networkIP": f"10.128.0.{int(instance.id) % 250 + 2}",
        "stackType": "IPV4_ONLY",
        "fingerprint": fingerprint([instance.id, index]),
    }
    configs = []
    for each in ordered.get("accessConfigs", ()):
        config = {
            "kind": "compute#accessConfig",
            "type": "ONE_TO_ONE_NAT",
            "name": each.get("name", "External NAT"),
            "networkTier": each.get("networkTier", "PREMIUM"),
        }
        configs.append(config | ({"natIP": instance.address} if instance.address else {}))
    return shown | ({"accessConfigs": configs} if configs else {})


def accounts(instance: Instance) -> list[dict[str, Any]]:
    if not instance.account:
        return []
    return [{**instance.body["serviceAccounts"][0], "email": instance.account}]
