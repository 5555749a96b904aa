"""Which run is meant, and everything that is known of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes import receipt_of
from test_bill import make_order

from cloudrun.bill import Ended, close
from cloudrun.errors import Corrupt, Missing, UsageError
from cloudrun.formats import canonical
from cloudrun.order import Order
from cloudrun.runs import attempt_object, find_run, last_attempt, load, open_runs, read_bill, record
from cloudrun.storage.folder import FolderBucket

HERE = ["here", "/toy"]


@pytest.fixture
def bucket(tmp_path: Path) -> FolderBucket:
    return FolderBucket(str(tmp_path))


def add(bucket: FolderBucket, run: str, **fields: Any) -> Order:
    order = make_order(run=run, project=run.rsplit("-", 3)[0], **fields)
    bucket.create(order.prefix + "/order.json", order.content())
    bucket.create(f"open/{run}", canonical({"run": run, "project": order.project}))
    return order


def test_by_id_by_part_and_by_an_ambiguous_part(bucket: FolderBucket) -> None:
    one, two = (add(bucket, f"toy-20261125-101112-{end}") for end in ("00aa", "00ab"))
    other = add(bucket, "other-20261125-101112-00aa")
    assert find_run(bucket, "toy", one.run, HERE) == one
    assert find_run(bucket, "toy", "00ab", HERE) == two
    assert find_run(bucket, "toy", "other", HERE) == other
    for text, count in (("00a", 3), ("00aa", 2), ("toy-2026", 2), ("", 3)):
        with pytest.raises(UsageError, match=f"is part of {count} runs"):
            find_run(bucket, "toy", text, HERE)
    with pytest.raises(UsageError, match="there is no run 'zzz'"):
        find_run(bucket, "toy", "zzz", HERE)


def test_an_id_that_is_part_of_another_is_still_that_one(bucket: FolderBucket) -> None:
    short = add(bucket, "toy-20261125-101112-00aa")
    add(bucket, "my-toy-20261125-101112-00aa")
    assert find_run(bucket, "toy", short.run, HERE) == short


def test_the_latest_is_the_latest_of_this_directory(bucket: FolderBucket) -> None:
    add(bucket, "toy-20261125-101112-00aa")
    newest = add(bucket, "toy-20261126-000000-0000")
    add(bucket, "toy-20261127-101112-00ff", origin=["here", "/elsewhere/toy"])
    add(bucket, "toy-20261127-101112-00fe", origin=["there", "/toy"])
    assert find_run(bucket, "toy", None, HERE) == newest
    with pytest.raises(UsageError, match="no run was started from this directory"):
        find_run(bucket, "toy", None, ["here", "/nowhere"])


def test_the_latest_of_two_in_the_same_second(bucket: FolderBucket) -> None:
    later = add(bucket, "toy-20261125-101112-0001", created="2026-11-25T10:11:12.900Z")
    add(bucket, "toy-20261125-101112-ffff", created="2026-11-25T10:11:12.100Z")
    assert find_run(bucket, "toy", None, HERE) == later


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]"])
def test_damaged_objects_do_not_hide_the_other_runs(bucket: FolderBucket, data: bytes) -> None:
    good = add(bucket, "toy-20261125-101112-00aa")
    for name in ("strange", "toy-20261125-101112-00aa.tmp", "UPPER-20261125-101112-00aa", "sub/dir"):
        bucket.create("open/" + name, data)
    bucket.create("toy/runs/toy-20261129-101112-0000/order.json", data)
    bucket.create("toy/runs/strange/order.json", data)
    assert open_runs(bucket) == [("toy", good.run)]
    assert find_run(bucket, "toy", None, HERE) == good


def test_orders_that_are_not_orders(bucket: FolderBucket) -> None:
    with pytest.raises(Missing):
        load(bucket, "toy", "toy-20261125-101112-00aa")
    order = make_order()
    for data in (order.content()[:-9], canonical({**order._asdict(), "more": 1}), canonical({"run": "x"})):
        bucket.put(order.prefix + "/order.json", data)
        with pytest.raises(Corrupt, match=r"order\.json is damaged"):
            load(bucket, "toy", order.run)


def test_attempts(bucket: FolderBucket) -> None:
    order = add(bucket, "toy-20261125-101112-00aa")
    assert last_attempt(bucket, order) == 0 and attempt_object(bucket, order, 1, "state") is None
    for name in ("1/claim.json", "2/claim.json", "10/claim.json", "x/claim.json"):
        bucket.create(f"{order.prefix}/attempts/{name}", b"{}")
    assert last_attempt(bucket, order) == 10
    (Path(bucket.root) / order.prefix / "attempts/11").mkdir()  # somebody is just claiming, or closing
    assert last_attempt(bucket, order) == 10
    bucket.create(f"{order.prefix}/attempts/11/claim.json", b"not json")  # there may be a machine
    assert last_attempt(bucket, order) == 11
    bucket.put(f"{order.prefix}/attempts/2/state.json", b"not json")
    assert attempt_object(bucket, order, 2, "state") is None


def test_a_record_through_the_life_of_a_run(bucket: FolderBucket) -> None:
    order = add(bucket, "toy-20261125-101112-00aa")
    seen = record(bucket, order)
    assert (seen["state"], seen["attempt"], seen["exit_code"], seen["reason"]) == ("starting", 0, None, None)
    bucket.create(order.prefix + "/attempts/1/claim.json", b"{}")
    bucket.put(order.prefix + "/attempts/1/state.json", canonical({"phase": "run", "beat": 1}))
    assert record(bucket, order)["state"] == "run"
    bucket.create(order.prefix + "/receipt.json", canonical(receipt_of(status=3)))
    seen = record(bucket, order)
    assert (seen["state"], seen["exit_code"], seen["run_seconds"]) == ("ending", 3, 0.5)
    assert seen["billed_seconds"] is seen["cost_usd"] is seen["ended_by"] is seen["proof"] is None
    close(bucket, order, [Ended("m", 100.0, 110.0, "agent", "seen")], "exited", 3)
    seen = record(bucket, order)
    assert (seen["state"], seen["billed_seconds"], seen["cost_usd"]) == ("ended", 10.0, 0.01)
    assert (seen["ended_by"], seen["proof"], seen["schema"]) == ("agent", "seen", 1)
    assert (seen["directory"], seen["host"], seen["project"]) == ("/toy", "here", "toy")


def test_a_record_of_a_run_without_a_receipt_or_with_a_damaged_one(bucket: FolderBucket) -> None:
    order = add(bucket, "toy-20261125-101112-00aa")
    bucket.create(order.prefix + "/receipt.json", b"garbage")
    assert record(bucket, order)["exit_code"] is None
    close(bucket, order, [], "lost", 121)
    seen = record(bucket, order)
    assert (seen["reason"], seen["exit_code"], seen["run_seconds"]) == ("lost", 121, None)


def test_there_is_no_bill_or_it_is_checked(bucket: FolderBucket) -> None:
    order = add(bucket, "toy-20261125-101112-00aa")
    assert read_bill(bucket, order) is None
    bucket.create(order.prefix + "/bill.json", b"{}")
    with pytest.raises(Corrupt, match=r"bill\.json is damaged"):
        read_bill(bucket, order)
