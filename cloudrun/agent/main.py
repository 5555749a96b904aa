"""The agent's story: read the order, claim the attempt, fetch, run main.py, save, write the receipt."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
import time
from contextlib import suppress
from functools import partial

from cloudrun.agent.fetch import Fetch
from cloudrun.agent.log import Log
from cloudrun.agent.machine import driver_trouble, identity, let_read, power_off
from cloudrun.agent.program import Program, find_python, steps
from cloudrun.agent.save import Saver
from cloudrun.agent.watch import Task, Watch, insist, now, said, stamp
from cloudrun.errors import CloudrunError, Conflict, Corrupt
from cloudrun.formats import canonical, parse
from cloudrun.processes import descendants, kill_descendants
from cloudrun.storage import Bucket, open_bucket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cloudrun.agent.environment import Environment

PR_SET_CHILD_SUBREAPER = 36
TURN_SECONDS = 0.25  # the longest that the main loop sleeps
ENDING_SECONDS = 0.02  # the same once main.py was asked to end, or has ended
LEAST_SECONDS = 5.0  # for the last words, however late it is
SHORT_SECONDS = 3.0  # for what the bucket refuses for good, and for the word that the machine is taken away


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    boot = json.loads(os.environ["CLOUDRUN_BOOT"])
    last_word = b"R"  # nothing is left to do on this machine
    try:
        bucket, (name, sha256) = bucket_of(boot), boot["order"]
        order, _ = bucket.get(name)
        if hashlib.sha256(order).hexdigest() != sha256:
            raise Corrupt(f"{name} is damaged: its sha256 is not the one that this machine was given")
        watch = Watch(boot, parse(order, name, limits=dict, manifest=dict, argv=list, outputs=list), bucket)
        receipt, ours = watch.prefix + "/receipt.json", watch.attempt + "/agent.json"
        following = f"{watch.prefix}/attempts/{watch.number + 1}/claim.json"
        if all(bucket.size(name) is None for name in (receipt, following)):
            if claim(watch):
                Attempt(watch).work()
        elif boot.get("kept") and any(bucket.size(name) is not None for name in (receipt, ours)):
            last_word = b"H"  # the run had its machine: a person started this one, for something else
    except Exception as error:
        print(f"CLOUDRUN-FATAL {boot['instance']} {said(error)}", flush=True)
        let_read(boot)
    finally:
        with suppress(OSError):
            os.write(int(os.environ["CLOUDRUN_GUARD"]), last_word)
            time.sleep(boot["agent_gone"])  # the guard ends the machine, and us with it
        if last_word == b"R":  # it is gone, or it hangs
            power_off(boot)
        os._exit(0)  # nothing is worth waiting for, not even a thread that hangs in the bucket


def bucket_of(boot: dict[str, Any]) -> Bucket:
    if "token" not in boot:
        return open_bucket(boot["bucket"], agent=True)
    from cloudrun.agent.alone import AloneBucket

    return AloneBucket(boot)


def claim(watch: Watch) -> bool:
    """Become the one machine that works on this attempt; False if another one is."""
    ours = identity(watch.boot)
    content = {"machine": ours, "python": sys.version.split()[0], "time": stamp()}
    try:
        watch.bucket.create(watch.attempt + "/agent.json", canonical(content))
    except Conflict:  # after a reboot it may be we who have it
        found = parse(watch.bucket.get(watch.attempt + "/agent.json")[0], "agent.json")
        return bool(found.get("machine") == ours)
    return True


class Attempt:
    """One attempt of a run. `work` returns when nothing is left to do on this machine."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.bucket, self.order = watch, watch.bucket, watch.order
        self.started, self.ran = stamp(), 0.0
        self.reason, self.message, self.unsaved = "exited", "", ""
        self.program: Program | None = None
        self.torn = False
        self.rented: Environment | None = None  # None: main.py runs as who we are
        self.saver = Saver(watch, self.order["outputs"])
        self.log = Log(watch.bucket, watch.attempt + "/log", int(watch.limits["spool"]), watch.stranger)
        watch.helpers.append(self.log.task)

    def work(self) -> None:
        try:
            if self.fetch() and self.prepare():
                self.run()
        except Exception as error:
            if self.reason != "preempted":
                self.reason = "agent-failed" if self.program else "failed"
            self.message = said(error)
        self.save()
        self.log.close()
        if not self.watch.join(self.log.task, self.room()):
            self.message = self.message or "the end of its output could not be sent"
        if self.reason != "preempted":
            self.watch.join(Task(insist, self.write_receipt, self.room(), SHORT_SECONDS), self.room())
            if self.rented and self.rented.keeping:
                self.watch.join(self.rented.keeping, min(LEAST_SECONDS, self.room()))

    def room(self) -> float:
        """Seconds that the last words may take."""
        limit = SHORT_SECONDS if self.unsaved else self.watch.limits["save"]
        return min(limit, max(self.watch.left() - LEAST_SECONDS, LEAST_SECONDS))

    def fetch(self) -> bool:
        """All that main.py needs. False if the run must end before it has begun."""
        trouble = driver_trouble(self.watch.boot)
        if trouble and self.order.get("stranger"):  # another one may do, which the client finds
            end = {"reason": "unusable", "why": trouble, "time": stamp()}
            self.bucket.create(self.watch.attempt + "/end.json", canonical(end))
            self.reason = "preempted"  # as far as we are concerned: there is no receipt yet
            return False
        if trouble:
            raise CloudrunError(trouble)
        fetch = Fetch(self.watch)
        self.watch.phase("fetch", fetch.progress)
        task = Task(self.bring, fetch)
        done = self.watch.join(task, self.watch.limits["fetch"], heed=True)
        fetch.stop.set()
        if not self.goes_on():
            return False
        if not done:
            raise task.error or CloudrunError("fetching the inputs took too long")
        return True

    def goes_on(self) -> bool:
        """Whether there is no reason to end before main.py has begun."""
        reason = self.watch.reason()
        if reason in ("guard-lost", "agent-failed"):
            raise CloudrunError(f"{reason}: {self.watch.trouble()}")
        if reason:
            self.end(reason)
        return not reason

    def bring(self, fetch: Fetch) -> None:
        """Inputs, over them what an earlier attempt saved, and the values given with -e."""
        if self.watch.boot["backend"] == "local":
            os.makedirs("work", exist_ok=True)
            os.chdir("work")
        else:
            from cloudrun.agent.environment import Environment  # which a local run does not pay for

            self.rented = Environment(self.watch, self.log.write)
            fetch.earlier = self.rented.enter()
        fetch.inputs()
        fetch.outputs(self.saver.previous())
        if self.rented:
            self.rented.settle(fetch.manifest, self.saver.outputs)
        self.saver.begin()
        self.given = parse(self.watch.read("env.json") or b"{}", "env.json")
        if set(self.order.get("env", ())) - set(self.given):
            raise CloudrunError("the values given with -e are gone from the bucket")

    def prepare(self) -> bool:
        """main.py's Python and its environment, without anything of ours."""
        environ = dict(os.environ)
        if self.rented:
            self.watch.phase("environment")
            environ = self.rented.login()
        environ.update({"PYTHONUNBUFFERED": "1", **self.given})
        python = find_python(environ) or sys.executable
        argv = [python, *self.order["argv"]]
        if self.rented:
            argv = self.rented.command(environ, self.order)
        environ.update((name, value) for name, value in os.environ.items() if name.startswith("CLOUDRUN_"))
        del environ["CLOUDRUN_BOOT"], environ["CLOUDRUN_GUARD"]
        self.argv, self.environment = argv, {**environ, "CLOUDRUN_ROLE": "program"}
        return self.goes_on()

    def run(self) -> None:
        """main.py from start to end: its output copied, saved every so often, ended if it has to be."""
        self.watch.phase("run")
        began = now()
        program = self.program = Program(self.argv, self.environment, self.log.write)
        reason, ending = None, []
        asked, self.saver.is_running = began, program.is_running
        self.watch.helpers.append(Task(self.saver.every_so_often, partial(self.log.write, "note")))
        stuck = self.watch.limits["stuck"]
        while program.status is None and not (reason and now() - asked > stuck and not ending):
            program.pump(ENDING_SECONDS if reason else TURN_SECONDS)
            self.watch.beat()
            if not reason:
                reason, asked = self.watch.reason(), now()
                if reason:
                    self.end(reason)
                    ending = steps(reason, self.watch)
            if reason and self.watch.level > 1:
                ending = [(0.0, signal.SIGKILL)]
            if ending and now() - asked >= ending[0][0]:
                self.saver.look()
                program.signal(ending.pop(0)[1])
        self.saver.ended.set()
        self.ran = now() - began
        self.drain(program)

    def drain(self, program: Program) -> None:
        """Of what main.py left behind, for no longer than the time for the last save allows."""
        limits, reserve = self.watch.limits, self.watch.reserve()
        status = program.status  # on SIGINT Python closes its files before it ends
        self.torn = status is None or (status < 0 and status != -signal.SIGINT)
        room = limits["grace_preempted"] if self.reason == "preempted" else self.watch.left() - 0.75 * reserve
        deadline = now() + min(limits["drain"], max(room, reserve / 8))
        while descendants() and now() < deadline and self.watch.level < 2:
            program.pump(ENDING_SECONDS)
            self.watch.beat()
            if self.watch.reason() == "preempted" != self.reason:
                break  # the machine is taken away meanwhile: what time there is the save needs
        if descendants():
            if not self.torn:
                self.saver.look(ended=True)
            self.torn = True
        while not kill_descendants(0.5) and now() < deadline + limits["stuck"]:
            self.watch.beat()
        program.last_words()

    def end(self, reason: str) -> None:
        """Note why; a spot notice is passed on first, whatever happens next: the run may go on elsewhere."""
        self.reason, self.message = reason, self.watch.trouble()
        if reason == "preempted":
            self.watch.beat()
            assert self.watch.farewell
            self.watch.join(self.watch.farewell, SHORT_SECONDS)

    def save(self) -> None:
        """The last save; `unsaved` says what went wrong. Then copies for people."""
        if self.program and self.program.status is None:  # it was our own mistake that brought us here
            self.drain(self.program)
        if self.program is None or self.watch.level > 1:
            return
        self.watch.phase("save")
        exact, room = self.reason == "exited" and not self.torn, self.room()
        save = partial(self.saver.save, exact=exact, torn=self.torn)
        task = Task(insist, save, room, SHORT_SECONDS)
        if self.watch.join(task, room):
            self.watch.join(Task(self.saver.copy_names), self.room())
        else:
            self.unsaved = said(task.error) if task.error else "it took too long"

    def write_receipt(self) -> None:
        status = self.program.status if self.program else None
        names = {int(known): known.name for known in signal.Signals}
        killed_by = None if status is None or status >= 0 else names.get(-status, f"SIG{-status}")
        receipt = {"run": self.order["run"], "attempt": self.watch.number}
        receipt.update({"started": self.started, "ended": stamp()})
        receipt.update({"reason": self.reason, "message": self.message, "by": self.watch.by})
        receipt.update({"status": None if killed_by else status, "signal": killed_by, "save": self.unsaved})
        receipt.update({"seconds": round(self.ran, 3), "chunks": self.log.sent})
        receipt.update({"files": len(self.saver.outputs), "uncopied": self.saver.uncopied})
        self.bucket.create(self.watch.prefix + "/receipt.json", canonical(receipt))
