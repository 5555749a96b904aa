"""Work on a second thread. Sent with the agent: standard library, Python 3.8."""

from __future__ import annotations

import queue
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable


class Background:
    """Does `act` for one job after the other; at most `waiting` of them wait.

    What went wrong is raised by the next `put` or `finish`; the jobs after it are dropped.
    """

    def __init__(self, act: Callable[[Any], object], waiting: int) -> None:
        self._act = act
        self._jobs: queue.Queue[Any] = queue.Queue(waiting)
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def put(self, job: object) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._raise()
        self._jobs.put(job)

    def finish(self) -> None:
        """Wait until everything is done."""
        self._jobs.join()
        self._raise()

    def close(self) -> None:
        """End the thread. Raises nothing."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        for job in iter(self._jobs.get, None):
            try:
                if self._error is None:
                    self._act(job)
            except Exception as error:
                self._error = error
            del job  # it may be large
            self._jobs.task_done()
