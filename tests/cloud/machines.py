"""Machines that are real process trees: own processes, own file systems, own power button.

`guest/` holds the programs that boot one. Needs Linux and root, or a kernel that lets ordinary users have
user namespaces; `unavailable` says what is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

BOOT = Path(__file__).resolve().parent / "guest" / "boot.py"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CONSOLE = 1 << 20  # the provider keeps the last MiB (discovery, getSerialPortOutput)


class Gpu(NamedTuple):
    """What nvidia-smi shows. `memory` in MiB."""

    name: str
    memory: int
    cards: int


class Hardware(NamedTuple):
    hostname: str
    gpu: Gpu | None
    environ: dict[str, str]
    guest_stop: float  # how long the guest waits at its own shutdown before it kills (systemd: 90 s)
    network: bool = True
    container: dict[str, Any] | None = None  # what guest/docker_init.py is to run, in place of a whole system


def search_path() -> str:
    """A machine has the system's directories, and this Python's if these hold no python3."""
    own = os.path.dirname(os.path.realpath(sys.executable))
    return PATH if shutil.which("python3", path=PATH) else f"{PATH}:{own}"


def processes_of(namespace: str) -> set[int]:
    """Pids, as seen from outside, of all that lives in this pid namespace (`pid:[4026532198]`)."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.readlink(f"/proc/{name}/ns/pid") == namespace:
                found.add(int(name))
    return found


class Machine:
    """One boot of one machine. `ended(machine, how)` is called once, on a thread of its own.

    `how`: poweroff, reboot, cut (from outside) or crash. When it is called no process is left.
    """

    def __init__(
        self, folder: Path, disk: Path, hardware: Hardware, ended: Callable[[Machine, str], Any]
    ) -> None:
        self.folder, self.hardware, self._ended = folder, hardware, ended
        self.console = folder / "console"
        self.namespace = ""
        self._pinned = -1  # keeps the namespace's number from being given to another one
        self.how = ""
        for name in ("hardware", "mounts"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        if not (folder / "hardware" / "gpu").exists():  # a reboot repairs no card
            self.set_gpu("ok")
        self._booted = threading.Event()
        self._process = self._start(disk)
        self._thread = threading.Thread(target=self._follow, name=f"machine-{hardware.hostname}", daemon=True)
        self._thread.start()

    def _start(self, disk: Path) -> subprocess.Popen[bytes]:
        console = os.open(self.console, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        config = {
            "disk": str(disk),
            "mounts": str(self.folder / "mounts"),
            "hardware": str(self.folder / "hardware"),
            "hostname": self.hardware.hostname,
            "gpu": self.hardware.gpu is not None,
            "guest_stop": self.hardware.guest_stop,
            "environ": self.hardware.environ,
            "no_network": not self.hardware.network,
            "path": search_path(),
            "container": self.hardware.container,
            "console": console,
        }
        try:
            with (self.folder / "errors").open("ab") as errors:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(BOOT)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    pass_fds=[console],
                    start_new_session=True,
                    cwd="/",
                )
        finally:
            os.close(console)
        assert process.stdin
        with suppress(BrokenPipeError):  # it could not even start, and `errors` says why
            process.stdin.write(json.dumps(config).encode() + b"\n")
            process.stdin.flush()
        return process

    def _follow(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            word, _, rest = line.decode().strip().partition(" ")
            if word == "pid":
                with suppress(OSError):
                    self._pinned = os.open(f"/proc/{rest}/ns/pid", os.O_RDONLY)
                    self.namespace = os.readlink(f"/proc/self/fd/{self._pinned}")
                self._booted.set()
            elif word == "end":
                self.how = rest
        self._process.wait()
        self.how = self.how or "crash"
        self._booted.set()
        self._ended(self, self.how)

    @property
    def alive(self) -> bool:
        return not self.how

    def soft_off(self) -> None:
        """The ACPI power button: the guest decides what it makes of it."""
        self._press(b"off\n")

    def cut(self) -> None:
        """No power: every process is gone at once."""
        self._press(b"cut\n")

    def _press(self, button: bytes) -> None:
        assert self._process.stdin
        with suppress(OSError, ValueError):
            self._process.stdin.write(button)
            self._process.stdin.flush()

    def processes(self) -> set[int]:
        self._booted.wait()
        return processes_of(self.namespace) if self.namespace else set()

    def freeze(self) -> None:
        """Stop every process, so that none runs and none can answer."""
        stopped: set[int] = set()
        while left := self.processes() - stopped:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            stopped |= left

    def thaw(self) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def set_gpu(self, mode: str) -> None:
        """How nvidia-smi answers from now on: ok, hang, fail or lost."""
        if gpu := self.hardware.gpu:
            uuid = "GPU-5c9fd1ab-7e4b-4a3e-9d6e-00000000000"
            text = f"name='{gpu.name}' memory={gpu.memory} count={gpu.cards} driver=580.95.05\n"
            new = self.folder / "hardware" / "gpu.new"
            new.write_text(f"{text}uuid={uuid} mode={mode}\n")
            new.replace(self.folder / "hardware" / "gpu")

    def errors(self) -> str:
        return (self.folder / "errors").read_text(errors="replace").strip()

    def close(self) -> None:
        """Cut it and wait until nothing is left."""
        assert self._process.stdin
        with suppress(OSError):
            self._process.stdin.close()
        self._thread.join()
        assert self._process.stdout
        self._process.stdout.close()
        if self._pinned >= 0:
            os.close(self._pinned)
            self._pinned, self.namespace = -1, ""


@lru_cache(maxsize=1)
def disk_root() -> str:
    """Where boot disks can lie: overlays need a file system under them that is no overlay itself."""
    reasons = []
    for place in (tempfile.gettempdir(), "/dev/shm"):
        with tempfile.TemporaryDirectory(dir=place, prefix="cloud-probe-") as top:
            if not (reason := _probe(Path(top))):
                return place
            reasons.append(f"{place}: {reason}")
    raise OSError("; ".join(reasons))


def unavailable() -> str:
    """Why no machine can boot here; empty if one can."""
    if not sys.platform.startswith("linux"):
        return "machines need Linux"
    try:
        disk_root()
    except OSError as error:
        return f"machines cannot boot here: {error}"
    return ""


def _probe(top: Path) -> str:
    done = threading.Event()
    environ = {"GCE_METADATA_HOST": "127.0.0.1:9"}
    hardware = Hardware("probe", None, environ, guest_stop=0.0)
    machine = Machine(top / "machine", top / "disk", hardware, lambda *_: done.set())
    machine.soft_off()
    done.wait(30)
    machine.close()
    return "" if machine.how == "poweroff" else machine.errors() or f"a machine ended by {machine.how}"
