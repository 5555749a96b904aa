"""The agent's story: read the order, claim the attempt, fetch, run main.py, save, write the receipt."""

from __future__ import annotations

import ctypes
import hashlib
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
from cloudrun.agent.watch import Ended, Watch, now
from cloudrun.errors import BucketError, CloudrunError, Conflict, Corrupt, Missing
from cloudrun.formats import canonical, parse, timestamp
from cloudrun.storage import open_bucket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cloudrun.storage import Bucket

PR_SET_CHILD_SUBREAPER = 36
LOOK_SECONDS = 2.0  # between two looks at which output files are closed


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    boot = json.loads(os.environ["CLOUDRUN_BOOT"])
    try:
        bucket = open_bucket(boot["bucket"])
        order = read_order(bucket, boot)
        watch = Watch(boot, order, bucket)
        if claim(bucket, watch):
            Attempt(boot, order, bucket, watch).work()
    except Exception as error:
        print(f"CLOUDRUN-FATAL {type(error).__name__}: {error}", flush=True)
        sys.exit(1)
    watch.tell_guard(b"R")


def read_order(bucket: Bucket, boot: dict[str, Any]) -> dict[str, Any]:
    name, sha256 = boot["order"]
    data, _ = bucket.get(name)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Corrupt(f"{name} is damaged: its sha256 is not the one that this machine was given")
    return parse(data, name, limits=dict, manifest=dict, argv=list, outputs=list)


def claim(bucket: Bucket, watch: Watch) -> bool:
    """Become the one machine that works on this attempt of an unfinished run; False if we are too late."""
    if bucket.size(watch.prefix + "/receipt.json") is not None:
        return False
    identity = {
        "machine": os.urandom(8).hex(),
        "python": sys.version.split()[0],
        "time": timestamp(time.time()),
    }
    try:
        bucket.create(watch.attempt + "/agent.json", canonical(identity))
    except Conflict:
        return False
    return True


