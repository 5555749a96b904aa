"""What a run costs beside main.py itself, and how late its output is, on an emulated Google Cloud.

    make bench ARGS="billed boot=2"      a table: billed vast start log ps; machines that boot for 2 s, not 20
    make bench ARGS="log seconds=30"     a program of 30 s, not 60

Emulated machines are processes of this computer: what they take is real, what a cloud takes is `boot`.
Machines need Linux and root or user namespaces, the bucket and the cloud need the packages of `[test]`.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import CLOUDRUN, TOP, at, environment, ms, project, row

sys.path.insert(0, str(TOP / "tests"))
sys.path.insert(0, str(TOP / "tests" / "e2e"))

from cloud import machines
from cloud.compute import Cloud
from cloud.storage import Storage
from gce import Gce, missing
from places import QUICK, VastPlace
from test_bill import make_order

Row = tuple[str, str, str, str, str]


def main(words: list[str]) -> None:
    options = dict(word.split("=", 1) for word in words if "=" in word)
    names = [word for word in words if "=" not in word]
    boot, seconds = float(options.get("boot", 20)), float(options.get("seconds", 60))
    tables: dict[str, Callable[[], Iterator[Row]]] = {
        "billed": lambda: billed(boot),
        "vast": lambda: vast(boot),
        "start": lambda: start(boot),
        "log": lambda: log(seconds),
        "ps": ps,
    }
    print(row("what", "cloudrun", "of the emulator", "more", "promise"))
    for name, measure in tables.items():
        if not names or name in names:
            reason = missing() or (machines.unavailable() if name in ("billed", "vast", "start") else "")
            for line in [(name, "-", reason, "", "")] if reason else measure():
                print(row(*line), flush=True)
    print(f"load of this machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")


class Place:
    """An account with a bucket and a cloud, and when what happened there: `times`, in seconds since 1970."""

    def __init__(self, folder: Path, boot: float) -> None:
        self.folder, self.times = folder, dict[str, float]()
        self.storage = Storage()
        self.storage.__enter__()
        self.storage.create_bucket("b")
        self.cloud = Cloud(folder / "cloud", timing=replace(QUICK, boot=boot))
        self._watch()

    def close(self) -> None:
        self.cloud.close()
        self.storage.__exit__(None, None, None)

    def _watch(self) -> None:
        """Note when a machine's startup script starts, and when each word of it comes to the bucket."""
        told, put = self.cloud.project.started, self.storage.store.put

        def started(machine: Any) -> None:
            self.times["booted"] = time.time()
            told(machine)

        def stored(bucket: str, name: str, data: bytes, *more: Any, **options: Any) -> Any:
            word = name.rpartition("/")[2]
            if word == "state.json":
                word = json.loads(data)["phase"]
            self.times.setdefault(word, time.time())
            return put(bucket, name, data, *more, **options)

        self.cloud.project.started, self.storage.store.put = started, stored  # type: ignore[method-assign]

    def environment(self, **settings: str) -> dict[str, str]:
        env = {**environment(self.folder), **self.cloud.environ(), "CLOUDRUN_BACKEND": "gcp"}
        env.update(STORAGE_EMULATOR_HOST=self.storage.url, GCS_DIR="gs://b/runs", CLOUDRUN_PRICE="0")
        return {**env, "VM_GPU": "none", "VM_SPOT": "1", **settings}

    def receipt(self) -> dict[str, Any]:
        found = [item for name, item in self.storage.objects("b").items() if name.endswith("/receipt.json")]
        return dict(json.loads(found[-1].data))


@contextmanager
def place(boot: float) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(dir=machines.disk_root(), ignore_cleanup_errors=True) as folder:
        found = Place(Path(folder), boot)
        try:
            yield found
        finally:
            found.close()


