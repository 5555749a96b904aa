"""Machines that are process trees on this computer: the same guard, agent and bucket, and no bill.

Every process of an instance has its directory as CLOUDRUN_INSTANCE in its environment, or works in it;
what is running is found by that, and nowhere written down. `ended` in the directory is the guard's last
word: the seconds that it lived, and why it ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

from cloudrun.backends import ANYTHING, Boot, Cost, Instance, Need, Offer, Survey
from cloudrun.config import data_directory, place
from cloudrun.errors import CloudrunError
from cloudrun.formats import timestamp
from cloudrun.processes import below, parents, pids, remove_tree, send, stat_of

PASSED_ON = (
    *("HOME", "PATH", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "VIRTUAL_ENV"),
    *("CONDA_PREFIX", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "XDG_CACHE_HOME"),
    *("STORAGE_EMULATOR_HOST", "GCE_METADATA_HOST"),  # where the bucket is, and who speaks for us there
)
BOOT_SECONDS = 1.0
KEPT_SECONDS = 45 * 24 * 3600.0  # what a machine left behind; no run takes that long
GUARD = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "guard.py")
KILL_SECONDS = 10.0
AGENT = b"cloudrun-agent\n"  # the name that the agent gives itself


class LocalBackend:
    """See cloudrun.backends.Backend. The price is what the user says that this computer costs."""

    name = "local"
    pace = 0.02
    least_billed, slowness = 0.0, 1.0
    appears_within = 0.2
    stranger = False

    def __init__(self, price: float = 0.0) -> None:
        self._price, self.place = price, place(self.name, os.environ)
        self._children: list[subprocess.Popen[bytes]] = []

    def warm_up(self) -> None:
        """Nothing has to be loaded."""

    def offers(self, need: Need = ANYTHING) -> list[Offer]:
        expected = self._price * need.hours
        return [Offer("this computer", self._price, BOOT_SECONDS, expected=expected, place="here")]

    def create(self, name: str, offer: Offer, boot: Boot) -> None:
        self._tidy()
        folder = self._folder(name)
        env = {key: value for key, value in os.environ.items() if key in PASSED_ON or key.startswith("LC_")}
        env.update(
            CLOUDRUN_INSTANCE=folder,
            CLOUDRUN_RUN=boot.run,
            CLOUDRUN_ATTEMPT=str(boot.attempt),
            CLOUDRUN_SECONDS=str(boot.payload["left"]),
            CLOUDRUN_ROLE="guard",
            CLOUDRUN_BOOT=json.dumps(boot.payload),
        )
        try:
            os.makedirs(folder, mode=0o700)
            with open(os.path.join(folder, "console"), "wb") as console:
                guard = subprocess.Popen(
                    [sys.executable, "-I", "-S", GUARD],
                    cwd=folder,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                    start_new_session=True,  # Ctrl-C and a closed terminal must not reach it
                )
        except OSError as error:
            raise CloudrunError(f"cannot start a machine on this computer: {error}") from None
        self._children.append(guard)
        while guard.poll() is None and not _environ(guard.pid):  # exec has not come so far yet
            time.sleep(0.001)

    def find(self, name: str) -> Instance | None:
        for child in self._children:
            child.poll()
        for instance in self.all():
            if instance.name == name:
                return instance
        with suppress(OSError, ValueError), open(os.path.join(self._folder(name), "ended")) as file:
            seconds, _, why = file.read().partition(" ")
            ended = os.fstat(file.fileno()).st_mtime
            return Instance(name, "", 0, "", ended - float(seconds), alive=False, ended=ended, why=why)
        return None

    def all(self) -> list[Instance]:
        members: dict[str, list[tuple[int, dict[str, str]]]] = {}
        for pid, mark in self._marks():
            members.setdefault(os.path.basename(mark["CLOUDRUN_INSTANCE"]), []).append((pid, mark))
        return [_instance(name, found) for name, found in members.items()]

    def survey(self) -> Survey:
        return Survey(self.all(), [])

    def stop(self, name: str) -> None:
        """Kill all of it, the guard last: until then orphans come to the guard and cannot hide."""
        deadline = time.monotonic() + KILL_SECONDS
        while True:
            guards, others = self._members(name)
            if not guards and not others:
                break
            if time.monotonic() > deadline:
                raise CloudrunError(f"processes {sorted(guards | others)} do not end when killed")
            send(signal.SIGKILL, others or guards)
            for child in self._children:
                child.poll()
            time.sleep(0.005)
        remove_tree(self._folder(name))

    def taken_away(self, name: str) -> bool:
        return False  # this computer is ours

    def cost(self, name: str) -> Cost | None:
        return None

    def console(self, name: str) -> str:
        with suppress(OSError), open(os.path.join(self._folder(name), "console"), errors="replace") as file:
            return file.read()[-4000:]
        return ""

    def by_hand(self, name: str) -> str:
        guards, others = self._members(name)
        return "kill -KILL " + " ".join(map(str, sorted(others | guards)))

    def _folder(self, name: str) -> str:
        return os.path.join(data_directory(os.environ), "instances", name)

    def _tidy(self) -> None:
        """Remove directories of machines so old that nobody will ask for them; bills remember the rest."""
        with suppress(OSError):
            before = time.time() - KEPT_SECONDS
            old = {entry.path for entry in os.scandir(self._folder("")) if entry.stat().st_mtime < before}
            for path in old - {mark["CLOUDRUN_INSTANCE"] for _, mark in self._marks() if old}:
                remove_tree(path)

    def _marks(self) -> Iterator[tuple[int, dict[str, str]]]:
        """(pid, the CLOUDRUN_ variables) of every process that belongs to an instance of this user."""
        ours = self._folder("")
        for pid in pids():
            environ = _environ(pid)
            if b"CLOUDRUN_INSTANCE=" in environ:
                pairs = (item.partition("=") for item in os.fsdecode(environ).split("\0"))
                mark = {key: value for key, _, value in pairs if key.startswith("CLOUDRUN_")}
                if mark.get("CLOUDRUN_INSTANCE", "").startswith(ours):
                    yield pid, {**mark, "CLOUDRUN_ROLE": _role(pid, mark)}

    def _members(self, name: str) -> tuple[set[int], set[int]]:
        """(guards, all others): what carries the mark, what descends from it, what works in its directory."""
        folder = self._folder(name)
        marked = {pid: mark for pid, mark in self._marks() if mark["CLOUDRUN_INSTANCE"] == folder}
        guards = {pid for pid, mark in marked.items() if mark.get("CLOUDRUN_ROLE") == "guard"}
        parent_of = parents()
        others = set(marked) | below(marked, parent_of) | set(_working_in(folder))
        return guards & set(parent_of), (others & set(parent_of)) - guards - {os.getpid()}


def _environ(pid: int) -> bytes:
    """Nothing for a process that is gone, or somebody else's, or that exec is just making."""
    with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return file.read()
    return b""


