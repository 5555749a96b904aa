"""What instances.insert, setScheduling and stop refuse at once, and with which words.

Sources: discovery (the descriptions of the fields), D:gpus, D:instances/limit-vm-runtime, D:instances/spot.
The words are those that public issues quote, where there are some; the others are assumed.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from . import catalog, errors
from .catalog import Image, MachineType
from .clock import seconds_of

NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?\Z")
LABEL_KEY = re.compile(r"[a-z][a-z0-9_-]{0,62}\Z")
LABEL_VALUE = re.compile(r"[a-z0-9_-]{0,63}\Z")
METADATA_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}\Z")
VALUE_MOST = 262144
TOTAL_MOST = 512 * 1024
SHORTEST, LONGEST = 30, 120 * 24 * 3600  # seconds of maxRunDuration (D:instances/limit-vm-runtime)


class Plan(NamedTuple):
    """An insert that was accepted: what it means. `disk`: name of the boot disk, new if `image` is set."""

    kind: MachineType
    gpu: str
    gpus: int
    disk: str
    disk_type: str
    gigabytes: int
    image: Image | None
    auto_delete: bool


def check_insert(
    body: dict[str, Any], project: str, zone: str, disks: dict[tuple[str, str], Any], shortest: float
) -> Plan:
    name = body.get("name", "")
    if not NAME.match(name):
        raise errors.invalid("resource.name", name, f"Must be a match of regex '{NAME.pattern[:-2]}'")
    kind = check_type(body.get("machineType", ""), zone)
    check_labels(body.get("labels", {}), "resource.labels")
    check_metadata(body.get("metadata", {}).get("items", []))
    gpu, gpus = check_gpus(body.get("guestAccelerators", []), kind, zone)
    check_scheduling(body.get("scheduling", {}), kind, gpus, shortest)
    check_network(body.get("networkInterfaces", []), project)
    return check_disks(body, kind, gpu, gpus, project, zone, disks)


def check_type(url: str, zone: str) -> MachineType:
    field = "resource.machineType"
    match = re.search(r"(?:^|/)zones/([^/]+)/machineTypes/([^/]+)\Z", url)
    if not match:
        raise errors.invalid(field, url, "The URL is malformed.")
    if match[1] != zone:
        raise errors.invalid(field, url, "Resources must be in the same zone as the instance.")
    if not (kind := catalog.machine_type(match[2], zone)):
        why = f"Machine type with name '{match[2]}' does not exist in zone '{zone}'."
        raise errors.invalid(field, url, why)
    return kind


def check_labels(labels: dict[str, str], field: str) -> None:
    for key, value in labels.items():
        if not LABEL_KEY.match(key):
            raise errors.invalid(field, key, f"Label key '{key}' violates format constraints.")
        if not LABEL_VALUE.match(value):
            raise errors.invalid(field, value, f"Label value '{value}' violates format constraints.")
    if len(labels) > 64:
        raise errors.invalid(field, len(labels), "At most 64 labels are allowed.")


def check_metadata(items: list[dict[str, str]]) -> None:
    total = 0
    for number, item in enumerate(items):
        field, value = f"resource.metadata.items[{number}]", item.get("value", "")
        if not METADATA_KEY.match(item.get("key", "")):
            raise errors.invalid(
                f"{field}.key", item.get("key"), "Must be a match of regex '[a-zA-Z0-9-_]{1,128}'"
            )
        if len(value) > VALUE_MOST:
            raise errors.too_large(f"{field}.value", VALUE_MOST)
        total += len(item["key"]) + len(value)
    if total > TOTAL_MOST:
        raise errors.too_large("resource.metadata", TOTAL_MOST)
    keys = [item["key"] for item in items]
    if len(set(keys)) < len(keys):
        raise errors.invalid("resource.metadata", keys, "Metadata has duplicate keys.")


def check_gpus(wanted: list[dict[str, Any]], kind: MachineType, zone: str) -> tuple[str, int]:
    """A type that brings its GPUs may be ordered with the same ones again; n1 needs them beside it."""
    if not wanted:
        return kind.gpu, kind.gpus
    field = "resource.guestAccelerators[0].acceleratorType"
    url, count = wanted[0].get("acceleratorType", ""), wanted[0].get("acceleratorCount", 0)
    match = re.search(r"(?:^|/)zones/([^/]+)/acceleratorTypes/([^/]+)\Z", url)
    if not match or match[1] != zone:
        raise errors.invalid(field, url, "The URL is malformed.")
    gpu = match[2]
    if gpu not in catalog.gpus_in(zone):
        raise errors.not_found(f"projects/p/zones/{zone}/acceleratorTypes/{gpu}")
    if kind.gpu:
        if (gpu, count) != (kind.gpu, kind.gpus):
            why = f"[{kind.name}, {gpu}] features are not compatible for creating instance."
            raise errors.invalid("resource.guestAccelerators", url, why)
        return gpu, count
    caps = catalog.N1_CAPS.get(gpu, {}) if kind.family in ("n1", "custom") else {}
    most = caps.get(count, (0, 0))
    if kind.cpus > most[0] or kind.memory > most[1] * 1024:
        why = f"[{kind.name}, {gpu}] features are not compatible for creating instance."
        raise errors.invalid("resource.guestAccelerators", f"{url} x {count}", why)
    return gpu, count


def check_network(interfaces: list[dict[str, Any]], project: str) -> None:
    if not interfaces:
        raise errors.invalid("resource.networkInterfaces", "", "At least one network interface is required.")
    for each in interfaces:
        network, subnet = each.get("network", ""), each.get("subnetwork", "")
        if network and network.rpartition("/")[2] != "default":
            raise errors.not_found(f"projects/{project}/global/networks/{network.rpartition('/')[2]}")
        if subnet and subnet.rpartition("/")[2] != "default":
            raise errors.not_found(f"projects/{project}/{subnet}")


# --- disks


def check_disks(
    body: dict[str, Any],
    kind: MachineType,
    gpu: str,
    gpus: int,
    project: str,
    zone: str,
    disks: dict[tuple[str, str], Any],
) -> Plan:
    boot = [each for each in body.get("disks", []) if each.get("boot")]
    if len(boot) != 1:
        raise errors.invalid("resource.disks", "", "Exactly one boot disk is required.")
    disk, wanted = boot[0], boot[0].get("initializeParams", {})
    auto = bool(disk.get("autoDelete"))
    if source := disk.get("source", ""):
        name = source.rpartition("/")[2]
        if (zone, name) not in disks:
            raise errors.not_found(f"projects/{project}/zones/{zone}/disks/{name}")
        return existing(disks[zone, name], kind, gpu, gpus, auto)
    name = wanted.get("diskName") or body["name"]
    if (zone, name) in disks:  # attached, not made anew: compute_v1, AttachedDiskInitializeParams.disk_name
        return existing(disks[zone, name], kind, gpu, gpus, auto)
    image = find_image(wanted.get("sourceImage", ""), project)
    gigabytes = int(wanted.get("diskSizeGb") or disk.get("diskSizeGb") or image.gigabytes)
    if gigabytes < image.gigabytes:
        why = f"Requested disk size cannot be smaller than the image size ({image.gigabytes} GB)"
        raise errors.invalid("resource.disks[0].initializeParams.diskSizeGb", gigabytes, why)
    disk_type = check_disk_type(wanted.get("diskType", ""), kind, zone)
    return Plan(kind, gpu, gpus, name, disk_type, gigabytes, image, auto)


def existing(disk: Any, kind: MachineType, gpu: str, gpus: int, auto: bool) -> Plan:
    if disk.user:
        message = f"The disk resource '{disk.name}' is already being used by '{disk.user}'"
        raise errors.ApiError(400, "resourceInUseByAnotherResource", message)
    return Plan(kind, gpu, gpus, disk.name, disk.type, disk.gigabytes, None, auto)


def check_disk_type(url: str, kind: MachineType, zone: str) -> str:
    field = "resource.disks[0].initializeParams.diskType"
    if not url:
        return kind.default_disk
    match = re.search(r"(?:^|/)zones/([^/]+)/diskTypes/([^/]+)\Z", url)
    if not match or match[1] != zone:
        raise errors.invalid(field, url, "The URL is malformed.")
    if match[2] not in catalog.DISK_TYPES:
        raise errors.not_found(f"projects/p/zones/{zone}/diskTypes/{match[2]}")
    if kind.refuses(match[2]):
        raise errors.bad_request(f"[{match[2]}] features are not compatible for creating instance.")
    return match[2]


def find_image(url: str, project: str) -> Image:
    match = re.search(r"(?:^|projects/([^/]+)/)global/images/(family/)?([^/]+)\Z", url)
    if not match:
        field = "resource.disks[0].initializeParams.sourceImage"
        raise errors.invalid(field, url, "The URL is malformed.")
    owner = match[1] or project
    found = (catalog.family if match[2] else catalog.image)(owner, match[3])
    if not found:
        raise errors.not_found(f"projects/{owner}/global/images/{match[2] or ''}{match[3]}")
    return found


# --- scheduling


def check_scheduling(wanted: dict[str, Any], kind: MachineType, gpus: int, shortest: float) -> None:
    model = wanted.get("provisioningModel", "SPOT" if wanted.get("preemptible") else "STANDARD")
    limited = "maxRunDuration" in wanted or "terminationTime" in wanted
    check_limit(wanted, shortest)
    if model == "STANDARD" and kind.spot_only:
        why = f"Machine type {kind.name} can only be created with provisioning model SPOT or FLEX_START."
        raise errors.invalid("resource.scheduling.provisioningModel", model, why)
    if model == "FLEX_START" and "maxRunDuration" not in wanted:
        raise errors.invalid("resource.scheduling", model, "maxRunDuration is required for FLEX_START.")
    if model == "SPOT":
        check_spot(wanted)
    elif "preemptionNoticeDuration" in wanted:
        raise errors.invalid("resource.scheduling", model, "preemptionNoticeDuration is for SPOT only.")
    if "instanceTerminationAction" in wanted and not limited and model == "STANDARD":
        why = "Instance termination action is only for SPOT or time-limited instances."
        raise errors.invalid(
            "resource.scheduling.instanceTerminationAction", wanted["instanceTerminationAction"], why
        )
    if gpus and model != "SPOT" and wanted.get("onHostMaintenance") != "TERMINATE":
        raise errors.bad_request("Instances with guest accelerators do not support live migration.")
    check_local_ssd(wanted, kind, limited)


def check_limit(wanted: dict[str, Any], shortest: float) -> None:
    field = "resource.scheduling.maxRunDuration"
    if "maxRunDuration" in wanted and "terminationTime" in wanted:
        raise errors.invalid(field, "", "Only one of maxRunDuration and terminationTime may be set.")
    if "maxRunDuration" not in wanted and "terminationTime" not in wanted:
        return
    if "instanceTerminationAction" not in wanted:
        raise errors.invalid(
            "resource.scheduling", "", "instanceTerminationAction is required with a time limit."
        )
    if wanted.get("preemptible"):
        raise errors.invalid(
            "resource.scheduling.preemptible", "true", "Use provisioningModel SPOT with a limit."
        )
    if "maxRunDuration" in wanted:
        seconds = int(wanted["maxRunDuration"].get("seconds", 0))
        if not shortest <= seconds <= LONGEST:
            raise errors.invalid(field, seconds, f"Must be between {SHORTEST} and {LONGEST} seconds.")
        return
    try:
        seconds_of(wanted["terminationTime"])
    except ValueError:
        text = wanted["terminationTime"]
        raise errors.invalid("resource.scheduling.terminationTime", text, "Must be RFC3339.") from None


def check_spot(wanted: dict[str, Any]) -> None:
    if wanted.get("automaticRestart"):
        why = "Scheduling must have preemptible be false when AutomaticRestart is true."
        raise errors.invalid("resource.scheduling.automaticRestart", "true", why)
    if wanted.get("onHostMaintenance", "TERMINATE") != "TERMINATE":
        why = "Scheduling must have preemptible be false when OnHostMaintenance isn't TERMINATE."
        raise errors.invalid("resource.scheduling.onHostMaintenance", wanted["onHostMaintenance"], why)


def check_local_ssd(wanted: dict[str, Any], kind: MachineType, limited: bool) -> None:
    discard = wanted.get("onInstanceStopAction", {}).get("discardLocalSsd")
    field = "resource.scheduling.onInstanceStopAction.discardLocalSsd"
    if discard is not None and not kind.ssds:
        raise errors.invalid(field, discard, "Only allowed for instances with local SSD.")
    if limited and wanted.get("instanceTerminationAction") == "STOP" and kind.ssds and discard is None:
        raise errors.invalid(field, "", "Required to stop an instance with local SSD at its time limit.")
