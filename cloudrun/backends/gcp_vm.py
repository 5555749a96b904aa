"""What an instance of Compute Engine is to us: whose machine, since when, at what price. Pure."""

from __future__ import annotations

import math
import re
import time
from datetime import datetime
from typing import Any

from cloudrun.backends import Boot, Instance
from cloudrun.backends.gcp_prices import disk_per_month
from cloudrun.backends.gcp_prices import price as known_price
from cloudrun.backends.gcp_shapes import Shape, resolve
from cloudrun.errors import UsageError
from cloudrun.formats import seconds_of, timestamp

RUN, ATTEMPT, ENDS, KEPT, BEFORE = (
    f"cloudrun-{word}" for word in ("run", "attempt", "ends", "kept", "before")
)

PRICE = "cloudrun-price"  # in the metadata: a label has no dot
AMOUNT = re.compile(r"\d{1,6}(\.\d{1,9})?\Z")
TAKEN = "cloudrun-taken"
TAKE_SECONDS = 300.0  # in which who has taken a machine has started it


def is_ours(vm: Any) -> bool:
    """Whether all that we would have to know of it stands in its labels; anybody may set some of them."""
    return RUN in vm.labels and all(_number(vm.labels.get(label, "")) for label in (ATTEMPT, ENDS))


def is_kept(vm: Any) -> bool:
    return bool(vm.labels.get(KEPT) == "yes")


def is_spot(vm: Any) -> bool:
    return bool(vm.scheduling.provisioning_model == "SPOT")


def is_being_taken(vm: Any) -> bool:
    """By another run: its labels are set, and it was not started since."""
    stopped = str(int(seconds_of_google(vm.last_stop_timestamp) or 0))
    age = time.time() - _number(vm.labels.get(TAKEN, ""))
    return vm.labels.get(BEFORE) == stopped and -TAKE_SECONDS < age < TAKE_SECONDS


def described(zone: str, vm: Any) -> Instance:
    run, attempt = vm.labels.get(RUN, ""), vm.labels.get(ATTEMPT, "0")
    started, stopped = (seconds_of_google(when) for when in (vm.last_start_timestamp, vm.last_stop_timestamp))
    started = started or seconds_of_google(vm.creation_timestamp) or time.time()
    ended = None
    if vm.status == "TERMINATED":
        ended = stopped or time.time()
        if str(int(ended)) == vm.labels.get(BEFORE):  # taken, and never started since
            started = ended
    return Instance(
        name=f"{run}-{attempt}",
        run=run,
        attempt=_number(attempt),
        deadline=timestamp(_number(vm.labels.get(ENDS, ""))),
        started=started,
        alive=vm.status != "TERMINATED" or is_being_taken(vm),  # who follows its run has to wait
        ended=ended,
        leftover=ended is not None and not is_kept(vm),
        price=price_of(zone, vm),
        kept=is_kept(vm),
        parked=parked_words(vm) if ended is not None and is_kept(vm) else "",
    )


def amount(price: float | None) -> str:
    return "" if price is None else f"{price:.6f}"


def price_of(zone: str, vm: Any) -> float | None:
    """US dollars per hour, as whoever rented it was told; who looks may have set another price since."""
    said = metadata_of(vm).get(PRICE, "")
    return float(said) if AMOUNT.match(said) else known_price(shape_of(vm), zone, is_spot(vm))


def _number(text: str) -> int:
    """Of a label, which anybody may have set."""
    return int(text) if text.isdecimal() and len(text) < 11 else 0


def parked_words(vm: Any) -> str:
    size = sum(disk.disk_size_gb for disk in vm.disks)
    # The kind of a disk is not told here; what a machine is made with is what its shape needs.
    return f"{vm.name} is parked, its disk costs {_monthly(shape_of(vm).disk_type, size)}"


def _monthly(kind: str, gigabytes: int) -> str:
    cost = disk_per_month(kind, gigabytes)
    return f"{'what is not known' if cost is None else f'about {cost:.2f} USD'} a month"


def of_a_disk(disk: Any) -> Instance:
    """One that no machine uses, as a machine that has ended."""
    run, attempt = disk.labels.get(RUN, ""), disk.labels.get(ATTEMPT, "0")
    zone, kind = (url.rpartition("/")[2] for url in (disk.zone, disk.type))
    made = seconds_of_google(disk.creation_timestamp) or time.time()
    return Instance(
        name=disk.name if is_kept(disk) else f"{run}-{attempt}",
        run=run or disk.name,
        attempt=_number(attempt),
        deadline=timestamp(_number(disk.labels.get(ENDS, ""))),
        started=made,
        alive=False,
        ended=made,
        leftover=not is_kept(disk),
        parked=f"the disk {disk.name} in {zone}, which nobody uses and costs {_monthly(kind, disk.size_gb)}",
        kept=is_kept(disk),
    )


def gce_name(name: str) -> str:
    """The name of an attempt's machine: at most 63 of a-z, 0-9 and -, beginning with a letter."""
    project, *rest = name.rsplit("-", 4)
    tail = "-".join(["", *rest])
    head = re.sub(r"[^a-z0-9]", "-", project)
    head = head if head[:1].isalpha() else "run-" + head
    return head[: 63 - len(tail)] + tail


def labels_of(boot: Boot, *, kept: bool) -> dict[str, str]:
    ends = str(math.ceil(seconds_of(boot.deadline)))
    labels = {RUN: boot.run, ATTEMPT: str(boot.attempt), ENDS: ends}
    return {**labels, KEPT: "yes"} if kept else labels


def metadata_of(vm: Any) -> dict[str, str]:
    return {item.key: item.value for item in vm.metadata.items}


def shape_of(vm: Any) -> Shape:
    """The shape of a machine that is there, as `resolve` would have it."""
    machine_type = vm.machine_type.rpartition("/")[2]
    attached = [each for each in vm.guest_accelerators if machine_type.startswith("n1-")]
    gpu = ""
    if attached:
        gpu = f"{attached[0].accelerator_type.rpartition('/')[2]}:{attached[0].accelerator_count}"
    try:
        return resolve(gpu, machine_type, True)
    except UsageError:
        return Shape(machine_type)


def seconds_of_google(text: str) -> float | None:
    """RFC 3339 with an offset, as Compute Engine writes it; None for no time."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() if text else None
