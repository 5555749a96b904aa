"""What machines of Compute Engine leave: disks that nobody uses, and Google's own word of how they ended."""

from __future__ import annotations

import time
from contextlib import suppress

from cloudrun.backends import Instance
from cloudrun.backends.gcp_api import Compute
from cloudrun.backends.gcp_vm import KEPT, RUN, is_kept, is_ours, of_a_disk, seconds_of_google
from cloudrun.backends.gcp_wire import ApiError, View

OURS = f"(labels.{RUN}:*) OR (labels.{KEPT}:*)"
NEW_SECONDS = 600.0  # in which a disk may wait for the machine that is made with it
TAKEN = "compute.instances.preempted"
ENDS = (
    *("delete", "stop", TAKEN, "compute.instances.guestTerminate"),
    *("compute.instances.hostError", "compute.instances.terminateOnHostMaintenance"),
)


class Left:
    """Of one project."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._disks: dict[str, tuple[str, str]] = {}  # zone and name, by the name that we gave the machine

    def disks(self) -> list[Instance]:
        """Those of ours that no machine uses; from then on they are known by name. Raises ApiError."""
        listed, found = self._compute.listed(OURS, "disks"), []
        for zone, disk in listed:
            age = time.time() - (seconds_of_google(disk.creation_timestamp) or 0.0)
            if not disk.users and (is_kept(disk) or is_ours(disk)) and age > NEW_SECONDS:
                found.append(of_a_disk(disk))
                self._disks[found[-1].name] = zone, disk.name
        return found

    def disk(self, name: str) -> Instance | None:
        """As it is now; None if it is not there, or in use."""
        with suppress(KeyError):
            zone, disk = self._disks[name]
            try:
                now = self._compute.read(f"zones/{zone}/disks/{disk}")
            except ApiError as error:
                if error.code != 404:
                    raise
                return None
            return None if now.users else of_a_disk(now)
        return None

    def delete(self, name: str) -> None:
        """Unless it is gone, in use by now, or was to be kept. Raises ApiError."""
        found = self.disk(name)
        if found and found.leftover:
            zone, disk = self._disks[name]
            self._compute.change("delete_unary", zone, kind="Disks", disk=disk)

    def by_hand(self, name: str) -> str:
        """The command that deletes this disk; empty if there is none."""
        zone, disk = self._disks.get(name, ("", ""))
        project = self._compute.project
        return f"gcloud compute disks delete {disk} --zone={zone} --project={project}" if disk else ""

    def taken_away(self, zones: list[str], vm: str, since: float) -> bool:
        operations = (each for zone in zones for each in self._of(zone, vm, TAKEN))
        return any((seconds_of_google(each.insert_time) or 0.0) >= since for each in operations)

    def ended(self, zones: list[str], vm: str, name: str, last: Instance | None) -> Instance | None:
        """A machine of one attempt that is gone, as operations tell it; `last`: as it was seen last."""
        if last and last.ended is not None:  # what was off had only its disk to lose
            return last._replace(leftover=False)
        for zone in zones:
            done = [each for each in self._of(zone, vm, "insert", *ENDS) if not each.error.errors]
            when = [(seconds_of_google(each.end_time), each.operation_type) for each in done]
            starts = [at for at, kind in when if at and kind == "insert"]
            ends = [at for at, kind in when if at and kind != "insert"]
            if ends and last:
                return last._replace(alive=False, ended=min(ends))
            if ends and starts:
                run, _, attempt = name.rpartition("-")
                return Instance(name, run, int(attempt), "", starts[0], alive=False, ended=min(ends))
        return None

    def _of(self, zone: str, vm: str, *kinds: str) -> list[View]:
        found = self._compute.operations(zone, *kinds)
        return [each for each in found if each.target_link.endswith("/instances/" + vm)]
