"""What any command does for runs that lost their client: end what is overdue, close what is over."""

from __future__ import annotations

import time
from contextlib import suppress

from cloudrun.backends import Backend, Instance
from cloudrun.bill import Ended, close, forget, see_ended
from cloudrun.errors import UNKNOWN, BucketError, Corrupt, Missing
from cloudrun.formats import seconds_of
from cloudrun.limits import DEFAULTS
from cloudrun.order import Order, run_prefix
from cloudrun.receipt import outcome_of, read_receipt
from cloudrun.report import Report
from cloudrun.runs import attempt_object, last_attempt, load, open_runs
from cloudrun.storage import Bucket

QUIET_SECONDS = 600.0  # a run without a machine may belong to a client that is just sending or creating


def sweep(backend: Backend, bucket: Bucket, report: Report) -> None:
    """End machines that nobody will end, then close the bills of runs whose machines are gone."""
    instances = {instance.name: instance for instance in backend.all()}
    for instance in instances.values():
        why = overdue(instance)
        if why:
            ended = see_ended(backend, instance.name, grace=0, limit=DEFAULTS["stop"], layer="sweep")
            report.warn(f"ended {instance.name}, {why} ({ended.proof})")
    running = {instance.run for instance in instances.values()}
    for project, run in open_runs(bucket):
        if run not in running:
            with suppress(BucketError):  # a damaged run must not keep anybody from the next one
                _close_if_over(backend, bucket, project, run)
    bucket.tidy()


def overdue(instance: Instance) -> str:
    """Why a machine has to be ended by whoever sees it; empty if it need not be."""
    if not instance.alive:
        return "whose guard and agent are gone"
    with suppress(Corrupt):
        late = time.time() - seconds_of(instance.deadline)
        if late > DEFAULTS["provider"]:
            return f"{late / 60:.0f} min past its deadline"
    return ""


def _close_if_over(backend: Backend, bucket: Bucket, project: str, run: str) -> None:
    prefix = run_prefix(project, run)
    try:
        order = load(bucket, project, run)
    except Missing:
        if _age(run) > QUIET_SECONDS:  # its client went before it had sent everything
            forget(bucket, prefix, run)
        return
    attempt = last_attempt(bucket, order)
    receipt = read_receipt(bucket, prefix)
    if not receipt and _age(run) < QUIET_SECONDS:
        return
    if bucket.size(prefix + "/bill.json") is not None:
        forget(bucket, prefix, run)
    elif receipt:
        outcome = outcome_of(receipt)
        close(bucket, order, _ends(backend, bucket, order, attempt), outcome.reason, outcome.exit_code)
    elif not _client_may_live(bucket, order, attempt):
        end = attempt_object(bucket, order, attempt, "end")
        reason = "preempted" if end else "lost" if attempt else "never started"
        close(bucket, order, _ends(backend, bucket, order, attempt), reason, UNKNOWN)


def _ends(backend: Backend, bucket: Bucket, order: Order, attempts: int) -> list[Ended]:
    """The machines of a run that are gone already, as the provider and the bucket remember them."""
    ends = []
    for attempt in range(1, attempts + 1):
        claim = attempt_object(bucket, order, attempt, "claim") or {}
        name = f"{order.run}-{attempt}"
        ended = see_ended(backend, name, grace=DEFAULTS["self_end"], limit=DEFAULTS["stop"], layer="sweep")
        started = seconds_of(claim["time"]) if "time" in claim else None
        ends.append(Ended(name, started, ended.ended, ended.layer, ended.proof))
    return ends


def _client_may_live(bucket: Bucket, order: Order, attempt: int) -> bool:
    """Without a machine and a receipt a run may still be between two attempts; its deadline decides."""
    return attempt > 0 and order.left() > 0 and _age(order.run) < QUIET_SECONDS


def _age(run: str) -> float:
    """Seconds since the run was named."""
    _, day, clock, _ = run.rsplit("-", 3)
    return time.time() - seconds_of(
        f"{day[:4]}-{day[4:6]}-{day[6:]}T{clock[:2]}:{clock[2:4]}:{clock[4:]}.000Z"
    )
