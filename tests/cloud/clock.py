"""The cloud's clock: real time that a test can move forward, the lock of all state, and what falls due."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

PACIFIC = timezone(timedelta(hours=-8))  # Compute Engine writes its times like this, never with a Z


def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, PACIFIC).isoformat(timespec="milliseconds")


def seconds_of(text: str) -> float:
    """Raises ValueError for what is not RFC 3339 with an offset."""
    when = datetime.fromisoformat(text.replace("Z", "+00:00"))
    if when.tzinfo is None:
        raise ValueError(f"no offset in {text!r}")
    return when.timestamp()


class Clock:
    """`changed` is notified whenever something fell due; whoever changes the cloud holds it."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self._ahead = 0.0
        self._due: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._closed = False
        self.errors: list[Exception] = []  # of what fell due; they are bugs of the emulator
        self._thread = threading.Thread(target=self._run, name="cloud-clock", daemon=True)
        self._thread.start()

    def now(self) -> float:
        return time.time() + self._ahead

    def after(self, seconds: float, act: Callable[..., Any], *arguments: Any) -> None:
        self.at(self.now() + seconds, act, *arguments)

    def at(self, when: float, act: Callable[..., Any], *arguments: Any) -> None:
        """Call it then, holding `changed`. What is no longer wanted has to see that for itself."""
        with self.changed:
            heapq.heappush(self._due, (when, next(self._numbers), act, arguments))
            self.changed.notify_all()

    def advance(self, seconds: float) -> None:
        """Move to so much later; what falls due on the way happens at its own time, in order."""
        with self.changed:
            end = self.now() + seconds
            while self._due and self._due[0][0] <= end:
                self._ahead += max(0.0, self._due[0][0] - self.now())
                self._fire()
            self._ahead += max(0.0, end - self.now())
            self.changed.notify_all()

    def wait_for(self, condition: Callable[[], Any], seconds: float) -> Any:
        """Until the condition is true, or so many real seconds have passed; returns what it was."""
        with self.changed:
            return self.changed.wait_for(condition, seconds)

    def close(self) -> None:
        with self.changed:
            self._closed = True
            self._due.clear()
            self.changed.notify_all()
        self._thread.join()

    def _fire(self) -> None:
        _, _, act, arguments = heapq.heappop(self._due)
        try:
            act(*arguments)
        except Exception as error:  # the clock must go on, and the test must not pass: see Cloud.close
            self.errors.append(error)
        self.changed.notify_all()

    def _run(self) -> None:
        with self.changed:
            while not self._closed:
                left = self._due[0][0] - self.now() if self._due else None
                if left is None or left > 0:
                    self.changed.wait(left)
                else:
                    self._fire()