class Attempt:
    """One attempt of a run. `work` returns when nothing is left to do on this machine."""

    def __init__(
        self, boot: dict[str, Any], order: dict[str, Any], bucket: Bucket, watch: Watch
    ) -> None:
        self.number, self.order, self.bucket, self.watch = boot["attempt"], order, bucket, watch
        self.limits = watch.limits
        self.started = time.time()
        self.ran = 0.0
        self.reason, self.message, self.saved = "exited", "", ""
        self.program: Program | None = None
        os.makedirs("work", exist_ok=True)
        os.chdir("work")
        self.saver = Saver(bucket, watch, self.number, order["outputs"])
        self.log = Log(bucket, watch.attempt + "/log", int(self.limits["spool"]))

    def work(self) -> None:
        try:
            self.fetch()
            self.run()
        except Ended as ended:
            self.reason = ended.reason
            if "took longer" in self.reason:
                self.reason, self.message = "failed", ended.reason
        except (CloudrunError, OSError) as error:
            self.reason, self.message = "failed", str(error)
        if self.reason == "preempted":
            self.end_attempt()
        self.save()
        self.log.close(min(self.limits["save"], max(self.watch.left() - 5, 5)))
        if self.reason != "preempted":
            self.write_receipt()

    def fetch(self) -> None:
        self.watch.phase("fetch")
        fetch = Fetch(self.bucket, self.watch.prefix, self.order)
        ticker = threading.Thread(target=self.show_progress, args=(fetch,), daemon=True)
        fetch.start()
        ticker.start()
        try:
            self.watch.during(fetch, "fetch")
        finally:
            fetch.stop.set()
        if fetch.error:
            raise fetch.error
        for folder in self.order["folders"]:
            os.makedirs(folder, exist_ok=True)
        fetch.restore(self.saver.previous())
        self.saver.begin()

    def show_progress(self, fetch: Fetch) -> None:
        manifest = self.order["manifest"]
        totals = {"of_files": manifest["files"], "of_bytes": manifest["bytes"]}
        while fetch.is_alive():
            self.watch.state = {"phase": "fetch", "files": fetch.files, "bytes": fetch.bytes, **totals}
            fetch.join(max(0.2, 10 * self.bucket.pace))

    def environment(self) -> dict[str, str]:
        """The login environment, the values given with -e, and nothing that is ours."""
        env = {name: value for name, value in os.environ.items() if name not in ("CLOUDRUN_BOOT", "CLOUDRUN_GUARD")}
        env.update(CLOUDRUN_ROLE="program", PYTHONUNBUFFERED="1")
        with suppress(Missing):
            name = self.watch.prefix + "/env.json"
            env.update(parse(self.bucket.get(name)[0], name))
        return env

    def run(self) -> None:
        """main.py from start to end, its output copied, saved every so often, ended when it has to be."""
        self.watch.phase("run")
        argv = [python(), *self.order["argv"]]
        program = self.program = Program(argv, self.environment(), self.log.write)
        began, looked, ending = now(), now(), None
        stop_saving = threading.Event()
        saving = threading.Thread(target=self.saver.every_so_often, args=(stop_saving,), daemon=True)
        saving.start()
        while program.status is None:
            program.pump(0.02 if ending else 1.0)
            self.watch.beat()
            reason = self.watch.reason()
            if reason and ending is None:
                ending = Ending(reason, self.limits, self.watch.reserve())
                self.reason = reason
                if reason == "preempted":
                    self.end_attempt()
            if ending or now() - looked > LOOK_SECONDS:
                self.saver.look()
                looked = now()
            if ending:
                self.escalate(program, ending)
        self.ran = now() - began
        stop_saving.set()
        drain = ending.drain if ending else self.limits["drain"]
        program.drain(0 if self.watch.level > 1 else drain, self.saver.look, self.watch.beat)

    def escalate(self, program: Program, ending: Ending) -> None:
        if self.watch.level > 1:
            ending.at_once()
        signum = ending.due()
        if signum:
            program.signal(signum)

    def save(self) -> None:
        """The last save, tried again while there is time and hope. `saved` says what went wrong."""
        if self.program is None or self.program.status is None or self.watch.level > 1:
            return
        self.watch.phase("save")
        killed = self.program.status < 0
        exact = self.reason == "exited" and not killed
        deadline = now() + min(self.limits["save"], max(self.watch.left() - 5, 5))
        tries = 0
        while True:
            thread = Try(self.saver, exact=exact, killed=killed)
            thread.start()
            with suppress(Ended):
                self.watch.during(thread, "save", until=("preempted", "guard-lost", "stopped", "client-lost", self.order["limited_by"]))
            tries += 1
            error = thread.error or (BucketError("it took too long") if thread.is_alive() else None)
            if error is None:
                self.uncopied = self.saver.copy_under_own_names()
                return
            if now() > deadline or tries > 2 and getattr(error, "permanent", False):
                self.saved = str(error)
                return
            time.sleep(min(0.2 * tries, 5))

    uncopied = 0

    def end_attempt(self) -> None:
        """Said first on a spot notice: whatever happens next, the client knows that the run may go on."""
        end = {"reason": self.reason, "time": timestamp(time.time())}
        with suppress(BucketError):
            self.bucket.create(self.watch.attempt + "/end.json", canonical(end))

    def write_receipt(self) -> None:
        status, signame = exit_of(self.program.status if self.program else None)
        receipt = {
            "run": self.watch.prefix.rpartition("/")[2],
            "attempt": self.number,
            "reason": self.reason,
            "status": status,
            "signal": signame,
            "by": self.watch.by,
            "message": self.message,
            "save": self.saved,
            "started": timestamp(self.started),
            "ended": timestamp(time.time()),
            "seconds": round(self.ran, 3),
            "chunks": self.log.sent,
            "files": self.saver.count,
            "uncopied": self.uncopied,
        }
        deadline, pause = now() + min(self.limits["save"], max(self.watch.left(), 5)), 0.1
        while True:
            try:
                self.bucket.create(self.watch.prefix + "/receipt.json", canonical(receipt))
                return
            except BucketError:
                if now() > deadline:
                    raise
            self.watch.beat()
            time.sleep(pause)
            pause = min(2 * pause, 5.0)


class Try(threading.Thread):
    """One try of the last save."""

    def __init__(self, saver: Saver, *, exact: bool, killed: bool) -> None:
        super().__init__(daemon=True)
        self.saver, self.exact, self.killed = saver, exact, killed
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.saver.save(last=True, exact=self.exact, killed=self.killed)
        except (BucketError, OSError) as error:
            self.error = error
