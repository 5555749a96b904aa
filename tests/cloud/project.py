"""One Google Cloud project: its instances, disks and operations, and how long things take."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .billing import Meter
from .clock import Clock, rfc3339
from .faults import Faults
from .operations import Operations, number
from .quotas import Quotas
from .tokens import Tokens

if TYPE_CHECKING:
    from .instances import Instance


@dataclass(frozen=True)
class Timing:
    """Seconds of the cloud's clock, short by default. `real()` has what was measured or is documented."""

    provisioning: float = 0.05
    staging: float = 0.05
    boot: float = 0.2  # from RUNNING until the startup script starts
    stopping: float = 0.05  # from the guest's end until TERMINATED
    deleting: float = 0.05
    changing: float = 0.02  # setLabels, setMetadata
    repairing: float = 0.2
    guest_standard: float = 4.0  # the guest's time after the power button (D:instances/spot)
    guest_spot: float = 2.0
    guest_stop: float = 3.0  # the guest's own patience when it shuts itself down
    maintenance_notice: float = 0.5
    wait: float = 2.0  # how long operations.wait blocks
    limit_late: float = 0.0  # after terminationTimestamp; up to 30 s (D:instances/limit-vm-runtime)
    shortest_run: float = 30.0  # least maxRunDuration; lower it for tests of short runs

    @classmethod
    def real(cls) -> Timing:
        return cls(5.0, 5.0, 20.0, 5.0, 10.0, 1.0, 60.0, 120.0, 30.0, 90.0, 3600.0, 120.0, 30.0, 30.0)


@dataclass
class Disk:
    """Lies in a directory of this computer and outlives its instances."""

    zone: str
    name: str
    type: str
    gigabytes: int
    image: str
    labels: dict[str, str]
    created: float
    folder: Path
    user: str = ""  # URL of the instance that has it

    def view(self, root: str) -> dict[str, Any]:
        place = f"{root}/zones/{self.zone}"
        shown: dict[str, Any] = {
            "kind": "compute#disk",
            "id": number(root, self.zone, self.name, self.created),
            "name": self.name,
            "zone": place,
            "type": f"{place}/diskTypes/{self.type}",
            "sizeGb": str(self.gigabytes),
            "status": "READY",
            "creationTimestamp": rfc3339(self.created),
            "labels": self.labels,
            "selfLink": f"{place}/disks/{self.name}",
        }
        if self.image:
            shown["sourceImage"] = self.image
        if self.user:
            shown["users"] = [self.user]
        return shown


@dataclass
class Project:
    """`root`: URL under which its resources name themselves. All changes hold `clock.changed`."""

    name: str
    root: str
    folder: Path
    clock: Clock
    timing: Timing
    tokens: Tokens
    faults: Faults
    real_machines: bool = True
    number: str = "123456789012"
    user: str = "user@example.com"
    guest_environ: dict[str, str] = field(default_factory=dict)
    instances: dict[tuple[str, str], Instance] = field(default_factory=dict)
    disks: dict[tuple[str, str], Disk] = field(default_factory=dict)
    started: Callable[[Any], None] = lambda machine: None  # told of every machine that boots

    def __post_init__(self) -> None:
        self.meter = Meter(self.clock)
        self.operations = Operations(self.clock, self.root)
        self.quotas = Quotas()

    @property
    def service_account(self) -> str:
        return f"{self.number}-compute@developer.gserviceaccount.com"

    def make_disk(
        self, zone: str, name: str, kind: str, gigabytes: int, image: str, labels: dict[str, str]
    ) -> Disk:
        folder = self.folder / "disks" / f"{zone}.{name}"
        disk = Disk(zone, name, kind, gigabytes, image, labels, self.clock.now(), folder)
        self.disks[zone, name] = disk
        self.meter.disk_began(name, gigabytes)
        return disk

    def remove_disk(self, disk: Disk) -> None:
        del self.disks[disk.zone, disk.name]
        self.meter.disk_ended(disk.name)
        erase(disk.folder)


def erase(folder: Path) -> None:
    """An overlay leaves directories that nobody may read, not even their owner."""
    for top, names, _ in os.walk(folder):
        for path in (os.path.join(top, name) for name in names):
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
