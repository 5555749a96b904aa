"""A fire drill: the faults that can be played for real, on the real backend, until nothing is billed.

Each one is a run of its own with a small program, started by a client of its own, as a user starts it.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TextIO

from cloudrun.backends import Backend, open_backend
from cloudrun.config import Settings, choose_backend, from_env
from cloudrun.errors import STILL_BILLED, CloudrunError, UsageError
from cloudrun.report import Report, human_money, human_seconds
from cloudrun.run import dearest, find_offers
from cloudrun.runs import load, open_runs, read_bill
from cloudrun.signals import Signals
from cloudrun.storage import open_bucket

Process = subprocess.Popen[str]

NAME = "cloudrun-drill"  # of its project
SHORT = "import time\nprint('up', flush=True)\ntime.sleep(3)\n"
STUBBORN = "import signal\nfor name in (2, 15): signal.signal(name, signal.SIG_IGN)\n"
LONG = "import time\nprint('up', flush=True)\ntime.sleep(3600)\n"
KILLS_AGENT = SHORT + "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(3600)\n"
COLUMNS = "{:<40} {:<8} {:>12} {:>12} {:>16}"
HOURS = "1"  # the longest that a run of a drill may take
START_SECONDS = 1800.0  # until the program's first word
CLOSE_SECONDS = 60.0  # for a client to close the bill of a machine that has ended
PAUSE_SECONDS = 2.0  # between two interrupts, as a person makes them


class Fault(NamedTuple):
    """`act` is played on a client whose program runs; `bound`: seconds from then to the end of billing."""

    what: str
    program: str
    act: Callable[[Process], None]
    bound: float
    options: tuple[str, ...] = ()


def faults(limits: dict[str, float], backend: Backend, boot: float) -> list[Fault]:
    """`boot`: seconds that a machine may take to start."""
    stop, finish = limits["stop"] * backend.slowness, 3 + limits["self_end"]
    asked = limits["client_lost"] + limits["grace_interrupt"] + limits["grace_terminate"]
    deadline = 2 * boot + 15
    late, hours = deadline + limits["provider"] + stop, ("--max-hours", f"{deadline / 3600:.4f}")
    lost = ("--if-client-lost", "stop")
    return [
        Fault("the program ends", SHORT, leave_alone, finish + stop),
        Fault("Ctrl-C, twice", STUBBORN + LONG, interrupt_twice, PAUSE_SECONDS + stop),
        Fault("the client is killed", SHORT, kill, finish + stop),
        Fault("client and agent are killed", KILLS_AGENT, kill, 3 + limits["agent_gone"] + stop),
        Fault("the client is killed, then the deadline", LONG, kill, late, hours),
        Fault("the client's computer sleeps", LONG, sleep, asked + finish + stop, lost),
    ]


def leave_alone(client: Process) -> None:
    pass


def interrupt_twice(client: Process) -> None:
    client.send_signal(signal.SIGINT)
    time.sleep(PAUSE_SECONDS)
    client.send_signal(signal.SIGINT)


def kill(client: Process) -> None:
    client.kill()


def sleep(client: Process) -> None:
    client.send_signal(signal.SIGSTOP)


def _end(client: Process) -> None:
    """It has a bill to close; one that slept wakes up."""
    client.send_signal(signal.SIGCONT)
    try:
        client.wait(CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        client.kill()
        client.wait()


def _last_words(client: Process, log: TextIO) -> str:
    client.terminate()
    client.wait()
    log.seek(0)
    return log.read().strip()[-2000:]


def drill(report: Report, environ: Mapping[str, str], backend: str | None, *, yes: bool) -> int:
    """Play them all and print a table. Returns 0, or 122 if a machine outlived its bound."""
    environ = {key: value for key, value in environ.items() if key not in ("VM_INSTANCE", "VM_TYPE")}
    if choose_backend(environ, backend)[0] == "gcp":
        environ["VM_GPU"] = "none"  # the cheapest; vast.ai lets nothing without a GPU
    environ.update(CLOUDRUN_PROJECT=NAME, CLOUDRUN_MAX_HOURS=HOURS)
    settings = from_env(environ, os.getcwd(), backend=backend)
    environ["CLOUDRUN_BACKEND"] = settings.backend
    with Signals(), tempfile.TemporaryDirectory(prefix=NAME) as folder:
        stage = _Stage(settings, environ, folder)
        stage.announce(report, yes=yes)
        print(COLUMNS.format("FAULT", "ENDED BY", "ENDED AFTER", "BOUND", "COST"), flush=True)
        return max(stage.play(fault) for fault in stage.faults)


class _Stage:
    """Where it is played: a project, a bucket and a backend."""

    def __init__(self, settings: Settings, environ: dict[str, str], folder: str) -> None:
        self.bucket, self.backend = open_bucket(settings.bucket), open_backend(settings)
        self.environ, self.folder = environ, folder
        self.offers = find_offers(self.backend)
        boot = max(offer.boot_seconds for offer in self.offers)
        self.faults = faults(settings.limits, self.backend, boot)

    def announce(self, report: Report, *, yes: bool) -> None:
        """Raises UsageError if nobody agrees to the price."""
        price = dearest(self.offers)
        seconds = sum(fault.bound for fault in self.faults)
        most = None if price is None else price * seconds / 3600
        what = f"{len(self.faults)} runs on {self.offers[0].what}"
        report.say(f"{what}: {human_seconds(seconds)} and {human_money(most)} at most, mostly much less")
        if yes or price == 0:
            return
        if not os.isatty(0):
            raise UsageError("a drill costs money: say --yes")
        report.say("go on? [y/N]")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise UsageError("nothing was started")

    def play(self, fault: Fault) -> int:
        before = self._runs()
        with self._client(fault, before) as client:
            (run,) = self._runs() - before
            began = time.monotonic()
            fault.act(client)
            took = self._until_ended(run, began, fault.bound)
        self._cloudrun("wait", run)
        bill = read_bill(self.bucket, load(self.bucket, NAME, run)) or {}
        ended = "NOT IN TIME" if took is None else human_seconds(took)
        cost = human_money(bill.get("cost"))
        layer = str(bill.get("layer", "?"))
        print(COLUMNS.format(fault.what, layer, ended, human_seconds(fault.bound), cost), flush=True)
        return STILL_BILLED if took is None else 0

    @contextmanager
    def _client(self, fault: Fault, before: set[str]) -> Iterator[Process]:
        """Whose program has said its first word. Nothing of a drill that is broken off goes on."""
        Path(self.folder, "main.py").write_text(fault.program)
        with open(os.path.join(self.folder, ".log"), "w+") as log:
            client = subprocess.Popen(
                [sys.executable, sys.argv[0], *fault.options, "main.py"],
                cwd=self.folder,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # a Ctrl-C here is for us
            )
            try:
                assert client.stdout
                ready, _, _ = select.select([client.stdout], [], [], START_SECONDS)
                if not ready or client.stdout.readline() != "up\n":
                    raise CloudrunError(f"the drill could not start its run:\n{_last_words(client, log)}")
                yield client
            except BaseException:
                client.terminate()
                raise
            finally:
                _end(client)
                for run in self._runs() - before:
                    if self._billed(run):
                        self._cloudrun("stop", "--now", run)

    def _runs(self) -> set[str]:
        return {run for project, run in open_runs(self.bucket) if project == NAME}

    def _until_ended(self, run: str, began: float, bound: float) -> float | None:
        """Seconds; None if it takes longer than the bound."""
        while time.monotonic() < began + bound:
            if not self._billed(run):
                return time.monotonic() - began
            time.sleep(self.backend.pace)
        return None

    def _billed(self, run: str) -> bool:
        """Whether its machine may be billed; a provider that does not answer says nothing."""
        with suppress(CloudrunError):
            return any(each.run == run and each.ended is None for each in self.backend.all())
        return True

    def _cloudrun(self, *words: str) -> None:
        command = [sys.executable, sys.argv[0], "--quiet", *words]
        subprocess.run(command, cwd=self.folder, env=self.environ, stdin=subprocess.DEVNULL, check=False)
