"""The life of a run, interrupted everywhere, with a toy backend and real signals: nothing is left running."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from fakes import OFFER, ActingBucket, ActingReport, FakeAgent, FakeBackend, receipt_of

from cloudrun import bill as billing
from cloudrun import commands, launch, run
from cloudrun.backends import Boot, Cost, Instance
from cloudrun.closing import price_words
from cloudrun.config import Settings, from_env
from cloudrun.errors import (
    BucketError,
    BucketRefused,
    CloudrunError,
    Interrupted,
    NoCapacity,
    Refused,
    StillRunning,
    UsageError,
)
from cloudrun.follow import since_boot
from cloudrun.formats import canonical, timestamp
from cloudrun.limits import DEFAULTS
from cloudrun.order import Order, deadline
from cloudrun.output import Output
from cloudrun.report import Report
from cloudrun.run import Client
from cloudrun.runs import read_bill
from cloudrun.signals import Signals
from cloudrun.start import Wanted, prepare, store
from cloudrun.storage import MAX_OBJECT
from cloudrun.sweep import overdue, sweep_up

STAGES = ("scan", "offer", "send", "order", "create", "created", "follow", "stop", "bill", "pull")
LIMITS = "CLOUDRUN_LIMITS"
OPTIONS = {"wait": False, "detach": False, "json_file": None}


class World:
    """A toy project, a fake backend with a fake agent on its machines, and a client."""

    def __init__(self, top: Path, *attempts: str, **limits: float) -> None:
        self.top = top
        self.backend = FakeBackend()
        self.bucket = ActingBucket(str(top / "bucket"))
        self.agent = self.bucket.agent = FakeAgent(self.backend, self.bucket, *attempts)
        self.report = ActingReport()
        table = {"stop": 0.2, "self_end": 0.2, "boot": 0.6, "agent_silence": 5, **limits}
        text = ",".join(f"{name}={value}" for name, value in table.items())
        self.settings: Settings = from_env({LIMITS: text}, "/toy", backend="local")

    def client(self, signals: Signals) -> Client:
        return Client(self.bucket, self.backend, self.report, signals)

    def order(self, **wanted: Any) -> Order:
        prepared = prepare(self.settings, self.bucket)
        words = Wanted(["main.py"], {"SECRET": "hidden"}, **wanted)
        return store(prepared, self.settings, words, OFFER.price, (self.bucket, self.report))

    def whole(self) -> int:
        """`cloudrun main.py`, below the command line."""
        with Signals() as signals:
            words = Wanted(["main.py"], {"SECRET": "hidden"})
            return launch.start_and_follow(self.client(signals), self.settings, words, OPTIONS)

    def execute(self, order: Order, **more: Any) -> Any:
        with Signals() as signals:
            return run.execute(self.client(signals), order, [OFFER], **more)

    def assert_ended(self) -> None:
        assert self.backend.alive() == []
        if "create" in self.backend.calls:
            last_create = max(i for i, call in enumerate(self.backend.calls) if call == "create")
            assert "stop" in self.backend.calls[last_create:]

    def assert_closed(self) -> None:
        assert list(self.bucket.names("open/")) == []
        assert not any(name.endswith("/env.json") for name in self.bucket.names(""))


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    project = tmp_path / "toy"
    (project / "model").mkdir(parents=True)
    (project / "main.py").write_text("print('hello')\n")
    monkeypatch.chdir(project)
    numbers = iter(range(100_000))

    def world(*attempts: str, **limits: float) -> World:
        (project / "model" / "result").unlink(missing_ok=True)
        top = tmp_path / f"world{next(numbers)}"
        top.mkdir()
        return World(top, *attempts, **limits)

    return world


@pytest.fixture(autouse=True)
def same_handlers() -> Iterator[None]:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    yield
    after = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert after == before


def kill(signum: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), signum)


# --- the story


def test_a_run_goes_through_its_stages_and_leaves_nothing(make: Callable[..., World]) -> None:
    world = make()
    assert world.whole() == 0
    assert tuple(world.report.stages) == STAGES
    calls = [call for call in world.backend.calls if call in ("create", "stop")]
    assert calls == ["create", "stop"]
    world.assert_ended()
    world.assert_closed()
    assert Path("model/result").read_bytes() == b"result"
    assert world.report.lines[-1].startswith("exit 0 · ran 0.5 s · billed ")
    assert "1 output fetched (6 B)" in world.report.lines[-1]


def test_the_exit_code_is_the_programs_own(make: Callable[..., World]) -> None:
    world = make()
    world.agent.status = 77
    assert world.whole() == 77


def test_bill_has_times_cost_layer_and_proof(make: Callable[..., World]) -> None:
    world = make()
    order = world.order()
    world.execute(order)
    bill = read_bill(world.bucket, order)
    assert bill and bill["layer"] == "agent" and bill["attempts"] == 1 and bill["exit_code"] == 0
    assert bill["cost"] == pytest.approx(bill["seconds"] / 1000, abs=1e-5)  # at 3.6 USD/h
    assert bill["proof"].startswith(f"fake: no {order.run}-1, seen ")


def boot(world: World, order: Order, attempt: int) -> Boot:
    machine = run.Lease(run.instance_name(order.run, attempt), since_boot() + order.left(world.bucket))
    return run.boot_of(world.bucket, order, attempt, machine)


def test_the_boot_payload_has_no_more_time_than_the_order(make: Callable[..., World]) -> None:
    """A clock that was set back after the order was written lengthens nothing."""
    world = make()
    order = world.order()
    late = Order(**{**order._asdict(), "deadline": "2199-01-01T00:00:00.000Z"})
    assert boot(world, late, 1).payload["left"] == order.seconds


# --- interrupted at every stage, and at every call


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("times", [1, 2])
def test_signals_as_a_stage_begins(make: Callable[..., World], stage: str, times: int, signum: int) -> None:
    world = make("state log nothing" if stage == "follow" else "state log receipt")

    def act(name: str) -> None:
        for _ in range(times * (name == stage)):
            kill(signum)

    world.report.on_stage = act
    code = outcome_of(world)
    world.assert_ended()
    if stage == "stop":
        assert code == 0  # the program had ended by itself
    else:
        assert code == 128 + signum
    if stage in ("create", "created"):
        assert read_bill(world.bucket, latest(world))["exit_code"] == 128 + signum  # type: ignore[index]
    if stage != "bill":
        world.assert_closed()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_raises(make: Callable[..., World], stage: str) -> None:
    world = make()

    def act(name: str) -> None:
        if name == stage:
            raise Interrupted(signal.SIGINT)

    world.report.on_stage = act
    assert outcome_of(world) == 130
    world.assert_ended()
    if stage != "bill":
        world.assert_closed()


def outcome_of(world: World) -> int:
    try:
        return world.whole()
    except Interrupted as error:
        return error.exit_code


def latest(world: World) -> Order:
    from cloudrun.runs import load

    (name,) = world.bucket.dirs("toy/runs/")
    return load(world.bucket, "toy", name)


def counted_events(world: World, first: int, second: int, act: Callable[[], None]) -> Callable[[], int]:
    """Calls `act` at the events of these numbers; what is returned tells how many there were."""
    count = 0

    def event(*_: object) -> None:
        nonlocal count
        count += 1
        if count in (first, second):
            act()

    world.report.on_stage = world.bucket.on_call = world.backend.on_call = event
    return lambda: count


@pytest.mark.parametrize("apart", [None, 1, 4, 20])
def test_signals_at_every_call(make: Callable[..., World], apart: int | None) -> None:
    """Before and after every request to the bucket and the backend, in every stage."""
    first, codes = 0, set()
    while True:
        first += 1
        world = make()
        count = counted_events(world, first, first + apart if apart else 0, kill)
        codes.add(outcome_of(world))
        world.assert_ended()
        if count() < first:
            break
    assert first > 50 and codes == {0, 130}


# --- at every bytecode of the lease and what it calls


@contextmanager
def traced(codes: set[Any], act: Callable[[FrameType], None]) -> Iterator[None]:
    def local(frame: FrameType, event: str, argument: object) -> Any:
        if event == "opcode":
            act(frame)
        return local

    def tracer(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code not in codes:
            return None
        frame.f_trace_opcodes = True
        return local

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        yield
    finally:
        sys.settrace(before)


def lease_codes() -> set[Any]:
    methods = [run.execute, run.lease.__wrapped__, billing.see_ended, run.settle]  # type: ignore[attr-defined]
    manager = type(run.lease(None, None, 1, None, None))  # type: ignore[arg-type]
    methods += [manager.__enter__, manager.__exit__, FakeBackend.create, FakeBackend.stop, FakeBackend.find]
    return {method.__code__ for method in methods}


@pytest.mark.parametrize("second", [False, True])
def test_signals_at_every_bytecode(make: Callable[..., World], second: bool) -> None:
    """As the handler would do it, between any two; the second one comes as the machine is stopped."""
    codes, point, created = lease_codes(), 0, 0
    order = make().order()
    while True:
        point += 3 if second else 1
        world, reached = make("state receipt"), 0
        with Signals() as signals:
            client = world.client(signals)

            def act(frame: FrameType, point: int = point, signals: Signals = signals) -> None:
                nonlocal reached
                reached += 1
                if reached == point:
                    signals._handle(signal.SIGINT, frame)

            def stopping(call: str) -> None:
                if second and call == "stop":
                    kill()

            world.backend.on_call = stopping
            try:
                with traced(codes, act):
                    run.execute(client, order, [OFFER])
            except Interrupted:
                pass
        assert world.backend.alive() == [], point
        created += "created" in world.backend.calls
        if "create" in world.backend.calls:
            world.assert_ended()
        if reached < point:
            break
    assert point > 500 and created > 100


# --- create and stop that go wrong


def test_a_create_that_raised_after_starting_is_stopped(make: Callable[..., World]) -> None:
    world = make()
    world.backend.fail_after_start = True
    with pytest.raises(CloudrunError, match="the answer was lost") as error:
        world.whole()
    assert error.value.exit_code == 125
    world.assert_ended()
    world.assert_closed()
    bill = read_bill(world.bucket, latest(world))
    assert bill and bill["exit_code"] == 125 and bill["reason"] == "failed" and bill["seconds"] is not None


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_machine_that_cannot_be_stopped_is_said_loudly(
    make: Callable[..., World], interrupted: bool
) -> None:
    world = make("state nothing" if interrupted else "state badreceipt")
    world.backend.refuse_stop = True
    world.report.on_stage = lambda name: kill() if interrupted and name == "created" else None
    with pytest.raises(StillRunning, match=r"no permission(?s:.)*by hand: fake-cloud stop toy-") as error:
        world.whole()
    assert error.value.exit_code == 122
    assert len(world.backend.alive()) == 1
    assert read_bill(world.bucket, latest(world)) is None  # the bill is open, and everybody can see it
    assert len(list(world.bucket.names("open/"))) == 1


def test_the_bucket_does_not_hide_a_machine_that_still_runs(make: Callable[..., World]) -> None:
    world = make("state badreceipt")
    world.backend.refuse_stop = True

    def stage(name: str) -> None:
        if name == "stop":
            world.bucket.refuse = lambda method, name: BucketError("the bucket is gone")

    world.report.on_stage = stage
    with pytest.raises(StillRunning):
        world.whole()


def test_no_machine_can_be_had(make: Callable[..., World]) -> None:
    world = make()
    world.backend.offers = lambda *_: []  # type: ignore[method-assign]
    with pytest.raises(CloudrunError, match="no such machine now"):
        world.whole()
    assert "create" not in world.backend.calls


# --- a bucket and a provider that do not answer


def test_a_bucket_out_of_reach_does_not_end_the_run(make: Callable[..., World]) -> None:
    world = make("state log nothing nothing nothing receipt")
    left = [3]

    def refuse(method: str, name: str) -> BucketError | None:
        if method == "get" and "/log/" in name and left[0] and "follow" in world.report.stages:
            left[0] -= 1
            return BucketError("no route to host")
        return None

    world.bucket.refuse = refuse
    assert world.whole() == 0 and left == [0]


def test_signals_end_the_run_while_the_bucket_is_out_of_reach(make: Callable[..., World]) -> None:
    world = make("nothing")

    def stage(name: str) -> None:
        if name == "follow":
            world.bucket.refuse = lambda method, name: BucketError("no route to host")
            kill()
            kill()

    world.report.on_stage = stage
    outcome = world.execute(world.order())
    assert (outcome.exit_code, outcome.reason) == (130, "stopped")
    world.assert_ended()
    assert any("the bill could not be closed" in line for line in world.report.lines)


def test_the_first_signal_is_passed_on_once_the_bucket_is_back(make: Callable[..., World]) -> None:
    world = make("state nothing")
    refused = []

    def refuse(method: str, name: str) -> BucketError | None:
        if method == "swap" and name.endswith("control.json") and not refused:
            refused.append(name)
            return BucketError("no route to host")
        return None

    world.bucket.refuse = refuse
    world.report.on_stage = lambda name: kill(signal.SIGTERM) if name == "follow" else None
    assert world.whole() == 143 and refused


def test_a_provider_that_does_not_answer_does_not_end_the_run(make: Callable[..., World]) -> None:
    world = make("state " + "nothing " * 800 + "receipt")
    world.report.on_stage = lambda name: setattr(world.backend, "unreachable", 2 * (name == "follow"))
    assert world.whole() == 0 and world.backend.unreachable == 0


@pytest.mark.parametrize("what", ["bill.json", "outputs.json"])
def test_a_bucket_that_refuses_at_the_end_keeps_the_outcome(make: Callable[..., World], what: str) -> None:
    world = make()
    world.agent.status = 5

    def refuse(method: str, name: str) -> BucketError | None:
        refused = name.endswith(what) and method in ("create", "get")
        return BucketRefused(f"cannot hold {name}: no space") if refused else None

    world.bucket.refuse = refuse
    assert world.whole() == 5
    world.assert_ended()
    assert any("no space" in line for line in world.report.lines)


@pytest.mark.parametrize("what", ["manifest.jsonl", "env.json", "order.json", "claim.json", "open/"])
def test_a_bucket_that_refuses_before_the_machine_costs_nothing(
    make: Callable[..., World], what: str
) -> None:
    world = make()

    def refuse(method: str, name: str) -> BucketError | None:
        return (
            BucketRefused(f"cannot hold {name}: read-only") if method == "create" and what in name else None
        )

    world.bucket.refuse = refuse
    with pytest.raises(BucketRefused, match="read-only") as error:
        world.whole()
    assert error.value.exit_code == 125 and "create" not in world.backend.calls
    world.bucket.refuse = lambda method, name: None
    world.assert_closed()


# --- what comes from the machine is data


def test_a_damaged_receipt_is_an_unknown_outcome_and_the_machine_is_ended(
    make: Callable[..., World],
) -> None:
    world = make("state log badreceipt")
    assert world.whole() == 121
    world.assert_ended()
    world.assert_closed()
    assert any("outcome unknown" in line and "receipt.json is damaged" in line for line in world.report.lines)


@pytest.mark.parametrize("number", [-(10**15), 10**400], ids=["negative", "huge"])
def test_a_machine_that_counts_beyond_reason_breaks_no_client(
    make: Callable[..., World], number: int
) -> None:
    world = make("nothing nothing nothing state log receipt")
    world.report = Drawing(quiet=False, verbose=False, environ={})  # type: ignore[assignment]
    order = world.order()
    state = {"phase": "fetch", "beat": 1, "files": 1, "of_files": 1, "bytes": number, "of_bytes": 1}
    world.bucket.put(f"{order.prefix}/attempts/1/state.json", canonical(state))
    assert world.execute(order).exit_code == 0
    world.assert_ended()


class Drawing(Report):
    def _may_draw(self) -> bool:
        return True


def test_a_piece_of_the_log_that_is_too_large_hides_nothing_after_it(make: Callable[..., World]) -> None:
    world = make()
    log = f"{world.order().prefix}/attempts/1/log"
    for number, size in ((1, MAX_OBJECT + 1), (2, 0)):
        Path(world.bucket.root, log).mkdir(parents=True, exist_ok=True)
        with open(f"{world.bucket.root}/{log}/{number:08d}", "wb") as file:
            file.truncate(size)
    output = Output(world.bucket, log, world.report, lambda: False)
    assert [output.step(hurry=True) for _ in range(3)] == [True, True, False] and output.printed == 2
    assert any("00000001" in line for line in world.report.lines)


@pytest.mark.parametrize("word", ["badlog", "badstate"])
def test_damaged_words_do_not_end_the_run(make: Callable[..., World], word: str) -> None:
    assert make(f"state {word} receipt").whole() == 0


@pytest.mark.parametrize(
    ("turns", "console", "code", "words"),
    [
        ("state vanish", "", 121, "outcome unknown (the machine is gone)"),
        ("state log vanish", "", 121, "outcome unknown (the machine is gone)"),
        ("preparing log vanish", "", 125, "main.py was not started"),  # what was printed was pip's
        ("vanish", "", 125, "the machine gave no sign of life"),
        ("state preempted", "", 121, "the machine was taken away; run it again to go on"),
    ],
)
def test_a_machine_that_goes_without_a_receipt(
    make: Callable[..., World], turns: str, console: str, code: int, words: str
) -> None:
    world = make(turns)
    world.backend.words = console
    with Signals() as signals:
        order = world.order()
        world.backend.offers = lambda *_: [OFFER._replace(boot_seconds=1e9)]  # longer than the run may last
        outcome = run.execute(world.client(signals), order, [OFFER])
    assert outcome
    assert outcome.exit_code == code and words in outcome.words
    world.assert_ended()
    world.assert_closed()


@pytest.mark.parametrize(("price", "machines"), [(3.6, 2), (3.7, 1), (None, 1)])
def test_a_run_is_not_continued_on_a_dearer_machine(
    make: Callable[..., World], price: float | None, machines: int
) -> None:
    """What it costs at most was said before it started."""
    world = make("state preempted", "state receipt")
    order = world.order()
    world.backend.offers = lambda *_: [OFFER._replace(price=price)]
    with Signals() as signals:
        outcome = run.execute(world.client(signals), order, [OFFER])
    assert outcome and len(world.backend.boots) == machines
    assert outcome.exit_code == (0 if machines == 2 else 121)
    world.assert_closed()


def test_an_offer_that_cannot_be_had_is_followed_by_the_next_one(make: Callable[..., World]) -> None:
    world = make()
    order = world.order()
    world.backend.sold_out = {"a", "b"}
    offers = [
        OFFER._replace(where=where, price=price) for where, price in zip("abc", (1.0, 2.0, 3.0), strict=True)
    ]
    with Signals() as signals:
        outcome = run.execute(world.client(signals), order, offers)
    assert outcome and outcome.exit_code == 0 and world.backend.calls.count("create") == 3
    bill = read_bill(world.bucket, order)
    assert bill and bill["cost"] == pytest.approx(bill["seconds"] * 3 / 3600, abs=1e-6)
    world.assert_ended()
    world.assert_closed()


def test_when_no_offer_can_be_had_the_run_has_failed_and_cost_nothing(make: Callable[..., World]) -> None:
    world = make()
    order = world.order()
    world.backend.sold_out = {"a"}
    with Signals() as signals, pytest.raises(NoCapacity):
        run.execute(world.client(signals), order, [OFFER._replace(where="a")])
    bill = read_bill(world.bucket, order)
    assert bill and bill["reason"] == "failed" and bill["exit_code"] == 125
    assert bill["seconds"] == bill["cost"] == 0
    world.assert_closed()


def test_the_most_that_a_run_can_cost_is_that_of_the_dearest_offer() -> None:
    cheap, dear = OFFER._replace(price=1.0), OFFER._replace(price=2.0)
    assert run.dearest([cheap, dear]) == 2.0
    assert run.dearest([cheap, OFFER._replace(price=None)]) is None


def test_a_machine_that_never_speaks_is_ended_when_its_boot_has_taken_too_long(
    make: Callable[..., World],
) -> None:
    world = make("nothing")
    order = world.order()
    order.limits["boot"] = 0.2
    outcome = world.execute(order)
    assert outcome.exit_code == 125 and "gave no sign of life" in outcome.words
    world.assert_ended()
    world.assert_closed()


# --- a stranger's machine, which may be of no use


def test_a_strangers_machine_that_never_speaks_is_ended_and_another_one_does(
    make: Callable[..., World],
) -> None:
    world = make("nothing", "state log receipt")
    order, world.backend.stranger = world.order()._replace(once=1.0), True
    order.limits["boot"] = 0.2
    first, second = Cost(0.005, 0.0025, 0.00125), Cost(0.01, 0.005, 0.0025)
    world.backend.costs = {f"{order.run}-1": first, f"{order.run}-2": second}
    outcome = world.execute(order)
    assert outcome.exit_code == 0 and len(world.backend.boots) == 2
    assert any("no sign of life; trying another machine" in line for line in world.report.lines)
    bill = read_bill(world.bucket, order)
    assert bill and (bill["attempts"], bill["cost"]) == (2, 0.02625), "what the first one cost is on the bill"
    world.assert_ended()
    world.assert_closed()


def test_a_run_that_would_cost_more_than_was_said_does_not_go_on(make: Callable[..., World]) -> None:
    world = make("nothing", "state log receipt")
    order, world.backend.stranger = world.order(), True
    order.limits["boot"] = 0.2
    world.backend.costs = {f"{order.run}-1": Cost(0.0, 0.0, 5.0)}
    outcome = world.execute(order)
    assert outcome.exit_code == 125 and len(world.backend.boots) == 1
    world.assert_ended()
    world.assert_closed()


def test_the_price_that_is_said_is_that_of_the_machine_that_is_named(make: Callable[..., World]) -> None:
    order = make("nothing").order()._replace(price=3.6)
    assert price_words(order, 3.6).startswith("3.6 USD/h, ends by")
    assert price_words(order, 1.5).startswith("1.5, at most 3.6 USD/h, ends by")


def test_the_next_machine_has_room_for_the_same_outputs(make: Callable[..., World]) -> None:
    world = make("nothing", "state log receipt")
    order, world.backend.stranger = world.order()._replace(once=1.0), True
    order.limits["boot"] = 0.2
    order.manifest["bytes_back"] = 30 * 10**9
    assert world.execute(order).exit_code == 0
    assert [need.bytes_out for need in world.backend.needs][-1:] == [30 * 10**9]


@pytest.mark.parametrize(("once", "machines"), [(1.0, 1), (9.0, 2)])
def test_the_traffic_of_the_next_machine_is_part_of_what_was_said(
    make: Callable[..., World], once: float, machines: int
) -> None:
    """Its image and its inputs are fetched again: 5 dollars, beside the price of its time."""
    world = make("nothing", "state log receipt")
    order, world.backend.stranger = world.order()._replace(once=once), True
    order.limits["boot"] = 0.2
    world.backend.offer = OFFER._replace(expected=5.0 + (OFFER.price or 0.0) * order.seconds / 3600)
    world.backend.costs = {f"{order.run}-1": Cost(0.0, 0.0, 0.5)}
    world.execute(order)
    assert len(world.backend.boots) == machines
    world.assert_closed()


def test_so_many_machines_are_tried_and_no_more(make: Callable[..., World]) -> None:
    world = make(*["nothing"] * 9)
    order, world.backend.stranger = world.order(), True
    order.limits["boot"] = 0.1
    outcome = world.execute(order)
    assert (outcome.reason, outcome.exit_code) == ("unusable", 125)
    assert len(world.backend.boots) == run.MOST_UNUSABLE
    world.assert_ended()
    world.assert_closed()


@pytest.mark.parametrize("turns", ["nothing", "state"])
def test_a_machine_that_its_backend_calls_lost_is_ended_and_the_run_goes_on(
    make: Callable[..., World], turns: str
) -> None:
    world = make(turns, "state log receipt")
    order = world.order()

    def lose(what: str) -> None:
        name = f"{order.run}-1"
        if what == "find" and world.backend.calls.count("find") > 1 and name in world.backend.machines:
            old = world.backend.machines[name]
            world.backend.machines[name] = old._replace(alive=False, lost="its host went away")

    world.backend.on_call = lose
    outcome = world.execute(order)
    assert outcome.exit_code == 0 and len(world.backend.boots) == 2
    world.assert_ended()
    world.assert_closed()


def test_a_machine_that_is_coming_has_all_the_time_that_its_backend_gives_it(
    make: Callable[..., World],
) -> None:
    world = make("nothing")
    order = world.order()
    order.limits.update(boot=0.2, agent_silence=0.1, state=0.01)
    began = time.monotonic()

    def coming(what: str) -> None:
        for name, machine in world.backend.machines.items():
            still = time.monotonic() - began < 2.0
            world.backend.machines[name] = machine._replace(coming=still)

    world.backend.on_call = coming
    outcome = world.execute(order)
    assert outcome.exit_code == 125 and time.monotonic() - began > 2.0
    world.assert_ended()


def test_who_rents_nothing_to_us_is_asked_once_and_nothing_is_waited_for(make: Callable[..., World]) -> None:
    world = make()
    order = world.order()
    world.backend.appears_within = 60.0

    def refuse(what: str) -> None:
        if what == "create":
            raise Refused("no credit")

    world.backend.on_call = refuse
    with Signals() as signals, pytest.raises(Refused):
        run.execute(world.client(signals), order, [OFFER, OFFER])
    assert world.backend.calls.count("create") == 1
    bill = read_bill(world.bucket, order)
    assert bill and bill["seconds"] == bill["cost"] == 0
    world.assert_closed()


def test_what_a_run_takes_once_is_in_its_worst_case_and_in_its_cap(make: Callable[..., World]) -> None:
    world = make()
    order = world.order()._replace(once=0.5)
    late = order.limits["provider"]
    assert order.worst == pytest.approx((order.seconds + late) * 3.6 / 3600 + 0.5)
    _, seconds, why = deadline(None, 1.0, 3.6, 0.0, 60.0, once=0.5)
    assert (seconds, why) == (pytest.approx(0.5 / 3.6 * 3600 - 60), "cost")


def test_a_script_that_stays_here_is_said_before_anything_is_sent(make: Callable[..., World]) -> None:
    world = make()
    Path(".cloudrunignore").write_text("main.py\n")
    with pytest.raises(UsageError, match="left out by an ignore file"):
        world.whole()
    assert list(world.bucket.names("")) == []


@pytest.mark.parametrize(
    ("console", "code", "words"),
    [
        ("CLOUDRUN-FATAL i the agent is damaged\n", 125, "main.py was not started: the agent is damaged"),
        ("cloudrun guard: the deadline was reached\n", 124, "ended at the deadline"),
        ("kernel panic\n", 125, "the machine gave no sign of life"),
    ],
)
def test_what_the_console_says_is_passed_on(
    make: Callable[..., World], console: str, code: int, words: str
) -> None:
    world = make("nothing")
    order = world.order()
    world.backend.words = console
    world.backend.on_call = lambda call: (
        world.backend.ends(f"{order.run}-1", "went") if call == "created" else None
    )
    outcome = world.execute(order)
    assert outcome.exit_code == code and words in outcome.words


def test_silence_and_the_deadline_end_a_machine(make: Callable[..., World]) -> None:
    world = make("state nothing", agent_silence=0.2, state=0.1)
    outcome = world.execute(world.order())
    assert outcome.exit_code == 121 and "silent" in outcome.words
    world.assert_ended()
    world = make("state", provider=0.1)
    world.settings = from_env({LIMITS: "provider=0.1"}, "/toy", max_hours=0.0004)
    outcome = world.execute(world.order())
    assert (outcome.exit_code, outcome.reason) == (124, "deadline")
    world.assert_ended()


# --- several clients, several attempts


def test_a_preempted_run_goes_on_with_the_next_attempt(make: Callable[..., World]) -> None:
    world = make("state log preempted", "state log receipt")
    order = world.order()
    outcome = world.execute(order)
    assert outcome.exit_code == 0 and [boot.attempt for boot in world.backend.boots] == [1, 2]
    bill = read_bill(world.bucket, order)
    assert bill and bill["attempts"] == 2
    world.assert_ended()


def test_a_preempted_run_that_was_to_end_does_not_go_on(make: Callable[..., World]) -> None:
    world = make("state nothing preempted", "state receipt")
    world.agent.obeys = False
    order = world.order()
    world.report.on_stage = lambda name: kill() if name == "follow" else None
    outcome = world.execute(order)
    assert (outcome.reason, outcome.exit_code) == ("stopped", 130) and len(world.backend.boots) == 1


def test_who_loses_the_claim_sees_the_run_through(make: Callable[..., World]) -> None:
    """Another client claims the second attempt first, and its machine finishes the run."""
    world = make("state preempted", "state log receipt")
    order = world.order()

    def faster(method: str, name: str) -> None:
        if method == "create" and name.endswith("attempts/2/claim.json"):
            world.bucket.on_call = lambda method, name: None
            with Signals() as signals:
                other = world.client(signals)
                assert run.claim(other, order, 2, OFFER)
                world.backend.create(f"{order.run}-2", OFFER, boot(world, order, 2))

    world.bucket.on_call = faster
    outcome = world.execute(order)
    assert outcome.exit_code == 0 and len(world.backend.boots) == 2
    bill = read_bill(world.bucket, order)
    assert bill and bill["attempts"] == 2 and bill["seconds"] is not None
    world.assert_ended()
    world.assert_closed()


def test_two_clients_never_make_two_machines(make: Callable[..., World]) -> None:
    """`wait` decides to go on at the moment at which the first client has claimed the next attempt."""
    world = make("state preempted", "state receipt")
    order = world.order()
    with Signals() as signals:
        client = world.client(signals)
        run.claim(client, order, 1, OFFER)
        name = f"{order.run}-1"
        world.backend.create(name, OFFER, boot(world, order, 1))

        def faster(call: str) -> None:
            if call == "offers" and len(world.backend.boots) == 1:
                world.backend.on_call = lambda call: None
                run.claim(world.client(signals), order, 2, OFFER)
                second = f"{order.run}-2"
                world.backend.create(second, OFFER, boot(world, order, 2))

        world.backend.on_call = faster
        outcome = run.see_through(client, order)
    assert outcome.exit_code == 0 and [boot.attempt for boot in world.backend.boots] == [1, 2]


def test_wait_continues_a_preempted_run_and_ctrl_c_leaves_it_alone(make: Callable[..., World]) -> None:
    world = make("state preempted", "state nothing")
    order = world.order()
    with Signals() as signals:
        client = world.client(signals)
        run.claim(client, order, 1, OFFER)
        world.backend.create(f"{order.run}-1", OFFER, boot(world, order, 1))
        follows = []

        def stage(name: str) -> None:
            follows.append(name)
            if follows.count("follow") == 2:
                kill()

        world.report.on_stage = stage
        with pytest.raises(Interrupted):
            run.see_through(client, order)
    assert world.backend.alive() == [f"{order.run}-2"]
    assert read_bill(world.bucket, order) is None
    world.agent.attempts[1] = ["receipt"]
    world.report.on_stage = lambda name: None
    with Signals() as signals:
        assert run.see_through(world.client(signals), order).exit_code == 0
    world.assert_ended()
    assert (read_bill(world.bucket, order) or {})["attempts"] == 2


def test_a_sweep_that_cannot_end_a_machine_is_122(make: Callable[..., World]) -> None:
    world = make("state nothing")
    order = world.order()
    assert world.execute(order, detach=True) is None
    name = f"{order.run}-1"
    world.backend.machines[name] = world.backend.machines[name]._replace(alive=False)
    world.backend.refuse_stop = True
    with Signals() as signals:
        assert commands.ps(world.client(signals), world.settings, as_json=False) == 122
    assert any(f"by hand: fake-cloud stop {name}" in line for line in world.report.lines)
    assert read_bill(world.bucket, order) is None
    world.backend.refuse_stop = False
    with Signals() as signals:
        assert commands.ps(world.client(signals), world.settings, as_json=False) == 0
    world.assert_ended()


def test_a_receipt_with_a_time_that_is_none_keeps_no_machine_alive() -> None:
    """It comes from the machine, which may belong to a stranger."""
    machine = Instance("m-1", "m", 1, timestamp(1000), 0.0, alive=True)
    for ended in ("never", timestamp(999999)):
        assert overdue(machine, DEFAULTS, receipt_of(ended=ended), 2000.0)[0] == "overdue"


def test_a_sweep_that_ends_what_is_left_of_a_machine_keeps_its_run_from_no_other(
    make: Callable[..., World],
) -> None:
    """Its client is there, and goes on with it."""
    world = make("state log preempted", "state log receipt")
    world.backend.name, world.backend.place = "local", world.settings.place
    order, seen = world.order(), list[str]()

    def stage(name: str) -> None:
        if name == "stop" and not seen:
            seen.append(name)
            machine, end = f"{order.run}-1", f"{order.prefix}/attempts/1/end.json"
            world.bucket.put(end, canonical({"reason": "preempted", "time": timestamp(time.time())}))
            world.backend.machines[machine] = world.backend.machines[machine]._replace(ended=None)
            with Signals() as signals:
                sweep_up(world.client(signals))

    world.report.on_stage = stage
    assert world.execute(order).exit_code == 0
    assert seen and (read_bill(world.bucket, order) or {})["attempts"] == 2
    world.assert_ended()


@pytest.mark.parametrize("said", ["never", "9999-01-01T00:00:00.000Z"])
def test_a_machine_that_says_a_wrong_time_keeps_no_bill_open(make: Callable[..., World], said: str) -> None:
    world = make("state nothing")
    world.backend.name, world.backend.place = "local", world.settings.place
    order = world.order()
    assert world.execute(order, detach=True) is None
    world.backend.machines.clear()
    state = canonical({"phase": "run", "beat": 9, "time": said})
    world.bucket.put(f"{order.prefix}/attempts/1/state.json", state)
    for later, closed in ((0.0, False), (1200.0, True)):
        world.bucket.time = lambda later=later: time.time() + later  # type: ignore[method-assign]
        with Signals() as signals:
            assert sweep_up(world.client(signals)) == 0
        assert bool(read_bill(world.bucket, order)) == closed
    world.assert_closed()


def test_detach_leaves_the_machine_and_returns_nothing(make: Callable[..., World]) -> None:
    world = make("nothing nothing state")
    assert world.execute(world.order(), detach=True) is None
    assert len(world.backend.alive()) == 1 and "stop" not in world.backend.calls


def test_a_signal_while_the_first_word_is_read_is_no_detaching(make: Callable[..., World]) -> None:
    world = make("nothing state nothing")
    order, sent = world.order(), list[str]()

    def call(method: str, name: str) -> None:
        if method == "get" and name.endswith("state.json") and not sent and world.bucket.size(name):
            sent.append(name)
            kill()

    world.bucket.on_call = call
    assert world.execute(order, detach=True).exit_code == 130 and sent
    world.assert_ended()


def test_a_signal_between_a_machine_and_its_follower_is_counted(make: Callable[..., World]) -> None:
    """When `lease` has yielded, and the body of the `with` has not begun."""
    world = make("state log nothing")
    order, sent = world.order(), list[str]()

    def profile(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_return" and called is next and world.backend.alive() and not sent:
            sys.setprofile(None)
            sent.append(frame.f_code.co_name)
            kill()

    sys.setprofile(profile)
    try:
        assert world.execute(order).exit_code == 130
    finally:
        sys.setprofile(None)
    assert sent == ["__enter__"]
    world.assert_ended()


@pytest.mark.parametrize("now", [False, True])
def test_stop_before_the_first_machine_claims_it_away(make: Callable[..., World], now: bool) -> None:
    world = make()
    order = world.order()
    with Signals() as signals:
        assert commands.stop(world.client(signals), world.settings, order.run, now=now) == 0
    outcome = world.execute(order)  # its client comes too late
    assert outcome.exit_code == 130 and "create" not in world.backend.calls
    world.assert_closed()


def test_a_run_that_is_just_being_sent_does_not_keep_stop_all_from_the_others(
    make: Callable[..., World],
) -> None:
    """Its mark is in open/ before its order is written."""
    world = make("state nothing")
    world.backend.place = world.settings.place
    order = world.order()
    assert world.execute(order, detach=True) is None
    for run_id in ("aaa-20260101-000000-0000", "zzz-20990101-000000-0000"):
        world.bucket.create(f"open/{run_id}", b"{}")
    with Signals() as signals:
        client = world.client(signals)
        assert commands.stop(client, world.settings, None, now=False, every=True) == 125
    world.assert_ended()
    assert list(world.bucket.names("open/")) == ["open/zzz-20990101-000000-0000"]


def test_stop_now_is_the_users_end_for_the_first_client_too(make: Callable[..., World]) -> None:
    world = make("state nothing")
    world.agent.obeys = False
    order, looked = world.order(), []

    def call(what: str) -> None:
        looked.append(what)
        if what == "find" and looked.count("find") == 2:
            with Signals() as signals:
                commands.stop(world.client(signals), world.settings, order.run, now=True)

    world.backend.on_call = call
    outcome = world.execute(order)
    assert (outcome.exit_code, outcome.reason) == (130, "stopped")
    world.assert_ended()


def test_the_heartbeat_is_written_only_for_those_who_asked(make: Callable[..., World]) -> None:
    world = make()
    order = world.order()
    world.execute(order)
    assert world.bucket.size(order.prefix + "/client.json") is None
    world = make()
    order = world.order(if_client_lost="stop")
    world.execute(order)
    assert world.bucket.size(order.prefix + "/client.json")


def test_a_bill_is_closed_once(make: Callable[..., World]) -> None:
    world = make()
    order = world.order()
    world.execute(order)
    first = read_bill(world.bucket, order)
    with Signals() as signals:
        client = world.client(signals)
        end = billing.end_of(world.backend, world.bucket, order, 1, grace=0)
        run.settle(client, order, [end], run.Outcome("lost", 121, "late"))
    assert read_bill(world.bucket, order) == first


def test_a_receipt_that_came_late_has_the_last_word(make: Callable[..., World]) -> None:
    world = make("state nothing")
    world.agent.obeys = False
    order = world.order()

    def stage(name: str) -> None:
        if name == "follow":
            kill()
            kill()
        if name == "stop":
            data = canonical(receipt_of(status=4))
            super(ActingBucket, world.bucket).create(order.prefix + "/receipt.json", data)

    world.report.on_stage = stage
    assert world.execute(order).exit_code == 4


def test_sweep_leaves_a_run_alone_that_is_just_starting(make: Callable[..., World]) -> None:
    world = make()

    def stage(name: str) -> None:
        if name in ("create", "created", "follow"):
            with Signals() as signals:
                sweep_up(world.client(signals))

    world.report.on_stage = stage
    assert world.whole() == 0


def test_a_cost_cap_needs_a_price(make: Callable[..., World]) -> None:
    world = make()
    world.settings = from_env({}, "/toy", max_cost=1)
    prepared = prepare(world.settings, world.bucket)
    with pytest.raises(CloudrunError, match="needs a known price"):
        store(prepared, world.settings, Wanted(["main.py"], {}), None, (world.bucket, world.report))
    assert list(world.bucket.names("")) == []
