"""The commands for runs that outlive their client: ps, logs, wait, stop, pull."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator

from cloudrun import pull as pulling
from cloudrun.bill import close
from cloudrun.closing import age, last_line, say_pulled
from cloudrun.config import Settings
from cloudrun.errors import BucketError
from cloudrun.follow import NOW, Seen, request_end
from cloudrun.formats import seconds_of
from cloudrun.order import Order
from cloudrun.output import Output, OutputClosed
from cloudrun.pull import Pulled
from cloudrun.receipt import read_receipt
from cloudrun.run import Client, end_of, see_through
from cloudrun.runs import find_run, last_attempt, load, open_runs, read_bill, record
from cloudrun.sweep import sweep

COLUMNS = "{:<44} {:<9} {:<8} {:>14} {:>12}"


def which(client: Client, settings: Settings, text: str | None) -> Order:
    """The run that is meant. Every command first sweeps up after lost clients."""
    sweep(client.backend, client.bucket, client.report)
    return find_run(client.bucket, settings.project, text, [os.uname().nodename, os.getcwd()])


def ps(client: Client, *, as_json: bool) -> Iterator[str]:
    """A line per open run, oldest first; with `as_json` one JSON array."""
    sweep(client.backend, client.bucket, client.report)
    records = []
    for project, run in open_runs(client.bucket):
        try:
            records.append(record(client.bucket, load(client.bucket, project, run)))
        except BucketError as error:
            client.report.detail(f"{run}: {error}")
    if as_json:
        yield json.dumps(records, indent=1)
    elif records:
        yield COLUMNS.format("RUN", "STATE", "BACKEND", "AGE", "USD/H")
        for item in sorted(records, key=lambda item: str(item["started"])):
            price = "unknown" if item["price_usd_per_hour"] is None else f"{item['price_usd_per_hour']:.2f}"
            yield COLUMNS.format(
                item["run"], item["state"], item["backend"], age(seconds_of(item["started"])), price
            )


def record_line(client: Client, order: Order) -> str:
    return json.dumps(record(client.bucket, order), indent=1)


def logs(client: Client, order: Order, *, follow: bool) -> int:
    """Print every attempt's output from the beginning."""
    attempt = 1
    output = _output(client, order, attempt)
    while True:
        try:
            while output.step():
                pass
        except OutputClosed:
            return 0
        newest = last_attempt(client.bucket, order)
        if attempt < newest:
            attempt += 1
            output = _output(client, order, attempt)
        elif not follow or read_bill(client.bucket, order) or _all_printed(client, order, output):
            return 0
        else:
            time.sleep(client.bucket.pace)


def _output(client: Client, order: Order, attempt: int) -> Output:
    return Output(client.bucket, f"{order.prefix}/attempts/{attempt}/log", client.report, lambda: None)


def _all_printed(client: Client, order: Order, output: Output) -> bool:
    receipt = read_receipt(client.bucket, order.prefix)
    if receipt:
        return output.printed >= int(receipt["chunks"])
    instances = {instance.run for instance in client.backend.all()}
    return order.run not in instances and last_attempt(client.bucket, order) > 0 and not output.step()


def wait(client: Client, order: Order) -> int:
    """Until the run has ended and its bill is closed; the output is not printed."""
    outcome = see_through(client, order)
    client.report.say(last_line(client.bucket, order, outcome, Pulled()))
    return outcome.exit_code


def stop(client: Client, order: Order, *, now: bool) -> int:
    """End a run and see its machine ended. Raises StillRunning."""
    if read_bill(client.bucket, order):
        client.report.say(f"{order.run} has ended already")
        return 0
    request_end(client.bucket, order.prefix, NOW if now else 1, "stop")
    attempt = last_attempt(client.bucket, order)
    if now and attempt:
        outcome, ended = end_of(client, order, attempt, 0, Seen("now", by="SIGINT"))
        close(client.bucket, order, [ended], outcome.reason, outcome.exit_code)
    else:
        outcome = see_through(client, order)
    client.report.say(last_line(client.bucket, order, outcome, Pulled()))
    return 0


def pull(client: Client, order: Order) -> int:
    pulled = pulling.pull(client.bucket, order, os.curdir, client.report)
    say_pulled(client, order, pulled)
    if not read_receipt(client.bucket, order.prefix) and not read_bill(client.bucket, order):
        client.report.say("the run goes on; this is its last complete save")
    client.report.say(
        f"{len(pulled.fetched) + len(pulled.beside)} outputs fetched, {pulled.unchanged} were here already"
    )
    return 0
