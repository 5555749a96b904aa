"""main.py: started in a process group of its own, its output copied, ended when it has to be."""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

from cloudrun.agent.watch import now
from cloudrun.processes import descendants, kill_descendants

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable

    from cloudrun.agent.watch import Watch

PIPE_BYTES = 1 << 20


class Program:
    """A running main.py. `status` is None until it ended; then its exit status, or minus a signal."""

    def __init__(self, argv: list[str], env: dict[str, str], write: Callable[[str, bytes], None]) -> None:
        self.status: int | None = None
        self._write = write
        wake, self._wake = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,
        )
        with suppress(OSError), open(f"/proc/{self._child.pid}/oom_score_adj", "w") as file:
            file.write("0")  # the guard's and our own protection is not meant for main.py
        assert self._child.stdout and self._child.stderr
        self._poll = select.poll()
        self._poll.register(wake, select.POLLIN)
        self._streams = {self._child.stdout.fileno(): "out", self._child.stderr.fileno(): "err"}
        for descriptor in self._streams:
            os.set_blocking(descriptor, False)
            self._poll.register(descriptor, select.POLLIN)
            with suppress(OSError):  # larger pipes, fewer turns; there is a limit for ordinary users
                fcntl.fcntl(descriptor, 1031, PIPE_BYTES)
        self._wake_read = wake

    def pump(self, seconds: float) -> None:
        """Copy output for at most so long, or until something happened."""
        for descriptor, _ in self._poll.poll(seconds * 1000):
            if descriptor == self._wake_read:
                os.read(descriptor, 4096)
                self._reap()
            else:
                self._copy(descriptor)

    def signal(self, signum: int) -> None:
        """To the whole group, as a terminal does."""
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signum)

    def drain(self, seconds: float, before_kill: Callable[[], object], beat: Callable[[], None]) -> None:
        """After the end of main.py: let what it left behind finish for so long, then end it."""
        deadline, pause = now() + seconds, 0.002
        while self._left_behind() and now() < deadline:
            self.pump(pause)
            pause = min(2 * pause, 0.1)
            beat()
        if self._left_behind():
            before_kill()
        while not kill_descendants(0.5):
            beat()
        for descriptor in list(self._streams):
            while self._copy(descriptor):
                pass
        signal.set_wakeup_fd(-1)

    def _left_behind(self) -> bool:
        self._reap()
        return bool(descendants())

    def _reap(self) -> None:
        """Collect main.py, and orphans: this process is their subreaper."""
        with suppress(ChildProcessError):
            while True:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is None:
                    return
                if ended.si_pid == self._child.pid:
                    self.status = self._child.poll()
                else:
                    os.waitpid(ended.si_pid, 0)

    def _copy(self, descriptor: int) -> bool:
        try:
            data = os.read(descriptor, PIPE_BYTES)
        except BlockingIOError:
            return False
        if data:
            self._write(self._streams[descriptor], data)
        else:
            self._poll.unregister(descriptor)
            del self._streams[descriptor]
        return bool(data)


class Ending:
    """Asks main.py to end, more firmly as time passes. `drain`: seconds for what it leaves behind."""

    def __init__(self, reason: str, watch: Watch) -> None:
        limits, room = watch.limits, watch.reserve()
        interrupt, terminate = limits["grace_interrupt"], limits["grace_terminate"]
        # In a short run the reserve is short as well, and half of it belongs to the save.
        scale = min(1.0, room / (4 * interrupt))
        self._steps = [(0.0, signal.SIGINT), (interrupt * scale, signal.SIGTERM)]
        self._steps.append(((interrupt + terminate) * scale, signal.SIGKILL))
        if reason == "preempted":
            self._steps = [(0.0, signal.SIGTERM), (limits["grace_preempted"], signal.SIGKILL)]
        self.drain = min(limits["drain"], room / 8)
        self._watch, self._started = watch, now()

    def press(self, program: Program) -> None:
        if self._watch.level > 1:
            self._steps, self.drain = [(0.0, signal.SIGKILL)], 0.0
        if self._steps and now() - self._started >= self._steps[0][0]:
            program.signal(self._steps.pop(0)[1])


def python() -> str:
    """The interpreter that `python main.py` would use here."""
    return shutil.which("python") or shutil.which("python3") or sys.executable


def exit_of(status: int | None) -> tuple[int | None, str | None]:
    """(exit status, name of the signal) of a finished program; one of them is None."""
    if status is None or status >= 0:
        return status, None
    with suppress(ValueError):
        return None, signal.Signals(-status).name
    return None, f"SIG{-status}"
