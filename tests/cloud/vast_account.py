"""One account of vast.ai and the market it rents on: offers, contracts, credit, and how long things take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .clock import Clock
from .faults import Faults
from .server import Reply, json_reply
from .vast_contract import Contract
from .vast_errors import no_such_instance
from .vast_meter import HOUR, Meter
from .vast_offers import MONTH, catalogue


@dataclass(frozen=True)
class VastTiming:
    """Seconds of the clock, short by default. `real()` has what is documented or was seen in the field."""

    provisioning: float = 0.04  # actual_status null, then created
    pull: float = 0.05  # loading
    boot: float = 0.05  # from running until ssh has a port and onstart starts
    stop: float = 0.05
    destroy: float = 0.05
    throttle_scale: float = 0.0  # 1.0: the least time between two calls that the service has

    @classmethod
    def real(cls) -> VastTiming:
        return cls(10.0, 60.0, 10.0, 2.0, 2.0, 1.0)


@dataclass
class Instead:
    """This is answered and nothing is done: a destroy that is ignored, a list that is empty."""

    value: Any
    status: int = 200

    def around(self, faults: Faults, request: Any, perform: Callable[[], Reply]) -> Reply:
        return json_reply(self.value, self.status)


NOTHING_RUNS = Instead(
    {
        "success": True,
        "instances": [],
        "instances_found": 0,
        "total_instances": 0,
        "label_counts": {},
        "next_token": None,
    }
)


@dataclass
class VastFaults(Faults):
    """Sets name machines, by machine_id; `appear_after` has patterns of labels."""

    stuck: set[int] = field(default_factory=set)  # what is destroyed there stays, and is billed
    offline: set[int] = field(default_factory=set)  # containers whose every call to the API breaks
    isolated: set[int] = field(default_factory=set)  # containers without any network
    stuck_loading: set[int] = field(default_factory=set)  # their containers never leave `loading`
    broken: dict[int, str] = field(default_factory=dict)  # the daemon's error, in status_msg
    taken: set[int] = field(default_factory=set)  # their GPUs are let to somebody else
    unfiltered: set[str] = field(default_factory=set)  # fields whose filters do nothing
    nulls: set[str] = field(default_factory=set)  # fields of an instance that are shown as null
    absent: set[str] = field(default_factory=set)  # fields of an instance that are not shown by id
    keyless: set[int] = field(default_factory=set)  # their containers have no CONTAINER_API_KEY
    booked_late: float = 0.0  # seconds after which a use shows in the charges (assumed: docs are silent)
    bad_key: int = 401  # or 404
    taken_status: int = 410  # of no_such_ask: 400 and 404 were seen too
    spend_limit: bool = False

    def clear(self) -> None:
        super().clear()
        for each in (self.stuck_loading, self.broken, self.taken, self.keyless):
            each.clear()
        for each in (self.unfiltered, self.nulls, self.absent):
            each.clear()
        self.spend_limit, self.booked_late = False, 0.0
        self.bad_key, self.taken_status = 401, 410


@dataclass
class Market:
    """All changes hold `clock.changed`."""

    folder: Path
    clock: Clock
    timing: VastTiming
    key: str
    real_machines: bool = True
    offers: list[dict[str, Any]] = field(default_factory=catalogue)
    contracts: dict[int, Contract] = field(default_factory=dict)
    faults: VastFaults = field(default_factory=VastFaults)
    image_bytes: float = 3e9  # what a pull costs in traffic
    ssh_keys: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    started: Callable[[Any], None] = lambda machine: None  # told of every container that boots
    # How a scheduled job calls the API: verb, path, body.
    call: Callable[[str, str, Any], Reply] = lambda verb, path, body: Reply(500)

    def __post_init__(self) -> None:
        self.meter = Meter(self.clock)
        self._paid_in = 25.0
        self._watch = 0

    # --- money

    @property
    def credit(self) -> float:
        """Dollars left; falls while anything is billed."""
        with self.clock.changed:
            return self._paid_in - self.meter.total()

    @credit.setter
    def credit(self, dollars: float) -> None:
        with self.clock.changed:
            self._paid_in = dollars + self.meter.total()
            self.watch_credit()

    def rate(self) -> float:
        """Dollars a second, at this moment."""
        hourly = 0.0
        for each in self.meter.accounts.values():
            hourly += each.price if each.gpu.since is not None else 0.0
            disk = each.offer["storage_cost"] * each.gigabytes / MONTH
            hourly += disk if each.disk.since is not None else 0.0
        return hourly / HOUR

    def watch_credit(self) -> None:
        """Without credit every container is stopped; the disks go on into the negative."""
        self._watch += 1
        watch, rate = self._watch, self.rate()

        def due() -> None:
            if watch == self._watch:
                for each in self.contracts.values():
                    if each.paid or each.intended == "running":
                        each.stop()

        if rate and any(each.paid for each in self.contracts.values()):
            self.clock.after(max(0.0, self.credit) / rate, due)

    # --- renting

    def contract(self, number: int) -> Contract:
        found = self.contracts.get(number)
        if found is None or found.gone:
            raise no_such_instance(number)
        return found

    def find(self, offer: int) -> dict[str, Any] | None:
        """An offer that can be had."""
        return next((each for each in self.offers if each["id"] == offer and each["rentable"]), None)

    def rent(self, offer: dict[str, Any], order: dict[str, Any]) -> Contract:
        offer["rentable"], offer["rented"] = False, True
        number = max(self.contracts, default=31_000_000) + 7
        contract = self.contracts[number] = Contract(self, number, dict(offer), order)
        return contract

    def let_again(self, contract: Contract) -> None:
        """A machine that is free again is offered under another number (assumed)."""
        number = max(each["id"] for each in self.offers) + 1000 if self.offers else contract.id
        for each in self.offers:
            if each["id"] == contract.offer["id"]:
                again = {**each, "id": number, "ask_contract_id": number, "rentable": True, "rented": False}
                self.offers.append(again)
                return
