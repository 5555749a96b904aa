"""The last words to the user: what came home, how it went, what it cost; and what a run would do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

from cloudrun.backends import Offer
from cloudrun.config import Settings
from cloudrun.errors import FAILED, CloudrunError
from cloudrun.formats import shown
from cloudrun.order import Order
from cloudrun.pull import Pulled, pull
from cloudrun.receipt import Outcome
from cloudrun.report import human_bytes, human_money, human_seconds
from cloudrun.run import Client, check_time
from cloudrun.runs import read_bill, record
from cloudrun.start import Wanted, amount, make_order, prepare
from cloudrun.storage import Bucket


def bring_home(client: Client, order: Order, outcome: Outcome) -> tuple[int, Pulled]:
    """Pull the outputs and print the one line that sums the run up. Returns cloudrun's exit code."""
    client.report.stage("pull")
    pulled, trouble = Pulled(), ""
    try:
        pulled = pull(client.bucket, order, os.curdir, client.report)
    except CloudrunError as error:
        trouble = str(error)
    say_pulled(client, order, pulled)
    client.report.say(last_line(client.bucket, order, outcome, pulled))
    if trouble:
        client.report.error(f"{trouble}\nthe outputs are safe in the bucket: cloudrun pull {order.run}")
        return outcome.exit_code or FAILED, pulled
    return outcome.exit_code, pulled


def say_pulled(client: Client, order: Order, pulled: Pulled) -> None:
    for path in pulled.beside:
        client.report.warn(f"stored as {shown(path)}: the file here is not what this run sent")


def last_line(bucket: Bucket, order: Order, outcome: Outcome, pulled: Pulled) -> str:
    bill = read_bill(bucket, order) or {"seconds": None, "cost": None, "proof": "no bill"}
    ran = "run time unknown" if outcome.seconds is None else f"ran {human_seconds(outcome.seconds)}"
    billed = "billed time unknown" if bill["seconds"] is None else f"billed {human_seconds(bill['seconds'])}"
    money = human_money(bill["cost"])
    if order.backend == "local" and bill["cost"] == 0:
        money += " (local)"
    count = len(pulled.fetched) + len(pulled.beside)
    fetched = f"{count} outputs fetched" + (f" ({human_bytes(pulled.bytes)})" if pulled.bytes else "")
    return f"{outcome.words} · {ran} · {billed} · {money} · {fetched} · ended: {bill['proof']}"


def write_record(path: str, bucket: Bucket, order: Order, pulled: Pulled) -> None:
    """What `--json FILE` gets. Raises CloudrunError."""
    value: dict[str, Any] = dict(record(bucket, order), fetched=pulled.fetched, beside=pulled.beside)
    try:
        with open(path, "w", encoding="ascii") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
    except OSError as error:
        raise CloudrunError(f"cannot write {path}: {error.strerror}") from None


def dry_run_lines(settings: Settings, wanted: Wanted, bucket: Bucket, offer: Offer) -> Iterator[str]:
    """Everything that a run would send, do and spend, a line each."""
    prepared = prepare(settings, bucket)
    work = prepared.plan
    order = make_order("dry-run", settings, wanted, offer.price, work, "0" * 64, "0" * 64)
    check_time(order, offer)
    yield f"to {bucket.url}/{settings.project}:"
    for item, line in zip(work.found, work.lines, strict=True):
        mark = "send" if line is None else "have"
        yield f"  {mark} {shown(item.path)} ({human_bytes(item.status.st_size)})"
    for why, paths in prepared.scanned.left_out.items():
        for path in paths:
            yield f"  leave {shown(path)} ({why})"
    yield "  " + amount(work)
    names = ", ".join(sorted(wanted.env)) or "nothing"
    yield f"run: {' '.join(wanted.argv)}, with {names} from -e"
    yield f"on: {offer.what} ({settings.backend}), ended at {order.deadline} at the latest"
    price = "price unknown" if offer.price is None else f"{offer.price:g} USD/h"
    worst = None if offer.price is None else (order.seconds + order.limits["provider"]) * offer.price / 3600
    yield f"spend: {price}, at most {human_money(worst)}"
    yield f"bring back: {', '.join(order.outputs)}"


def age(seconds_ago: float) -> str:
    return human_seconds(max(time.time() - seconds_ago, 0))
