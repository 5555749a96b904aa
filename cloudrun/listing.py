"""Runs and machines side by side: what the bucket says is open, and what the providers say is there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from cloudrun.backends import Backend, Instance, Survey, open_backend
from cloudrun.background import side_by_side
from cloudrun.config import NEEDED, Settings
from cloudrun.errors import BucketError, CloudrunError, Corrupt
from cloudrun.formats import seconds_of, timestamp
from cloudrun.limits import DEFAULTS
from cloudrun.order import Order, time_of
from cloudrun.receipt import read_receipt
from cloudrun.report import Report, human_seconds
from cloudrun.runs import (
    RECORD,
    SCHEMA,
    attempt_object,
    described,
    every_run,
    last_attempt,
    load,
    open_runs,
    read_bill,
)
from cloudrun.storage import Bucket
from cloudrun.sweep import overdue

STRANGE = "billed without a run"
LOST = "without a machine"
UNFINISHED = ("boot", "fetch", "environment", "run")  # no receipt is written in these phases
COLUMNS = "{:<44} {:<20} {:<8} {:>14} {:>9}"


class Sight(NamedTuple):
    """What could be seen: (backend, machine), whose machines these are, and machines that are not ours.

    `disks`: (backend, disk), without a machine.
    """

    machines: list[tuple[str, Instance]]
    places: set[str]
    others: list[str]
    disks: list[tuple[str, Instance]]
    blind: bool = False  # a provider could not be asked

    def of(self, backend: Backend) -> Survey:
        """Its machines; who was not to be seen is asked again."""
        mine = [instance for name, instance in self.machines if name == backend.name]
        return Survey(mine, []) if backend.place in self.places else backend.survey()


def backends_of(
    settings: Settings, chosen: Backend, environ: Mapping[str, str], report: Report
) -> list[Backend]:
    """The chosen one, and each other one that has all its settings."""
    found = [chosen]
    for name, needed in NEEDED.items():
        if name != settings.backend and needed and all(environ.get(variable) for variable in needed):
            try:
                found.append(open_backend(settings._replace(backend=name, price=None)))
            except CloudrunError as error:
                report.warn(f"{name} is not looked at: {error}")
    return found


def look(backends: list[Backend], report: Report) -> Sight:
    """At all machines of all providers. One that does not answer hides no other."""
    sight = Sight([], set(), [], [])
    for backend in backends:
        try:
            found = backend.survey()
            sight.machines.extend((backend.name, instance) for instance in found.ours)
            sight.disks.extend((backend.name, disk) for disk in found.disks)
            sight.others.extend(f"{backend.name}: {name}" for name in found.others)
            sight.places.add(backend.place)
            if found.unseen:
                report.warn(found.unseen)
        except CloudrunError as error:
            report.warn(f"the machines of {backend.name} cannot be seen: {error}")
            sight = sight._replace(blind=True)
    return sight


class Row(NamedTuple):
    """`doubtful`: whoever sweeps may find something to do."""

    record: dict[str, Any]
    doubtful: bool


def rows(bucket: Bucket, sight: Sight, report: Report, *, history: bool = False) -> list[Row]:
    """One for each open run (with `history`, for every run) and each machine without one, by age."""
    machines: dict[str, list[tuple[str, Instance]]] = {}
    for backend, instance in sight.machines:
        machines.setdefault(instance.run, []).append((backend, instance))

    def row(found: tuple[str, str]) -> Row | None:
        project, run = found
        try:
            order = load(bucket, project, run)
            return _of_run(bucket, order, [each for _, each in machines.get(run, ())], sight.places)
        except BucketError as error:
            report.warn(f"{run}: {error}")
            return None

    runs = every_run(bucket) if history else open_runs(bucket)
    known = [found for found in side_by_side(row, runs, 2 * bucket.workers) if found]
    known_runs = {each.record["run"] for each in known}  # else an order that is damaged hides a machine
    alone = [each for run, found in machines.items() if run not in known_runs for each in found]
    known += [_of_machine(backend, instance) for backend, instance in alone]
    known += [_of_machine(*disk)._replace(doubtful=False) for disk in sight.disks]  # gc looks after them
    return sorted(known, key=lambda row: str(row.record["started"]))


def _of_run(bucket: Bucket, order: Order, machines: list[Instance], places: set[str]) -> Row:
    billed = [each for each in machines if each.ended is None]
    attempt = max((each.attempt for each in billed), default=0) or last_attempt(bucket, order)
    state, receipt = attempt_object(bucket, order, attempt, "state"), None
    with suppress(Corrupt):
        if not billed or (state or {}).get("phase") not in UNFINISHED:
            receipt = read_receipt(bucket, order.prefix)
    record = described(order, attempt, state, receipt, None if billed else read_bill(bucket, order))
    note = record["note"]
    if not billed and record["state"] != "ended":
        if order.place in ("", *places):
            record["state"] = LOST if attempt else "starting"
        else:
            note = f"its machine is in {order.place}, which cannot be seen from here"
    limits, now = {**DEFAULTS, **order.limits}, time_of(bucket)
    well = billed and not any(overdue(each, limits, receipt, now)[0] for each in billed)
    record = {**record, "machine": billed[-1].name if billed else None, "note": note}
    return Row(record, not well and record["state"] != "ended")


def _of_machine(backend: str, instance: Instance) -> Row:
    state = STRANGE if instance.ended is None else "left over" if instance.leftover else "parked"
    record = {
        **dict.fromkeys(RECORD),
        "schema": SCHEMA,
        "run": instance.run,
        "backend": backend,
        "state": state,
        "attempt": instance.attempt,
        "started": timestamp(instance.started),
        "deadline": instance.deadline,
        "price_usd_per_hour": None if state == "parked" else instance.price,
        "machine": instance.name,
        "note": instance.parked or None,
    }
    return Row(record, instance.billed)


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Lines for people; none if there is nothing to show."""
    if records:
        yield COLUMNS.format("RUN", "STATE", "BACKEND", "AGE", "USD/H")
    for item in records:
        price, idle = item["price_usd_per_hour"], item["state"] in ("parked", "ended")
        words = "-" if idle else "unknown" if price is None else f"{price:.2f}"
        age = human_seconds(max(time.time() - seconds_of(item["started"]), 0))
        line = COLUMNS.format(item["run"], item["state"], item["backend"], age, words)
        yield f"{line}  {item['note']}" if item["note"] else line
