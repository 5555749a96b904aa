"""What a vast.ai container is created with. The guard in it runs here, under every Python at hand."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from machine import VERSIONS, interpreter, wait_until

from cloudrun.backends import Boot
from cloudrun.backends.vast_boot import Label, environment, label_of, onstart, read_label
from cloudrun.formats import timestamp

LONGEST = "p" * 41 + "-20260101-000000-abcd-12345"


def test_onstart_fits_into_the_call_that_creates_a_container() -> None:
    assert len(onstart(LONGEST).encode()) <= 4096


def test_onstart_is_read_by_the_plainest_shell() -> None:
    subprocess.run(["sh", "-n"], input=onstart(LONGEST), text=True, check=True)


def test_a_label_says_whose_container_it_is_and_when_it_ends() -> None:
    boot = Boot("a_b-c-20261125-101112-00ff", 3, timestamp(1_800_000_000.2), {})
    found = read_label(label_of(boot))
    assert found == Label("a_b-c-20261125-101112-00ff", 3, 1_800_000_001)
    assert found.name == "a_b-c-20261125-101112-00ff-3" and len(label_of(boot)) <= 256


@pytest.mark.parametrize("text", [None, "", 7, "mine", "cloudrun/x", "cloudrun/a/b/1", "cloudrun/a/1/2/3"])
def test_other_labels_are_not_ours(text: object) -> None:
    assert read_label(text) is None


def test_the_environment_carries_the_order_and_our_endpoints_and_nothing_else() -> None:
    given = {
        "VAST_URL": "http://here",
        "VAST_API_KEY": "secret",
        "HOME": "/root",
        "STORAGE_EMULATOR_HOST": "",
    }
    found = environment({"left": 1}, given)
    assert json.loads(base64.b64decode(found.pop("CLOUDRUN_PAYLOAD"))) == {"left": 1}
    assert found == {"VAST_URL": "http://here"}


class Service(ThreadingHTTPServer):
    """Takes every request, and ends nothing."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str | None, bytes]] = []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_DELETE(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append(  # type: ignore[attr-defined]
            (self.command, self.path, self.headers.get("Authorization"), body)
        )
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"success": true}')

    def log_message(self, *_: object) -> None:
        pass


class Container:
    """onstart as it is, but for its directory, its console, its pauses and the names of Python."""

    def __init__(self, folder: Path, pythons: str) -> None:
        self.service, self.folder, self.console = Service(), folder, folder / "console"
        self.console.touch()
        changes = {
            "/proc/1/fd/1": str(self.console),
            "/proc/1/environ": str(folder / "environ"),
            "/var/lib/cloudrun": str(folder / "lib"),
            "sleep 20": "sleep 0.1",
            "sleep 999": "sleep 0.1",
            "/venv/main/bin/python /opt/conda/bin/python python3 python": pythons,
        }
        self.script = onstart("i-1")
        for old, new in changes.items():
            assert old in self.script
            self.script = self.script.replace(old, new)
        self.environ = {
            "PATH": "/usr/bin:/bin",
            "CONTAINER_ID": "77",
            "CONTAINER_API_KEY": "key",
            "VAST_URL": f"http://127.0.0.1:{self.service.server_port}",
        }
        self.started: list[int] = []

    def start(self, payload: object, **environ: str) -> Container:
        words = base64.b64encode(json.dumps(payload).encode()).decode()
        shell = subprocess.Popen(
            ["sh", "-c", self.script],
            env={**self.environ, "CLOUDRUN_PAYLOAD": words, **environ},
            start_new_session=True,
        )
        self.started.append(shell.pid)
        assert shell.wait(20) == 0, "onstart returns at once"
        return self

    def said(self, text: str) -> str:
        wait_until(lambda: text in self.console.read_text(), what=text)
        return self.console.read_text()

    def close(self) -> None:
        for group in self.started:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self.service.shutdown()
        self.service.server_close()


@pytest.fixture
def made(tmp_path: Path) -> Iterator[list[Container]]:
    found: list[Container] = []
    yield found
    for container in found:
        container.close()


