"""Seeing a machine ended: the grace it gets, refusals, who ended it, and the bill that follows."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import OFFER, FakeBackend

from cloudrun.backends import Boot, Cost
from cloudrun.bill import Ended, Patience, close, end_of, forget, see_ended
from cloudrun.errors import Conflict, StillRunning
from cloudrun.formats import canonical
from cloudrun.limits import DEFAULTS
from cloudrun.order import Order
from cloudrun.runs import last_attempt, read_bill
from cloudrun.storage.folder import FolderBucket

NAME = "toy-20261125-101112-00ff-1"
LONG = Patience(60.0, 60.0)


def make_order(**fields: Any) -> Order:
    given: dict[str, Any] = {
        "run": NAME[:-2],
        "project": "toy",
        "backend": "fake",
        "created": "2026-11-25T10:11:12.000Z",
        "deadline": "2026-11-26T10:11:12.000Z",
        "seconds": 86400.0,
        "limited_by": "deadline",
        "price": 3.6,
        "argv": ["main.py"],
        "outputs": ["model", "checkpoint"],
        "folders": ["data", "model", "checkpoint"],
        "env": [],
        "if_client_lost": "finish",
        "manifest": {"sha256": "0" * 64, "files": 1, "bytes": 1},
        "agent": ["toy/blobs/" + "0" * 64, "0" * 64],
        "limits": dict(DEFAULTS),
        "origin": ["here", "/toy"],
    }
    return Order(**{**given, **fields})


@pytest.fixture
def backend() -> FakeBackend:
    backend = FakeBackend()
    backend.create(NAME, OFFER, Boot(NAME[:-2], 1, "2027-01-01T00:00:00.000Z", {}))
    backend.calls.clear()
    return backend


def at_find(backend: FakeBackend, number: int, act: Callable[[], object]) -> None:
    """`act` as the machine is looked at for the number-th time: no clock is needed."""

    def called(what: str) -> None:
        if what == "find" and backend.calls.count("find") == number:
            act()

    backend.on_call = called


def test_a_machine_that_ends_itself_in_its_grace_is_not_ended_by_us(backend: FakeBackend) -> None:
    at_find(backend, 3, lambda: backend.ends(NAME, "the run is finished"))
    ended = see_ended(backend, NAME, LONG, layer="lease")
    assert ended.layer == "agent" and ended.started and ended.started <= ended.ended
    assert backend.calls == ["find", "find", "find", "stop"]  # that one frees what it left
    assert backend.machines == {}
    assert ended.proof.startswith(f"fake: no {NAME}, seen ")


def test_the_guards_end_is_told_from_the_agents(backend: FakeBackend) -> None:
    backend.ends(NAME, "the agent was silent for 300 s")
    assert see_ended(backend, NAME, LONG, layer="lease").layer == "guard"


def test_without_grace_it_is_stopped_at_once(backend: FakeBackend) -> None:
    ended = see_ended(backend, NAME, Patience(0, 60), layer="sweep")
    assert ended.layer == "sweep" and backend.calls[:2] == ["find", "stop"] and backend.machines == {}


def test_a_machine_whose_guard_is_gone_gets_no_grace(backend: FakeBackend) -> None:
    backend.machines[NAME] = backend.machines[NAME]._replace(alive=False)
    started = time.monotonic()
    assert see_ended(backend, NAME, LONG, layer="lease").layer == "lease"
    assert time.monotonic() - started < 30


def test_absent_is_ended(backend: FakeBackend) -> None:
    ended = see_ended(backend, "never-1", Patience(60, 60), layer="lease")
    assert ended.started is None and abs(ended.ended - time.time()) < 60


def test_a_machine_whose_create_call_did_not_come_back_may_appear_later(backend: FakeBackend) -> None:
    machine = backend.machines.pop(NAME)
    backend.appears_within = 60.0
    at_find(backend, 5, lambda: backend.machines.update({NAME: machine}))
    ended = see_ended(backend, NAME, Patience(0, 60, doubtful=True), layer="lease")
    assert ended.started == machine.started and backend.machines == {}


def test_what_a_machine_leaves_is_freed_before_it_counts_as_ended(backend: FakeBackend) -> None:
    """A stopped VM of which a disk is billed; it ended when it stopped, not when the disk was gone."""
    ended_at = time.time() - 30
    backend.machines[NAME] = backend.machines[NAME]._replace(alive=False, ended=ended_at, leftover=True)
    ended = see_ended(backend, NAME, LONG, layer="lease")
    assert ended.ended == ended_at and ended.layer == "guard"
    assert backend.machines == {} and backend.calls[:3] == ["find", "stop", "find"]


def test_one_that_somebody_else_frees_in_the_meantime_is_known_as_it_was_seen(backend: FakeBackend) -> None:
    """Two sweeps at the same time; the slower one may write the bill."""
    backend.ends(NAME, "the agent was silent for 300 s")
    known = backend.machines[NAME]
    at_find(backend, 1, backend.machines.clear)
    ended = see_ended(backend, NAME, Patience(0, 60), layer="sweep", known=known)
    assert (ended.layer, ended.started, ended.ended) == ("guard", known.started, known.ended)


def test_a_doubtful_machine_that_never_appears_is_ended(backend: FakeBackend) -> None:
    backend.appears_within = 0.1
    before = time.monotonic()
    ended = see_ended(backend, "never-1", Patience(0, 60, doubtful=True), layer="lease")
    assert ended.started is None and time.monotonic() - before >= 0.1


def test_a_stop_that_is_refused_is_tried_again(backend: FakeBackend) -> None:
    backend.refuse_stop = True
    at_find(backend, 4, lambda: setattr(backend, "refuse_stop", False))
    assert see_ended(backend, NAME, Patience(0, 60), layer="lease").layer == "lease"
    assert backend.calls.count("stop") >= 4


def test_a_provider_that_does_not_answer_is_asked_again(backend: FakeBackend) -> None:
    backend.unreachable = 5
    see_ended(backend, NAME, Patience(0, 60), layer="lease")
    assert backend.machines == {}


def test_a_backend_with_a_bug_does_not_keep_the_machine(backend: FakeBackend) -> None:
    """The undo step goes on whatever is raised inside it."""

    def broken() -> None:
        raise ZeroDivisionError

    at_find(backend, 2, broken)
    backend.refuse_stop = True
    with pytest.raises(StillRunning):
        see_ended(backend, NAME, Patience(0, 0.3), layer="lease")


def test_what_cannot_be_seen_ended_is_said_with_the_command(backend: FakeBackend) -> None:
    backend.refuse_stop = True
    with pytest.raises(StillRunning) as error:
        see_ended(backend, NAME, Patience(0, 0.1), layer="lease")
    assert NAME in str(error.value) and "no permission to stop it" in str(error.value)
    assert f"by hand: fake-cloud stop {NAME}" in str(error.value) and error.value.exit_code == 122


@pytest.fixture
def bucket(tmp_path: Path) -> FolderBucket:
    bucket = FolderBucket(str(tmp_path))
    bucket.create("open/" + NAME[:-2], canonical({"run": NAME[:-2], "project": "toy"}))
    bucket.create(make_order().prefix + "/env.json", b'{"KEY":"secret"}')
    return bucket


def ends(*spans: tuple[float | None, float]) -> list[Ended]:
    return [Ended(f"m{i}", start, end, "agent", f"seen {i}") for i, (start, end) in enumerate(spans)]


def test_a_bill_sums_the_machines_up(bucket: FolderBucket) -> None:
    order = make_order()
    close(bucket, order, ends((1000, 1100.5), (1200, 1300)), "exited", 3)
    bill = read_bill(bucket, order)
    assert bill == {
        "reason": "exited",
        "exit_code": 3,
        "started": "1970-01-01T00:16:40.000Z",
        "ended": "1970-01-01T00:21:40.000Z",
        "seconds": 200.5,
        "price": 3.6,
        "cost": 0.2005,
        "layer": "agent",
        "proof": "seen 1",
        "attempts": 2,
        "parked": "",
        "gpu": None,
        "disk": None,
        "traffic": None,
        "note": "",
    }
    assert list(bucket.names("open/")) == [] and bucket.size(order.prefix + "/env.json") is None


def test_a_bill_has_the_parts_where_they_are_known_of_every_machine(bucket: FolderBucket) -> None:
    order = make_order()
    first, second = ends((1000, 1100), (1200, 1300))
    first = first._replace(cost=Cost(0.5, 0.25, 0.125), note="no limit of its own")
    close(bucket, order, [first, second._replace(cost=Cost(1.0, 0.5, 0.25))], "exited", 0)
    bill = read_bill(bucket, order)
    assert bill and (bill["gpu"], bill["disk"], bill["traffic"]) == (1.5, 0.75, 0.375)
    assert bill["cost"] == 2.625 and bill["note"] == "no limit of its own"


@pytest.mark.parametrize(("traffic", "parts"), [(None, (1.0, 0.5, None)), (0.25, (1.0, 0.5, 0.25))])
def test_traffic_that_is_not_known_leaves_the_cost_unknown(
    bucket: FolderBucket, traffic: float | None, parts: object
) -> None:
    order = make_order()
    (end,) = ends((1000, 1100))
    close(bucket, order, [end._replace(cost=Cost(1.0, 0.5, traffic))], "exited", 0)
    bill = read_bill(bucket, order)
    assert bill and (bill["gpu"], bill["disk"], bill["traffic"]) == parts
    assert bill["cost"] == (None if traffic is None else 1.75)


def test_what_is_not_known_is_not_invented(bucket: FolderBucket) -> None:
    order = make_order()
    close(bucket, order, ends((None, 1100), (1200, 1300)), "exited", 0)
    bill = read_bill(bucket, order)
    assert bill and bill["seconds"] is bill["cost"] is None


def test_an_unknown_price_is_an_unknown_cost(bucket: FolderBucket) -> None:
    order = make_order(price=None)
    close(bucket, order, ends((1000, 1100)), "exited", 0)
    bill = read_bill(bucket, order)
    assert bill and bill["seconds"] == 100 and bill["cost"] is None


def test_no_machine_at_all(bucket: FolderBucket) -> None:
    order = make_order()
    close(bucket, order, [], "stopped", 130)
    bill = read_bill(bucket, order)
    assert bill and (bill["layer"], bill["seconds"], bill["started"]) == ("none", 0, None)


def test_the_first_bill_stands(bucket: FolderBucket) -> None:
    order = make_order()
    close(bucket, order, ends((1000, 1100)), "exited", 0)
    close(bucket, order, ends((1000, 9999)), "lost", 121)
    bill = read_bill(bucket, order)
    assert bill and bill["seconds"] == 100 and bill["exit_code"] == 0


def test_forget_may_be_repeated(bucket: FolderBucket) -> None:
    for _ in range(2):
        forget(bucket, make_order().prefix, NAME[:-2])
    assert list(bucket.names("open/")) == []


def test_who_closes_the_bill_and_who_continues_exclude_each_other(bucket: FolderBucket) -> None:
    """The claim on the next attempt goes to one of them: no machine can start under a closed bill."""
    order = make_order()
    claims = order.prefix + "/attempts/{}/claim.json"
    bucket.create(claims.format(1), b'{"client":"a","time":"2026-11-25T10:00:00.000Z"}')
    bucket.create(claims.format(2), b'{"client":"b","time":"2026-11-25T10:05:00.000Z"}')
    assert not close(bucket, order, ends((1000, 1100)), "lost", 121)
    assert read_bill(bucket, order) is None and last_attempt(bucket, order) == 2
    assert close(bucket, order, ends((1000, 1100), (1200, 1300)), "exited", 0)
    assert last_attempt(bucket, order) == 2
    with pytest.raises(Conflict):
        bucket.create(claims.format(3), b'{"client":"c","time":"2026-11-25T10:10:00.000Z"}')


@pytest.mark.parametrize("spoke", [True, False])
def test_a_machine_that_nobody_saw_is_billed_only_if_it_ever_said_a_word(
    backend: FakeBackend, tmp_path: Path, spoke: bool
) -> None:
    """Its client was killed after its claim: before its create call, perhaps (found by make chaos)."""
    bucket, order = FolderBucket(str(tmp_path)), make_order()
    backend.machines.clear()
    attempt = order.prefix + "/attempts/1/"
    bucket.create(attempt + "claim.json", b'{"client":"a","price":3.6,"time":"2026-11-25T10:11:20.000Z"}')
    if spoke:
        bucket.create(attempt + "agent.json", b'{"machine":"m","time":"2026-11-25T10:11:30.000Z"}')
    ended = end_of(backend, bucket, order, 1, grace=0.0)
    assert close(bucket, order, [ended], "failed", 125)
    bill = read_bill(bucket, order)
    assert bill and (bill["seconds"] is not None) == (bill["cost"] is not None) == spoke
