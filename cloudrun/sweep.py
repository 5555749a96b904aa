"""What any command does for runs that lost their client: end what is overdue, close what is over."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from cloudrun.backends import Backend, Instance, Survey
from cloudrun.background import side_by_side
from cloudrun.bill import Ended, Patience, close, ends_of, forget, see_ended
from cloudrun.config import Bounds
from cloudrun.errors import BucketError, CloudrunError, Corrupt, StillRunning
from cloudrun.follow import Seen, conclude, how_of
from cloudrun.formats import canonical, has_begun, parse, seconds_of, timestamp
from cloudrun.handover import take_back
from cloudrun.late import collect, may_go_on
from cloudrun.limits import DEFAULTS
from cloudrun.order import Order, run_prefix, time_of
from cloudrun.receipt import Outcome, read_receipt
from cloudrun.report import Report
from cloudrun.runs import attempt_object, last_attempt, load, open_runs, read_bill
from cloudrun.storage import Bucket

if TYPE_CHECKING:
    from cloudrun.run import Client

STRANGE_SECONDS = 3600.0  # past its deadline: a machine of which only this computer's clock says so
QUIET_SECONDS = 600.0  # a run without a machine may belong to a client that is just sending or creating


def sweep_up(client: Client, look: Callable[[], Survey] | None = None, *, dry_run: bool = False) -> int:
    """Every command first ends and closes what lost clients left. Returns an exit code, having said why.

    `look`: what there is, else machines are looked for.
    """
    try:
        found = look() if look else Survey(client.backend.all(), [])
        if found.unseen:
            client.report.warn(found.unseen)
        sweep(client.backend, client.bucket, client.report, client.bounds, found, dry_run=dry_run)
    except CloudrunError as error:
        client.report.error(str(error))
        return error.exit_code
    return 0


def sweep(
    backend: Backend, bucket: Bucket, report: Report, bounds: Bounds, found: Survey, *, dry_run: bool = False
) -> None:
    """End machines that nobody will end, then close the bills of runs whose machines are gone.

    And delete disks that machines left. What goes wrong with one of them keeps nobody from the next one.
    Raises StillRunning at the end, for what could not be ended. `dry_run`: say what there is to do, and do
    nothing.
    """
    things = [each for each in found.ours if each.billed]  # what is parked has been seen to the end
    runs: dict[str, str] = {}
    try:
        runs = {run: project for project, run in open_runs(bucket)}
    except CloudrunError as error:  # what is overdue has to end even if the bucket is out of reach
        report.warn(str(error))

    def visit(run: str) -> str:
        order = _Visit(backend, bucket, report, run, bounds, dry_run=dry_run)
        machines, disks = ([each for each in some if each.run == run] for some in (things, found.disks))
        return order.visit(runs.get(run), machines, disks)

    names = {each.run for each in (*things, *found.disks)}
    still = side_by_side(visit, sorted({*runs, *names}), 2 * bucket.workers)
    if not dry_run:
        bucket.tidy()
    if any(still):
        raise StillRunning("\n".join(filter(None, still)))


def overdue(
    instance: Instance, limits: dict[str, float], receipt: dict[str, Any] | None, now: float
) -> tuple[str, str]:
    """(as in Seen.how, why) of a machine that has to be ended by whoever sees it; empty if it need not be."""
    if not instance.alive:
        return "gone", f"because {instance.lost}" if instance.lost else "whose guard and agent are gone"
    with suppress(Corrupt):
        if receipt and now - seconds_of(receipt["ended"]) > 2 * limits["self_end"]:
            return "finished", "which had finished, and did not end itself"
    with suppress(Corrupt):  # whatever a receipt says
        late = now - seconds_of(instance.deadline)
        if late > limits["provider"]:
            return "overdue", f"{late / 60:.0f} min past its deadline"
    return "", ""


class _Visit:
    """One run, looked after."""

    def __init__(
        self, backend: Backend, bucket: Bucket, report: Report, run: str, bounds: Bounds, *, dry_run: bool
    ) -> None:
        self.backend, self.bucket, self.report, self.run = backend, bucket, report, run
        self.bounds, self.dry_run = bounds, dry_run
        self.now = time_of(bucket)
        self.ended: dict[str, Ended] = {}
        self.console, self.how = "", "gone"
        self.goes_on = False

    def visit(self, project: str | None, machines: list[Instance], disks: list[Instance]) -> str:
        """What could not be ended, in words."""
        try:
            self.pay(project, machines)
            for disk in disks:
                self.free(disk)
        except StillRunning as error:
            return str(error)
        except Exception as error:  # an order of another version, say: it must not hide the next machine
            self.report.warn(f"{self.run}: {error}")
        return ""

    def pay(self, project: str | None, machines: list[Instance]) -> None:
        """Raises CloudrunError, StillRunning among them."""
        prefix = run_prefix(project or "", self.run)
        order, receipt = None, None
        with suppress(BucketError):  # whatever the bucket says, a machine may have to be ended
            order = load(self.bucket, project, self.run) if project else None
            if order and not self.dry_run:
                collect(self.bucket, order, self.report.warn, self.bounds)
            receipt = read_receipt(self.bucket, prefix) if order else None
        limits = {**DEFAULTS, **order.limits} if order else {**DEFAULTS, "provider": STRANGE_SECONDS}
        for instance in machines:
            how, why = overdue(instance, limits, receipt, self.now)
            if how and not self._is_by_hand(instance):
                self._end(instance, how, why, limits["stop"])
                if instance.lost and order and not self.dry_run:
                    self._note_lost(order, instance)
        if len(self.ended) < len(machines) or not project:
            return
        if order is None:
            if self.now - _named(self.run) > QUIET_SECONDS and not self._only_say("forget"):
                forget(self.bucket, prefix, self.run)  # its client went before all was sent
        elif order.backend == self.backend.name and order.place in ("", self.backend.place):
            self._close(order, receipt)

    def free(self, disk: Instance) -> None:
        """Delete what a machine of a run has left; a disk that was to be kept is a person's to delete.

        Raises CloudrunError, StillRunning among them.
        """
        bill = run_prefix(self.run.rsplit("-", 3)[0], self.run) + "/bill.json"
        if not disk.leftover:
            self.report.warn(f"{disk.parked}; if nobody needs it: {self.backend.by_hand(disk.name)}")
        elif self.now - seconds_of(disk.deadline) > STRANGE_SECONDS or self.bucket.size(bill) is not None:
            self._end(disk, "gone", f"which has left {disk.parked}", DEFAULTS["stop"])

    def _only_say(self, what: str) -> bool:
        if self.dry_run:
            self.report.say(f"would {what} {self.run}")
        return self.dry_run

    def _end(self, instance: Instance, how: str, why: str, limit: float) -> None:
        name = instance.name
        if self.dry_run:
            self.report.say(f"would end {name}, {why}")
            return
        self.how = how
        with suppress(CloudrunError):
            self.console = self.backend.console(name)
        clock, patience = partial(time_of, self.bucket), Patience(0, limit)
        self.ended[name] = see_ended(self.backend, name, patience, layer="sweep", clock=clock, known=instance)
        self.report.warn(f"ended {name}, {why} ({self.ended[name].proof})")

    def _is_by_hand(self, instance: Instance) -> bool:
        """Whether a person started a machine that is kept, for something else than its last run."""
        if not instance.kept:
            return False
        bill = run_prefix(self.run.rsplit("-", 3)[0], self.run) + "/bill.json"
        with suppress(BucketError):
            ended = parse(self.bucket.get(bill)[0], bill, ended=str)["ended"]
            return instance.started > seconds_of(ended)
        return instance.started > seconds_of(instance.deadline)

    def _close(self, order: Order, receipt: dict[str, Any] | None) -> None:
        """The bill of a run without a machine, unless there may still be a client."""
        if read_bill(self.bucket, order):
            if not self._only_say("forget"):
                take_back(self.bucket, order)
                forget(self.bucket, order.prefix, order.run)
            return
        attempt = last_attempt(self.bucket, order)
        objects = (attempt_object(self.bucket, order, attempt, what) for what in ("claim", "state", "end"))
        silent = self.now - max(_named(order.run), *(self._time_in(found or {}) for found in objects))
        if not (receipt or (self.ended and not self.goes_on) or silent > QUIET_SECONDS):
            return
        outcome = self._outcome(order, attempt)
        if outcome.reason == "preempted" and silent <= QUIET_SECONDS:
            return  # its client may be about to go on with it
        if not self._only_say("close the bill of"):
            grace = {**DEFAULTS, **order.limits}["self_end"]
            ends = ends_of(self.backend, self.bucket, order, self.ended.values(), grace=grace)
            close(self.bucket, order, ends, outcome.reason, outcome.exit_code)

    def _note_lost(self, order: Order, instance: Instance) -> None:
        """The run may go on elsewhere, if its client is still there or anybody comes for it."""
        self.goes_on, self.how = True, "preempted"
        end = f"{order.prefix}/attempts/{instance.attempt}/end.json"
        with suppress(BucketError):  # the machine has said why it ended, or nobody will know
            self.bucket.create(end, canonical({"reason": "preempted", "time": timestamp(self.now)}))

    def _time_in(self, found: dict[str, Any]) -> float:
        """0 for a time that is none, or has not come: a machine may have written it."""
        with suppress(Corrupt):
            when = seconds_of(found.get("time", ""))
            return when if when < self.now + QUIET_SECONDS else 0.0
        return 0.0

    def _outcome(self, order: Order, attempt: int) -> Outcome:
        state = attempt_object(self.bucket, order, attempt, "state") or {}
        end = attempt_object(self.bucket, order, attempt, "end")
        began, name = has_begun(state), f"{order.run}-{attempt}"
        how = how_of(end) if end else self.how
        with suppress(CloudrunError):  # Compute Engine shows no console of a machine that is parked
            self.console = self.console or self.backend.console(name)
        with suppress(CloudrunError):
            alone = may_go_on(self.bucket, order, state)
            if how == "gone" and attempt and (alone or self.backend.taken_away(name)):
                how = "preempted"
        return conclude(self.bucket, order, Seen(how, console=self.console, began=began))


def _named(run: str) -> float:
    """When the run got its name. Raises Corrupt."""
    day, clock = ["", "", *run.split("-")][-3:-1]
    return seconds_of(f"{day[:4]}-{day[4:6]}-{day[6:]}T{clock[:2]}:{clock[2:4]}:{clock[4:]}.000Z")
