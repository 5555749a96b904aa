"""What Compute Engine takes, in USD: enough for an honest guess before a run, never for a bill.

Machines: the catalog of SkyPilot v9 at 2c3d7ea, a snapshot from between June and September 2026. Marked L:
Google's public list price, from memory, as are disks and addresses. What nobody knows is not here: hosts
with a spot price, most regions, what is only about right. Disks and addresses are no part of a machine's
price. Spot prices change up to daily.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cloudrun.backends.gcp_shapes import Shape

DATE = "2026-06"  # the snapshot may be younger; nobody shall think so
ADDRESS_PER_HOUR = 0.005  # L, an external IPv4 address in use
DISK_PER_GB_MONTH = {"pd-balanced": 0.10}  # L


class Row(NamedTuple):
    """USD per hour of a machine type with all that is in it, or of one GPU attached to another type."""

    part: str
    place: str  # a region, or a zone where no more is known
    on_demand: float | None
    spot: float | None


# fmt: off
ROWS = (
    Row("g2-standard-4",  "us-central1",     0.707, None),  # L
    Row("g4-standard-48", "us-central1",     4.5,   None),  # L
    Row("a2-highgpu-1g",  "us-central1",     3.673, 1.928),
    Row("a2-highgpu-8g",  "us-central1",     29.39, 15.42),
    Row("a2-ultragpu-1g", "us-central1",     5.07,  2.74),  # on demand: L
    Row("a3-highgpu-1g",  "us-central1",     None,  5.98),
    Row("a3-highgpu-1g",  "us-east4",        None,  4.27),
    Row("a3-highgpu-1g",  "europe-north1-c", None,  1.29),
    Row("a3-highgpu-8g",  "us-central1",     88.0,  47.9),  # on demand: L
    Row("a4-highgpu-8g",  "us-central1",     None,  37.7),
    Row("n1-standard-4",  "us-central1",     0.19,  None),  # L
    Row("T4",             "us-central1",     0.35,  0.192),
    Row("P4",             "us-central1",     0.60,  0.180),
    Row("V100",           "us-central1",     2.48,  None),  # L
)
# fmt: on


def table(rows: Iterable[Row] = ROWS) -> dict[tuple[str, str], Row]:
    """The rows that can be true: catalogs take reservations for on demand, and then spot looks dearer."""
    return {
        (row.part, row.place): row
        for row in rows
        if row.on_demand is None or row.spot is None or 0 < row.spot < row.on_demand
    }


def price(shape: Shape, zone: str, spot: bool) -> float | None:
    """USD per hour of the machine in this zone, or None if it is not known."""
    parts = [(shape.machine_type, 1)]
    if shape.accelerator:
        parts.append((shape.gpu, shape.gpus))
    total = 0.0
    for part, count in parts:
        each = _each(part, zone, spot)
        if each is None:
            return None
        total += count * each
    return round(total, 6)


def _each(part: str, zone: str, spot: bool) -> float | None:
    known = table()
    row = known.get((part, zone)) or known.get((part, zone.rpartition("-")[0]))
    return row and (row.spot if spot else row.on_demand)


def disk_per_month(disk_type: str, gb: float) -> float | None:
    each = DISK_PER_GB_MONTH.get(disk_type)
    return None if each is None else each * gb
