"""Parts of a machine for tests: interpreters, buckets with an order, the guard or the agent on its own."""

import hashlib
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest

from cloudrun.formats import Entry, canonical, entry_line, read_frames
from cloudrun.limits import DEFAULTS
from cloudrun.storage.folder import FolderBucket
from cloudrun.zipapp import agent_archive

ROOT = Path(__file__).resolve().parents[1]
GUARD = ROOT / "cloudrun" / "guard.py"
VERSIONS = ["3.8", "3.9", "3.10", "3.11", "3.12", "3.13"]
SHORT = {
    "grace_interrupt": 0.4,
    "grace_terminate": 0.4,
    "drain": 1.0,
    "save_interval": 0.2,
    "agent_beat": 0.1,
}


def interpreter(version):
    """The path of a Python of this version; the test is skipped where there is none."""
    candidates = []
    with suppress(OSError):
        candidates = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    found = str(candidates[-1]) if candidates else shutil.which(f"python{version}")
    if not found or subprocess.run([found, "-c", ""], check=False).returncode:
        pytest.skip(f"there is no Python {version} here")
    return found


def wait_until(check, seconds=20, what="this"):
    """The first true value of `check`. Fails if there is none for so long."""
    deadline = time.monotonic() + seconds
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {seconds} s")
        time.sleep(0.01)


def alive(pid):
    """Whether there is such a process, and it is more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def with_role(role, folder):
    """The processes of a machine below `folder` that are guard, agent or program, oldest first."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            environ = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
            mine = any(item.startswith(b"CLOUDRUN_INSTANCE=" + os.fsencode(str(folder))) for item in environ)
            if mine and role_of(name, environ) == role:
                found.append(int(name))
    return sorted(found)


def role_of(pid, environ):
    """Its CLOUDRUN_ROLE; the agent is a fork of the guard, with the guard's environment and its own name."""
    if Path(f"/proc/{pid}/comm").read_bytes() == b"cloudrun-agent\n":
        return "agent"
    return next((item[14:].decode() for item in environ if item.startswith(b"CLOUDRUN_ROLE=")), "")


def archived(source):
    """A program as the zip archive that a guard runs."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("__main__.py", source)
    return buffer.getvalue()


def signal_all(pids, signum):
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signum)


class Run:
    """A run in a bucket of its own, as a client would have stored it, and a folder to be its machine."""

    def __init__(self, top, main="", files=(), *, left=60.0, limits=(), attempt=1, **order):
        self.top, self.attempt = Path(top), attempt
        self.bucket = FolderBucket(str(self.top / "bucket"))
        self.prefix = "p/runs/p-20260101-000000-abcd"
        self.folder = self.top / "machine"
        self.work = self.folder / "work"
        entries = [
            self.input("main.py", main),
            *(self.input(path, data) for path, data in dict(files).items()),
        ]
        manifest = "".join(entry_line(entry) + "\n" for entry in entries).encode()
        self.bucket.create(self.prefix + "/manifest.jsonl", manifest)
        wanted = {"sha256": hashlib.sha256(manifest).hexdigest(), "files": len(entries)}
        wanted["bytes"] = sum(entry.size for entry in entries)
        self.order = {
            "run": "p-20260101-000000-abcd",
            "argv": ["main.py"],
            "outputs": ["model", "checkpoint"],
            "folders": ["checkpoint", "data", "model"],
            "seconds": left,
            "limited_by": "deadline",
            "if_client_lost": "finish",
            "manifest": wanted,
            "limits": {**DEFAULTS, **SHORT, **dict(limits)},
            **order,
        }
        self.left = left
        self.environ = {"PATH": "/usr/bin:/bin", "HOME": str(self.top), "CLOUDRUN_INSTANCE": str(self.folder)}
        self.process = None
        self.booted = False
        self.words = b""

    def input(self, path, data):
        """A file of the project, or an Entry as it is."""
        if isinstance(data, Entry):
            return data
        data = data.encode() if isinstance(data, str) else data
        blob = self.bucket.put_blob("p/blobs/", [data])
        return Entry(path, 0o644, len(data), blob, ((blob, 0, len(data)),) if data else ())

    def boot(self):
        order = canonical(self.order)
        if not self.booted:
            self.bucket.create(self.prefix + "/order.json", order)
        self.booted = True
        return {
            "run": self.order["run"],
            "attempt": self.attempt,
            "instance": "i",
            "backend": "local",
            "bucket": self.bucket.url,
            "prefix": self.prefix,
            "order": [self.prefix + "/order.json", hashlib.sha256(order).hexdigest()],
            "left": self.left,
            "agent_gone": 60.0,
        }

    def command(self, python):
        return [python, "-I", "-S", "agent.pyz"]

    def start(self, python=sys.executable, **environ):
        """The agent alone; we are its guard."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "agent.pyz").write_bytes(agent_archive())
        self.reading, writing = os.pipe()
        env = {**self.environ, "CLOUDRUN_ROLE": "agent", "CLOUDRUN_GUARD": str(writing), **environ}
        env["CLOUDRUN_BOOT"] = json.dumps(self.boot())
        env["PATH"] = os.path.dirname(python) + ":" + env["PATH"]
        with open(self.folder / "console", "ab") as console:
            self.process = subprocess.Popen(
                self.command(python),
                cwd=self.folder,
                env=env,
                pass_fds=[writing],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        os.close(writing)
        return self

    def finish(self, seconds=60):
        """Until the agent has ended, or said that it has: then we end it. Its `words` are what it wrote."""
        try:
            deadline, piece = time.monotonic() + seconds, b"."
            while piece and not {*b"RH"} & {*piece}:
                assert select.select([self.reading], [], [], max(0.0, deadline - time.monotonic()))[0]
                piece = os.read(self.reading, 65536)
                self.words += piece
        finally:
            self.kill()
        os.close(self.reading)
        return self

    def kill(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        signal_all(with_role("program", self.folder), signal.SIGKILL)  # orphans of an agent that we killed

    def run(self, python=sys.executable, **environ):
        return self.start(python, **environ).finish()

    def object(self, name):
        """A JSON object of the run; None if it is not there."""
        path = Path(self.bucket.root) / self.prefix / name
        return json.loads(path.read_bytes()) if path.exists() else None

    @property
    def receipt(self):
        return self.object("receipt.json")

    @property
    def console(self):
        return (self.folder / "console").read_text(errors="replace")

    def phase(self):
        return (self.object(f"attempts/{self.attempt}/state.json") or {}).get("phase")

    def output(self, stream="out"):
        """What main.py printed, as the bucket has it."""
        folder = Path(self.bucket.root) / self.prefix / "attempts" / str(self.attempt) / "log"
        pieces = []
        for chunk in sorted(folder.iterdir()) if folder.exists() else ():
            pieces += [
                bytes(data) for _, name, data in read_frames(chunk.read_bytes(), "log") if name == stream
            ]
        return b"".join(pieces)

    def outputs(self):
        """{path: content} of the last complete set."""
        found = self.object("outputs.json") or {"files": []}
        return {
            file["path"]: None
            if file.get("dir")
            else self.bucket.get(f"{self.prefix}/saved/{file['sha256']}")[0]
            for file in found["files"]
        }
