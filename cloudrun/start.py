"""From a project to a stored order: scan, send, write. Nothing here costs money."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from cloudrun.backends import Need
from cloudrun.bill import forget
from cloudrun.config import Settings
from cloudrun.errors import BucketError, UsageError
from cloudrun.formats import canonical, timestamp
from cloudrun.index import Index, index_path
from cloudrun.order import MOST_SECONDS, Order, deadline, here, new_run_id, run_prefix, time_of
from cloudrun.project import DATA, Scan, returned, scan, summary
from cloudrun.report import Report, human_bytes
from cloudrun.send import Plan, plan, send
from cloudrun.storage import Bucket
from cloudrun.zipapp import agent_archive

RETURNED = ("model/", "checkpoint/")
LEAST_BACK = 10**9  # bytes


class Wanted(NamedTuple):
    """What the user asked for on the command line. `argv` starts with the script's path in the project."""

    argv: list[str]
    env: dict[str, str]
    outputs: tuple[str, ...] = ()
    if_client_lost: str = "finish"


class Prepared(NamedTuple):
    """A project looked at, and nothing done yet."""

    scanned: Scan
    known: Index
    plan: Plan

    def need(self, settings: Settings, hours: float = 1.0) -> Need:
        """For choosing a machine."""
        seconds = settings.max_hours * 3600 if settings.max_hours else MOST_SECONDS
        return Need(self.plan.size, expected_back(self.plan), hours, seconds, settings.max_cost)


def expected_back(work: Plan) -> int:
    """Bytes: as much as lies where outputs do, or LEAST_BACK."""
    back = (item.status.st_size for item in work.found if item.path.startswith(RETURNED))
    return max(sum(back), LEAST_BACK)


def prepare(settings: Settings, bucket: Bucket) -> Prepared:
    scanned = scan(os.curdir)
    index = Index(index_path(bucket.url, settings.project))
    return Prepared(scanned, index, plan(scanned.found, index, bucket, settings.project))


def describe(prepared: Prepared) -> str:
    """The one line about what goes up and what stays here."""
    left_out = summary(prepared.scanned.left_out)
    return f"sending {amount(prepared.plan)}" + (f"; left out: {left_out}" if left_out else "")


def amount(work: Plan) -> str:
    size = f"{human_bytes(work.new_size)} of {human_bytes(work.size)}"
    return f"{work.new_files} of {work.files} files, {size}"


def store(
    prepared: Prepared,
    settings: Settings,
    wanted: Wanted,
    price: float | None,
    client: tuple[Bucket, Report],
    *,
    stranger: bool = False,
    once: float = 0.0,
) -> Order:
    """Send what is missing and write the order: from here on the run exists. Undone if it fails half-way."""
    bucket, report = client
    check_price(settings, price)
    report.stage("send")
    sent = _send(prepared, settings, bucket, report)
    agent = agent_of(bucket, settings.project)
    report.stage("order")
    now = time_of(bucket)
    run = new_run_id(settings.project, now)
    prefix = run_prefix(settings.project, run)
    try:
        bucket.create(f"open/{run}", canonical({"run": run, "project": settings.project}))
        digest = hashlib.sha256()
        bucket.create(prefix + "/manifest.jsonl", _hashed(sent, digest))
        if wanted.env:
            bucket.create(prefix + "/env.json", canonical(wanted.env))
        manifest = digest.hexdigest()
        order = make_order(run, settings, wanted, price, sent, manifest, agent, created=now, once=once)
        order = order._replace(stranger=stranger)
        bucket.create(prefix + "/order.json", order.content())
    except BaseException:
        with suppress(BucketError):  # what went wrong first is what the user should read
            forget(bucket, prefix, run)
        raise
    return order


def check_price(settings: Settings, price: float | None) -> None:
    """Raises UsageError for a cap that nobody could keep."""
    if settings.max_cost and price is None:
        raise UsageError(
            "a cost cap needs a known price: set CLOUDRUN_PRICE (USD per hour), or use --max-hours"
        )


def make_order(
    run: str,
    settings: Settings,
    wanted: Wanted,
    price: float | None,
    sent: Plan,
    manifest: str,
    agent: str,
    *,
    created: float,
    once: float = 0.0,
) -> Order:
    late = settings.limits["provider"]
    limits = settings.max_hours, settings.max_cost
    until, seconds, limited_by = deadline(*limits, price, created, late, once=once)
    outputs = returned(wanted.outputs)
    return Order(
        run=run,
        project=settings.project,
        backend=settings.backend,
        created=timestamp(created),
        deadline=until,
        seconds=seconds,
        limited_by=limited_by,
        price=price,
        argv=wanted.argv,
        outputs=outputs,
        folders=sorted({*DATA, *outputs}),
        env=sorted(wanted.env),
        if_client_lost=wanted.if_client_lost,
        manifest={
            "sha256": manifest,
            "files": sent.files,
            "bytes": sent.size,
            "bytes_back": expected_back(sent),
        },
        agent=[f"{settings.project}/blobs/{agent}", agent],
        limits=settings.limits,
        origin=here(),
        place=settings.place,
        once=once,
    )


def agent_of(bucket: Bucket, project: str) -> str:
    """Store the agent, if it is not there yet, and return its sha256."""
    data = agent_archive()
    sha256 = hashlib.sha256(data).hexdigest()
    if bucket.size(f"{project}/blobs/{sha256}") is None:
        bucket.put_blob(f"{project}/blobs/", [data])
    return sha256


def _send(prepared: Prepared, settings: Settings, bucket: Bucket, report: Report) -> Plan:
    done, lock = [0, 0], threading.Lock()

    def progress(files: int, size: int) -> None:
        with lock:  # several threads are sending
            done[0] += files
            done[1] += size
            report.progress("sending", done[0], prepared.plan.new_files, done[1], prepared.plan.new_size)

    return send(prepared.plan, prepared.known, bucket, settings.project, progress)


def _hashed(sent: Plan, digest: hashlib._Hash) -> Iterator[bytes]:
    for piece in sent.manifest():
        digest.update(piece)
        yield piece
