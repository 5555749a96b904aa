"""What tests need to run `bin/cloudrun` as its users do: a home of its own, projects, and real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, str(TOP / "bin" / "cloudrun")]
LIMITS = {
    "grace_interrupt": 3,
    "grace_terminate": 1,
    "drain": 1,
    "save_interval": 0.2,
    "state": 0.5,
    "client_beat": 0.2,
    "self_end": 10,
    "stop": 20,
}
# Says so when it runs, and ends within a moment of being asked.
SLEEPER = """
import pathlib, signal, sys, time
def ending(signum, frame):
    print("asked by", signal.Signals(signum).name, flush=True)
    sys.exit(7)
signal.signal(signal.SIGINT, ending)
pathlib.Path("model/weights").write_text("half")
print("running", flush=True)
time.sleep(60)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("running", flush=True)
time.sleep(60)
"""


def wait_until(check: Callable[[], Any], seconds: float = 40) -> Any:
    """The first true value of `check`, asked again and again."""
    deadline = time.monotonic() + seconds
    while True:
        value = check()
        if value:
            return value
        assert time.monotonic() < deadline, f"never true: {check}"
        time.sleep(0.01)


class Home:
    """An account on this computer with nothing in it: directories, environment, projects, runs."""

    def __init__(self, top: Path, **limits: float) -> None:
        self.top, self.bucket = top, top / "data" / "cloudrun" / "bucket"
        self.home = top / "home"
        self.home.mkdir(exist_ok=True)
        table = ",".join(f"{name}={value}" for name, value in {**LIMITS, **limits}.items())
        self.env = {
            "HOME": str(self.home),
            "XDG_DATA_HOME": str(top / "data"),
            "XDG_CACHE_HOME": str(top / "cache"),
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "CLOUDRUN_LIMITS": table,
            "CLOUDRUN_BACKEND": "local",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def project(self, main: str, name: str = "toy", **files: str) -> Path:
        folder = self.top / name
        (folder / "model").mkdir(parents=True, exist_ok=True)
        for path, text in {"main.py": main, **files}.items():
            (folder / path).write_text(text)
        return folder

    def start(self, project: Path, *arguments: str, **more: Any) -> subprocess.Popen[bytes]:
        """bin/cloudrun with pipes, unless `more` says otherwise."""
        env = {**self.env, **more.pop("env", {})}
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*COMMAND, *arguments], cwd=project, env=env, **{**streams, **more})

    def run(self, project: Path, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        process = self.start(project, *arguments, **more)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        texts = [None if text is None else text.decode("utf-8", "surrogateescape") for text in (out, err)]
        return subprocess.CompletedProcess(process.args, process.returncode, *texts)

    def detach(self, project: Path, *arguments: str, **more: Any) -> str:
        done = self.run(project, "--detach", *arguments, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def runs(self, project: str = "toy") -> list[str]:
        folder = self.bucket / project / "runs"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    def object(self, run: str, name: str) -> Path:
        return self.bucket / run.rsplit("-", 3)[0] / "runs" / run / name

    def read(self, run: str, name: str) -> Any:
        return json.loads(self.object(run, name).read_text())

    def only_run(self, project: str = "toy") -> str:
        (run,) = self.runs(project)
        return run

    def machines(self) -> list[int]:
        """The processes of this home's machines."""
        mark, found = b"CLOUDRUN_INSTANCE=" + os.fsencode(self.top), []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):
                if mark in Path(f"/proc/{name}/environ").read_bytes():
                    found.append(int(name))
        return found

    def assert_over(self) -> None:
        """Nothing runs, no bill is open, no secret is left."""
        assert wait_until(lambda: not self.machines()) is not None
        assert not list((self.bucket / "open").iterdir())
        assert not list(self.bucket.glob("*/runs/*/env.json"))


def open_home(top: Path, **limits: float) -> Iterator[Home]:
    """For a fixture: kills what a failed test left."""
    home = Home(top, **limits)
    yield home
    for _ in range(20):
        for pid in home.machines():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01 if home.machines() else 0)


def says(process: subprocess.Popen[bytes], word: bytes = b"running") -> None:
    """Wait until the program's output has this word in it."""
    assert process.stdout
    seen = b""
    while word not in seen:
        piece = os.read(process.stdout.fileno(), 4096)
        assert piece, (seen, process.stderr and process.stderr.read())
        seen += piece


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, (out or b"").decode(), (err or b"").decode()
