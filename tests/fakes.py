"""Stand-ins that keep the real ones' contracts: a backend in memory, a bucket and a report that can act."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from cloudrun.backends import ANYTHING, Boot, Cost, Instance, Need, Offer, Survey
from cloudrun.errors import BucketError, CloudrunError, NoCapacity
from cloudrun.formats import canonical, frame, timestamp
from cloudrun.report import Report
from cloudrun.storage import MAX_OBJECT
from cloudrun.storage.folder import FolderBucket

OFFER = Offer("a fake machine", 3.6, 0.0)


class FakeBackend:
    """See cloudrun.backends.Backend. `calls` has what was asked of it, `machines` what there is.

    refuse_stop: stop raises, and the machine stays. fail_after_start: create raises, and the machine is
    there. unreachable: so many calls of find and all raise. sold_out: `where` there is none.
    """

    name = "fake"
    place = ""
    pace = 0.002
    appears_within = least_billed = 0.0
    slowness = 1.0
    stranger = False

    def __init__(self) -> None:
        self.machines: dict[str, Instance] = {}
        self.costs: dict[str, Cost] = {}
        self.calls: list[str] = []
        self.boots: list[Boot] = []
        self.needs: list[Need] = []
        self.offer = OFFER
        self.words = ""
        self.refuse_stop = self.fail_after_start = False
        self.unreachable = 0
        self.sold_out: set[str] = set()
        self.taken: set[str] = set()
        self.on_call: Callable[[str], None] = lambda what: None

    def warm_up(self) -> None:
        pass

    def offers(self, need: Need = ANYTHING) -> list[Offer]:
        self._called("offers")
        self.needs.append(need)
        return [self.offer]

    def create(self, name: str, offer: Offer, boot: Boot) -> None:
        self._called("create")
        if offer.where in self.sold_out:
            raise NoCapacity(f"none in {offer.where}")
        if name in self.machines:
            raise CloudrunError(f"there is a {name} already")
        self.boots.append(boot)
        self.machines[name] = Instance(name, boot.run, boot.attempt, boot.deadline, time.time(), alive=True)
        if self.fail_after_start:
            raise CloudrunError("the answer was lost")
        self._called("created")

    def find(self, name: str) -> Instance | None:
        self._called("find")
        self._reach()
        return self.machines.get(name)

    def all(self) -> list[Instance]:
        self._called("all")
        self._reach()
        return [machine for machine in self.machines.values() if machine.ended is None]

    def survey(self) -> Survey:
        return Survey(self.all(), [])

    def stop(self, name: str) -> None:
        self._called("stop")
        if self.refuse_stop:
            raise CloudrunError("no permission to stop it")
        self.machines.pop(name, None)

    def taken_away(self, name: str) -> bool:
        return name in self.taken

    def cost(self, name: str) -> Cost | None:
        return self.costs.get(name)

    def console(self, name: str) -> str:
        return self.words if name in self.machines else ""

    def by_hand(self, name: str) -> str:
        return f"fake-cloud stop {name}"

    def ends(self, name: str, why: str) -> None:
        """The machine ends by itself."""
        old = self.machines[name]
        self.machines[name] = Instance(
            name, old.run, old.attempt, old.deadline, old.started, False, time.time(), why
        )

    def alive(self) -> list[str]:
        return [name for name, machine in self.machines.items() if machine.ended is None]

    def _reach(self) -> None:
        if self.unreachable:
            self.unreachable -= 1
            raise CloudrunError("the provider does not answer")

    def _called(self, what: str) -> None:
        self.calls.append(what)
        self.on_call(what)


class FakeAgent:
    """What machines do, a turn each time that somebody looks for the receipt.

    `attempts` lists, per attempt, the words of its turns: state, log, badlog, badstate, receipt, badreceipt,
    preempted, vanish, preparing, alone, nothing. The last one is repeated. It obeys control.json.
    """

    def __init__(self, backend: FakeBackend, bucket: FolderBucket, *attempts: str) -> None:
        self.backend, self.bucket = backend, bucket
        self.attempts = [words.split() for words in attempts or ("state log receipt",)]
        self.obeys = True
        self.status = 0
        self.turns: dict[str, int] = {}

    def turn(self) -> None:
        for boot in self.backend.boots:
            name = f"{boot.run}-{boot.attempt}"
            if name in self.backend.alive():
                number = self.turns[name] = self.turns.get(name, -1) + 1
                words = self.attempts[boot.attempt - 1]
                self._act(words[min(number, len(words) - 1)], number, name, boot.payload["prefix"], boot)

    def _act(self, word: str, number: int, name: str, prefix: str, boot: Boot) -> None:
        attempt, control = f"{prefix}/attempts/{boot.attempt}", self.bucket.root + f"/{prefix}/control.json"
        asked = None
        try:
            with open(control) as file:
                asked = json.load(file)["by"]
        except FileNotFoundError:
            pass
        if asked and self.obeys:
            self._receipt(prefix, boot.attempt, "stopped", asked)
            self.backend.ends(name, "the run is finished")
        elif word in ("state", "badstate", "preparing"):
            phase = "environment" if word == "preparing" else "run"
            data = canonical({"phase": phase, "beat": number, "time": timestamp(time.time())})
            self.bucket.put(attempt + "/state.json", b"{{{" if word == "badstate" else data)
        elif word == "alone":
            self.bucket.put(attempt + "/state.json", canonical({"phase": "run", "beat": 0, "alone": True}))
        elif word in ("log", "badlog"):
            data = frame(time.time(), "out", b"hello from %d\n" % boot.attempt)
            self.bucket.create(attempt + "/log/00000001", data if word == "log" else b"garbage")
        elif word == "receipt":
            self._receipt(prefix, boot.attempt, "exited", "")
            self.backend.ends(name, "the run is finished")
        elif word == "badreceipt":
            self.bucket.create(prefix + "/receipt.json", b'{"reason": 7}')
        elif word == "preempted":
            self.bucket.create(attempt + "/end.json", canonical({"reason": "preempted", "time": "now"}))
            self.backend.ends(name, "taken away")
        elif word == "vanish":
            del self.backend.machines[name]

    def _receipt(self, prefix: str, attempt: int, reason: str, by: str) -> None:
        data = b"result"
        sha256 = self.bucket.put_blob(prefix + "/saved/", [data])
        file = {"path": "model/result", "mode": 0o644, "size": len(data), "sha256": sha256}
        outputs = {"attempt": attempt, "sequence": 1, "time": timestamp(time.time()), "files": [file]}
        self.bucket.put(prefix + "/outputs.json", canonical(outputs))
        receipt = receipt_of(attempt=attempt, reason=reason, by=by, status=self.status)
        self.bucket.create(prefix + "/receipt.json", canonical(receipt))


def receipt_of(**fields: Any) -> dict[str, Any]:
    """A receipt of a run that went well, but for these fields."""
    when = timestamp(time.time())
    receipt = {
        "run": "r",
        "attempt": 1,
        "reason": "exited",
        "status": 0,
        "signal": None,
        "by": "",
        "message": "",
        "save": "",
        "started": when,
        "ended": when,
        "seconds": 0.5,
        "chunks": 0,
        "files": 1,
        "uncopied": 0,
    }
    return {**receipt, **fields}


class ActingBucket(FolderBucket):
    """A folder bucket that says what is asked of it: before and after each call `on_call(method, name)`.

    refuse: an error to raise for a call, by (method, name). The agent's turns are driven by the client's
    looks at the receipt.
    """

    pace = slow_pace = 0.001

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.on_call: Callable[[str, str], None] = lambda method, name: None
        self.refuse: Callable[[str, str], BucketError | None] = lambda method, name: None
        self.agent: FakeAgent | None = None

    def _act(self, method: str, name: str) -> None:
        self.on_call(method, name)
        error = self.refuse(method, name)
        if error:
            raise error

    def size(self, name: str) -> int | None:
        self._act("size", name)
        found = super().size(name)
        self.on_call("size done", name)
        return found

    def get(self, name: str, most: int = MAX_OBJECT) -> tuple[bytes, str]:
        if name.endswith("/receipt.json") and self.agent:
            self.agent.turn()
        self._act("get", name)
        return super().get(name, most)

    def create(self, name: str, content: Any) -> bool:
        self._act("create", name)
        done = super().create(name, content)
        self.on_call("create done", name)
        return done

    def put(self, name: str, data: bytes) -> None:
        self._act("put", name)
        super().put(name, data)

    def swap(self, name: str, data: bytes, version: str | None) -> str:
        self._act("swap", name)
        return super().swap(name, data, version)

    def delete(self, name: str) -> None:
        self._act("delete", name)
        super().delete(name)
        self.on_call("delete done", name)


class ActingReport(Report):
    """Keeps what it is told; `on_stage` is called as the story comes to each point."""

    def __init__(self) -> None:
        super().__init__(quiet=True, verbose=False, environ={})
        self.stages: list[str] = []
        self.lines: list[str] = []
        self.on_stage: Callable[[str], None] = lambda name: None

    def stage(self, name: str) -> None:
        self.stages.append(name)
        self.on_stage(name)

    def say(self, text: str) -> None:
        self.lines.append(text)

    detail = warn = error = say