def billed(boot: float) -> Iterator[Row]:
    """Of examples/digits, the seconds that the meter counts and main.py did not run."""
    with place(boot) as here:
        path = here.folder / "digits"
        shutil.copytree(TOP / "examples" / "digits", path)
        done = subprocess.run([*CLOUDRUN, "main.py"], cwd=path, env=here.environment(), capture_output=True)
        if done.returncode:
            yield "digits", "-", done.stderr.decode().strip().rpartition("\n")[2], "", ""
            return
        (name,) = here.cloud.meter.names()
        ((began, end, _),) = here.cloud.meter.intervals(name)
        assert end is not None  # the client has seen it
        ran, times, stopping = here.receipt()["seconds"], here.times, here.cloud.project.timing.stopping
    exited = times["run"] + ran
    more = end - began - ran
    yield "billed seconds that are not main.py's", s(more), f"{boot:g} s boot", s(more - boot), "boot + 3 s"
    steps = [
        ("RUNNING to the startup script", began, times["booted"]),
        ("guard and agent start, to agent.json", times["booted"], times["agent.json"]),
        ("the inputs", times["agent.json"], times["run"]),
        ("the last save, to receipt.json", exited, times["receipt.json"]),
        ("receipt.json to TERMINATED", times["receipt.json"], end),
    ]
    yield "  main.py itself", s(ran), "", "", ""
    for words, since, until in steps:
        yield "  " + words, s(until - since), s(boot) if until == times["booted"] else "", "", ""
    off = end - stopping - exited
    yield "main.py's exit to power-off, with the save", s(off), "", "", "1 s + save"


def vast(boot: float) -> Iterator[Row]:
    """The same on the emulated vast.ai, which bills from the rental on; `boot`: loading the image."""
    root = machines.disk_root()
    with (
        tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as disks,
        tempfile.TemporaryDirectory() as top,
    ):
        here, folder = VastPlace(disks), Path(top)
        here.cloud.market.timing = replace(here.cloud.market.timing, pull=boot)
        path = folder / "digits"
        shutil.copytree(TOP / "examples" / "digits", path)
        env = {**environment(folder), **here.settings()}
        done = subprocess.run([*CLOUDRUN, "main.py"], cwd=path, env=env, capture_output=True)
        ran, billed = (
            here.object("receipt.json"),
            sum(map(here.cloud.meter.seconds, here.cloud.meter.names())),
        )
        here.close()
    if done.returncode or not ran:
        yield "digits on vast.ai", "-", done.stderr.decode().strip().rpartition("\n")[2], "", ""
        return
    more = billed - ran["seconds"]
    yield (
        "vast.ai: billed seconds that are not main.py's",
        s(more),
        f"{boot:g} s boot",
        s(more - boot),
        "boot + 3 s",
    )


def start(boot: float) -> Iterator[Row]:
    """Enter to the first byte of output: a machine that has to be made, one that is kept, and the second
    time of one that is kept, when nothing is left to send."""
    with place(boot) as here:
        path = project(here.folder, "print('x', flush=True)\n")
        timing = here.cloud.project.timing
        theirs = boot + timing.provisioning + timing.staging
        pipe, quiet, kept = subprocess.PIPE, subprocess.DEVNULL, {"VM_INSTANCE": "kept"}
        for words, settings in (("a new machine", {}), ("", kept), ("a parked machine", kept)):
            began = time.time()
            command = [*CLOUDRUN, "main.py"]
            with subprocess.Popen(
                command, cwd=path, env=here.environment(**settings), stdout=pipe, stderr=quiet
            ) as client:
                assert client.stdout
                client.stdout.read(1)
                took = time.time() - began
            if words:
                words = f"Enter to the first byte, {words}"
                yield words, s(took), s(theirs), "+" + s(took - theirs), ""


CHATTY = """
import time
while True:
    print(f"{time.time():.6f}", flush=True)
    time.sleep(0.1)
"""
SILENT = "import time\nprint(f'{time.time():.6f}', flush=True)\ntime.sleep(900)\n"


