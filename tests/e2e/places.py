"""Where the machines of the end-to-end tests are: on this computer, or on an emulated cloud."""

import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from cloud.compute import Cloud
from cloud.faults import Answer
from cloud.project import Timing
from cloud.storage import Storage
from cloud.vast import Vast
from cloud.vast_errors import forbidden
from cloud.vast_offers import offer
from machine import role_of, signal_all, wait_until

QUICK = Timing(0.02, 0.02, boot=0.05, stopping=0.02, deleting=0.02, guest_standard=4.0, guest_spot=4.0)


class CloudMeter:
    """The cloud's billing meter, with the verbs of the local one."""

    def __init__(self, cloud):
        self._meter = cloud.meter

    def leave_out(self, pid):
        """The cloud never bills a client."""

    @property
    def members(self):
        return self._meter.running()

    @property
    def seconds(self):
        return sum(self._meter.seconds(name) for name in self._meter.names())

    def wait_gone(self, seconds):
        wait_until(lambda: not self.members, seconds, "the end of all billing")
        self._meter.check()

    def close(self):
        """The cloud is closed by who opened it."""


class Place:
    """Where the machines of a Machinery are: `settings` to reach them, and what is in their bucket."""

    least_billed = 0  # seconds
    free = True  # whether what the settings ask for costs nothing
    notice = True  # whether a machine is told before it is taken away
    limit_late = 0.0  # seconds that the provider's limit may come too late

    def agrees(self, bill):
        """Whether the bill says what the meter says."""
        return abs(bill["seconds"] - self.meter.seconds) < 1.0

    def fair(self, bill, price):
        """Whether the cost on the bill is that of its time, at so many dollars per hour."""
        paid = max(bill["seconds"], self.least_billed)
        return abs(bill["cost"] - paid * price / 3600) < 1e-5

    def now(self):
        """By the clock of who bills: seconds since the epoch."""
        return time.time()

    def lose_limit(self):
        """The provider's own limit never comes, and nobody is told."""

    def have_one_machine(self):
        """A run has nowhere else to go."""

    def elsewhere(self, home):
        """Variables of a computer that knows nothing of any run."""
        return {"HOME": str(home), "XDG_DATA_HOME": str(home), "XDG_CACHE_HOME": str(home)}


