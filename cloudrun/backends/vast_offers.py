"""Which vast.ai offers a run may take, and which of them is the best. Pure; fields as the search has them.

Prices: dph_base is the GPU, USD/h; storage_cost USD per GB and month of 720 h; inet_*_cost USD per GB. The
service's own filters are sometimes ignored, so that every bound is checked here once more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cloudrun.errors import UsageError

DEFAULT_GPU = "RTX 4090"
DEFAULT_IMAGE = "pytorch/pytorch:2.7.1-cuda12.8-cudnn9-runtime"
IMAGE_GB = 4.5  # of any image as it is pulled: no registry is asked; unpacked it has UNPACKED times as much
UNPACKED = 2.5
LEAST_DISK_GB, SPARE_GB = 20, 5
MONTH = 720.0  # hours
EGRESS = 0.12  # USD per GB from Cloud Storage to the internet (Google's list price, from memory)
GB = 1e9
RELIABILITY = 0.95
DOWN, UP = 100.0, 20.0  # Mbit/s
MOST = 5  # hosts that a run may try
KINDS = ("sxm", "sxm4", "sxm5", "sxm6", "nvl", "pcie", "ws", "s")  # of one GPU, for who did not say which
CUDA = re.compile(r"cu(?:da)?[-:]?(1\d)\.?(\d)")


class Wanted(NamedTuple):
    """What VM_GPU, VM_DISK and VAST_IMAGE ask for. `memory` in GB of one GPU, `disk` in GB; 0: any."""

    gpu: str
    gpus: int
    memory: int
    image: str
    disk: int

    @property
    def cuda(self) -> float:
        """The CUDA version of the image, as its name or its tag says; 0 if neither does."""
        found = CUDA.search(self.image.rpartition("/")[2])
        return float(f"{found[1]}.{found[2]}") if found else 0.0


class Load(NamedTuple):
    """What a run moves and how long it may take: GB in and out, seconds; `most` USD if there is a cap."""

    gb_in: float
    gb_out: float
    seconds: float
    most: float | None = None


def wanted(vm: Mapping[str, str]) -> Wanted:
    """Raises UsageError with all that is wrong."""
    problems = []
    gpu, _, number = (vm.get("VM_GPU") or DEFAULT_GPU).partition(":")
    if _plain(gpu) in ("none", ""):
        problems.append(f"VM_GPU={vm['VM_GPU']}: vast.ai lets machines with a GPU; gcp and local do without")
    if number and not (number.isdecimal() and 0 < int(number) <= 16):
        problems.append(f"VM_GPU={vm['VM_GPU']}: not a GPU and how many of it, such as RTX_4090 or T4:2")
    disk = vm.get("VM_DISK", "")
    if disk and not (disk.isdecimal() and 8 <= int(disk) <= 65536):
        problems.append(f"VM_DISK={disk}: not a number of GB from 8 on")
    image = vm.get("VAST_IMAGE") or DEFAULT_IMAGE
    if ":" not in image.rpartition("/")[2] or len(image) > 1024 or image.split() != [image]:
        problems.append(f"VAST_IMAGE={image}: not an image with its tag, such as {DEFAULT_IMAGE}")
    if problems:
        raise UsageError("\n".join(problems))
    memory = re.search(r"(?i)[-_ ](\d+) ?gb$", gpu)
    name = gpu[: memory.start()] if memory else gpu
    return Wanted(name, int(number or 1), int(memory[1]) if memory else 0, image, int(disk or 0))


def names_of(gpu: str, known: Iterable[str]) -> list[str]:
    """What vast.ai calls this GPU, whatever its form factor. Raises UsageError if it is not among `known`."""
    known = sorted(known)
    plain = _plain(gpu)
    exact = [name for name in known if _plain(name) == plain]
    kinds = [name for name in known if _plain(name).removesuffix(_kind(name)) == plain]
    found = sorted({*exact, *kinds}) or [name for name in known if _plain(name) == "rtx" + plain]
    if not found:
        raise UsageError(f"VM_GPU={gpu}: vast.ai lets no such GPU now; it has {', '.join(known)}")
    return found


def _plain(name: str) -> str:
    """`NVIDIA GeForce RTX 4090`, `RTX_4090` and `rtx4090` are one."""
    letters = "".join(letter for letter in name.lower() if letter.isalnum())
    for maker in ("nvidia", "geforce", "tesla"):
        letters = letters.removeprefix(maker)
    return letters


def _kind(name: str) -> str:
    last = name.lower().rpartition(" ")[2]
    return last if last in KINDS else ""


def disk_for(wanted: Wanted, load: Load) -> int:
    """GB to rent: they cannot be changed later. Raises UsageError for a VM_DISK that is too small."""
    needed = math.ceil(UNPACKED * IMAGE_GB + load.gb_in + 2 * load.gb_out + SPARE_GB)
    if 0 < wanted.disk < needed:
        raise UsageError(
            f"VM_DISK={wanted.disk}: the image, {load.gb_in:.1f} GB of inputs and the outputs "
            f"need {needed} GB at least"
        )
    return wanted.disk or max(LEAST_DISK_GB, needed)


def query(wanted: Wanted, names: list[str], disk: int, load: Load) -> dict[str, Any]:
    """The body of a search."""
    body: dict[str, Any] = {
        "gpu_name": {"in": names},
        "num_gpus": {"eq": wanted.gpus},
        "disk_space": {"gte": disk},
        "verified": {"eq": True},
        "rentable": {"eq": True},
        "rented": {"eq": False},
        "external": {"eq": False},
        "cpu_arch": {"eq": "amd64"},
        "reliability2": {"gte": RELIABILITY},
        "inet_down": {"gte": DOWN},
        "inet_up": {"gte": UP},
        "cuda_max_good": {"gte": wanted.cuda},
        "duration": {"gte": load.seconds if load.most is None else 0.0},
        "order": [["dph_total", "asc"]],
        "type": "on-demand",
        "limit": 64,
        "allocated_storage": disk,
    }
    if wanted.memory:
        least, most = _memory(wanted)
        body["gpu_ram"] = {"gte": least, "lte": most}
    return body


def _memory(wanted: Wanted) -> tuple[float, float]:
    """MB; a card of 80 GB shows 81,559 or 81,920 of them."""
    return 940.0 * wanted.memory, 1126.0 * wanted.memory


class Host:
    """An offer of the search, which may be anything: what is missing or of the wrong type does not fit."""

    def __init__(self, row: Mapping[str, Any], disk: int) -> None:
        self.row, self.disk = row, disk

    def number(self, name: str) -> float:
        """Of a field; NaN, which fits nowhere, if there is none."""
        value = self.row.get(name)
        right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if right else math.nan  # type: ignore[arg-type]

    @property
    def id(self) -> str:
        return str(self.row.get("id"))

    @property
    def machine(self) -> str:
        return str(self.row.get("machine_id"))

    @property
    def place(self) -> str:
        return str(self.row.get("geolocation") or "").strip(" ,") or "place unknown"

    @property
    def words(self) -> str:
        return f"{self.row.get('num_gpus')} x {self.row.get('gpu_name')}, host {self.machine} ({self.place})"

    @property
    def price(self) -> float:
        """USD per hour, GPU and disk."""
        return round(self.number("dph_base") + self.number("storage_cost") * self.disk / MONTH, 6)

    def traffic(self, load: Load, pulls: int = 1) -> float:
        """USD that the host takes for the image, the inputs and the outputs."""
        down = (pulls * IMAGE_GB + load.gb_in) * self.number("inet_down_cost")
        return down + load.gb_out * self.number("inet_up_cost")

    def once(self, load: Load, pulls: int = 1) -> float:
        """USD however long it takes: traffic, and what Google takes for the inputs to leave its network."""
        return round(self.traffic(load, pulls) + load.gb_in * EGRESS, 6)

    def seconds(self, load: Load, late: float) -> float:
        """How long a run may take here."""
        if load.most is None or not self.price > 0:
            return load.seconds
        return min(load.seconds, (load.most - self.once(load)) / self.price * 3600 - late)

    def misfit(self, wanted: Wanted, names: list[str], load: Load, late: float) -> str:
        """The first bound that it breaks; empty if there is none."""
        row, number = self.row, self.number
        least, most = _memory(wanted) if wanted.memory else (0.0, math.inf)
        bounds = {
            "gpu": row.get("gpu_name") in names and row.get("num_gpus") == wanted.gpus,
            "memory": least <= number("gpu_ram") <= most,
            "rented": row.get("rentable") is True and not row.get("rented") and not row.get("external"),
            "verified": row.get("verification") == "verified",
            "cpu": row.get("cpu_arch") == "amd64",
            "reliability": number("reliability2") >= RELIABILITY,
            "network": number("inet_down") >= DOWN and number("inet_up") >= UP,
            "cuda": number("cuda_max_good") >= wanted.cuda,
            "disk": number("disk_space") >= self.disk,
            "duration": number("duration") >= self.seconds(load, late) + late,
            "price": self.price > 0 and self.once(load) >= 0,
        }
        return next((name for name, holds in bounds.items() if not holds), "")


def ranked(hosts: Iterable[Host], load: Load, hours: float) -> list[Host]:
    """By what so many hours are expected to cost in all; of one machine only the best offer."""
    best: dict[str, Host] = {}
    for host in sorted(hosts, key=lambda host: (expected(host, load, hours), -host.number("reliability2"))):
        best.setdefault(host.machine, host)
    return list(best.values())[:MOST]


def expected(host: Host, load: Load, hours: float) -> float:
    """USD for so many hours."""
    return round(host.price * hours + host.once(load), 6)


def worst(host: Host, load: Load, late: float) -> float:
    """USD that vast.ai may take until the deadline, and the time that an end may be `late`."""
    return host.price * (max(host.seconds(load, late), 0.0) + late) / 3600 + host.traffic(load)
