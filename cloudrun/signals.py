"""Ctrl-C, SIGTERM and SIGHUP: the first one raises or is counted, never lost."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from cloudrun.errors import Interrupted

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """While this context is open, the first signal raises Interrupted, unless `hold` was called.

    What was ignored when we started stays ignored (nohup). `received` lists all that came.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._raising = True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for signum in HANDLED:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def hold(self) -> None:
        """From here on signals are counted and interrupt nothing."""
        self._raising = False

    def rearm(self) -> None:
        """From here on the next signal raises again."""
        self._raising = True

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.received.append(signum)
        if self._raising:
            self._raising = False
            raise Interrupted(signum)
