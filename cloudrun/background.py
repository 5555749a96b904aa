"""Work on other threads. Sent with the agent: standard library, Python 3.8."""

from __future__ import annotations

import queue
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterable


class Background:
    """Does `act` for one job after the other on so many `workers`; at most `waiting` jobs wait for them.

    What went wrong is raised by the next `put` or `finish`; the jobs after it are dropped.
    """

    def __init__(self, act: Callable[[Any], object], waiting: int, workers: int = 1) -> None:
        self._act, self._workers = act, workers
        self._jobs: queue.Queue[Any] = queue.Queue(waiting)
        self._error: Exception | None = None
        self._threads: list[threading.Thread] = []

    def put(self, job: object) -> None:
        if len(self._threads) < self._workers:
            self._threads.append(threading.Thread(target=self._run, daemon=True))
            self._threads[-1].start()
        self.check()
        self._jobs.put(job)

    def finish(self) -> None:
        """Wait until everything is done."""
        self._jobs.join()
        self.check()

    def close(self) -> None:
        """End the threads. Raises nothing."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def drop(self, seconds: float) -> None:
        """Begin no more jobs, and wait only so long for those that are being done."""
        self._error = self._error or RuntimeError("dropped")
        with self._jobs.all_tasks_done:
            self._jobs.all_tasks_done.wait_for(lambda: not self._jobs.unfinished_tasks, seconds)

    def check(self) -> None:
        """Raise what went wrong; a long job asks now and then whether it is still wanted."""
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


def side_by_side(act: Callable[[Any], Any], items: Iterable[Any], workers: int) -> list[Any]:
    """What `act` makes of each, in their order. Raises what one of them raised."""
    items = list(items)
    results: list[Any] = [None] * len(items)

    def one(number: int) -> None:
        results[number] = act(items[number])

    work = Background(one, 1, workers)
    try:
        for number in range(len(items)):
            work.put(number)
        work.finish()
    except Exception:
        work.close()
        raise
    except BaseException:  # the user's signal does not wait for what is being done: that can take minutes
        work.drop(0)
        raise
    work.close()
    return results
