"""A fire drill: the faults that can be played for real, on the real backend, until nothing is billed.

Each one is a run of its own with a small program, started by a client of its own, as a user starts it. They
are played side by side: most of the time of each is spent waiting for a machine.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from cloudrun.backends import Backend, open_backend
from cloudrun.config import Settings, choose_backend, from_env
from cloudrun.errors import STILL_BILLED, CloudrunError, UsageError
from cloudrun.formats import timestamp
from cloudrun.report import Report, human_money, human_seconds
from cloudrun.run import dearest, find_offers
from cloudrun.runs import load, open_runs, read_bill
from cloudrun.signals import Signals
from cloudrun.storage import open_bucket

Process = subprocess.Popen[str]

NAME = "cloudrun-drill"  # of its projects, but for a number
SHORT = "import time\nprint('up', flush=True)\ntime.sleep(3)\n"
STUBBORN = "import signal\nfor name in (2, 15): signal.signal(name, signal.SIG_IGN)\n"
LONG = "import time\nprint('up', flush=True)\ntime.sleep(3600)\n"
KILLS_AGENT = SHORT + "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(3600)\n"
COLUMNS = "{:<40} {:<8} {:>12} {:>12} {:>16}"
NOT_IN_TIME = "NOT IN TIME"
HOURS = "1"  # the longest that a run of a drill may take
START_SECONDS = 1800.0  # until the program's first word
CLOSE_SECONDS = 60.0  # for a client to close the bill of a machine that has ended
PAUSE_SECONDS = 2.0  # between two interrupts, as a person makes them
TURN_SECONDS = 0.2  # between two looks whether the drill is broken off


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
        stage = _Stage(settings, environ, folder, report)
        stage.announce(yes=yes)
        print(COLUMNS.format("FAULT", "ENDED BY", "ENDED AFTER", "BOUND", "COST"), flush=True)
        return stage.play()


class _Stage:
    """Where it is played: a bucket, a backend, and a directory with one project for each fault."""

    def __init__(self, settings: Settings, environ: dict[str, str], folder: str, report: Report) -> None:
        self.bucket, self.backend = open_bucket(settings.bucket), open_backend(settings)
        self.environ, self.folder, self.report = environ, folder, report
        self.offers = find_offers(self.backend)
        boot = max(offer.boot_seconds for offer in self.offers)
        self.faults = faults(settings.limits, self.backend, boot)
        # A host of vast.ai is let once; else one offer is good for any number of machines.
        self.places = min(len(self.offers), len(self.faults)) if self.backend.stranger else len(self.faults)
        self.over = threading.Event()  # the drill is broken off
        self.one_command = threading.Lock()  # two that sweep at the same time are in each other's way
        self._one_look, self._looked, self._billed = threading.Lock(), 0.0, set[str]()

    def announce(self, *, yes: bool) -> None:
        """Raises UsageError if nobody agrees to the price."""
        price = dearest(self.offers)
        bounds = [fault.bound for fault in self.faults]
        most = None if price is None else price * sum(bounds) / 3600
        what = f"{len(self.faults)} runs on {self.offers[0].what}, {self.places} side by side"
        seconds = sum(bounds) / self.places + max(bounds)
        self.report.say(f"{what}: {human_seconds(seconds)} and {human_money(most)} at most, mostly much less")
        if yes or price == 0:
            return
        if not os.isatty(0):
            raise UsageError("a drill costs money: say --yes")
        self.report.say("go on? [y/N]")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise UsageError("nothing was started")

    def play(self) -> int:
        """All of them. Whatever breaks that off, none of their machines is left."""
        code, numbers = 0, range(len(self.faults))
        with ThreadPoolExecutor(self.places) as pool:
            try:
                for row in pool.map(self._play, numbers):
                    print(COLUMNS.format(*row), flush=True)
                    code = STILL_BILLED if NOT_IN_TIME in row else code
            except BaseException:
                self.over.set()  # each one then ends what it has started, and we wait for that
                raise
        return code

    def _play(self, number: int) -> tuple[str, ...]:
        """A row of the table."""
        fault, own = self.faults[number], _Own(self, number)
        with own.client(fault) as client:
            run = own.run()
            self.report.detail(f"{run}: {fault.what}, at {timestamp(time.time())}")
            began = time.monotonic()
            fault.act(client)
            took = self._until_ended(run, began, fault.bound)
        if not (bill := own.bill(run)):
            own.cloudrun("wait", run)
            bill = own.bill(run)
        ended = NOT_IN_TIME if took is None else human_seconds(took)
        bound, cost = human_seconds(fault.bound), human_money(bill.get("cost"))
        return fault.what, str(bill.get("layer", "?")), ended, bound, cost

    def _until_ended(self, run: str, began: float, bound: float) -> float | None:
        """Seconds; None if it takes longer than the bound."""
        while time.monotonic() < began + bound:
            looked, billed = self.look(self.backend.pace)
            if looked > began and run not in billed:
                return looked - began
            self.wait(self.backend.pace)
        return None

    def wait(self, seconds: float) -> None:
        """Raises CloudrunError if the drill is broken off."""
        if self.over.wait(seconds):
            raise CloudrunError("the drill was broken off")

    def look(self, age: float) -> tuple[float, set[str]]:
        """When a look was made, at most so many seconds ago, and which runs' machines may be billed then.

        One for all who ask: a provider takes so many looks in a second. What it does not answer is no look.
        """
        with self._one_look:
            now = time.monotonic()
            if now - self._looked >= age:
                with suppress(CloudrunError):
                    self._billed = {each.run for each in self.backend.all() if each.ended is None}
                    self._looked = now
            return self._looked, self._billed


class _Own:
    """What one fault has for itself: a project, so that its runs can be told from those of the others."""

    def __init__(self, stage: _Stage, number: int) -> None:
        self.stage, self.project = stage, f"{NAME}-{number + 1}"
        self.folder = Path(stage.folder, self.project)
        self.environ = {**stage.environ, "CLOUDRUN_PROJECT": self.project}
        self._before = set[str]()
        self._before = self._runs()

    @contextmanager
    def client(self, fault: Fault) -> Iterator[Process]:
        """Whose program has said its first word. Nothing of a drill that is broken off goes on."""
        self.folder.mkdir()
        (self.folder / "main.py").write_text(fault.program)
        with open(self.folder / ".log", "w+") as log:
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
                self._hear(client, log)
                yield client
            except BaseException:
                client.terminate()
                raise
            finally:
                _end(client)
                for run in self._runs():
                    asked = time.monotonic()
                    looked, billed = self.stage.look(0.0)
                    if run in billed or looked < asked:
                        self.cloudrun("stop", "--now", run)

    def _hear(self, client: Process, log: TextIO) -> None:
        assert client.stdout
        until = time.monotonic() + START_SECONDS
        while not select.select([client.stdout], [], [], TURN_SECONDS)[0] and time.monotonic() < until:
            self.stage.wait(0)
        if time.monotonic() >= until or client.stdout.readline() != "up\n":
            raise CloudrunError(f"the drill could not start its run:\n{_last_words(client, log)}")

    def run(self) -> str:
        (run,) = self._runs()
        return run

    def _runs(self) -> set[str]:
        return {
            run for project, run in open_runs(self.stage.bucket) if project == self.project
        } - self._before

    def bill(self, run: str) -> dict[str, Any]:
        return read_bill(self.stage.bucket, load(self.stage.bucket, self.project, run)) or {}

    def cloudrun(self, *words: str) -> None:
        command = [sys.executable, sys.argv[0], "--quiet", *words]
        with self.stage.one_command:
            subprocess.run(command, cwd=self.folder, env=self.environ, stdin=subprocess.DEVNULL, check=False)
