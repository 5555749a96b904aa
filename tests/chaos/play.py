"""One run of the campaign: drawn from its seed, played, recorded, judged."""

import json
import os
import random
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cloud import machines
from machine import wait_until
from machinery import Machinery
from places import GcpPlace, VastPlace

from . import program
from .catalogue import draw
from .judges import Client, Fault, Record, judge

HOURS = 12 / 3600  # a run's deadline
BOUND = 60.0  # seconds after which a client that nobody stopped must have ended
LATE = 1.0  # seconds from a client's end until what it saw ended is gone from the meter, too
LIMITS = {
    **{"boot": 10.0, "fetch": 10.0, "environment": 10.0, "provisioning": 5.0, "pull": 5.0, "away": 2.0},
    **{"grace_preempted": 0.5, "stuck": 3.0, "reserve_grace": 1.0, "reserve_save": 1.0, "provider": 2.0},
    **{"agent_silence": 3.0, "client_lost": 2.0, "stop": 4.0, "state": 0.3, "agent_beat": 0.3},
}


class Witness(threading.Thread):
    """Hears what main.py tells, however it ends. `told` in the order of its coming."""

    def __init__(self):
        super().__init__(daemon=True)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.settimeout(0.1)
        self.port, self.told, self.closed = self.socket.getsockname()[1], [], False
        self.start()

    def run(self):
        while not self.closed:
            with suppress(TimeoutError):
                self.told.append(json.loads(self.socket.recv(4096)))
        self.socket.close()

    def heard(self, what, number=0):
        return any(each["what"] == what and each.get("number", 0) >= number for each in list(self.told))


