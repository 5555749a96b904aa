"""The commands for runs that outlive their client: ps, logs, wait, stop, pull, gc."""

from __future__ import annotations

import itertools
import json
import os
import time
from dataclasses import replace
from functools import partial

from cloudrun import follow as following
from cloudrun import offers as offering
from cloudrun import pull as pulling
from cloudrun.backends import Backend
from cloudrun.bill import close, end_of
from cloudrun.closing import counted, last_line, say_pulled
from cloudrun.config import Settings
from cloudrun.errors import FAILED, STILL_BILLED, UNKNOWN, USAGE, BucketError, CloudrunError, UsageError
from cloudrun.follow import NOW, request_end
from cloudrun.late import collect, goes_alone
from cloudrun.listing import backends_of, look, rows, table
from cloudrun.order import Order, here
from cloudrun.output import Output
from cloudrun.receipt import Outcome, user_code
from cloudrun.run import Client, see_through
from cloudrun.runs import find_run, last_attempt, load, open_runs, read_bill, record
from cloudrun.sweep import sweep_up

URGENCY = (0, USAGE, UNKNOWN, FAILED, STILL_BILLED)  # of several exit codes the last of these


def which(client: Client, settings: Settings, text: str | None, *, act: bool = False) -> Order:
    """The run that is meant. Raises UsageError; `act`: also if its machine cannot be seen from here."""
    if act:
        client.backend.warm_up()  # who sees a machine to its end may have to end it
    sweep_up(client)
    order = find_run(client.bucket, settings.project, text, here())
    if act and order.place not in ("", settings.place) and not read_bill(client.bucket, order):
        raise UsageError(
            f"the machine of {order.run} is in {order.place} and cannot be seen from here, {settings.place}: "
            f"do that on the computer {order.origin[0]}, with the settings that the run was started with"
        )
    collect(client.bucket, order, client.report.warn, client.bounds)
    return order


def ps(client: Client, settings: Settings, *, as_json: bool, history: bool = False) -> int:
    """A line for each open run and each machine without one, oldest first; `as_json`: one JSON array."""
    backends, code = _backends(client, settings), 0
    sight = look(backends, client.report)
    try:
        found = rows(client.bucket, sight, client.report, history=history)
    except BucketError:  # what is overdue has to end even if the bucket is out of reach
        sweep_up(client, partial(sight.of, client.backend))
        raise
    if any(row.doubtful for row in found):  # else a sweep, which costs as much again, finds nothing
        code = sweep_up(client, partial(sight.of, client.backend))
        sight = look(backends, client.report)
        found = rows(client.bucket, sight, client.report, history=history)
    records = [row.record for row in found]
    for line in [json.dumps(records, indent=1)] if as_json else table(records):
        print(line)
    if sight.others:
        client.report.say("not made by cloudrun, billed, and left alone: " + ", ".join(sight.others))
    return code or (FAILED if sight.blind else 0)


def offers(client: Client, settings: Settings, *, hours: float, as_json: bool) -> int:
    """What could be rented now for the project in this directory."""
    return sweep_up(client) or offering.offers(client, settings, hours=hours, as_json=as_json)


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


def stop(client: Client, settings: Settings, run: str | None, *, now: bool, every: bool = False) -> int:
    """End a run, or all open ones, and see the machines ended. Raises StillRunning."""
    if every and run:
        raise UsageError("--all ends every run: name none")
    if every:
        return _stop_all(client, settings, now)
    order = which(client, settings, run, act=True)
    if read_bill(client.bucket, order):
        client.report.say(f"{order.run} has ended already")
        return 0
    _see_stopped(client, order, _ask(client, order, now))
    return 0


def _ask(client: Client, order: Order, now: bool) -> bool:
    """Write the wish down. Returns whether to end the machine at once: one that is alone hears nobody."""
    if not now and goes_alone(client.bucket, order):
        client.report.say(following.ALONE)
        now = True
    request_end(client.bucket, order.prefix, NOW if now else 1, "stop")
    return now


def _see_stopped(client: Client, order: Order, now: bool) -> None:
    attempt = last_attempt(client.bucket, order)
    outcome = Outcome("stopped", user_code("SIGINT"), "stopped before it started")
    if attempt or not close(client.bucket, order, [], outcome.reason, outcome.exit_code):
        if now and attempt:
            end_of(client.backend, client.bucket, order, attempt, grace=0.0)
        outcome = see_through(client, order)
    client.report.say(last_line(client.bucket, order, outcome))


def _stop_all(client: Client, settings: Settings, now: bool) -> int:
    """Every run is asked first, so that they end side by side; what goes wrong with one stops no other."""
    code = sweep_up(client)
    backends, asked = {each.place: each for each in _backends(client, settings)}, []
    for project, run in open_runs(client.bucket):
        try:
            order = load(client.bucket, project, run)
            asked.append((order, _ask(client, order, now)))
        except CloudrunError as error:  # its client is just sending, say
            client.report.error(f"{run}: {error}")
            code = max(code, error.exit_code, key=URGENCY.index)
    for order, at_once in asked:
        try:
            if order.place not in backends:
                raise CloudrunError(f"its machine is in {order.place}, which cannot be seen from here")
            client.report.say(order.run)
            _see_stopped(replace(client, backend=backends[order.place]), order, at_once)
        except CloudrunError as error:
            client.report.error(f"{order.run}: {error}")
            code = max(code, error.exit_code, key=URGENCY.index)
    return code


def gc(client: Client, settings: Settings, *, dry_run: bool) -> int:
    """Sweep every backend that has its settings: made for cron, silent when there is nothing to do."""
    clients = [replace(client, backend=backend) for backend in _backends(client, settings)]
    return max((sweep_up(each, each.backend.survey, dry_run=dry_run) for each in clients), key=URGENCY.index)


def _backends(client: Client, settings: Settings) -> list[Backend]:
    return backends_of(settings, client.backend, os.environ, client.report)


def pull(client: Client, settings: Settings, run: str | None) -> int:
    """Of a running run, the last complete save."""
    order = which(client, settings, run)
    pulled = pulling.pull(client.bucket, order, os.curdir, client.report, client.bounds)
    say_pulled(client, order, pulled)
    if not read_bill(client.bucket, order) and client.bucket.size(order.prefix + "/receipt.json") is None:
        client.report.say("the run goes on; this is its last complete save")
    client.report.say(f"{counted(pulled)}, {pulled.unchanged} were here already")
    return 0
