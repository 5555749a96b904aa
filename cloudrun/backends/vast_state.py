"""What a vast.ai instance is to us: whose it is, what it is doing, of what use it still is. Pure.

Fields as the API shows them; each may be null, or missing, or wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from cloudrun.backends import Cost, Instance
from cloudrun.backends.vast_boot import Label
from cloudrun.formats import timestamp

# Of status_msg while a container comes up, in small letters; anything else there is no sign of anything.
BROKEN = (
    *("no space left on device", "oci runtime create failed", "cannot allocate memory"),
    *("invalid reference format", "manifest unknown", "unauthorized", "unexpected eof"),
)
COMING, UP, AWAY, TAKEN, DEAD, FAILED = "coming", "up", "away", "taken", "dead", "broken"


class Stage(NamedTuple):
    """`kind`: coming, up, away (it may come back), taken, dead or broken; `words` say it to the user."""

    kind: str
    phase: str
    words: str


def stage(row: Mapping[str, Any]) -> Stage:
    """Where an instance stands."""
    actual, message = row.get("actual_status"), str(row.get("status_msg") or "")
    wishes = [row.get(name) for name in ("cur_state", "intended_status")]
    if actual in ("offline", "unknown", "frozen"):
        words = "the machine was frozen" if actual == "frozen" else "the machine's host is out of reach"
        return Stage(AWAY, str(actual), words)
    if wishes == ["stopped", "stopped"]:
        if actual in (None, "created", "loading"):
            return Stage(TAKEN, "parked", "the machine was made and not started")
        return Stage(TAKEN, "stopped", "the machine was stopped: outbid, out of credit, or by hand")
    if actual in (None, "created", "loading"):
        if any(pattern in message.lower() for pattern in BROKEN):
            return Stage(FAILED, "broken", f"the host cannot start the container: {message.strip()[:200]}")
        if actual == "loading":
            return Stage(COMING, "pull", "the host did not load the image in time")
        return Stage(COMING, "provisioning", "the host did not begin in time")
    if actual in ("exited", "stopped"):
        return Stage(DEAD, "exited", "the container ended")
    return Stage(UP, str(actual), "")


def described(row: Mapping[str, Any], label: Label, found: Stage, lost: str, started: float) -> Instance:
    """`lost`: why it is of no use any more; `started`: when it was made, if the service does not say."""
    return Instance(
        name=label.name,
        run=label.run,
        attempt=label.attempt,
        deadline=timestamp(label.ends),
        started=number(row, "start_date") or started,
        alive=not lost and found.kind in (COMING, UP, AWAY),
        price=price(row),
        coming=found.kind == COMING,
        lost=lost,
    )


def ended_one(name: str, run: str, attempt: int, cost: Cost) -> Instance:
    """One that nobody here saw alive; the provider has charged for it."""
    ended = cost.ended or 0.0
    return Instance(name, run, attempt, "", cost.started or ended, alive=False, ended=ended)


def number(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if right else None  # type: ignore[arg-type]


def price(row: Mapping[str, Any]) -> float | None:
    """USD per hour while it runs, disk included."""
    return number(row, "dph_total")
