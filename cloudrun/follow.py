"""Follow an attempt: print its output, pass the user's wish to end it on, notice its end."""

from __future__ import annotations

import itertools
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cloudrun.errors import FAILED, UNKNOWN, BucketError, CloudrunError, Conflict, Corrupt, Missing
from cloudrun.formats import canonical, has_begun, parse, seconds_of
from cloudrun.handover import Renewals
from cloudrun.late import collect, is_alone, may_go_on
from cloudrun.order import Order, time_of
from cloudrun.output import Output
from cloudrun.receipt import Outcome, billed_outcome, ended_by, outcome_of, read_receipt, user_code
from cloudrun.report import human_money, human_seconds
from cloudrun.runs import attempt_object, is_claimed
from cloudrun.storage import Bucket

if TYPE_CHECKING:
    from cloudrun.run import Client

LOOK_SECONDS = 0.5  # between two looks at the machine, and two tries at a bucket that is out of reach
LAST_WORDS_SECONDS = 0.5  # in which the bucket may show what a machine wrote just before it went
NOW = 2
OF_THE_HOST = (  # in what a guard said: not ours
    *("urlopen error", "timed out", "in time", "the disk cannot", "no CONTAINER_API_KEY"),
)
REFUSED = ": the machine's service account may not read the bucket, cloudrun doctor says what allows it"
ALONE = (
    "no client was there to renew the machine's token, and it goes on alone: nothing more of its output "
    "comes before its end, and to stop it means to end it at once"
)
ENDING = ("finished", "preempted", "shutdown", "gone")  # the machine is about to end itself, or has


@dataclass
class Seen:
    """How following an attempt ended.

    `how`: finished (there is a receipt), preempted, shutdown (from outside), gone (without a word),
    superseded (by the next attempt), silent, overdue, now (the user asked twice), detached, unusable (for
    this run: `why`). `by`: the signal of the user's wish.
    """

    how: str
    receipt: dict[str, Any] | None = None
    by: str = ""
    console: str = ""
    began: bool = False
    self_end: float = 0.0
    why: str = ""

    @property
    def grace(self) -> float | None:
        """Seconds in which the machine may end itself; None: it shall live on."""
        if self.how == "detached":
            return None
        return self.self_end if self.how in ENDING else 0.0

    def outcome(self, order: Order, left: float) -> Outcome:
        """What it means for the run, if there is no receipt, and so many seconds before its deadline."""
        if self.how == "now":
            return Outcome("stopped", user_code(self.by), f"{ended_by(self.by)}, at once")
        if self.how == "preempted":
            return Outcome("preempted", UNKNOWN, "the machine was taken away; run it again to go on")
        if self.how == "unusable":
            return Outcome("unusable", FAILED, f"main.py was not started: {self.why}")
        late = self.how == "shutdown" and left <= 0
        if late or self.how == "overdue" or "guard: the deadline was reached" in self.console:
            return Outcome(order.limited_by, 124, "ended at the deadline, by the guard, the provider or us")
        if self.how == "shutdown":
            return Outcome("shutdown", UNKNOWN, "the machine was shut down from outside")
        fatal = [line.partition(" ")[2] for line in fatal_lines(self.console)]
        if not self.began:
            words = fatal[-1] if fatal else "the machine gave no sign of life"
            return Outcome("failed", 125, f"main.py was not started: {words}")
        why = fatal[-1] if fatal else self.console.strip().rpartition("\n")[2] or f"the machine is {self.how}"
        return Outcome("lost", UNKNOWN, f"outcome unknown ({why})")


def how_of(end: dict[str, Any]) -> str:
    """Of an end.json: taken away by the provider, shut down by somebody, or of no use."""
    reason = end.get("reason")
    return reason if reason in ("shutdown", "unusable") else "preempted"


def fatal_lines(console: str) -> list[str]:
    """`<instance> <words>`: what guard or agent could not work without."""
    lines = (line.partition("CLOUDRUN-FATAL ")[2] for line in console.splitlines())
    return [line + REFUSED * ("HTTP Error 403" in line) for line in lines if line]


