"""Follow an attempt: print its output, pass the user's wish to end it on, notice its end."""

from __future__ import annotations

import itertools
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cloudrun.bill import Ended
from cloudrun.errors import UNKNOWN, BucketError, CloudrunError, Conflict, Missing
from cloudrun.formats import canonical, parse
from cloudrun.order import Order
from cloudrun.output import Output, OutputClosed
from cloudrun.receipt import Outcome, outcome_of, read_receipt, user_code
from cloudrun.report import Report, human_money, human_seconds
from cloudrun.runs import attempt_object
from cloudrun.storage import Bucket

if TYPE_CHECKING:
    from cloudrun.run import Client

LOOK_SECONDS = 0.5  # between two looks at the machine
LAST_WORDS_SECONDS = 0.5  # in which the bucket may show what a machine wrote just before it went
NOW = 2


@dataclass
class Seen:
    """How following an attempt ended.

    `how`: finished (there is a receipt), preempted, gone (without a word), silent, overdue, now (the
    user asked twice), detached. `by` is the signal with which the user asked.
    """

    how: str
    receipt: dict[str, Any] | None = None
    by: str = ""
    console: str = ""
    began: bool = False
    self_end: float = 0.0

    @property
    def grace(self) -> float | None:
        """Seconds in which the machine may end itself; None: it shall live on."""
        if self.how == "detached":
            return None
        return self.self_end if self.how in ("finished", "preempted", "gone") else 0.0

    def outcome(self, order: Order, ended: Ended) -> Outcome:
        """What it means for the run, once the machine is seen ended."""
        if self.receipt:
            return outcome_of(self.receipt)
        if self.how == "now":
            return Outcome("stopped", user_code(self.by), "ended by the user, at once")
        if self.how == "preempted":
            return Outcome("preempted", UNKNOWN, "the machine was taken away; run it again to go on")
        if self.how == "overdue" or "deadline" in self.console:
            return Outcome(order.limited_by, 124, "ended at the deadline, by the guard or by us")
        fatal = [line for line in self.console.splitlines() if "CLOUDRUN-FATAL" in line]
        if not self.began:
            words = fatal[-1].partition("CLOUDRUN-FATAL ")[2] if fatal else "the machine gave no sign of life"
            return Outcome("failed", 125, f"main.py was not started: {words}")
        why = fatal[-1] if fatal else self.console.strip().rpartition("\n")[2] or f"the machine is {self.how}"
        return Outcome("lost", UNKNOWN, f"outcome unknown ({why})")


def follow(client: Client, order: Order, attempt: int, *, mine: bool = True, detach: bool = False) -> Seen:
    """Until the attempt's end, or its first sign of life with `detach`.

    mine: print its output, and take signals as the wish to end it; they are counted meanwhile.
    """
    if mine:
        client.signals.hold()
    client.report.stage("follow")
    follower = _Follower(client, order, attempt, mine)
    while True:
        try:
            seen = follower.step(detach=detach)
        except OutputClosed:
            follower.ask(signal.SIGPIPE)
            continue
        except BucketError as error:
            if error.permanent:
                raise
            client.report.status(f"the bucket cannot be reached: {error}")
            seen = None
            time.sleep(1)
        if seen:
            client.report.clear()
            return seen


