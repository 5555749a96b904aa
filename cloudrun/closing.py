"""The last words to the user: what came home, how it went, what it cost; and what a run would do."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from typing import Any

from cloudrun.config import Settings
from cloudrun.errors import UNKNOWN, BucketError, CloudrunError, Interrupted, UsageError
from cloudrun.formats import shown
from cloudrun.order import Order, time_of
from cloudrun.pull import Pulled, pull
from cloudrun.receipt import Outcome
from cloudrun.report import human_bytes, human_money, human_seconds
from cloudrun.run import Client, check_time, dearest, find_offers, most_once
from cloudrun.runs import read_bill, record
from cloudrun.start import Wanted, amount, check_price, make_order, prepare
from cloudrun.storage import Bucket


def bring_home(client: Client, order: Order, outcome: Outcome) -> tuple[int, Pulled]:
    """Pull the outputs and print the one line that sums the run up. Returns cloudrun's exit code."""
    report, code, pulled, trouble = client.report, outcome.exit_code, Pulled(), ""
    try:
        report.stage("pull")
        pulled = pull(client.bucket, order, os.curdir, report, client.bounds)
    except (CloudrunError, Interrupted) as error:
        trouble, code = str(error), code or (UNKNOWN if isinstance(error, CloudrunError) else error.exit_code)
    say_pulled(client, order, pulled)
    say = report.say if outcome.reason == "exited" and code == outcome.exit_code else report.warn
    say(last_line(client.bucket, order, outcome, counted(pulled)))
    if trouble:
        report.error(f"{trouble}\nwhat was saved is in the bucket: cloudrun pull {order.run}")
    return code, pulled


def say_pulled(client: Client, order: Order, pulled: Pulled) -> None:
    for path in pulled.beside:
        client.report.warn(f"stored as {shown(path)}: the file here is not what this run sent")


def counted(pulled: Pulled) -> str:
    count = len(pulled.fetched) + len(pulled.beside)
    size = f" ({human_bytes(pulled.bytes)})" if pulled.bytes else ""
    return f"{count} output{'s' * (count != 1)} fetched{size}"


def last_line(bucket: Bucket, order: Order, outcome: Outcome, *fetched: str) -> str:
    """How it ended, how long that took, what it costs, and how that is known."""
    try:
        bill = read_bill(bucket, order) or {}
    except BucketError:
        bill = {}
    ran = "run time unknown" if outcome.seconds is None else f"ran {human_seconds(outcome.seconds)}"
    seconds, cost = bill.get("seconds"), bill.get("cost")
    billed = "billed time unknown" if seconds is None else f"billed {human_seconds(seconds)}"
    money = human_money(cost) + (" (local)" if order.backend == "local" and cost == 0 else "")
    if bill.get("gpu") is not None:
        money = split_words(bill)
    seen = bill.get("ended")
    proof = f"seen ended {seen[11:19]} UTC" if seen else bill.get("proof", "its bill is not closed yet")
    more = [bill[name] for name in ("parked", "note") if bill.get(name)]
    return " · ".join([outcome.words, ran, billed, money, *fetched, proof, *more])


def split_words(bill: dict[str, Any]) -> str:
    """What a machine cost whose parts are known, each of them."""
    traffic = "unknown" if bill["traffic"] is None else human_money(bill["traffic"])
    whole = "" if bill["cost"] is None else f"{human_money(bill['cost'])}: "
    parts = f"GPU {human_money(bill['gpu'])}, disk {human_money(bill['disk'])}, traffic {traffic}"
    return whole + parts


def check_json(path: str | None) -> None:
    """Raises UsageError for a --json FILE that cannot be written or is no record: later would be too late."""
    if path is None:
        return
    try:
        with open(path, "r+b") as file:
            if file.seekable() and file.read(1) not in (b"", b"{"):
                raise UsageError(f"--json {path}: that file is there, and is no record of a run")
    except FileNotFoundError:
        if not os.access(os.path.dirname(path) or os.curdir, os.W_OK):
            raise UsageError(f"--json {path}: cannot write there") from None
    except OSError as error:
        raise UsageError(f"--json {path}: cannot write there: {error.strerror}") from None


def write_record(path: str, client: Client, order: Order, pulled: Pulled) -> int:
    """What `--json FILE` gets. Returns an exit code if that failed, else 0."""
    try:
        value = dict(record(client.bucket, order), fetched=pulled.fetched, beside=pulled.beside)
        with open(path, "w", encoding="ascii") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
    except (OSError, BucketError) as error:
        client.report.error(f"cannot write {path}: {error}")
        return UNKNOWN
    return 0


def price_words(order: Order, price: float | None) -> str:
    """What a run can cost, said before it costs anything. `price`: that of the offer that is tried first."""
    ends = f"ends by {order.ends_by[:16].replace('T', ' ')} UTC"
    if order.price is None:
        return f"price unknown, {ends}"
    most = f"at most {human_money(order.worst)}" if order.price else "nothing is billed"
    if order.once:
        most += f", {human_money(order.once)} of it traffic"
    hourly = f"{order.price:g}" if price in (None, order.price) else f"{price:g}, at most {order.price:g}"
    return f"{hourly} USD/h, {ends}, {most}"


def dry_run_lines(client: Client, settings: Settings, wanted: Wanted) -> Iterator[str]:
    """Everything that a run would send, do and spend, a line each."""
    bucket, prepared = client.bucket, prepare(settings, client.bucket)
    offers, work = find_offers(client.backend, prepared.need(settings)), prepared.plan
    price, once = dearest(offers), most_once(offers)
    check_price(settings, price)
    nothing, now = "0" * 64, time_of(bucket)
    order = make_order("dry-run", settings, wanted, price, work, nothing, nothing, created=now, once=once)
    check_time(bucket, order, offers)
    yield f"to {bucket.url}/{settings.project}:"
    for item, line in zip(work.found, work.lines, strict=True):
        mark = "send" if line is None else "have"
        yield f"  {mark} {shown(item.path)} ({human_bytes(item.status.st_size)})"
    for why, paths in prepared.scanned.left_out.items():
        for path in paths:
            yield f"  leave {shown(path)} ({why})"
    yield "  " + amount(work)
    names = ", ".join(sorted(wanted.env)) or "nothing"
    yield f"run: {shlex.join(wanted.argv)}, with {names} from -e"
    yield f"on: {offers[0].what} ({settings.backend}), {price_words(order, offers[0].price)}"
    yield f"bring back: {', '.join(order.outputs)}"
