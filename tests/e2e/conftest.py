"""A project and its client as real processes, with a meter beside the machine."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from machine import ROOT, SHORT, signal_all, wait_until, with_role
from meter import Meter

LIMITS = {
    **SHORT,
    "state": 0.2,
    "client_beat": 0.2,
    "agent_gone": 1.0,
    "self_end": 3.0,
    "stop": 15.0,
    "save": 5.0,
}


class Machinery:
    """A project directory, an account that has nothing else, and what runs there."""

    def __init__(self, top):
        self.top = top
        self.project = top / "home" / "digits"
        self.project.mkdir(parents=True)
        self.meter = Meter(top)
        self.clients = []

    def main(self, text):
        (self.project / "main.py").write_text("import os, signal, sys, time\n" + text)
        return self

    def environ(self, **variables):
        limits = {
            **LIMITS,
            **{key[6:]: value for key, value in variables.items() if key.startswith("limit_")},
        }
        return {
            "PATH": f"{os.path.dirname(sys.executable)}:/usr/bin:/bin",
            "HOME": str(self.top / "home"),
            "XDG_DATA_HOME": str(self.top / "share"),
            "XDG_CACHE_HOME": str(self.top / "cache"),
            "CLOUDRUN_BACKEND": "local",
            "CLOUDRUN_LIMITS": ",".join(f"{name}={value}" for name, value in limits.items()),
            "PYTHONDONTWRITEBYTECODE": "1",
            **{key: value for key, value in variables.items() if not key.startswith("limit_")},
        }

    def start(self, *arguments, **variables):
        """A client, with its stdout and stderr in files."""
        number = len(self.clients)
        with open(self.top / f"out{number}", "wb") as out, open(self.top / f"err{number}", "wb") as err:
            client = subprocess.Popen(
                [sys.executable, str(ROOT / "bin" / "cloudrun"), *arguments],
                cwd=self.project,
                env=self.environ(**variables),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.meter.leave_out(client.pid)
        client.number = number
        self.clients.append(client)
        return client

    def run(self, *arguments, seconds=60, **variables):
        """The exit code of a client that is waited for."""
        return self.start(*arguments, **variables).wait(seconds)

    def running(self, *arguments, text="up\n", **variables):
        """A client whose main.py has printed `text`."""
        client = self.start(*arguments, **variables)
        wait_until(lambda: text in self.out(client) or client.poll() is not None, 30, "main.py's first word")
        assert client.poll() is None, self.err(client)
        return client

    def out(self, client):
        return (self.top / f"out{client.number}").read_text()

    def err(self, client):
        return (self.top / f"err{client.number}").read_text()

    def role(self, name):
        return with_role(name, self.top)

    def object(self, name):
        """An object of the only run; None where there is none."""
        for path in (self.top / "share/cloudrun/bucket/digits/runs").glob("*/" + name):
            return json.loads(path.read_bytes())
        return None

    def wait_for(self, name, seconds=20):
        return wait_until(lambda: self.object(name), seconds, name)

    def saved(self, path):
        """Whether a complete set with this path is in the bucket."""
        found = self.object("outputs.json") or {"files": []}
        return any(file["path"] == path for file in found["files"])

    def local(self, path):
        path = self.project / path
        return path.read_text() if path.exists() else None

    def ended(self, seconds=15):
        """All of it gone, as the meter sees it, and a bill that agrees; returns the bill."""
        self.meter.wait_gone(seconds)
        bill = self.object("bill.json")
        assert bill, "no bill"
        assert abs(bill["seconds"] - self.meter.seconds) < 1.0, (bill, self.meter.seconds)
        assert bill["proof"] and not list((self.top / "share/cloudrun/bucket/open").iterdir())
        return bill

    def close(self):
        self.meter.close()
        for client in self.clients:
            with suppress(ProcessLookupError):
                os.killpg(client.pid, signal.SIGKILL)
            client.wait()
        for _ in range(20):
            left = [pid for role in ("guard", "agent", "program") for pid in self.role(role)]
            signal_all(left, signal.SIGKILL)
            if not left:
                return
            time.sleep(0.05)


@pytest.fixture
def machinery(tmp_path):
    found = Machinery(tmp_path)
    yield found
    found.close()