def log(seconds: float) -> Iterator[Row]:
    """Through gs://, whose requests cost money: how late a line is, and what an hour of it costs.

    The machine is a local one, which the client looks at every 0.5 s: at one of a cloud it looks every 2 s,
    and asks the bucket for the next claim as often, so that a cloud's run costs somewhat less than this.
    """
    for kind, program in (("chatty", CHATTY), ("silent", SILENT)):
        with tempfile.TemporaryDirectory() as folder, Storage() as storage:
            storage.create_bucket("b")
            path = project(Path(folder), program)
            env = {**environment(Path(folder)), "STORAGE_EMULATOR_HOST": storage.url, "GCS_DIR": "gs://b/r"}
            delays, counts = followed(path, env, storage, seconds)
            if kind == "chatty":
                yield "the first line of output is late by", ms(delays[0]), "", "", "2 s"
                delays.sort()
                yield "a line every 0.1 s, median", ms(at(delays, 0.5)), "", "", "2 s"
                yield "a line every 0.1 s, 99th percentile", ms(at(delays, 0.99)), "", "", "2 s"
            requests = ", ".join(f"{counts[each]:.0f} {each}" for each in ("A", "B", "free"))
            cost = f"{counts['cost']:.4f} USD/h"
            yield f"a {kind} program, requests in an hour", cost, requests, "", "0.02 USD/h"


def ps() -> Iterator[Row]:
    """200 open runs with a machine each, 10,000 runs that have ended: nothing boots here."""
    from cloudrun.formats import canonical, timestamp

    count, now, timing = 200, time.time(), replace(QUICK, boot=0.0)
    with (
        tempfile.TemporaryDirectory() as folder,
        Storage() as storage,
        Cloud(Path(folder) / "cloud", timing=timing, machines=False) as cloud,
    ):
        storage.create_bucket("b")
        google, done = Gce(cloud), []
        for number in range(10_000 + count):
            order = make_order(run=f"toy-20261125-{number:06d}-00aa", backend="gcp", created=timestamp(now))
            put(storage, f"{order.prefix}/order.json", order.content())
            if number < count:
                put(storage, f"open/{order.run}", canonical({"run": order.run, "project": "toy"}))
                put(storage, f"{order.prefix}/attempts/1/claim.json", canonical({"time": timestamp(now)}))
                put(storage, f"{order.prefix}/attempts/1/state.json", canonical({"phase": "run", "beat": 1}))
                labels = {
                    "cloudrun-run": order.run,
                    "cloudrun-attempt": "1",
                    "cloudrun-ends": f"{now + 9e4:.0f}",
                }
                done.append(google.insert(f"{order.run}-1", labels=labels, kind="e2-small"))
        for operation in done:
            google.wait(operation)
        path, env = Path(folder), {**cloud.environ(), "STORAGE_EMULATOR_HOST": storage.url}
        env = {**environment(path), **env, "GCS_DIR": "gs://b", "CLOUDRUN_BACKEND": "gcp"}
        took = []
        for _ in range(5):
            began = time.perf_counter()
            shown = subprocess.run([*CLOUDRUN, "ps"], cwd=path, env=env, capture_output=True, text=True)
            took.append(time.perf_counter() - began)
            assert shown.returncode == 0 and shown.stdout.count(" run ") == count, shown
    yield f"ps: {count} open runs and machines, 10,000 ended", s(statistics.median(took)), "", "", "2 s"


def put(storage: Storage, name: str, data: bytes) -> None:
    storage.store.put("b", name, data, {}, {})


def followed(
    path: Path, env: dict[str, str], storage: Storage, seconds: float
) -> tuple[list[float], dict[str, float]]:
    """How late each line was, and what was asked of the bucket, in an hour of the same."""
    delays: list[float] = []

    def read() -> None:
        for line in iter(client.stdout.readline, b""):  # type: ignore[union-attr]
            delays.append(time.time() - float(line))

    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen([*CLOUDRUN, "main.py"], cwd=path, env=env, stdout=pipe, stderr=quiet) as client:
        reader = threading.Thread(target=read)
        reader.start()
        while not delays and client.poll() is None:
            time.sleep(0.05)
        time.sleep(3)
        before, cost, began = storage.counts(), storage.cost(), time.monotonic()
        time.sleep(seconds)
        after, hours = storage.counts(), (time.monotonic() - began) / 3600
        counts = {each: (after[each] - before[each]) / hours for each in ("A", "B", "free")}
        counts["cost"] = (storage.cost() - cost) / hours
        client.terminate()
        reader.join()
    return delays or [float("nan")], counts


def s(value: float) -> str:
    return f"{value:.2f} s"


if __name__ == "__main__":
    main(sys.argv[1:])
