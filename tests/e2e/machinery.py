"""A project and its client as real processes, with a meter beside the machine."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

from machine import ROOT, SHORT, wait_until, with_role
from meter import Meter
from places import LocalPlace

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

    def __init__(self, top, place=None):
        self.top = top
        self.project = top / "home" / "digits"
        self.project.mkdir(parents=True)
        self.place = place or LocalPlace(top, Meter(top), lambda name: with_role(name, top))
        self.meter = self.place.meter
        self.clients = []

    def main(self, text):
        (self.project / "main.py").write_text("import os, signal, sys, time\n" + text)
        return self

    def environ(self, **variables):
        limits = {
            **LIMITS,
            **self.place.limits,
            **{key[6:]: value for key, value in variables.items() if key.startswith("limit_")},
        }
        return {
            "PATH": f"{os.path.dirname(sys.executable)}:/usr/bin:/bin",
            "HOME": str(self.top / "home"),
            "XDG_DATA_HOME": str(self.top / "share"),
            "XDG_CACHE_HOME": str(self.top / "cache"),
            **self.place.settings(),
            "CLOUDRUN_LIMITS": ",".join(f"{name}={value}" for name, value in limits.items()),
            "PYTHONDONTWRITEBYTECODE": "1",
            **{key: value for key, value in variables.items() if not key.startswith("limit_")},
        }

    def other_clock(self, seconds):
        """For the environment of a client whose computer's clock is so many seconds ahead of the world's."""
        folder = self.top / f"clock{seconds}"
        folder.mkdir(exist_ok=True)
        shift = f"import time; true = time.time; time.time = lambda: true() + {seconds}\n"
        (folder / "sitecustomize.py").write_text(shift)
        return {"PYTHONPATH": str(folder)}

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
        return self.place.role(name)

    def take_away(self):
        """What a provider does with a spot machine."""
        self.place.take_away()

    def taken_away(self):
        """The same, until all has ended that ends without a client. Only what had a notice writes it down."""
        self.take_away()
        if self.place.notice:
            self.wait_for("attempts/1/end.json")
            self.meter.wait_gone(8)

    def object(self, name):
        """An object of the only run; None where there is none."""
        return self.place.object(name)

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
        assert self.place.agrees(bill), (bill, self.meter.seconds)
        assert bill["proof"] and not self.place.open_runs()
        return bill

    def close(self):
        self.meter.close()
        for client in self.clients:
            with suppress(ProcessLookupError):
                os.killpg(client.pid, signal.SIGKILL)
            client.wait()
        self.place.close()
