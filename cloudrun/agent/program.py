"""main.py: started in a process group of its own, its output copied, ended when it has to be."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress

from cloudrun.agent.watch import Watch
from cloudrun.processes import stat_of

EXITING = 4  # PF_EXITING of the kernel's flags
PIPE_BYTES = 1 << 20  # no pipe that nobody made larger holds more, whatever the size of a page
AS_EVER = [signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ]


class Program:
    """A running main.py. `status` is None until it ended; then its exit status, or minus a signal."""

    def __init__(self, argv: list[str], env: dict[str, str], write: Callable[[str, bytes], None]) -> None:
        self.status: int | None = None
        self._write = write
        (out, for_out), (err, for_err) = os.pipe(), os.pipe()
        self._streams = {out: "out", err: "err"}
        for reading in self._streams:
            os.set_blocking(reading, False)
        nothing = os.open(os.devnull, os.O_RDONLY)
        actions = [(os.POSIX_SPAWN_DUP2, ours, n) for n, ours in enumerate((nothing, for_out, for_err))]
        self._pid = os.posix_spawn(
            argv[0], argv, env, file_actions=actions, setpgroup=0, setsigmask=[], setsigdef=AS_EVER
        )
        for ours in (nothing, for_out, for_err):
            os.close(ours)

    def pump(self, seconds: float) -> None:
        """Copy output for at most so long. When there can be no more, main.py's end is near."""
        pause = seconds if self._streams else min(seconds, 0.01)
        for descriptor in select.select(list(self._streams), [], [], pause)[0]:
            self._copy(descriptor)
        self._reap()

    def last_words(self) -> None:
        """What stands in the pipes when nobody is left to write: one read takes all that one can hold."""
        self._reap()
        for descriptor in list(self._streams):
            self._copy(descriptor)

    def signal(self, signum: int) -> None:
        """To the whole group, as a terminal does."""
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signum)

    def is_running(self) -> bool:
        """As the kernel knows it now, from any thread: who is killed closes its files before it has ended."""
        stat = stat_of(self._pid) if self.status is None else []
        return bool(stat) and stat[0] not in b"ZX" and not int(stat[6]) & EXITING

    def _reap(self) -> None:
        """Collect main.py, and orphans: this process is their subreaper."""
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if pid == self._pid:
                    self.status = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    def _copy(self, descriptor: int) -> None:
        with suppress(BlockingIOError):
            data = os.read(descriptor, PIPE_BYTES)
            if data:
                self._write(self._streams[descriptor], data)
            else:
                del self._streams[descriptor]


def find_python(environ: Mapping[str, str]) -> str | None:
    """What a shell would start as python, else as python3. Importing shutil for it would cost 4 ms."""
    folders = environ.get("PATH", os.defpath).split(os.pathsep)
    paths = (
        os.path.abspath(os.path.join(folder, name)) for name in ("python", "python3") for folder in folders
    )
    return next((path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)), None)


def steps(reason: str, watch: Watch) -> list[tuple[float, int]]:
    """(seconds after the beginning, signal): main.py is asked to end, more firmly as time passes."""
    interrupt, terminate = watch.limits["grace_interrupt"], watch.limits["grace_terminate"]
    if reason == "preempted":
        return [(0.0, signal.SIGTERM), (watch.limits["grace_preempted"], signal.SIGKILL)]
    # In a short run the reserve is short as well, and half of it belongs to the save.
    scale = min(1.0, watch.reserve() / (4 * interrupt))
    kill_after = (interrupt + terminate) * scale
    return [(0.0, signal.SIGINT), (interrupt * scale, signal.SIGTERM), (kill_after, signal.SIGKILL)]
