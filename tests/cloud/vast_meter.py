"""What vast.ai bills: the GPU per second while it runs, the disk as long as the contract exists, bytes.

Sources: docs.vast.ai, "Billing" and "FAQ". Nothing of it is rounded, and nothing is billed while the host
is offline. Only the destruction of a contract ends its bill.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .clock import Clock
from .machines import Machine
from .vast_offers import MONTH

HOUR = 3600.0
GIGABYTE = 1e9  # prices are per GB


@dataclass
class Counter:
    """Seconds that are billed, in stretches."""

    done: list[tuple[float, float]] = field(default_factory=list)
    since: float | None = None

    def turn(self, on: bool, now: float) -> None:
        if on and self.since is None:
            self.since = now
        elif not on and self.since is not None:
            self.done.append((self.since, now))
            self.since = None

    def seconds(self, now: float) -> float:
        """Until then: `now` may be in the past."""
        stretches = [*self.done, *([(self.since, now)] if self.since is not None else [])]
        return sum(max(min(end, now) - start, 0.0) for start, end in stretches)


@dataclass
class Account:
    """One contract: its prices, and what was used."""

    offer: dict[str, Any]
    price: float  # dollars an hour for the GPU
    gigabytes: float
    created: float
    destroyed: float | None = None
    gpu: Counter = field(default_factory=Counter)
    disk: Counter = field(default_factory=Counter)
    down: float = 0.0  # bytes
    up: float = 0.0
    machines: list[Machine] = field(default_factory=list)

    def amounts(self, now: float) -> dict[str, float]:
        """Dollars, under the names that a charge has for them."""
        monthly = self.offer["storage_cost"] * self.gigabytes
        return {
            "gpu": self.gpu.seconds(now) * self.price / HOUR,
            "disk": self.disk.seconds(now) * monthly / (MONTH * HOUR),
            "bwd": self.down * self.offer["inet_down_cost"] / GIGABYTE,
            "bwu": self.up * self.offer["inet_up_cost"] / GIGABYTE,
        }


class Meter:
    """Ids of contracts are its names."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.accounts: dict[int, Account] = {}
        self.leaks: list[str] = []  # what was found alive behind a container that should have ended

    # --- told by the service

    def opened(self, contract: int, offer: dict[str, Any], price: float, gigabytes: float) -> None:
        self.accounts[contract] = Account(offer, price, gigabytes, self._clock.now())

    def bills(self, contract: int, *, gpu: bool, disk: bool) -> None:
        """From now on."""
        account, now = self.accounts[contract], self._clock.now()
        account.gpu.turn(gpu, now)
        account.disk.turn(disk, now)
        if not gpu and (left := self.processes(contract)):
            self.leaks.append(f"{contract} has ended and its processes {sorted(left)} have not")

    def closed(self, contract: int) -> None:
        self.bills(contract, gpu=False, disk=False)
        self.accounts[contract].destroyed = self._clock.now()

    def booted(self, contract: int, machine: Machine) -> None:
        self.accounts[contract].machines.append(machine)

    def traffic(self, contract: int, *, down: float = 0.0, up: float = 0.0) -> None:
        """Bytes into and out of the container, the image's too."""
        with self._clock.changed:
            account = self.accounts[contract]
            account.down, account.up = account.down + down, account.up + up

    # --- asked by tests

    def names(self) -> list[int]:
        """The ids of all contracts that were ever billed."""
        return list(self.accounts)

    def running(self) -> list[int]:
        """What costs money now, be it for a disk only."""
        with self._clock.changed:
            return [
                contract
                for contract, account in self.accounts.items()
                if account.gpu.since is not None or account.disk.since is not None
            ]

    def gpu_seconds(self, contract: int) -> float:
        with self._clock.changed:
            return self.accounts[contract].gpu.seconds(self._clock.now())

    def disk_seconds(self, contract: int) -> float:
        with self._clock.changed:
            return self.accounts[contract].disk.seconds(self._clock.now())

    def seconds(self, contract: int) -> float:
        """From its creation until it was destroyed: how long it cost anything at all."""
        with self._clock.changed:
            account = self.accounts[contract]
            return (account.destroyed or self._clock.now()) - account.created

    def cost_split(self, contract: int) -> dict[str, float]:
        """Dollars for `gpu`, `disk` and `traffic`."""
        with self._clock.changed:
            found = self.accounts[contract].amounts(self._clock.now())
        return {"gpu": found["gpu"], "disk": found["disk"], "traffic": found["bwd"] + found["bwu"]}

    def cost(self, contract: int) -> float:
        return sum(self.cost_split(contract).values())

    def total(self) -> float:
        return sum(self.cost(contract) for contract in self.names())

    def processes(self, contract: int) -> set[int]:
        """What is alive of it on this computer, whatever the provider says."""
        return {pid for machine in self.accounts[contract].machines for pid in machine.processes()}

    def check(self) -> None:
        """Fails if a process is alive in a container whose GPU is not paid for, or ever was."""
        with self._clock.changed:
            alive = {
                contract: left
                for contract, account in self.accounts.items()
                if account.gpu.since is None and (left := self.processes(contract))
            }
        assert not alive, f"not billed, and still alive: {alive}"
        assert not self.leaks, self.leaks
