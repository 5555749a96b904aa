"""The life of an instance: states, limits, preemption, and the machine behind it.

Sources: D:instances/instance-lifecycle, D:instances/limit-vm-runtime, D:instances/spot.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import catalog, errors
from .checks import Plan
from .clock import seconds_of
from .machines import Gpu, Hardware, Machine
from .metadata import MetadataServer
from .operations import Operation, number
from .project import Disk, Project
from .server import Server

BEFORE_RUNNING = ("PROVISIONING", "STAGING")


class Instance:
    """`body` holds what the user ordered. Every method is called under `project.clock.changed`."""

    def __init__(self, project: Project, zone: str, body: dict[str, Any], plan: Plan, disk: Disk) -> None:
        self.project, self.zone, self.body, self.plan, self.disk = project, zone, body, plan, disk
        self.name: str = body["name"]
        self.created = project.clock.now()
        self.id = number(zone, self.name, self.created)
        self.visible_at = self.created + project.faults.delay_of(self.name)
        self.status = "PROVISIONING"
        self.message = ""
        self.starts = 0
        self.last_start: float | None = None
        self.last_stop: float | None = None
        self.limit: float | None = None  # resourceStatus.scheduling.terminationTimestamp
        self.address = ""
        self.preempted = False
        self.maintenance = "NONE"
        self.attributes: dict[str, dict[str, str]] = {}  # guest attributes
        self.machine: Machine | None = None
        self.gone = False
        self._life = 0  # what was to happen later in an earlier life does not happen
        self._doomed = False  # deleted as soon as it is TERMINATED
        self._restart = False  # by the provider, after it lost the machine
        self._resetting = False
        self._waiting: list[Operation] = []  # done when it is TERMINATED
        self.starting: Operation | None = None
        self.server = Server(MetadataServer(self).answer)
        disk.user = self.link

    # --- what it is

    @property
    def link(self) -> str:
        return f"{self.project.root}/zones/{self.zone}/instances/{self.name}"

    @property
    def resource(self) -> str:
        return f"projects/{self.project.name}/zones/{self.zone}/instances/{self.name}"

    @property
    def scheduling(self) -> dict[str, Any]:
        wanted: dict[str, Any] = self.body.setdefault("scheduling", {})
        return wanted

    @property
    def spot(self) -> bool:
        return self.scheduling.get("provisioningModel") == "SPOT" or bool(self.scheduling.get("preemptible"))

    @property
    def restarts(self) -> bool:
        """By the provider, when it has lost or needs the host."""
        return bool(self.scheduling.get("automaticRestart", not self.spot))

    @property
    def metadata(self) -> dict[str, str]:
        return {item["key"]: item.get("value", "") for item in self.body.get("metadata", {}).get("items", ())}

    @property
    def account(self) -> str:
        """The service account's address, or nothing."""
        accounts = self.body.get("serviceAccounts") or [{"email": ""}]
        email: str = accounts[0]["email"]
        return self.project.service_account if email == "default" else email

    @property
    def guest_seconds(self) -> float:
        timing = self.project.timing
        return timing.guest_spot if self.spot else timing.guest_standard

    @property
    def visible(self) -> bool:
        return self.project.clock.now() >= self.visible_at

    @property
    def _folder(self) -> Path:
        return self.project.folder / "machines" / f"{self.id}-{self.starts}"

    @property
    def console(self) -> Path:
        """Of its last start."""
        return self._folder / "console"

    # --- coming up

    def provision(self, operation: Operation) -> None:
        self.status, self.message, self.starting = "PROVISIONING", "", operation
        self._later(self.project.timing.provisioning, self._stage)

    def _stage(self) -> None:
        others = [each for each in self.project.instances.values() if each is not self]
        if failure := self.project.quotas.problem(self, others):
            self._refuse(failure)
            return
        self.status = "STAGING"
        self._later(self.project.timing.staging, self._run)

    def _refuse(self, failure: errors.Failure) -> None:
        """A new instance vanishes with its new disk; one that had been there is TERMINATED again."""
        operation, self.starting = self.starting, None
        if self.starts == 0:
            self._remove()
        else:
            self.status, self.message = "TERMINATED", failure[2]["message"]
        if operation:
            self.project.operations.finish(operation, failure)

    def _run(self) -> None:
        project = self.project
        self.status, self.last_start = "RUNNING", project.clock.now()
        self.starts += 1
        self.preempted, self.maintenance = False, "NONE"
        project.meter.began(self.name)
        self.address = address_of(self.id, self.starts)
        self._arm()
        if self.starting:
            project.operations.finish(self.starting)
        self.starting = None
        self._later(project.timing.boot, self._boot)

    def _arm(self) -> None:
        wanted = self.scheduling
        assert self.last_start is not None
        if "maxRunDuration" in wanted:
            self.limit = self.last_start + int(wanted["maxRunDuration"]["seconds"])
        elif "terminationTime" in wanted:
            self.limit = seconds_of(wanted["terminationTime"])
        if self.limit is not None:
            late = self.project.timing.limit_late
            self._later(self.limit + late - self.project.clock.now(), self._reach_limit)

    def _boot(self) -> None:
        project = self.project
        if self.status != "RUNNING" or self.machine or not project.real_machines:
            return
        gpu = catalog.GPUS.get(self.plan.gpu)
        host = f"127.0.0.1:{self.server.port}"
        hardware = Hardware(
            self.name,
            Gpu(gpu.card, gpu.memory, self.plan.gpus) if gpu else None,
            {"GCE_METADATA_HOST": host, "GCE_METADATA_IP": host, **project.guest_environ},
            project.timing.guest_stop,
            network=self.name not in project.faults.isolated,
            lacks=tuple(project.faults.lacking),
        )
        self.machine = Machine(self._folder, self.disk.folder, hardware, self._machine_ended)
        project.started(self.machine)
        project.meter.booted(self.name, self.machine)

    # --- going down

    def stop(self, operation: Operation) -> None:
        self._shut_down(operation, delete=False)

    def delete(self, operation: Operation) -> None:
        if self.status == "STOPPING":
            self._doomed = True
            self._waiting.append(operation)
        elif self.status == "TERMINATED":
            self._doomed = True
            self._waiting.append(operation)
            self.status = "STOPPING"
            self._later(self.project.timing.deleting, self._terminated)
        elif self.status in BEFORE_RUNNING:
            self._abandon(operation)
        else:
            self._shut_down(operation, delete=True)

    def _abandon(self, operation: Operation) -> None:
        """Deleted before it ever ran."""
        if self.starting:
            gone = errors.failed("RESOURCE_NOT_FOUND", 404, "NOT FOUND", f"'{self.resource}' was not found")
            self.project.operations.finish(self.starting, gone)
        self._remove()
        self.project.operations.finish(operation)

    def _shut_down(self, operation: Operation, *, delete: bool, cut: bool = False) -> None:
        """Press the power button, and take the power away when the guest's time is over."""
        if self.status == "REPAIRING":  # no restart any more
            self._life += 1
            self._restart = False
        self.status = "STOPPING"
        self._doomed |= delete
        if operation not in self._waiting:
            self._waiting.append(operation)
        if not self.machine or not self.machine.alive:
            self._later(self.project.timing.stopping, self._terminated)
        elif cut or self.scheduling.get("skipGuestOsShutdown"):
            self.machine.cut()
        else:
            self.machine.soft_off()
            self._later(self.guest_seconds, self._cut)

    def _cut(self) -> None:
        if self.machine:
            self.machine.cut()

    def _machine_ended(self, machine: Machine, how: str) -> None:
        with self.project.clock.changed:
            if machine is not self.machine:
                return
            timing = self.project.timing
            if self.status == "STOPPING":
                self.machine = None
                self._later(timing.stopping, self._terminated)
            elif how == "reboot" or self._resetting:
                self.machine, self._resetting = None, False
                self._later(timing.boot, self._boot)
            elif how == "poweroff":
                self.machine = None
                done = self._note("guestTerminate", "Instance terminated by guest OS shutdown.")
                self._shut_down(done, delete=False)
            # After a crash nothing runs any more, and the instance stays RUNNING and is billed.
            self.project.clock.changed.notify_all()

    def _terminated(self) -> None:
        if self.name in self.project.faults.stuck:
            self._later(0.02, self._terminated)
            return
        self._life += 1
        self.project.meter.ended(self.name, preempted=self.preempted)
        self.status, self.address, self.limit = "TERMINATED", "", None
        self.last_stop = self.project.clock.now()
        waiting, self._waiting = self._waiting, []
        if self._doomed:
            self._remove()
        for operation in waiting:
            self.project.operations.finish(operation)
        if self._restart and not self.gone:
            self.status, self._restart = "REPAIRING", False
            self._later(self.project.timing.repairing, self._restore)

    def _restore(self) -> None:
        self.starting = self._note("automaticRestart", "Instance automatically restarted by Compute Engine.")
        self._run()

    def _remove(self) -> None:
        self._life += 1
        self.gone = True
        self.disk.user = ""
        del self.project.instances[self.zone, self.name]
        if self.plan.auto_delete:
            self.project.remove_disk(self.disk)
        self.server.stop_listening()

    # --- what the provider does by itself

    def _reach_limit(self) -> None:
        if self.status == "RUNNING":
            action = self.scheduling["instanceTerminationAction"]
            operation = self._note(action.lower(), "Instance reached its time limit.")
            self._shut_down(operation, delete=action == "DELETE")

    def preempt(self) -> None:
        """Metadata first, then the power button, then STOP or DELETE (D:instances/spot)."""
        self.preempted = True
        notice = int(self.scheduling.get("preemptionNoticeDuration", {}).get("seconds", 0))
        delete = self.scheduling.get("instanceTerminationAction") == "DELETE"
        self._announce("preempted", "Instance was preempted.", notice, delete)

    def maintain(self) -> None:
        """A host event: spot instances are preempted, others are told before."""
        if self.spot:
            self.preempt()
            return
        self.maintenance = "TERMINATE_ON_HOST_MAINTENANCE"
        self._restart = self.restarts
        notice = self.project.timing.maintenance_notice
        self._announce("terminateOnHostMaintenance", "Instance terminated during maintenance.", notice, False)

    def _announce(self, kind: str, message: str, notice: float, delete: bool) -> None:
        operation = self._note(kind, message)
        self._waiting.append(operation)  # already: the guest may go before its time
        self._later(notice, lambda: self._shut_down(operation, delete=delete))
        self.project.clock.changed.notify_all()

    def host_error(self) -> None:
        """The host is lost at once. A restart comes back with the same disk, and boots as ever."""
        self._restart = self.restarts
        operation = self._note("hostError", "Instance terminated by Compute Engine: host error.")
        self._shut_down(operation, delete=False, cut=True)

    def reset(self, operation: Operation) -> None:
        self.blink()
        self.project.operations.finish(operation)

    def blink(self) -> None:
        """No power for a moment; RUNNING all the time."""
        if self.machine:
            self._resetting = True
            self.machine.cut()

    def _note(self, kind: str, message: str) -> Operation:
        """An operation of the system's own."""
        full = kind if kind in ("stop", "delete") else f"compute.instances.{kind}"
        operation = self.project.operations.start(full, self.zone, self.link, self.id, "system")
        operation.message = message
        return operation

    def _later(self, seconds: float, act: Callable[[], Any]) -> None:
        life = self._life

        def due() -> None:
            if life == self._life:
                act()

        self.project.clock.after(seconds, due)


def address_of(identity: str, start: int) -> str:
    """An ephemeral address out of the documentation range, another one at each start."""
    return f"203.0.113.{(int(identity) + start) % 254 + 1}"