class CloudPlace(Place):
    def __init__(self, cloud):
        self.storage = Storage()
        self.storage.__enter__()
        self.storage.create_bucket("b")
        self.cloud, self.meter = cloud, CloudMeter(cloud)

    def settings(self):
        return {
            **self.cloud.environ(),
            "STORAGE_EMULATOR_HOST": self.storage.url,
            "GCS_DIR": "gs://b/runs",
        }

    def role(self, name):
        """The processes on all machines that are guard, agent or program, oldest first."""
        found = []
        for pid in (pid for machine in self.cloud.all_machines for pid in machine.processes()):
            with suppress(OSError):
                if role_of(pid, Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")) == name:
                    found.append(pid)
        return sorted(found)

    def object(self, name):
        for path, found in self.storage.objects("b").items():
            if path.startswith("runs/digits/runs/") and path.split("/", 4)[4] == name:
                return json.loads(found.data)
        return None

    def orders(self):
        found = self.storage.objects("b").items()
        return [json.loads(each.data) for path, each in found if path.endswith("/order.json")]

    def open_runs(self):
        return [path for path in self.storage.objects("b") if path.startswith("runs/open/")]

    def now(self):
        return self.cloud.clock.now()

    def freeze(self):
        """All that runs on the machine stops, and the provider notices nothing."""
        wait_until(lambda: self.cloud.all_machines)[-1].freeze()

    def cut_off(self):
        """The bucket is out of reach for everybody."""
        self.storage.faults.add(lambda call: True, times=float("inf"), status=503)

    def close(self):
        self.cloud.close()
        self.storage.__exit__(None, None, None)
        assert self.cloud.violations == []


class GcpPlace(CloudPlace):
    name = "gcp"
    least_billed = 60

    def __init__(self, folder):
        super().__init__(Cloud(Path(folder), timing=QUICK))
        self.limits = {"look": 0.1, "appears": 1.0, "boot_least": 1.0}

    def settings(self):
        gcp = {"CLOUDRUN_BACKEND": "gcp", "CLOUDRUN_PRICE": "0", "VM_GPU": "none", "VM_SPOT": "1"}
        return {**super().settings(), **gcp}

    def ended_at(self, run):
        """When the first machine of this run cost nothing any more."""
        return self.cloud.meter.intervals(run + "-1")[-1].end

    def lose_limit(self):
        self.cloud.project.timing = replace(QUICK, limit_late=1e9)

    def reach_limit(self):
        (name,) = self.cloud.meter.running()
        self.cloud.clock.advance(self.cloud.instance(name).limit - self.now())

    def take_away(self):
        (name,) = self.cloud.meter.running()
        self.cloud.preempt(name)

    def close(self):
        super().close()
        for insert in self.cloud.inserts():
            assert int(insert.body["scheduling"]["maxRunDuration"]["seconds"]) >= 30


class VastPlace(CloudPlace):
    """For the meter a container has ended when it is destroyed: its disk is billed until then.

    The service never says when that was, so that a bill ends when it was seen. What it took it does say.
    """

    name = "vast"
    free = notice = False
    limit_late = 3600.0

    def __init__(self, folder):
        super().__init__(Vast(Path(folder)))
        self.limits = {"look": 0.1, "appears": 1.0, "boot_least": 1.0}
        prices = {"price": 6.0, "storage_cost": 0.0, "inet_up_cost": 0.0, "inet_down_cost": 0.0}
        self.cloud.offers = [offer(7_200_001 + number, **prices) for number in range(8)]
        self.cloud.credit = 1000.0

    def settings(self):
        return {**super().settings(), "CLOUDRUN_BACKEND": "vast", "VM_GPU": "RTX_4090"}

    def agrees(self, bill):
        billed = self.cloud.meter.total()
        return bill["seconds"] > self.meter.seconds - 1.0 and abs(bill["cost"] - billed) < 1e-5

    def ended_at(self, run):
        """When the first container of this run cost nothing any more."""
        label = f"cloudrun/{run}/1/"
        (number,) = [n for n, each in self.cloud.instances.items() if (each.label or "").startswith(label)]
        return self.cloud.meter.accounts[number].destroyed

    def fair(self, bill, price):
        """A container that comes up costs less than one that runs."""
        return 0 < bill["cost"] < bill["seconds"] * price / 3600

    def lose_limit(self):
        refusal = Answer(forbidden("a scheduled job"))
        self.cloud.faults.on("instances.delete", refusal, times=None, when=lambda call: call.key == "job")

    def have_one_machine(self):
        del self.cloud.offers[1:]

    def reach_limit(self):
        (job,) = self.cloud.jobs.values()
        self.cloud.clock.advance(job["start_time"] - self.now())

    def take_away(self):
        """Somebody bids more."""
        (number,) = self.cloud.meter.running()
        self.cloud.outbid(number)
        self.cloud.wait(number, "stopped")


class LocalPlace(Place):
    """Machines that are process trees on this computer."""

    name = "local"

    def __init__(self, top, meter, role):
        self.limits, self.meter, self.role = {}, meter, role
        self._bucket = top / "share/cloudrun/bucket"

    def settings(self):
        return {"CLOUDRUN_BACKEND": "local"}

    def object(self, name):
        for path in (self._bucket / "digits/runs").glob("*/" + name):
            return json.loads(path.read_bytes())
        return None

    def orders(self):
        return [json.loads(path.read_bytes()) for path in (self._bucket / "digits/runs").glob("*/order.json")]

    def open_runs(self):
        return list((self._bucket / "open").iterdir())

    def elsewhere(self, home):
        """Not quite: a computer sees its own machines, by the directory that they work in."""
        return {"HOME": str(home)}

    def freeze(self):
        stopped = set()
        while left := wait_until(self.meter.look_again) - stopped:
            signal_all(left, signal.SIGSTOP)
            stopped |= left

    def cut_off(self):
        self._bucket.rename(self._bucket.with_name("hidden"))
        self._bucket.touch()

    def take_away(self):
        for pid in self.role("guard"):
            os.kill(pid, signal.SIGTERM)

    def close(self):
        deadline = time.monotonic() + 1
        while left := [pid for role in ("guard", "agent", "program") for pid in self.role(role)]:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
