"""Runs and machines side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBackend, receipt_of
from test_bill import make_order

from cloudrun.backends import Instance, Survey
from cloudrun.bill import Ended, close
from cloudrun.errors import CloudrunError
from cloudrun.formats import canonical, timestamp
from cloudrun.listing import Sight, look, rows, table
from cloudrun.order import Order
from cloudrun.report import Report
from cloudrun.runs import RECORD
from cloudrun.storage.folder import FolderBucket

QUIET = Report(quiet=True, verbose=False, environ={})


@pytest.fixture
def bucket(tmp_path: Path) -> FolderBucket:
    return FolderBucket(str(tmp_path))


def add(bucket: FolderBucket, number: int = 0, *, attempts: int = 1, **more: Any) -> Order:
    deadline = timestamp(time.time() + 3600)
    order = make_order(deadline=deadline)._replace(run=f"toy-20261125-101112-{number:04x}", **more)
    bucket.create("open/" + order.run, canonical({"run": order.run, "project": order.project}))
    bucket.create(order.prefix + "/order.json", order.content())
    for attempt in range(1, attempts + 1):
        claim = {"client": "c", "time": timestamp(0), "price": 1.0}
        bucket.create(f"{order.prefix}/attempts/{attempt}/claim.json", canonical(claim))
        bucket.put(f"{order.prefix}/attempts/{attempt}/state.json", canonical({"phase": "run", "beat": 1}))
    return order


def machine(order: Order, attempt: int = 1, **more: Any) -> Instance:
    return Instance(
        f"{order.run}-{attempt}",
        order.run,
        attempt,
        order.deadline,
        **{"started": time.time() - 90, "alive": True, **more},
    )


def seen(*machines: Instance, places: tuple[str, ...] = (), others: tuple[str, ...] = ()) -> Sight:
    return Sight([("fake", each) for each in machines], set(places), list(others), [])


def one(bucket: FolderBucket, sight: Sight, *, history: bool = False) -> dict[str, Any]:
    ((found, doubtful),) = rows(bucket, sight, QUIET, history=history)
    assert doubtful == (
        found["state"] not in ("run", "parked", "ended") or "cannot be seen" in (found["note"] or "")
    )
    assert set(found) == {*RECORD, "machine"}
    return found


def test_a_run_with_its_machine(bucket: FolderBucket) -> None:
    order = add(bucket, attempts=2)
    found = one(bucket, seen(machine(order, 2)))
    assert (found["state"], found["attempt"], found["machine"]) == ("run", 2, f"{order.run}-2")


def test_a_run_whose_machine_is_gone(bucket: FolderBucket) -> None:
    add(bucket, place="fake:here")
    found = one(bucket, seen(places=("fake:here",)))
    assert (found["state"], found["machine"], found["note"]) == ("without a machine", None, None)
    found = one(bucket, seen(places=("fake:there",)))
    assert found["state"] == "run" and "in fake:here, which cannot be seen from here" in found["note"]


def test_a_run_that_has_not_asked_for_a_machine_yet(bucket: FolderBucket) -> None:
    add(bucket, attempts=0)
    assert one(bucket, seen())["state"] == "starting"


def test_a_machine_that_no_run_in_the_bucket_has(bucket: FolderBucket) -> None:
    found = one(bucket, seen(machine(make_order(), price=0.7)))
    assert (found["state"], found["price_usd_per_hour"]) == ("billed without a run", 0.7)
    assert found["machine"] == f"{make_order().run}-1"


def test_parked_and_left_over(bucket: FolderBucket) -> None:
    words = "vm is parked, its disk costs about 10.00 USD a month"
    found = one(bucket, seen(machine(make_order(), ended=time.time(), kept=True, parked=words, alive=False)))
    assert (found["state"], found["note"], found["price_usd_per_hour"]) == ("parked", words, None)
    found = one(bucket, seen(machine(make_order(), ended=time.time(), leftover=True, alive=False)))
    assert found["state"] == "left over"


def test_history(bucket: FolderBucket) -> None:
    order = add(bucket)
    close(bucket, order, [Ended("m", 1000, 1100, "agent", "seen")], "exited", 3)
    assert rows(bucket, seen(), QUIET) == []
    found = one(bucket, seen(), history=True)
    assert (found["state"], found["billed_seconds"], found["exit_code"]) == ("ended", 100, 3)
    lines = list(table([found]))
    assert lines[0].split() == ["RUN", "STATE", "BACKEND", "AGE", "USD/H"] and lines[1].split()[1] == "ended"


def test_the_oldest_comes_first_and_what_is_damaged_hides_nothing(bucket: FolderBucket) -> None:
    young = add(bucket, 1, created="2026-11-25T12:00:00.000Z")
    old = add(bucket, 2, created="2026-11-25T10:00:00.000Z")
    bucket.put(add(bucket, 3).prefix + "/order.json", b"not json")
    bucket.create("open/x", b"not json")
    found = rows(bucket, seen(), QUIET)
    assert [row.record["run"] for row in found] == [old.run, young.run]


def test_a_machine_whose_order_cannot_be_read_is_shown_and_doubtful(bucket: FolderBucket) -> None:
    """As of another version of cloudrun, or of a client that went before it had written it."""
    order = add(bucket)
    bucket.put(order.prefix + "/order.json", b"not json")
    (row,) = rows(bucket, seen(machine(order)), QUIET)
    assert row.doubtful and row.record["machine"] == f"{order.run}-1"


@pytest.mark.parametrize("machine_is", [{"alive": False}, {"deadline": timestamp(time.time() - 3600)}])
def test_a_machine_that_has_to_be_ended_is_doubtful(bucket: FolderBucket, machine_is: dict[str, Any]) -> None:
    order = add(bucket)
    (row,) = rows(bucket, seen(machine(order)._replace(**machine_is)), QUIET)
    assert row.doubtful and row.record["state"] == "run"


def test_a_machine_that_has_finished_is_doubtful_once_it_has_had_its_time(bucket: FolderBucket) -> None:
    order = add(bucket)
    bucket.put(f"{order.prefix}/attempts/1/state.json", canonical({"phase": "save", "beat": 2}))
    for ended, doubtful in ((time.time() - 600, True), (time.time(), False)):
        bucket.put(order.prefix + "/receipt.json", canonical(receipt_of(ended=timestamp(ended))))
        (row,) = rows(bucket, seen(machine(order)), QUIET)
        assert (row.doubtful, row.record["state"]) == (doubtful, "ending")


def test_a_provider_that_does_not_answer_hides_no_other() -> None:
    class Blind(FakeBackend):
        place = "blind"

        def survey(self) -> Survey:
            raise CloudrunError("no network")

    class Shared(FakeBackend):
        place = "shared"

        def survey(self) -> Survey:
            return Survey(self.all(), ["somebody's"])

    there = Shared()
    order = make_order()
    there.machines["m"] = machine(order)
    sight = look([Blind(), there], QUIET)
    assert sight.blind and sight.places == {"shared"} and sight.others == ["fake: somebody's"]
    assert [instance.run for _, instance in sight.machines] == [order.run]
