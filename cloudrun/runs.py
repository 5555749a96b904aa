"""Runs as the bucket knows them: which there are, and everything that is known of one."""

from __future__ import annotations

from contextlib import suppress
from itertools import groupby
from typing import Any

from cloudrun.errors import Corrupt, Missing, UsageError
from cloudrun.formats import parse
from cloudrun.order import RUN_ID, Order, read_order, run_prefix
from cloudrun.receipt import outcome_of, read_receipt
from cloudrun.storage import Bucket

SCHEMA = 1
RECORD = (
    *("schema", "run", "project", "directory", "host", "backend", "state", "attempt", "started", "deadline"),
    *("price_usd_per_hour", "reason", "exit_code", "run_seconds", "billed_seconds", "cost_usd"),
    *("gpu_usd", "disk_usd", "traffic_usd", "ended_by", "proof", "note"),
)


def open_runs(bucket: Bucket) -> list[tuple[str, str]]:
    """(project, run) of every run whose bill is not closed; what is no run's name there is skipped."""
    names = (name[len("open/") :] for name in bucket.names("open/"))
    return [(name.rsplit("-", 3)[0], name) for name in names if RUN_ID.fullmatch(name)]


def every_run(bucket: Bucket) -> list[tuple[str, str]]:
    """(project, run) of every run that there ever was."""
    return _all(bucket, "")


def load(bucket: Bucket, project: str, run: str) -> Order:
    name = run_prefix(project, run) + "/order.json"
    return read_order(bucket.get(name)[0], name)


def find_run(bucket: Bucket, project: str, text: str | None, origin: list[str]) -> Order:
    """The run that `text` is the id of, or a unique part of it; without it the latest from `origin`.

    Raises UsageError.
    """
    if text is None:
        return _latest(bucket, project, origin)
    matches = [(where, run) for where, run in _all(bucket, project) if text in run]
    exact = [match for match in matches if match[1] == text]
    if len(exact or matches) == 1:
        return load(bucket, *(exact or matches)[0])
    if matches:
        some = ", ".join(run for _, run in matches[:5])
        raise UsageError(f"{text!r} is part of {len(matches)} runs ({some}); give more of the id")
    raise UsageError(f"there is no run {text!r} in {bucket.url}; `cloudrun ps` shows the open ones")


def _all(bucket: Bucket, project: str) -> list[tuple[str, str]]:
    projects = [name for name in bucket.dirs("") if name != "open"]
    projects.sort(key=lambda name: name != project)
    return [(name, run) for name in projects for run in bucket.dirs(f"{name}/runs/")]


def _latest(bucket: Bucket, project: str, origin: list[str]) -> Order:
    found: list[Order] = []
    runs = bucket.dirs(f"{project}/runs/")
    for second, named in groupby(sorted(runs, key=_second, reverse=True), _second):
        for run in named if second else ():
            with suppress(Missing, Corrupt):
                found.append(load(bucket, project, run))
        found = [order for order in found if order.origin == origin]
        if found:
            return max(found, key=lambda order: order.created)
    raise UsageError("no run was started from this directory; give an id, `cloudrun ps` shows the open ones")


def _second(run: str) -> list[str]:
    """When a run was named; the rest of a name says nothing about which was first."""
    return run.rsplit("-", 3)[1:3]


def last_attempt(bucket: Bucket, order: Order) -> int:
    """The number of the newest attempt that a client claimed, 0 before the first."""
    names = bucket.dirs(order.prefix + "/attempts/")
    newest = max((int(name) for name in names if name.isdigit()), default=0)
    return newest if is_claimed(bucket, order, newest) else max(newest - 1, 0)


def is_claimed(bucket: Bucket, order: Order, attempt: int) -> bool | None:
    """True: for a machine; False: by who closes the bill, so that there never will be one; None: not yet.

    A claim that is damaged may stand for a machine. A folder makes the directory before the claim.
    """
    name = f"{order.prefix}/attempts/{attempt}/claim.json"
    try:
        return not parse(bucket.get(name)[0], name).get("closed")
    except Missing:
        return None
    except Corrupt:
        return True


def attempt_object(bucket: Bucket, order: Order, attempt: int, what: str) -> dict[str, Any] | None:
    """claim.json, agent.json, state.json or end.json of an attempt; None where there is none to read."""
    name = f"{order.prefix}/attempts/{attempt}/{what}.json"
    try:
        return parse(bucket.get(name)[0], name)
    except (Missing, Corrupt):
        return None


def read_bill(bucket: Bucket, order: Order) -> dict[str, Any] | None:
    name = order.prefix + "/bill.json"
    try:
        return parse(bucket.get(name)[0], name, seconds=(int, float, type(None)), layer=str, proof=str)
    except Missing:
        return None


def record(bucket: Bucket, order: Order) -> dict[str, Any]:
    """The one documented JSON object about a run, for `wait` and `--json`."""
    attempt, bill, receipt = last_attempt(bucket, order), read_bill(bucket, order), None
    state = attempt_object(bucket, order, attempt, "state")
    with suppress(Corrupt):
        receipt = read_receipt(bucket, order.prefix)
    return described(order, attempt, state, receipt, bill)


def described(
    order: Order,
    attempt: int,
    state: dict[str, Any] | None,
    receipt: dict[str, Any] | None = None,
    bill: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A value for each name of RECORD."""
    outcome, phase = outcome_of(receipt) if receipt else None, (state or {}).get("phase", "starting")
    ended = (bill or {}).get("exit_code")
    return {
        "schema": SCHEMA,
        "run": order.run,
        "project": order.project,
        "directory": order.origin[1],
        "host": order.origin[0],
        "backend": order.backend,
        "state": "ended" if bill else "ending" if receipt else phase,
        "attempt": attempt,
        "started": order.created,
        "deadline": order.deadline,
        "price_usd_per_hour": order.price,
        "reason": outcome.reason if outcome else (bill or {}).get("reason"),
        "exit_code": outcome.exit_code if outcome else ended,
        "run_seconds": outcome.seconds if outcome else None,
        "billed_seconds": bill["seconds"] if bill else None,
        "cost_usd": bill["cost"] if bill else None,
        "gpu_usd": (bill or {}).get("gpu"),
        "disk_usd": (bill or {}).get("disk"),
        "traffic_usd": (bill or {}).get("traffic"),
        "ended_by": bill["layer"] if bill else None,
        "proof": bill["proof"] if bill else None,
        "note": (bill or {}).get("note") or None,
    }
