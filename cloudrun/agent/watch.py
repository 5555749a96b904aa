"""What may end main.py before it ends itself, and the signs of life to the guard and the client."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from cloudrun.agent.machine import why_it_ends
from cloudrun.errors import BucketError, CloudrunError, Missing
from cloudrun.formats import canonical, has_begun, parse, seconds_of, timestamp
from cloudrun.storage import Bucket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cloudrun.agent.alone import AloneBucket


CLOCK_SECONDS = 2.0  # to which two clocks that are right may differ, and an answer may take


def now() -> float:
    """Seconds since boot, time asleep included: a changed clock moves no limit."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def stamp() -> str:
    return timestamp(time.time())


def insist(act: Callable[[], object], seconds: float, refused: float) -> object:
    """Try again for so long, what the bucket refuses for good `refused` seconds. Raises the last error."""
    started, pause = now(), 0.1
    while True:
        try:
            return act()
        except (BucketError, OSError) as error:
            if now() - started > (refused if getattr(error, "permanent", False) else seconds):
                raise
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def said(error: BaseException) -> str:
    return str(error) if isinstance(error, (CloudrunError, OSError)) else f"{type(error).__name__}: {error}"


class Task(threading.Thread):
    """Work on a thread of its own, so that the main thread stays free to watch; starts at once."""

    def __init__(self, work: Callable[..., object], *arguments: object) -> None:
        super().__init__(target=work, args=arguments, daemon=True)
        self.error: Exception | None = None
        try:
            self.start()
        except RuntimeError as error:  # main.py may have taken all the threads that there are
            self.error = error

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            self.error = error


class Watch:
    """Answers `reason` from the main thread at any time; a thread of its own talks to the bucket.

    `helpers` are the tasks that a run cannot go on without. `stranger`: the bucket of a machine whose token
    runs out.
    """

    def __init__(self, boot: dict[str, Any], order: dict[str, Any], bucket: Bucket) -> None:
        self.boot, self.order, self.bucket = boot, order, bucket
        self.limits: dict[str, float] = order["limits"]
        self.prefix, self.number = boot["prefix"], boot["attempt"]
        self.attempt = f"{self.prefix}/attempts/{self.number}"
        self.end_at: float = now() + boot["left"]
        self.stranger: AloneBucket | None = bucket if "token" in boot else None  # type: ignore[assignment]
        self.longest_save = 0.0
        self.level, self.by = 0, ""
        self._pipe, self._guard = int(os.environ["CLOUDRUN_GUARD"]), select.poll()
        self._guard.register(self._pipe, 0)  # says when nobody is left who could read it
        self._beaten = now()
        self._client = b"", now()
        self._noticed, self._client_lost = threading.Event(), False
        self.farewell: Task | None = None
        self._changed = threading.Event()
        self.phase("boot")
        os.set_blocking(self._pipe, False)
        os.set_inheritable(self._pipe, False)
        for name in (signal.SIGINT, signal.SIGHUP):
            signal.signal(name, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self._noticed.set())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # the guard held it back for us
        self.helpers = [Task(self._correspond)]

    def left(self) -> float:
        return self.end_at - now()

    def reserve(self) -> float:
        """Seconds kept back at the end of the run for its grace and its last save."""
        saving = max(self.limits["reserve_save"], 2 * self.longest_save)
        wanted = min(self.limits["reserve_grace"] + saving, self.limits["reserve_max"])
        return min(wanted, 0.2 * float(self.order["seconds"]))

    def reason(self) -> str | None:
        """Why main.py has to end now, or None."""
        reasons = {
            "preempted": self._noticed.is_set(),
            "guard-lost": self._guard.poll(0),
            "agent-failed": any(task.error for task in self.helpers),
            "stopped": self.level,
            self.order["limited_by"]: self.left() <= self.reserve(),
            "client-lost": self._client_lost,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def trouble(self) -> str:
        """What went wrong in the helpers."""
        return " ".join(said(task.error) for task in self.helpers if task.error)

    def beat(self) -> None:
        """From the main loop only: the guard hears that the thread that does the work goes on.

        A spot notice, whenever it comes, is passed on to the bucket: the run may go on elsewhere.
        """
        if self._noticed.is_set() and self.farewell is None:
            self.farewell = Task(self._say_farewell)
        if now() - self._beaten > self.limits["agent_beat"]:
            self._beaten = now()
            with suppress(OSError):
                os.write(self._pipe, b".")

    def _say_farewell(self) -> None:
        why = "preempted"  # as long as nobody says otherwise: the run may go on
        with suppress(OSError):
            why = why_it_ends(self.boot)
        self.bucket.create(self.attempt + "/end.json", canonical({"reason": why, "time": stamp()}))

    def phase(self, name: str, details: Mapping[str, int] | None = None) -> None:
        """`details` may change while the phase lasts."""
        self._phase, self._details = name, details or {}
        self._changed.set()

    def join(self, task: Task, seconds: float, *, heed: bool = False) -> bool:
        """Wait for a task, for so long; `heed`: or until the run must end. False if it did not get done."""
        started = now()
        while task.is_alive() and now() - started < seconds and not (heed and self.reason()):
            task.join(0.05)
            self.beat()
        return not task.error and not task.is_alive()

    def _correspond(self) -> None:
        said_at, said, before = 0.0, None, None
        while True:
            pause = max(0.2, self.bucket.slow_pace)
            with suppress(Exception):  # whatever it was, the next letter may arrive
                alone = self.stranger is not None and self.stranger.renew()
                self._read_control()
                if self.order["if_client_lost"] == "stop":
                    self._read_client()
                if before is None:  # the machine may have been started again
                    name = f"attempts/{self.number}/state.json"
                    before = {"began": True} if has_begun(parse(self.read(name) or b"{}", name)) else {}
                state = {
                    **self._details,
                    **before,
                    "phase": self._phase,
                    **({"alone": True} if alone else {}),
                }
                if state != said or now() - said_at > self.limits["state"]:
                    letter = {**state, "beat": now(), "time": stamp()}
                    self.bucket.put(self.attempt + "/state.json", canonical(letter))
                    said, said_at = state, now()
                    self._set_clock()
                if self.stranger and alone:
                    self.stranger.leave()
                    self._client_lost = self.order["if_client_lost"] == "stop"  # it has renewed nothing
            if self.stranger:
                pause = min(pause, max(0.2, self.stranger.token.left() / 10))
            self._changed.wait(pause)
            self._changed.clear()

    def _set_clock(self) -> None:
        """The bucket's clock may shorten the run, of which the machine knows only how long it may take."""
        time_there = self.bucket.time()
        if time_there is not None:
            left = seconds_of(self.order["deadline"]) - time_there
            if left < self.left() - CLOCK_SECONDS:
                self.end_at = now() + left
                os.write(self._pipe, b"L%.3f\n" % left)

    def _read_control(self) -> None:
        control = self.read("control.json")
        if control:
            found = parse(control, "control.json", level=int, by=str)
            self.by = self.by or found["by"]
            self.level = max(self.level, found["level"])

    def _read_client(self) -> None:
        """A client is lost when its sign of life is seen not to change; an unreadable bucket says nothing."""
        found, (before, since) = self.read("client.json"), self._client
        if found != before:
            self._client = found, now()
        self._client_lost = found == before and now() - since > self.limits["client_lost"]

    def read(self, name: str) -> bytes:
        """An object of the run; nothing where there is none."""
        with suppress(Missing):
            return self.bucket.get(f"{self.prefix}/{name}")[0]
        return b""
