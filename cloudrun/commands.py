"""The commands for runs that outlive their client: ps, logs, wait, stop, pull."""

from __future__ import annotations

import itertools
import json
import os
import time

from cloudrun import follow as following
from cloudrun import pull as pulling
from cloudrun.bill import close, end_of
from cloudrun.closing import counted, last_line, say_pulled
from cloudrun.config import Settings
from cloudrun.errors import BucketError, CloudrunError, UsageError
from cloudrun.follow import NOW, request_end
from cloudrun.formats import seconds_of
from cloudrun.late import collect, goes_alone
from cloudrun.order import Order, here
from cloudrun.output import Output
from cloudrun.receipt import Outcome, user_code
from cloudrun.report import human_seconds
from cloudrun.run import Client, see_through
from cloudrun.runs import find_run, last_attempt, load, open_runs, read_bill, record
from cloudrun.sweep import sweep

COLUMNS = "{:<44} {:<9} {:<8} {:>14} {:>12}"


def sweep_up(client: Client) -> int:
    """Every command first ends and closes what lost clients left. Returns an exit code, having said why."""
    try:
        sweep(client.backend, client.bucket, client.report, client.bounds)
    except CloudrunError as error:
        client.report.error(str(error))
        return error.exit_code
    return 0


def which(client: Client, settings: Settings, text: str | None, *, act: bool = False) -> Order:
    """The run that is meant. Raises UsageError; `act`: also if its machine cannot be seen from here."""
    sweep_up(client)
    order = find_run(client.bucket, settings.project, text, here())
    if act and order.place not in ("", settings.place) and not read_bill(client.bucket, order):
        raise UsageError(
            f"the machine of {order.run} is in {order.place} and cannot be seen from here, {settings.place}: "
            f"do that on the computer {order.origin[0]}, with the settings that the run was started with"
        )
    collect(client.bucket, order, client.report.warn, client.bounds)
    return order


def ps(client: Client, settings: Settings, *, as_json: bool) -> int:
    """A line per open run, oldest first; with `as_json` one JSON array."""
    code = sweep_up(client)
    records = []
    for project, run in open_runs(client.bucket):
        try:
            records.append(record(client.bucket, load(client.bucket, project, run)))
        except BucketError as error:
            client.report.warn(f"{run}: {error}")
    records.sort(key=lambda item: str(item["started"]))
    if as_json:
        print(json.dumps(records, indent=1))
    elif records:
        print(COLUMNS.format("RUN", "STATE", "BACKEND", "AGE", "USD/H"))
    for item in () if as_json else records:
        price = item["price_usd_per_hour"]
        words = "unknown" if price is None else f"{price:.2f}"
        age = human_seconds(max(time.time() - seconds_of(item["started"]), 0))
        print(COLUMNS.format(item["run"], str(item["state"]), item["backend"], age, words))
    return code


def logs(client: Client, settings: Settings, run: str | None, *, follow: bool) -> int:
    """Print every attempt's output from the beginning."""
    order = which(client, settings, run)
    for attempt in itertools.count(1):
        patience = 0.0
        if follow:
            seen = following.follow(client, order, attempt, mine=False)
            patience = order.limits["self_end"] if seen.how == "preempted" else 0.0
        else:
            prefix = f"{order.prefix}/attempts/{attempt}/log"
            output = Output(client.bucket, prefix, client.report, lambda: False)
            while not output.closed and output.step(hurry=True):
                pass
        if not _has_next(client, order, attempt, patience):
            return 0
    raise AssertionError


def _has_next(client: Client, order: Order, attempt: int, patience: float) -> bool:
    """Whether there is an attempt after this one, or comes one within so many seconds."""
    deadline = time.monotonic() + patience
    while last_attempt(client.bucket, order) <= attempt:
        if time.monotonic() >= deadline or read_bill(client.bucket, order):
            return False
        time.sleep(client.bucket.pace)
    return True


def wait(client: Client, settings: Settings, run: str | None, *, as_json: bool) -> int:
    """Until the run has ended and its bill is closed; the output is not printed."""
    order = which(client, settings, run, act=True)
    outcome = see_through(client, order)
    if as_json:
        print(json.dumps(record(client.bucket, order), indent=1))
    client.report.say(last_line(client.bucket, order, outcome))
    return outcome.exit_code


def stop(client: Client, settings: Settings, run: str | None, *, now: bool) -> int:
    """End a run and see its machine ended. Raises StillRunning."""
    order = which(client, settings, run, act=True)
    if read_bill(client.bucket, order):
        client.report.say(f"{order.run} has ended already")
        return 0
    if not now and goes_alone(client.bucket, order):
        client.report.say(following.ALONE)
        now = True
    request_end(client.bucket, order.prefix, NOW if now else 1, "stop")
    attempt = last_attempt(client.bucket, order)
    outcome = Outcome("stopped", user_code("SIGINT"), "stopped before it started")
    if attempt or not close(client.bucket, order, [], outcome.reason, outcome.exit_code):
        if now and attempt:
            end_of(client.backend, client.bucket, order, attempt, grace=0.0)
        outcome = see_through(client, order)
    client.report.say(last_line(client.bucket, order, outcome))
    return 0


def pull(client: Client, settings: Settings, run: str | None) -> int:
    """Of a running run, the last complete save."""
    order = which(client, settings, run)
    pulled = pulling.pull(client.bucket, order, os.curdir, client.report, client.bounds)
    say_pulled(client, order, pulled)
    if not read_bill(client.bucket, order) and client.bucket.size(order.prefix + "/receipt.json") is None:
        client.report.say("the run goes on; this is its last complete save")
    client.report.say(f"{counted(pulled)}, {pulled.unchanged} were here already")
    return 0