class Play:
    """`machinery` is the run's project, clients and machines; the faults act on it through this."""

    def __init__(self, seed, top, disks, backend=None, faults=()):
        self.seed, self.top = seed, Path(top)
        self._rng, self._own = random.Random(seed), threading.local()
        self.backend = self.rng.choice(("local", "gcp", "vast"))
        self.backend = backend or self.backend
        self.cleanup = ExitStack()
        place = {"gcp": GcpPlace, "vast": VastPlace, "local": lambda _: None}[self.backend](disks)
        self.disks = Path(disks)
        self.machinery = Machinery(self.top, place)
        self.place = self.machinery.place
        self.place.limits = {**self.place.limits, **LIMITS}
        if self.backend == "vast":  # whose clock knows whole seconds only
            self.place.limits["appears"] = 3.0
        self.cloud = getattr(self.place, "cloud", None)
        self.storage = getattr(self.place, "storage", None)
        self.witness = Witness()
        self.record = Record(seed, self.backend)
        self.shift = self.top / "shift"  # by how many seconds the clients' clock is ahead
        self.over, self.healed = threading.Event(), threading.Event()
        self.clients: list[tuple[subprocess.Popen, Client]] = []
        self.stopped: list[int] = []  # clients that a fault has stopped for good
        self.main_client = None
        self.plan = {
            "port": self.witness.port,
            "steps": self.rng.choice((6, 9, 12, 60)),
            "pace": 0.25,
            "slow": self.rng.choice((0.05, 0.3)),
            "status": self.rng.choice((0, 0, 3)),
            "polite": self.rng.random() < 0.7,
        }
        self.options = self.rng.choice(([], [], [], [], ["--if-client-lost=stop"]))
        self.record.status = self.plan["status"]
        self.drawn = draw(self, faults)
        self.record.faults = [fault.told for fault in self.drawn]
        names = {fault.entry.name for fault in self.drawn}
        if "disk: full" in names:
            self._small_disk()
        if "client: clock jumps" in names:
            self.shift.write_text("0")

    def _small_disk(self):
        """What machines write on can be full; a run is refused where less than 64 MB are free."""
        where = {"local": self.top / "share/cloudrun/instances", "gcp": self.disks / "disks"}
        self.small_disk = where.get(self.backend, self.disks / "containers")
        self.small_disk.mkdir(parents=True, exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=100m,mode=755", "chaos", str(self.small_disk)]
        subprocess.run(mount, check=True)
        self.cleanup.callback(subprocess.run, ["umount", "-l", str(self.small_disk)], check=False)

    def show(self):
        """What a person wants to know of a run that failed."""
        print(f"plan {self.plan} {self.options}")
        began = min((each["at"] for each in self.record.told), default=0.0)
        for fault in self.drawn:
            print(f"fault {fault.told.words}", fault.told.at and round(fault.told.at - began, 2))
        for each in self.record.told:
            print(round(each["at"] - began, 2), {k: v for k, v in each.items() if k != "at"})
        for at, attempt, sequence, files in self.record.versions:
            shown = [(path, head and head["number"]) for path, head in files]
            print(round(at - began, 2), f"save {attempt}.{sequence}", shown)
        print("bill", self.record.bill, "meter", self.record.metered, "receipt", self.record.receipt)
        for number, (_, client) in enumerate(self.clients):
            print(f"--- {client}\n{(self.top / f'err{number}').read_text()[-1500:]}")

    @property
    def rng(self):
        """Each fault has its own: they come side by side, and a seed is to be played again."""
        return getattr(self._own, "rng", self._rng)

    # --- clients

    def start(self, *arguments, kind="other", **variables):
        process = self.machinery.start(*arguments, **self.other_clock(), **variables)
        client = Client("cloudrun " + " ".join(arguments if kind != "main" else arguments[-1:]), kind)
        self.clients.append((process, client))
        self.record.clients.append(client)
        threading.Thread(target=self._follow, args=(process, client), daemon=True).start()
        return process

    def _follow(self, process, client):
        code = process.wait()
        deadline = time.monotonic() + LATE + 20 * self.record.lag
        while self.place.meter.members and time.monotonic() < deadline and client.kind == "main":
            time.sleep(0.02)
        # As a shell says it: a second signal may come when all is done, and end it as any program.
        client.billed, client.code = bool(self.place.meter.members), code if code >= 0 else 128 - code

    def done(self, process):
        return next(client.code for each, client in self.clients if each is process) is not None

    def kill(self, process):
        next(client for each, client in self.clients if each is process).killed = True
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)

    def other_clock(self):
        """Read each time, so that it can jump."""
        folder = self.top / "clock"
        folder.mkdir(exist_ok=True)
        code = (
            "import time; true = time.time\n"
            "def shifted():\n"
            f"    try: return true() + float(open({str(self.shift)!r}).read())\n"
            "    except (OSError, ValueError): return true()\n"
            "time.time = shifted\n"
        )
        (folder / "sitecustomize.py").write_text(code)
        return {"PYTHONPATH": str(folder)} if self.shift.exists() else {}

    # --- what happens

    def happened(self, event, number=0):
        """Whether a moment of the protocol has come."""
        if event == "writing":  # slowly, and in place
            told = [each for each in list(self.witness.told) if each["what"] == "opening"]
            return any(each["name"] == "model/weights" and each["number"] >= number for each in told)
        if event in ("start", "step", "end"):
            return self.witness.heard(event, number)
        names = {"claim": "attempts/1/claim.json", "agent": "attempts/1/agent.json", "saved": "outputs.json"}
        return self.machinery.object(names.get(event, f"{event}.json")) is not None

    def _faulty(self, fault):
        """Wait for the fault's moment, then make it happen."""
        while fault.event and not self.happened(*fault.event):
            if self.over.wait(0.01):
                return
        if fault.event and self.over.wait(fault.delay):
            return
        fault.told.at, self._own.rng = time.monotonic(), fault.rng
        with suppress(AssertionError, LookupError, ProcessLookupError, ValueError):  # it is gone already
            fault.act()
        del self._own.rng

    def _observe(self):
        """Each outputs.json that there was; and how late this computer is."""
        seen, before = None, time.monotonic()
        while not self.over.wait(0.02):
            now = time.monotonic()
            self.record.lag = max(self.record.lag, now - before - 0.1)
            with suppress(OSError, ValueError):
                if self.record.over is None and self.happened("receipt"):
                    self.record.over = now
                found = self.machinery.object("outputs.json")
                key = found and (found["attempt"], found["sequence"])
                if found and key != seen:
                    seen = key
                    files = [(file["path"], file.get("sha256")) for file in found["files"]]
                    self.record.versions.append((now, *key, files))
            before = time.monotonic()

    def play(self):
        """The record, judged."""
        self.machinery.main("")
        source = Path(program.__file__).read_text()
        (self.machinery.project / "main.py").write_text(source)
        (self.machinery.project / "data").mkdir()
        (self.machinery.project / "data" / "numbers").write_bytes(bytes(1000))
        try:
            self._run()
        except Exception as error:
            self.record.trouble = f"{type(error).__name__}: {error}"
        self.over.set()
        with suppress(OSError):
            self._look()
        self._close()
        return self.record, judge(self.record)

    def _run(self):
        waiting = [fault for fault in self.drawn if fault.event]
        for fault in self.drawn:
            if not fault.event:
                self._faulty(fault)
        arguments = [f"--max-hours={HOURS:.9f}", "-e", f"CHAOS={json.dumps(self.plan)}", *self.options]
        for target, given in [(self._faulty, (fault,)) for fault in waiting] + [(self._observe, ())]:
            threading.Thread(target=target, args=given, daemon=True).start()
        self.main_client = self.start(*arguments, "main.py", kind="main")
        self._wait_for_clients(self.main_client, "the client")
        self._wait_for_machines()
        self._heal()
        self._later_commands()

    def _wait_for_clients(self, process, words):
        """Until it has ended, or never will, because a fault has stopped it."""
        there = lambda: self.done(process) or process.pid in self.stopped  # noqa: E731
        wait_until(there, BOUND + 100 * self.record.lag, f"the end of {words}")

    def _wait_for_machines(self):
        """Those that end themselves do so by the deadline and what comes after it."""
        until = time.monotonic() + HOURS * 3600 + 6 + 20 * self.record.lag
        swept = self.record.excused("late")
        while self.place.meter.members and time.monotonic() < until:
            time.sleep(0.05)
            if swept and self.happened("receipt"):
                until = min(until, time.monotonic() + 4)
                swept = False

    def _heal(self):
        """Everything works again, as far as it can."""
        self.healed.set()
        for faults in (self.cloud and self.cloud.faults, self.storage and self.storage.faults):
            if faults:
                faults.clear()
        for fault in self.drawn:
            fault.heal()

    def _later_commands(self):
        """`gc`, until nothing is billed and no bill is open; then who waits, and who fetches."""
        self.record.late = bool(self.place.meter.members) or self.record.late
        if self.record.late and self.backend != "local" and self.rng.random() < 0.5:
            self._let_the_provider_end_it()
        until = time.monotonic() + 20
        while self.place.meter.members and time.monotonic() < until:
            self._wait_for_clients(self.start("gc", kind="other"), "gc")
        self.record.left = [str(name) for name in self.place.meter.members]
        for process, client in self.clients:
            if client.code is None and process.pid in self.stopped:
                self.kill(process)
        known = self.happened("bill") and self.record.clients[0].code is not None
        if self.happened("order") and (not known or self.rng.random() < 0.3):
            self._wait_for_clients(self.start("wait", kind="wait"), "wait")
            self._wait_for_clients(self.start("pull", kind="other"), "pull")
        for process, client in self.clients:
            if client.code is None and not client.killed:
                self._wait_for_clients(process, client.words)
        deadline = time.monotonic() + LATE + 20 * self.record.lag
        while self.place.meter.members and time.monotonic() < deadline:
            time.sleep(0.02)
        self.record.left = [str(name) for name in self.place.meter.members]

    def _let_the_provider_end_it(self):
        """The third layer, without any command: its clock, or its job, comes to the limit."""
        self.record.limited = True
        if self.backend == "gcp":
            self.cloud.clock.advance(60)
        else:
            self.cloud.fire_jobs()
        with suppress(AssertionError):
            wait_until(lambda: not self.place.meter.members, 10 + 20 * self.record.lag)
        if self.place.meter.members and (self.backend == "gcp" or self.cloud.jobs):
            self.record.left_by_provider = [str(name) for name in self.place.meter.members]

    # --- what is there afterwards

    def _look(self):
        record, found = self.record, self._contents()
        record.told = list(self.witness.told)
        spoiled = {each["name"] for each in record.told if each["what"] == "spoiled"}
        record.receipt, record.bill = (
            self.machinery.object("receipt.json"),
            self.machinery.object("bill.json"),
        )
        saved = {path[6:]: data for path, data in found.items() if path.startswith("saved/")}
        head = {sha256: header(data) for sha256, data in saved.items()}
        judged = lambda path: is_judged(path) and path not in spoiled  # noqa: E731
        last = self.machinery.object("outputs.json") or {"files": []}
        named = {file["path"]: file["sha256"] for file in last["files"] if "sha256" in file}
        record.missing = [path for path, sha256 in named.items() if sha256 not in saved]
        record.versions = [
            (*key, [(path, head.get(sha)) for path, sha in files if judged(path) and sha in saved])
            for *key, files in record.versions
        ]
        record.contents = {
            ("outputs.json", path): head[sha] for path, sha in named.items() if judged(path) and sha in head
        }
        for path, data in found.items():
            if path.startswith(("model/", "checkpoint/")) and judged(path):
                record.contents["the bucket", path] = header(data)
        project = self.machinery.project
        for folder in ("model", "checkpoint"):
            for path in (each for each in (project / folder).rglob("*") if each.is_file()):
                name = str(path.relative_to(project))
                if judged(name):
                    record.contents["the project", name] = header(path.read_bytes())
        at_home = {path: data for (where, path), data in record.contents.items() if where == "the project"}
        record.unlike = [
            path for path, sha in named.items() if judged(path) and at_home.get(path) != head.get(sha)
        ]
        self._look_at_meter()

    def _look_at_meter(self):
        record, meter = self.record, self.place.meter
        record.metered, billed = meter.seconds, self._billed()
        record.billed_until = max((end for _, end in billed), default=0.0)
        record.longest, record.limit = (
            max((end - start for start, end in billed), default=0.0),
            HOURS * 3600 + 2 + 20 * (1 + record.lag),
        )
        if self.backend == "gcp":
            record.limit = max(record.limit, 30 + 20 * (1 + record.lag))
        if self.backend == "vast":
            record.known_cost = self.cloud.meter.total()

    def _billed(self):
        """When each machine was billed: [(from, to)] in the kernel's seconds."""
        if self.backend == "local":
            return [tuple(stretch) for stretch in self.place.meter.stretches]
        meter, ahead = self.cloud.meter, self.cloud.clock.now() - time.monotonic()
        if self.backend == "vast":
            lives = [(each.created, each.destroyed) for each in meter.accounts.values()]
        else:
            lives = [each[:2] for name in meter.names() for each in meter.intervals(name)]
        return [(start - ahead, (end or self.cloud.clock.now()) - ahead) for start, end in lives]

    def _contents(self):
        """{name below the run: bytes}."""
        if self.storage:
            found = self.storage.objects("b").items()
            return {
                path.split("/", 4)[4]: bytes(each.data)
                for path, each in found
                if path.startswith("runs/digits/runs/")
            }
        return {
            str(path.relative_to(run)): path.read_bytes()
            for run in (self.top / "share/cloudrun/bucket/digits/runs").glob("*")
            for path in run.rglob("*")
            if path.is_file()
        }

    def _close(self):
        self.witness.closed = True
        self._heal()
        try:
            self.machinery.close()
        except Exception as error:
            said = f"at the end: {error!r} {getattr(self.cloud, 'violations', '')}"
            self.record.trouble = self.record.trouble or said
        self.cleanup.close()


def is_judged(path):
    """What is not whole, or not yet, may be torn."""
    return not path.split("/")[-1].endswith((".incomplete", ".tmp")) and path.split("/")[-1] != ".gitkeep"


def header(data):
    return program.read(data)


@contextmanager
def folders():
    with (
        tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as top,
        tempfile.TemporaryDirectory(dir=machines.disk_root(), ignore_cleanup_errors=True) as disks,
    ):
        yield top, disks


__all__ = ["Fault", "Play", "folders"]
