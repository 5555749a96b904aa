"""What may end main.py before it ends itself, and the signs of life to the guard and the client."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress

from cloudrun.errors import BucketError
from cloudrun.formats import canonical, parse, timestamp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable

    from cloudrun.storage import Bucket


def now() -> float:
    """Seconds since boot, time asleep included: a changed clock moves no limit."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def insist(act: Callable[[], object], seconds: float, beat: Callable[[], object]) -> None:
    """Do what the bucket refuses again and again, for so long. Raises its last BucketError."""
    deadline, pause = now() + seconds, 0.1
    while True:
        try:
            act()
            return
        except BucketError:
            if now() > deadline:
                raise
        beat()
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


class Ended(Exception):
    """The run must end for this reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Task(threading.Thread):
    """Work on a thread of its own, so that the main thread stays free to watch; starts at once."""

    def __init__(self, work: Callable[..., object], *arguments: object) -> None:
        super().__init__(daemon=True)
        self.done = False
        self.error: Exception | None = None
        self._work, self._arguments = work, arguments
        self.start()

    def run(self) -> None:
        try:
            self._work(*self._arguments)
            self.done = True
        except Exception as error:
            self.error = error


class Watch:
    """Answers `reason` from the main thread at any time; a thread of its own talks to the bucket."""

    def __init__(self, boot: dict[str, Any], order: dict[str, Any], bucket: Bucket) -> None:
        self.order, self.bucket = order, bucket
        self.limits: dict[str, float] = order["limits"]
        self.prefix, self.attempt = boot["prefix"], f"{boot['prefix']}/attempts/{boot['attempt']}"
        self.end_at: float = now() + boot["left"]
        self.longest_save = 0.0
        self.level, self.by = 0, ""
        self.state: dict[str, Any] = {"phase": "boot"}
        self._pipe, self._guard = int(os.environ["CLOUDRUN_GUARD"]), os.getppid()
        self._beaten = self._client_at = now()
        self._client_beat: object = None
        self._signalled = threading.Event()
        self._changed = threading.Event()
        os.set_blocking(self._pipe, False)
        os.set_inheritable(self._pipe, False)
        for name in (signal.SIGINT, signal.SIGHUP):
            signal.signal(name, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self._signalled.set())
        Task(self._correspond)

    def left(self) -> float:
        return self.end_at - now()

    def reserve(self) -> float:
        """Seconds kept back at the end of the run for its grace and its last save."""
        saving = max(self.limits["reserve_save"], 2 * self.longest_save)
        wanted = min(self.limits["reserve_grace"] + saving, self.limits["reserve_max"])
        return min(wanted, 0.2 * float(self.order["seconds"]))

    def reason(self) -> str | None:
        """Why main.py has to end now, or None."""
        if self._signalled.is_set():
            return "preempted"
        if os.getppid() != self._guard:
            return "guard-lost"
        if self.level:
            return "stopped"
        if self.left() <= self.reserve():
            return str(self.order["limited_by"])
        lost = self.limits["client_lost"]
        if self.order["if_client_lost"] == "stop" and now() - self._client_at > lost:
            return "client-lost"
        return None

    def beat(self) -> None:
        """From the main loop only: the guard hears that the thread that does the work goes on."""
        if now() - self._beaten > self.limits["agent_beat"]:
            self._beaten = now()
            self.tell_guard(b".")

    def tell_guard(self, word: bytes) -> None:
        with suppress(OSError):
            os.write(self._pipe, word)

    def phase(self, name: str) -> None:
        self.state = {"phase": name}
        self._changed.set()

    def join(
        self,
        task: Task,
        seconds: float,
        *,
        heed: bool = False,
        tick: Callable[[], object] = lambda: None,
    ) -> None:
        """Wait for a task, for so long. `heed`: raise Ended when the run must end meanwhile."""
        started, pause = now(), 0.002
        while task.is_alive() and now() - started < seconds:
            task.join(pause)
            pause = min(2 * pause, 0.2)
            self.beat()
            tick()
            reason = self.reason() if heed else None
            if reason:
                raise Ended(reason)

    def _correspond(self) -> None:
        beat, said_at, said = 0, 0.0, None
        while True:
            with suppress(BucketError):
                self._read_control()
                self._read_client()
                state = self.state
                if state != said or now() - said_at > self.limits["state"]:
                    beat, said, said_at = beat + 1, state, now()
                    full = dict(state, beat=beat, time=timestamp(time.time()))
                    self.bucket.put(self.attempt + "/state.json", canonical(full))
            self._changed.wait(8 * self.bucket.pace)
            self._changed.clear()

    def _read_control(self) -> None:
        name = self.prefix + "/control.json"
        if self.bucket.size(name) is not None:
            control = parse(self.bucket.get(name)[0], name, level=int, by=str)
            self.by = self.by or control["by"]
            self.level = max(self.level, control["level"])

    def _read_client(self) -> None:
        name = self.prefix + "/client.json"
        if self.order["if_client_lost"] == "stop" and self.bucket.size(name) is not None:
            beat = parse(self.bucket.get(name)[0], name)
            if beat != self._client_beat:
                self._client_beat, self._client_at = beat, now()