def conclude(bucket: Bucket, order: Order, seen: Seen, bill: dict[str, Any] | None = None) -> Outcome:
    """How the run ended, once its machine is seen ended: the receipt has the last word."""
    try:
        if not seen.receipt:
            collect(bucket, order)
        receipt = seen.receipt or read_receipt(bucket, order.prefix)
        if receipt:
            outcome, numbers = outcome_of(receipt), range(1, receipt["attempt"] + 1)
            states = (attempt_object(bucket, order, n, "state") for n in numbers)
            if outcome.reason == "failed" and any(has_begun(state or {}) for state in states):
                words = f"main.py was not started again: {receipt['message']}"
                outcome = outcome._replace(exit_code=UNKNOWN, words=words)
            return outcome
        level, by = requested_end(bucket, order.prefix)
        if level >= NOW or (level and seen.how in ("preempted", "shutdown")):
            seen = Seen("now", by=by)
    except BucketError as error:
        if seen.how != "now":
            return Outcome("lost", UNKNOWN, f"outcome unknown ({error})")
    return billed_outcome(bill) if bill else seen.outcome(order, order.left(bucket))


def follow(
    client: Client, order: Order, attempt: int, *, mine: bool = True, show: bool = True, detach: bool = False
) -> Seen:
    """Until the attempt's end, or its first sign of life with `detach`. Raises nothing of its own.

    mine: signals are the wish to end it, counted meanwhile. show: print its output.
    """
    if mine:
        client.signals.hold()
    client.report.stage("follow")
    follower = _Follower(client, order, attempt, mine)
    while True:
        seen = follower.step(show=show, detach=detach)
        if seen:
            client.report.clear()
            return seen


