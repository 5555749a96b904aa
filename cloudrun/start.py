"""From a project to a stored order: scan, send, write. Nothing here costs money."""

from __future__ import annotations

import hashlib
import io
import os
import py_compile
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import MAGIC_NUMBER, cache_from_source

from cloudrun.bill import forget
from cloudrun.config import Settings
from cloudrun.errors import BucketError, UsageError
from cloudrun.formats import canonical, timestamp
from cloudrun.index import Index, index_path
from cloudrun.order import Order, deadline, new_run_id, run_prefix
from cloudrun.project import DATA, Scan, returned, scan, summary
from cloudrun.report import Report, human_bytes
from cloudrun.send import Plan, Sent, plan, send
from cloudrun.storage import Bucket

AGENT_MODULES = ("errors", "formats", "processes", "storage/__init__", "storage/folder")
UNCHECKED = (1).to_bytes(4, "little") + bytes(8)  # the flags of a .pyc and the hash that nobody compares
AGENT_MAIN = "from cloudrun.agent.main import main\n\nmain()\n"


@dataclass(frozen=True)
class Wanted:
    """What the user asked for on the command line. `argv` starts with the script's path in the project."""

    argv: list[str]
    env: dict[str, str]
    outputs: tuple[str, ...] = ()
    if_client_lost: str = "finish"


@dataclass(frozen=True)
class Prepared:
    """A project looked at, and nothing done yet."""

    scanned: Scan
    index: Index
    plan: Plan


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
) -> Order:
    """Send what is missing and write the order: from here on the run exists. Undone if it fails half-way."""
    bucket, report = client
    check_price(settings, price)
    report.stage("send")
    sent = _send(prepared, settings, bucket, report)
    agent = agent_of(bucket, settings.project)
    report.stage("order")
    run = new_run_id(settings.project, time.time())
    prefix = run_prefix(settings.project, run)
    try:
        bucket.create(f"open/{run}", canonical({"run": run, "project": settings.project}))
        digest = hashlib.sha256()
        bucket.create(prefix + "/manifest.jsonl", _hashed(sent, digest))
        if wanted.env:
            bucket.create(prefix + "/env.json", canonical(wanted.env))
        order = make_order(run, settings, wanted, price, sent, digest.hexdigest(), agent)
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
    sent: Sent | Plan,
    manifest: str,
    agent: str,
) -> Order:
    created = time.time()
    late = settings.limits["provider"]
    until, seconds, limited_by = deadline(settings.max_hours, settings.max_cost, price, created, late)
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
        manifest={"sha256": manifest, "files": sent.files, "bytes": sent.size},
        agent=[f"{settings.project}/blobs/{agent}", agent],
        limits=settings.limits,
    )


def agent_of(bucket: Bucket, project: str) -> str:
    """Store the agent, if it is not there yet, and return its sha256."""
    data = agent_archive()
    sha256 = hashlib.sha256(data).hexdigest()
    if bucket.size(f"{project}/blobs/{sha256}") is None:
        bucket.put_blob(f"{project}/blobs/", [data])
    return sha256


def agent_archive() -> bytes:
    """The agent as a zipapp: the same bytes for the same sources and the same Python."""
    package = os.path.dirname(os.path.abspath(__file__))
    agent = sorted(name[:-3] for name in os.listdir(os.path.join(package, "agent")) if name.endswith(".py"))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("__main__.py"), AGENT_MAIN)
        archive.writestr(zipfile.ZipInfo("cloudrun/__init__.py"), "")
        for module in (*AGENT_MODULES, *(f"agent/{name}" for name in agent)):
            path = os.path.join(package, module + ".py")
            with open(path, "rb") as file:
                archive.writestr(zipfile.ZipInfo(f"cloudrun/{module}.py"), file.read())
            compiled = _compiled(path)
            if compiled:
                archive.writestr(zipfile.ZipInfo(f"cloudrun/{module}.pyc"), compiled)
    return buffer.getvalue()


def _compiled(path: str) -> bytes:
    """Bytecode for a machine with this Python (another one ignores it), which starts 20 ms sooner.

    Taken from the cache that every import uses, because only a stored file always has the same bytes;
    marked as needing no check against the source's time, which a zip file does not keep.
    """
    status = os.stat(path)
    of_source = (int(status.st_mtime) & 0xFFFFFFFF).to_bytes(4, "little")
    of_source += (status.st_size & 0xFFFFFFFF).to_bytes(4, "little")
    try:
        cached = cache_from_source(path)
        for tried in (False, True):
            if tried:
                py_compile.compile(path)
            with suppress(FileNotFoundError), open(cached, "rb") as file:
                compiled = file.read()
                if compiled[:16] == MAGIC_NUMBER + bytes(4) + of_source:
                    return MAGIC_NUMBER + UNCHECKED + compiled[16:]
    except (OSError, NotImplementedError):  # an installation that cannot be written, or keeps no cache
        pass
    return b""


def _send(prepared: Prepared, settings: Settings, bucket: Bucket, report: Report) -> Sent:
    done = [0, 0]

    def progress(files: int, size: int) -> None:
        done[0] += files
        done[1] += size
        report.progress("sending", done[0], prepared.plan.new_files, done[1], prepared.plan.new_size)

    return send(prepared.plan, prepared.index, bucket, settings.project, progress)


def _hashed(sent: Sent, digest: hashlib._Hash) -> Iterator[bytes]:
    for piece in sent.manifest():
        digest.update(piece)
        yield piece