class _Follower:
    def __init__(self, client: Client, order: Order, attempt: int, mine: bool) -> None:
        self.client, self.order, self.attempt, self.mine = client, order, attempt, mine
        self.name = f"{order.run}-{attempt}"
        self.output = Output(
            client.bucket, f"{order.prefix}/attempts/{attempt}/log", client.report, self.tick
        )
        self.begun = self.heard = time.monotonic()
        self.state: dict[str, Any] = {}
        self.asked: list[int] = []
        self.alive = False
        self.gone_at: float | None = None
        self._looked = self._beaten = self._stated = 0.0
        self._beats = itertools.count(1)

    def step(self, *, detach: bool) -> Seen | None:
        moved = self.mine and self.output.step()
        self.tick()
        if len(self.asked) >= NOW:
            return self._seen("now")
        if moved:
            self.heard = time.monotonic()
            return None  # output first: it is what the user waits for
        receipt = read_receipt(self.client.bucket, self.order.prefix)
        if receipt and (
            not self.mine or self.output.printed >= receipt["chunks"] or receipt["attempt"] != self.attempt
        ):
            return self._seen("finished", receipt)
        if time.monotonic() - self._stated > 4 * self.client.bucket.pace:
            self._stated = time.monotonic()
            self._read_state()
        if detach and self.state:
            return self._seen("detached")
        seen = self._look() if time.monotonic() - self._looked > LOOK_SECONDS else None
        if not seen:
            time.sleep(self.client.bucket.pace)
        return seen

    def tick(self) -> None:
        """What must not wait for anybody: the user's signals, and our sign of life."""
        for signum in self.client.signals.received[len(self.asked) :]:
            self.ask(signum)
        if time.monotonic() - self._beaten > self.order.limits["client_beat"]:
            self._beaten = time.monotonic()
            beat = {"client": self.client.identity, "beat": next(self._beats)}
            self.client.bucket.put(self.order.prefix + "/client.json", canonical(beat))

    def ask(self, signum: int) -> None:
        """Ask the agent to end main.py; the second time the caller ends the machine."""
        self.asked.append(signum)
        level = min(len(self.asked), NOW)
        if level == 1:
            self.client.report.say("ending main.py and saving; once more ends the machine at once")
        request_end(self.client.bucket, self.order.prefix, level, signal.Signals(self.asked[0]).name)

    def _seen(self, how: str, receipt: dict[str, Any] | None = None) -> Seen:
        by = signal.Signals(self.asked[0]).name if self.asked else ""
        console = "" if receipt else self.client.backend.console(self.name)
        self_end = self.order.limits["self_end"]
        return Seen(how, receipt, by, console, self.state.get("phase") in ("run", "save"), self_end)

    def _read_state(self) -> None:
        state = attempt_object(self.client.bucket, self.order, self.attempt, "state")
        if state and state.get("beat") != self.state.get("beat"):
            self.heard = time.monotonic()
        self.state = state or self.state
        if self.state.get("phase") == "fetch" and "of_bytes" in self.state:
            numbers = (self.state.get(key, 0) for key in ("files", "of_files", "bytes", "of_bytes"))
            self.client.report.progress("the machine fetches", *numbers)
        elif self.output.at_line_start:
            self.client.report.status(self._status())

    def _status(self) -> str:
        ran = time.monotonic() - self.begun
        price = "" if not self.order.price else f" · {human_money(ran * self.order.price / 3600)} so far"
        phase = self.state.get("phase", "starting the machine")
        return f"{phase} · {human_seconds(ran)}{price} · ends by {self.order.deadline[11:16]} UTC"

    def _look(self) -> Seen | None:
        """At the machine: is it there, does it live, is it time?"""
        self._looked = now = time.monotonic()
        instance = self.client.backend.find(self.name)
        self.alive = self.alive or bool(instance and instance.alive)
        known = (
            self.alive or attempt_object(self.client.bucket, self.order, self.attempt, "agent") is not None
        )
        if instance and instance.alive:
            self.gone_at = None
        elif known or instance or now - self.begun > self.order.limits["boot"]:
            self.gone_at = self.gone_at or now
            if now - self.gone_at >= LAST_WORDS_SECONDS and not (self.mine and self.output.step()):
                return self._gone()
        silence = 1.5 * self.order.limits["agent_silence"] + 2 * self.order.limits["state"]
        if now - self.heard > silence:
            return self._seen("silent")
        if self.order.left() < -self.order.limits["provider"]:
            return self._seen("overdue")
        return None

    def _gone(self) -> Seen:
        receipt = read_receipt(self.client.bucket, self.order.prefix)
        if receipt:
            return self._seen("finished", receipt)
        self._read_state()
        end = attempt_object(self.client.bucket, self.order, self.attempt, "end")
        return self._seen("preempted" if end else "gone")


def request_end(bucket: Bucket, prefix: str, level: int, by: str) -> None:
    """Raise the level in control.json; it never falls, and who asked first stays named."""
    name = prefix + "/control.json"
    for _ in range(20):
        version = None
        try:
            data, version = bucket.get(name)
            found = parse(data, name, level=int, by=str)
            if found["level"] >= level:
                return
            by = found["by"]
        except Missing:
            pass
        try:
            bucket.swap(name, canonical({"level": level, "by": by}), version)
            return
        except Conflict:
            time.sleep(0.05)
    raise CloudrunError(f"cannot write {name}: somebody else keeps writing it")


def say_price(report: Report, order: Order, what: str) -> None:
    """What the run can cost, said before it costs anything."""
    price = "price unknown" if order.price is None else f"{order.price:g} USD/h"
    worst = (order.seconds + order.limits["provider"]) * (order.price or 0) / 3600
    most = "nothing is billed" if order.price == 0 else f"at most {human_money(worst)}"
    report.say(f"{what}, {price}, ends by {order.deadline[:16].replace('T', ' ')} UTC, {most}")