class _Follower:
    def __init__(self, client: Client, order: Order, attempt: int, mine: bool) -> None:
        self.client, self.order, self.attempt, self.mine = client, order, attempt, mine
        self.name = f"{order.run}-{attempt}"
        log = f"{order.prefix}/attempts/{attempt}/log"
        self.output = Output(client.bucket, log, client.report, self.tick)
        self.begun = self.heard = self.booted = time.monotonic()
        # Whatever the clock does later, and however long this computer sleeps. Of a run that another client
        # started we know only what its machine says: our clock may be wrong, and the bucket tell none.
        self.end_at = (
            since_boot() + order.left(client.bucket) + order.limits["provider"] if mine else float("inf")
        )
        self.state: dict[str, Any] = {}
        self.asked: list[int] = []
        self.alive = self.complete = self.changed = False
        self.lost = ""
        self.gone_at: float | None = None
        self.cut_off: BucketError | None = None
        self._counted = self._told = 0
        self._looked = self._beaten = self._stated = self._told_at = 0.0
        self._beats = itertools.count(1)
        self._said_alone = False
        self._renewals = Renewals(client.bucket, order, attempt, client.report.detail)

    def step(self, *, show: bool, detach: bool) -> Seen | None:
        if self.tick():
            return self._seen("overdue" if since_boot() > self.end_at else "now")
        if self.output.closed and not self.mine:
            return self._seen("detached")
        seen = None
        try:
            if show and self.output.step(hurry=self.complete):
                self.heard = time.monotonic()
                return None  # output first: it is what the user waits for
            if self.complete or time.monotonic() - self._stated > self.client.bucket.slow_pace:
                seen = self._read(show, detach)
            self.cut_off = None
        except BucketError as error:
            self.cut_off, self.heard = error, time.monotonic()  # who is silent cannot be known
            self.client.report.status(f"the bucket cannot be read: {error}")
            time.sleep(LOOK_SECONDS)
        if not seen and time.monotonic() - self._looked > max(LOOK_SECONDS, self.client.backend.pace):
            seen = self._look(show)
        if not seen:
            time.sleep(self.client.bucket.pace)
        return seen

    def tick(self) -> bool:
        """What must not wait for anybody: signals, the deadline, our sign of life. True: end it now."""
        if self.mine:
            signals = self.client.signals.received[self._counted :]
            self._counted += len(signals)
            self.asked += signals
            if self.output.closed and signal.SIGPIPE not in self.asked:
                self.asked.append(signal.SIGPIPE)
        now, limits = time.monotonic(), self.order.limits
        with suppress(BucketError):  # it is tried again
            if len(self.asked) > self._told and now - self._told_at > LOOK_SECONDS:
                self._told_at = now
                self._tell(min(len(self.asked), NOW))
            if self.order.if_client_lost == "stop" and now - self._beaten > limits["client_beat"]:
                self._beaten = now
                beat = {"client": self.client.identity, "beat": next(self._beats)}
                self.client.bucket.put(self.order.prefix + "/client.json", canonical(beat))
        if self.alive and not self.alone:
            self._renewals.step()
        heard = NOW if not self.alone else 1  # who hears nobody cannot be asked to end main.py
        return len(self.asked) >= heard or since_boot() > self.end_at

    @property
    def alone(self) -> bool:
        """Whether the machine's token has run out, and it goes on without hearing or telling anything."""
        return is_alone(self.order, self.state)

    def _tell(self, level: int) -> None:
        """Ask the agent to end main.py; when asked twice, our caller ends the machine."""
        request_end(self.client.bucket, self.order.prefix, level, self._by())
        self._told = level
        if level < NOW:
            self.client.report.say("ending main.py and saving; once more ends the machine at once")

    def _by(self) -> str:
        return signal.Signals(self.asked[0]).name if self.asked else ""

    def _seen(self, how: str, receipt: dict[str, Any] | None = None) -> Seen:
        console = ""
        if how not in ("finished", "detached"):
            with suppress(CloudrunError):
                console = self.client.backend.console(self.name)
        began, self_end = has_begun(self.state), self.order.limits["self_end"]
        return Seen(how, receipt, self._by(), console, began, self_end, self.lost)

    def _read(self, show: bool, detach: bool) -> Seen | None:
        """What the machine wrote: its receipt, or how it is."""
        self._stated = time.monotonic()
        self._read_state()
        if detach and self.state and len(self.client.signals.received) == self._counted and not self.asked:
            return self._seen("detached")
        if self.alone:
            self._go_on_alone()
        try:
            receipt = read_receipt(self.client.bucket, self.order.prefix)
        except Corrupt:
            return self._seen("finished")
        self.complete = receipt is not None
        rest = receipt["chunks"] if receipt and show and receipt["attempt"] == self.attempt else 0
        return self._seen("finished", receipt) if receipt and self.output.printed >= rest else None

    def _go_on_alone(self) -> None:
        """It says nothing more before its end; then what it says may have come already."""
        if not self._said_alone:
            self._said_alone = True
            self.client.report.say(ALONE)
        self._collect()

    def _collect(self) -> None:
        collect(self.client.bucket, self.order, self.client.report.warn, self.client.bounds)

    def _read_state(self) -> None:
        state = attempt_object(self.client.bucket, self.order, self.attempt, "state")
        if state and state.get("beat") != self.state.get("beat"):
            self.heard, self.changed = time.monotonic(), bool(self.state)
        self.state = state or self.state
        numbers = [self.state.get(key) for key in ("files", "of_files", "bytes", "of_bytes")]
        sane = all(isinstance(number, int) and 0 <= number < 1 << 60 for number in numbers)
        if self.state.get("phase") == "fetch" and sane:
            self.client.report.progress("the machine fetches", *numbers)  # type: ignore[arg-type]
        else:
            self.client.report.status(self._status())

    def _status(self) -> str:
        ran = time.monotonic() - self.begun
        price = "" if not self.order.price else f" · {human_money(ran * self.order.price / 3600)} so far"
        phase = self.state.get("phase", "starting the machine")
        return f"{phase} · {human_seconds(ran)}{price} · ends by {self.order.ends_by[11:16]} UTC"

    def _look(self, show: bool) -> Seen | None:
        """At the machine: is it there, does it live, is it time?"""
        self._looked = now = time.monotonic()
        with suppress(CloudrunError):  # a provider that cannot be asked says nothing about the machine
            instance = self.client.backend.find(self.name)
            if instance and instance.ended is None and not self.mine:
                late = time_of(self.client.bucket) - seconds_of(instance.deadline)
                if late > self.order.limits["provider"]:
                    return self._seen("overdue")
            if instance and instance.coming:
                self.booted = self.heard = now  # its backend keeps the time
            self.lost = instance.lost if instance else self.lost
            if instance and instance.alive:
                self.alive, self.gone_at = True, None
            elif self.alive or instance or self.state or now - self.begun > self.order.limits["boot"]:
                self.gone_at = self.gone_at or now
            readable = not self.cut_off or self.cut_off.permanent
            if self.gone_at and readable and now - self.gone_at >= LAST_WORDS_SECONDS:
                return self._gone(show)
            if is_claimed(self.client.bucket, self.order, self.attempt + 1):
                return self._seen("superseded")
        fatal = self._fatal() if self.mine and not self.state else ""
        if fatal and self.client.backend.stranger and any(words in fatal for words in OF_THE_HOST):
            self.lost = fatal
            return self._seen("unusable")
        if fatal:
            return self._seen("silent")
        unborn = self.mine and not self.state and now - self.booted > self.order.limits["boot"]
        if unborn and not self.cut_off:
            self.lost = "the machine gave no sign of life"
            return self._seen("unusable" if self.client.backend.stranger else "silent")
        # Of a stranger's machine whose token nobody renewed until we came, silence says nothing.
        known = not self.alone and (self.mine or not self.order.stranger or self.changed)
        if (
            known
            and now - self.heard > 1.5 * self.order.limits["agent_silence"] + 2 * self.order.limits["state"]
        ):
            return self._seen("silent")
        return None

    def _fatal(self) -> str:
        """What guard or agent said on the console of this machine, without which it cannot work."""
        with suppress(CloudrunError):
            lines = fatal_lines(self.client.backend.console(self.name))
            return next((line.partition(" ")[2] for line in lines if self.name in line), "")
        return ""

    def _gone(self, show: bool) -> Seen | None:
        with suppress(BucketError):
            self._collect()
            if show and self.output.step(hurry=True):
                return None
            seen = self._read(show=False, detach=False)
            if seen:
                return seen
            self._read_state()
            end = attempt_object(self.client.bucket, self.order, self.attempt, "end")
            if end:
                self.lost = str(end.get("why", ""))[:300] or self.lost
                return self._seen(how_of(end))
        if self.lost:  # whoever has not begun can begin elsewhere, and is not billed for long
            return self._seen("preempted" if self.state else "unusable")
        with suppress(CloudrunError):  # it had no time to say so, or no network
            if self.client.backend.taken_away(self.name) or may_go_on(
                self.client.bucket, self.order, self.state
            ):
                return self._seen("preempted")
        return self._seen("gone")


def since_boot() -> float:
    """Seconds, time asleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def request_end(bucket: Bucket, prefix: str, level: int, by: str) -> None:
    """Raise the level in control.json; it never falls, and who asked first stays named."""
    for _ in range(20):
        found, version = _control(bucket, prefix)
        wanted = canonical({"level": level, "by": found["by"] or by})
        try:
            if found["level"] < level:
                bucket.swap(prefix + "/control.json", wanted, version)
            return
        except Conflict:
            time.sleep(0.05)
    raise BucketError(f"cannot write {prefix}/control.json: somebody else keeps writing it")


def requested_end(bucket: Bucket, prefix: str) -> tuple[int, str]:
    """(level, who asked first) of control.json; level 0 while nobody did."""
    found, _ = _control(bucket, prefix)
    return found["level"], found["by"]


def _control(bucket: Bucket, prefix: str) -> tuple[dict[str, Any], str | None]:
    name = prefix + "/control.json"
    try:
        data, version = bucket.get(name)
        return parse(data, name, level=int, by=str), version
    except Missing:
        return {"level": 0, "by": ""}, None