SLEEPS = b"import time; time.sleep(60)"
SLEEPER = hashlib.sha256(SLEEPS).hexdigest()
ORDER = {
    **{"instance": "i-1", "backend": "vast", "agent": ["agent", "0" * 64], "left": 0.1},
    **{"agent_gone": 1, "agent_silence": 1},
}
THE_CALL = ("DELETE", "/api/v0/instances/77/", "Bearer key", b"{}")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_guard_ends_the_container_and_goes_on_asking(
    tmp_path: Path, made: list[Container], version: str
) -> None:
    (tmp_path / "agent").write_bytes(SLEEPS)
    container = Container(tmp_path, interpreter(version))
    made.append(container)
    container.start({**ORDER, "bucket": f"file://{tmp_path}", "agent": ["agent", SLEEPER], "left": 0.5})
    wait_until(lambda: len(container.service.seen) > 1, 40)
    assert set(container.service.seen) == {THE_CALL}
    assert "the deadline was reached" in container.console.read_text()


@pytest.mark.parametrize("tool", ["curl", "wget"])
def test_without_a_python_the_shell_ends_the_container(
    tmp_path: Path, made: list[Container], tool: str
) -> None:
    if not shutil.which(tool):
        pytest.skip(f"there is no {tool} here")
    container = Container(tmp_path, "no-python-here /bin/false")
    made.append(container)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in (tool, "sh", "sleep", "base64", "rm", "mkdir"):
        (programs / name).symlink_to(shutil.which(name) or name)
    container.start(ORDER, PATH=str(programs))
    said = container.said("CLOUDRUN-FATAL i-1 the image has no Python 3.8 or newer")
    assert "VAST_IMAGE" in said
    wait_until(lambda: container.service.seen)
    assert set(container.service.seen) == {THE_CALL}


def test_without_a_key_it_says_so(tmp_path: Path, made: list[Container]) -> None:
    (tmp_path / "environ").write_bytes(b"PATH=/bin\0CONTAINER_LABEL=C.77\0")
    container = Container(tmp_path, interpreter("3.11"))
    made.append(container)
    container.start(ORDER, CONTAINER_API_KEY="")
    assert re.search("CLOUDRUN-FATAL i-1 there is no CONTAINER_API_KEY", container.said("FATAL"))


def test_the_key_is_found_where_only_process_1_has_it(tmp_path: Path, made: list[Container]) -> None:
    (tmp_path / "environ").write_bytes(
        b"PATH=/bin\0CONTAINER_API_KEY=other\0CONTAINER_LABEL=a b\0CONTAINER_ID=78\0"
    )
    container = Container(tmp_path, "no-python-here")
    made.append(container)
    container.start(ORDER, CONTAINER_API_KEY="")
    assert "Python" in container.said("FATAL")
    wait_until(lambda: container.service.seen)
    assert container.service.seen[0] == ("DELETE", "/api/v0/instances/78/", "Bearer other", b"{}")


def test_a_guard_that_was_killed_is_followed_by_the_shell(tmp_path: Path, made: list[Container]) -> None:
    (tmp_path / "agent").write_bytes(SLEEPS)
    container = Container(tmp_path, interpreter("3.11"))
    made.append(container)
    container.start({**ORDER, "bucket": f"file://{tmp_path}", "agent": ["agent", SLEEPER], "left": 60})
    guard = wait_until(lambda: with_environ("CLOUDRUN_ROLE=guard", str(tmp_path)))
    time.sleep(0.2)
    os.kill(guard, signal.SIGKILL)
    wait_until(lambda: container.service.seen)
    assert container.service.seen[0] == THE_CALL


def with_environ(text: str, folder: str) -> int:
    """The oldest process with this in its environment that works below the folder; 0 if there is none."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            environ = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
            if text.encode() in environ and os.readlink(f"/proc/{name}/cwd").startswith(folder):
                found.append(int(name))
    return min(found, default=0)
