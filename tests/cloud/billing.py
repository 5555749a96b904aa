"""The billing meter: what is paid for, whatever the API shows (D:instances/instance-lifecycle).

It is told when a machine starts and stops to cost money, and looks for itself whether the processes of a
machine that should have stopped are gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .clock import Clock
from .machines import Machine

MINUTE = 60.0  # the least that one start costs (D:vm-instance-pricing)


class Interval(NamedTuple):
    """From RUNNING until TERMINATED or deleted, in the cloud's time; `end` is None while it runs."""

    start: float
    end: float | None
    preempted: bool = False


@dataclass
class Disk:
    name: str
    gigabytes: int
    start: float
    end: float | None = None


class Meter:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._intervals: dict[str, list[Interval]] = {}
        self._machines: dict[str, list[Machine]] = {}
        self._disks: list[Disk] = []
        self.leaks: list[str] = []  # what was found alive behind a machine that should have ended

    # --- told by the cloud

    def began(self, name: str) -> None:
        assert name not in self.running(), f"{name} is started twice"
        self._intervals.setdefault(name, []).append(Interval(self._clock.now(), None))

    def booted(self, name: str, machine: Machine) -> None:
        self._machines.setdefault(name, []).append(machine)

    def ended(self, name: str, *, preempted: bool = False) -> None:
        if name in self.running():
            last = self._intervals[name][-1]
            self._intervals[name][-1] = Interval(last.start, self._clock.now(), preempted)
        if left := self.processes(name):
            self.leaks.append(f"{name} has ended and its processes {sorted(left)} have not")

    def disk_began(self, name: str, gigabytes: int) -> None:
        self._disks.append(Disk(name, gigabytes, self._clock.now()))

    def disk_ended(self, name: str) -> None:
        for disk in self._disks:
            if disk.name == name and disk.end is None:
                disk.end = self._clock.now()

    # --- asked by tests

    def intervals(self, name: str) -> list[Interval]:
        """One per start, over all machines that ever had this name."""
        with self._clock.changed:
            return list(self._intervals.get(name, ()))

    def running(self) -> list[str]:
        """The names that cost money now."""
        with self._clock.changed:
            return [name for name, found in self._intervals.items() if found and found[-1].end is None]

    def names(self) -> list[str]:
        """Of all machines that were ever billed."""
        return list(self._intervals)

    def seconds(self, name: str) -> float:
        """How long it ran, to the moment."""
        now = self._clock.now()
        return sum((now if end is None else end) - start for start, end, _ in self.intervals(name))

    def billed(self, name: str) -> float:
        """Seconds on the bill: at least a minute per start, nothing for one preempted within its first."""
        total, now = 0.0, self._clock.now()
        for start, end, preempted in self.intervals(name):
            ran = (now if end is None else end) - start
            total += 0.0 if preempted and ran < MINUTE else max(MINUTE, ran)
        return total

    def disks(self) -> list[str]:
        """The disks that cost money now."""
        with self._clock.changed:
            return [disk.name for disk in self._disks if disk.end is None]

    def disk_seconds(self, name: str) -> float:
        """GB seconds."""
        with self._clock.changed:
            now = self._clock.now()
            mine = [disk for disk in self._disks if disk.name == name]
            return sum(disk.gigabytes * ((disk.end or now) - disk.start) for disk in mine)

    def processes(self, name: str) -> set[int]:
        """What is alive of it on this computer, whatever the provider says."""
        return {pid for machine in self._machines.get(name, ()) for pid in machine.processes()}

    def check(self) -> None:
        """Fails if anything is alive that is not paid for, or ever was."""
        with self._clock.changed:
            paid = set(self.running())
            alive = {
                name: left for name in self._machines if name not in paid and (left := self.processes(name))
            }
        assert not alive, f"not billed, and still alive: {alive}"
        assert not self.leaks, self.leaks
