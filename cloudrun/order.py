"""A run's identity and its order: what to run, within which limits. Written before any machine exists."""

from __future__ import annotations

import os
import re
import time
from typing import Any, NamedTuple

from cloudrun.config import DEFAULT_HOURS
from cloudrun.errors import Corrupt
from cloudrun.formats import canonical, parse, seconds_of, timestamp
from cloudrun.storage import Bucket

MOST_SECONDS = 120 * 24 * 3600.0  # the longest limit that a provider keeps
TEXTS = ("run", "project", "backend", "created", "deadline", "place", "limited_by", "if_client_lost")
FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(TEXTS, str),
    **dict.fromkeys(("argv", "outputs", "folders", "env", "agent", "origin"), list),
    **{"manifest": dict, "limits": dict, "seconds": (int, float), "price": (int, float, type(None))},
}


def here() -> list[str]:
    """The origin of a run that is started now: this computer, this directory."""
    return [os.uname().nodename, os.getcwd()]


RUN_ID = re.compile(r"[a-z0-9][a-z0-9_-]*-\d{8}-\d{6}-[0-9a-f]{4}")


def new_run_id(project: str, when: float) -> str:
    """<project>-<YYYYMMDD>-<HHMMSS>-<4 hex>: at most 63 characters that may stand in a label."""
    return f"{project}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(when))}-{os.urandom(2).hex()}"


class Order(NamedTuple):
    """order.json. `argv` is the script and its arguments; `limited_by` says which limit set the deadline.

    `origin` is where the run was started: "the latest run" means the latest with the same origin.
    `place` says whose machines the run has, see cloudrun.config.place; `stranger`: they are not our own,
    see cloudrun.handover.
    `env` has the names given with -e; their values travel in env.json. `once`: US dollars of a run
    however long it takes, for traffic.
    """

    run: str
    project: str
    backend: str
    created: str
    deadline: str
    seconds: float
    limited_by: str
    price: float | None
    argv: list[str]
    outputs: list[str]
    folders: list[str]
    env: list[str]
    if_client_lost: str
    manifest: dict[str, Any]
    agent: list[str]
    limits: dict[str, float]
    origin: list[str]
    place: str = ""
    stranger: bool = False
    once: float = 0.0

    @property
    def prefix(self) -> str:
        return run_prefix(self.project, self.run)

    def content(self) -> bytes:
        return canonical(self._asdict())

    @property
    def ends_by(self) -> str:
        """When the machine is gone at the latest: the provider's own limit."""
        return timestamp(seconds_of(self.deadline) + self.limits["provider"])

    @property
    def worst(self) -> float | None:
        """What the run can cost at most, in US dollars; None if its price is not known."""
        seconds = self.seconds + self.limits["provider"]
        return None if self.price is None else seconds * self.price / 3600 + self.once

    def left(self, bucket: Bucket) -> float:
        """Seconds until the deadline."""
        return seconds_of(self.deadline) - time_of(bucket)


def time_of(bucket: Bucket) -> float:
    """Seconds since the epoch by the clock that client and machine share: this computer's may be wrong."""
    there = bucket.time()
    return time.time() if there is None else there


def run_prefix(project: str, run: str) -> str:
    return f"{project}/runs/{run}"


def read_order(data: bytes, name: str) -> Order:
    """Raises Corrupt."""
    value = parse(data, name, **FIELDS)
    seconds_of(value["deadline"])
    value["stranger"] = value.get("stranger") is True
    try:
        return Order(**value)
    except TypeError:
        raise Corrupt(f"{name} is damaged, or of another version of cloudrun") from None


def deadline(
    hours: float | None,
    cost: float | None,
    price: float | None,
    created: float,
    provider: float,
    *,
    once: float = 0.0,
) -> tuple[str, float, str]:
    """(deadline, seconds, what set it): the earlier of the two limits.

    The cost cap pays for what is taken `once`, and for the `provider` seconds that a machine may live
    beyond its deadline.
    """
    if hours is None and not (cost and price):
        hours = DEFAULT_HOURS  # a cap on what costs nothing is none
    seconds, limited_by = (hours * 3600 if hours else float("inf")), "deadline"
    if cost is not None and price:
        capped = max((cost - once) / price * 3600 - provider, 0.0)
        if capped < seconds:
            seconds, limited_by = capped, "cost"
    seconds = min(seconds, MOST_SECONDS)
    return timestamp(created + seconds), round(seconds, 3), limited_by
