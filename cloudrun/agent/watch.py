"""What may end main.py before it ends itself, and the signs of life to the guard and to the client."""

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
    from typing import Any

    from cloudrun.storage import Bucket


def now() -> float:
    """Seconds since boot, time asleep included: a changed clock moves no limit."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Ended(Exception):
    """The run must end for this reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Watch:
    """Answers `reason` from the main thread at any time; a thread of its own talks to the bucket."""

    def __init__(self, boot: dict[str, Any], order: dict[str, Any], bucket: Bucket) -> None:
        self.order, self.bucket = order, bucket
        self.limits: dict[str, float] = order["limits"]
        self.prefix, self.attempt = boot["prefix"], f"{boot['prefix']}/attempts/{boot['attempt']}"
        self.end_at = now() + boot["left"]
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
        threading.Thread(target=self._correspond, daemon=True).start()

    def left(self) -> float:
        return self.end_at - now()

    def reserve(self) -> float:
        """Seconds kept back at the end of the run for its grace and its last save."""
        saving = max(self.limits["reserve_save"], 2 * self.longest_save)
        wanted = min(self.limits["reserve_grace"] + saving, self.limits["reserve_max"])
        return min(wanted, 0.2 * self.order["seconds"])

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
        """Called by the main loop only: the guard hears that this thread, which does the work, goes on."""
        if now() - self._beaten > self.limits["agent_beat"]:
            self._beaten = now()
            self.tell_guard(b".")

    def tell_guard(self, word: bytes) -> None:
        with suppress(OSError):
            os.write(self._pipe, word)

    def phase(self, name: str) -> None:
        self.state = {"phase": name}
        self._changed.set()

    def during(self, thread: threading.Thread, limit: str, *, until: tuple[str, ...] = ()) -> None:
        """Wait for a thread. Raises Ended if the run must end meanwhile, except for a reason in `until`."""
        started = now()
        while thread.is_alive():
            thread.join(0.01 if now() - started < 1 else 0.2)
            self.beat()
            reason = self.reason()
            if reason and reason not in until:
                raise Ended(reason)
            if now() - started > self.limits[limit]:
                raise Ended(f"{limit} took longer than {self.limits[limit]:.0f} s")

    def _correspond(self) -> None:
        beat, said_at, said = 0, 0.0, None
        while True:
            with suppress(BucketError):
                self._read_control()
                self._read_client()
                state = dict(self.state)
                if state != said or now() - said_at > self.limits["state"]:
                    beat, said, said_at = beat + 1, state, now()
                    full = dict(state, beat=beat, time=timestamp(time.time()))
                    self.bucket.put(self.attempt + "/state.json", canonical(full))
            self._changed.wait(8 * self.bucket.pace)
            self._changed.clear()

    def _read_control(self) -> None:
        name = self.prefix + "/control.json"
        if self.bucket.size(name) is None:
            return
        control = parse(self.bucket.get(name)[0], name, level=int, by=str)
        if control["level"] > self.level:
            self.by = self.by or control["by"]
            self.level = control["level"]

    def _read_client(self) -> None:
        name = self.prefix + "/client.json"
        if self.order["if_client_lost"] != "stop" or self.bucket.size(name) is None:
            return
        beat = parse(self.bucket.get(name)[0], name)
        if beat != self._client_beat:
            self._client_beat, self._client_at = beat, now()