def _role(pid: int, mark: dict[str, str]) -> str:
    """The agent is a fork of the guard, so that its own environment still tells what the guard is."""
    with suppress(OSError), open(f"/proc/{pid}/comm", "rb") as file:
        if file.read() == AGENT:
            return "agent"
    return mark.get("CLOUDRUN_ROLE", "")


def _working_in(folder: str) -> Iterator[int]:
    """Processes without a terminal (so no person's shell) whose directory is inside the instance's."""
    for pid in pids():
        with suppress(OSError, IndexError):
            inside = os.readlink(f"/proc/{pid}/cwd").startswith(os.path.realpath(folder) + "/")
            if inside and stat_of(pid)[4] == b"0":
                yield pid


def _instance(name: str, members: list[tuple[int, dict[str, str]]]) -> Instance:
    mark = members[0][1]
    started = min(_started(pid) for pid, _ in members)
    return Instance(
        name=name,
        run=mark.get("CLOUDRUN_RUN", ""),
        attempt=int(mark.get("CLOUDRUN_ATTEMPT", "0")),
        # From its age, not from the time of day: a clock that was changed makes nothing overdue.
        deadline=timestamp(started + float(mark.get("CLOUDRUN_SECONDS", "0"))),
        started=started,
        alive=any(found.get("CLOUDRUN_ROLE") in ("guard", "agent") for _, found in members),
    )


def _started(pid: int) -> float:
    """Seconds since the epoch at which a process started, to a hundredth."""
    booted, stat = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME), stat_of(pid)
    return booted + int(stat[19]) / os.sysconf("SC_CLK_TCK") if stat else time.time()
