"""The agent's story: read the order, claim the attempt, fetch, run main.py, save, write the receipt."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
import sys
import threading
import time
from contextlib import suppress

from cloudrun.agent.fetch import Fetch
from cloudrun.agent.log import Log
from cloudrun.agent.program import Ending, Program, exit_of, python
from cloudrun.agent.save import Saver
from cloudrun.agent.watch import Ended, Task, Watch, insist, now
from cloudrun.errors import BucketError, CloudrunError, Conflict, Corrupt, Missing
from cloudrun.formats import canonical, parse, timestamp
from cloudrun.storage import open_bucket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cloudrun.storage import Bucket

PR_SET_CHILD_SUBREAPER = 36
TURN_SECONDS = 0.25  # the longest that the main loop sleeps
LOOK_SECONDS = 2.0  # between two looks at which output files are closed
ENDING_SECONDS = 0.02  # the same, and the turn, once main.py was asked to end
LEAST_SECONDS = 5.0  # for the last words, however late it is


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    boot = json.loads(os.environ["CLOUDRUN_BOOT"])
    try:
        bucket = open_bucket(boot["bucket"])
        order = read_order(bucket, boot)
        watch = Watch(boot, order, bucket)
        if claim(bucket, watch):
            Attempt(boot["attempt"], order, bucket, watch).work()
    except Exception as error:
        print(f"CLOUDRUN-FATAL {type(error).__name__}: {error}", flush=True)
    os.write(int(os.environ["CLOUDRUN_GUARD"]), b"R")  # nothing is left to do on this machine


def read_order(bucket: Bucket, boot: dict[str, Any]) -> dict[str, Any]:
    name, sha256 = boot["order"]
    data, _ = bucket.get(name)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Corrupt(f"{name} is damaged: its sha256 is not the one that this machine was given")
    return parse(data, name, limits=dict, manifest=dict, argv=list, outputs=list)


def claim(bucket: Bucket, watch: Watch) -> bool:
    """Become the one machine that works on this attempt; False if the run or the attempt is taken."""
    if bucket.size(watch.prefix + "/receipt.json") is not None:
        return False
    identity = {"machine": os.urandom(8).hex(), "python": sys.version.split()[0]}
    try:
        bucket.create(watch.attempt + "/agent.json", canonical(dict(identity, time=stamp())))
    except Conflict:
        return False
    return True


class Attempt:
    """One attempt of a run. `work` returns when nothing is left to do on this machine."""

    def __init__(self, number: int, order: dict[str, Any], bucket: Bucket, watch: Watch) -> None:
        self.number, self.order, self.bucket, self.watch = number, order, bucket, watch
        self.started, self.ran = stamp(), 0.0
        self.reason, self.message, self.unsaved = "exited", "", ""
        self.program: Program | None = None
        os.makedirs("work", exist_ok=True)
        os.chdir("work")
        self.saver = Saver(bucket, watch, number, order["outputs"])
        self.log = Log(bucket, watch.attempt + "/log", int(watch.limits["spool"]))

    def work(self) -> None:
        try:
            self.fetch()
            self.run()
        except Ended as ended:
            self.end(ended.reason)
        except (CloudrunError, OSError) as error:
            self.reason, self.message = "failed", str(error)
        self.save()
        self.watch.join(Task(self.log.close, self.room()), self.room())
        if self.reason != "preempted":
            insist(self.write_receipt, self.room(), self.watch.beat)

    def room(self) -> float:
        """Seconds that the last words may take."""
        return min(self.watch.limits["save"], max(self.watch.left() - LEAST_SECONDS, LEAST_SECONDS))

    def fetch(self) -> None:
        """The inputs, and over them what an earlier attempt saved."""
        fetch = Fetch(self.bucket, self.watch.prefix, self.order)

        def bring() -> None:
            fetch.inputs()
            fetch.outputs(self.saver.previous())
            self.saver.begin()

        def show() -> None:
            self.watch.state = {"phase": "fetch", **fetch.progress()}

        self.watch.phase("fetch")
        task = Task(bring)
        try:
            self.watch.join(task, self.watch.limits["fetch"], heed=True, tick=show)
        finally:
            fetch.stop.set()
        if not task.done:
            raise task.error or CloudrunError("fetching the inputs took too long")

    def environment(self) -> dict[str, str]:
        """The login environment, the values given with -e, and nothing that is ours."""
        env = dict(os.environ, CLOUDRUN_ROLE="program", PYTHONUNBUFFERED="1")
        del env["CLOUDRUN_BOOT"], env["CLOUDRUN_GUARD"]
        with suppress(Missing):
            name = self.watch.prefix + "/env.json"
            env.update(parse(self.bucket.get(name)[0], name))
        return env

    def run(self) -> None:
        """main.py from start to end: its output copied, saved every so often, ended if it has to be."""
        self.watch.phase("run")
        environment = self.environment()
        began = looked = now()
        program = self.program = Program([python(), *self.order["argv"]], environment, self.log.write)
        ended, ending = threading.Event(), None
        Task(self.saver.every_so_often, ended)
        while program.status is None:
            program.pump(ENDING_SECONDS if ending else TURN_SECONDS)
            self.watch.beat()
            reason = self.watch.reason()
            if now() - looked > (ENDING_SECONDS if ending or reason else LOOK_SECONDS):
                self.saver.look()
                looked = now()
            if reason and not ending:
                ending = Ending(reason, self.watch)
                self.end(reason)
            if ending:
                ending.press(program)
        ended.set()
        self.ran = now() - began
        drain = ending.drain if ending else self.watch.limits["drain"]
        program.drain(drain, self.saver.look, self.watch.beat)

    def end(self, reason: str) -> None:
        """Note why; for a spot notice say so first, whatever happens next: the run may go on elsewhere."""
        self.reason = reason
        if reason == "preempted":
            with suppress(BucketError):
                content = canonical({"reason": reason, "time": stamp()})
                self.bucket.create(self.watch.attempt + "/end.json", content)

    def save(self) -> None:
        """The last save, tried again while there is time and hope; `unsaved` says what went wrong."""
        if self.program is None or self.program.status is None or self.watch.level > 1:
            return
        self.watch.phase("save")
        killed = self.program.status < 0
        exact = self.reason == "exited" and not killed
        deadline = now() + self.room()
        for tries in itertools.count(1):
            task = Task(self.saver.finish, exact, killed)
            self.watch.join(task, deadline - now())
            self.unsaved = "" if task.done else str(task.error or "it took too long")
            hopeless = tries > 2 and getattr(task.error, "permanent", False)
            if task.done or hopeless or now() > deadline:
                return
            time.sleep(0.2)

    def write_receipt(self) -> None:
        status, signame = exit_of(self.program.status if self.program else None)
        receipt = {
            "run": self.order["run"],
            "attempt": self.number,
            "reason": self.reason,
            "status": status,
            "signal": signame,
            "by": self.watch.by,
            "message": self.message,
            "save": self.unsaved,
            "started": self.started,
            "ended": stamp(),
            "seconds": round(self.ran, 3),
            "chunks": self.log.sent,
            "files": self.saver.count,
            "uncopied": self.saver.uncopied,
        }
        self.bucket.create(self.watch.prefix + "/receipt.json", canonical(receipt))


def stamp() -> str:
    return timestamp(time.time())
