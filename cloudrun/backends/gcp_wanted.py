"""What VM_* ask for of Compute Engine. Pure: every problem is reported at once."""

from __future__ import annotations

import re
from typing import NamedTuple

from cloudrun.backends.gcp_shapes import Shape, image_family, resolve
from cloudrun.errors import UsageError

ZONES = "us-central1-a us-central1-b us-central1-c"
DISK_GB = 100
NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?\Z")
USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}\Z")
YES = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}


class Wanted(NamedTuple):
    """What VM_* ask for. `vm` is the name of the machine that is kept; empty: one for each attempt."""

    shape: Shape
    vm: str
    zones: list[str]
    spot: bool
    disk: int
    image: str


def wanted(vm: dict[str, str]) -> Wanted:
    """Raises UsageError with all that is wrong."""
    problems = []
    zones = vm.get("VM_ZONE", ZONES).replace(",", " ").split()
    problems += [
        f"VM_ZONE: {zone} is not a zone, such as us-central1-a" for zone in zones if zone.count("-") != 2
    ]
    name, disk = vm.get("VM_INSTANCE", ""), vm.get("VM_DISK", str(DISK_GB))
    if name and not NAME.match(name):
        problems.append(f"VM_INSTANCE={name}: at most 63 of a-z, 0-9 and -, beginning with a letter")
    if not disk.isdecimal() or not 10 <= int(disk) <= 65536:
        problems.append(f"VM_DISK={disk}: not a number of GB from 10 on")
    spot = YES.get(vm.get("VM_SPOT", "").lower())
    if spot is None:
        problems.append(f"VM_SPOT={vm['VM_SPOT']}: not 1 or 0")
    shape, image = Shape(""), vm.get("VM_IMAGE", "")
    try:
        shape = resolve(vm.get("VM_GPU", ""), vm.get("VM_TYPE", ""), bool(spot))
        image = image or image_family(shape)
    except UsageError as error:
        problems.append(str(error))
    if not USER.match(vm.get("VM_USER", "root")):
        problems.append(f"VM_USER={vm['VM_USER']}: at most 32 of a-z, 0-9, _ and -")
    if problems:
        raise UsageError("\n".join(problems))
    return Wanted(shape, name, zones, bool(spot), int(disk), image)
