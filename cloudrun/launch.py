"""`cloudrun main.py` from the user's side: check everything, start, follow, bring home."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cloudrun.backends import Need, Offer, open_backend
from cloudrun.bill import close, forget
from cloudrun.closing import bring_home, check_json, dry_run_lines, price_words, write_record
from cloudrun.config import Settings, from_env
from cloudrun.errors import FAILED, USAGE, CloudrunError, Held, Interrupted, UsageError
from cloudrun.handover import ALONE_LATER
from cloudrun.order import Order
from cloudrun.project import check_project, returned
from cloudrun.report import Report
from cloudrun.run import Client, check_limits, check_time, dearest, execute, find_offers, most_once
from cloudrun.runs import last_attempt
from cloudrun.signals import Signals
from cloudrun.start import Prepared, Wanted, describe, prepare, store
from cloudrun.storage import open_bucket
from cloudrun.sweep import sweep_up


def run_script(name: str, arguments: list[str], **options: Any) -> int:
    """The options are those of the command line. Returns the exit code."""
    settings, wanted = check(name, arguments, options)
    report = open_report(**options)
    if settings.chosen:
        report.say(f"backend {settings.backend}, because {settings.chosen}")
    with open_client(settings, report) as client:
        if not options["dry_run"]:
            return start_and_follow(client, settings, wanted, options)
        for line in dry_run_lines(client, settings, wanted):
            print(line)
        return 0


def check(name: str, arguments: list[str], options: dict[str, Any]) -> tuple[Settings, Wanted]:
    """Raises UsageError with everything that is wrong, at once."""
    here, environ, problems = os.getcwd(), dict(os.environ), []

    def attempt(check: Callable[..., Any], *values: Any, **flags: Any) -> Any:
        try:
            return check(*values, **flags)
        except UsageError as error:
            problems.append(str(error))

    limits = {key: options[key] for key in ("backend", "max_hours", "max_cost")}
    script = attempt(check_project, here, name)
    settings = attempt(from_env, environ, here, **limits)
    attempt(returned, options["output"])
    env = attempt(environment, options["env"], environ)
    attempt(check_json, options["json_file"])
    if problems:
        raise UsageError("\n".join(problems))
    if script.startswith("-"):
        script = "./" + script  # Python would take it for an option
    return settings, Wanted([script, *arguments], env, options["output"], options["if_client_lost"])


def wait_for_offers(client: Client, need: Need, *, queue: bool) -> list[Offer]:
    """`queue`: as long as another run has the machine that is kept. Raises CloudrunError, Held among them."""
    said = False
    while True:
        try:
            return find_offers(client.backend, need)
        except Held as error:
            if not queue:
                raise
            if not said:
                client.report.say(f"queueing: {error}")
            said = True
        time.sleep(5 * client.backend.pace)


def check_script(prepared: Prepared, wanted: Wanted) -> None:
    """Raises UsageError for a script that an ignore file keeps here."""
    script = os.path.normpath(wanted.argv[0])
    if not any(item.path == script for item in prepared.scanned.found):
        raise UsageError(
            f"{script} is left out by an ignore file or by cloudrun's own rules: --dry-run says why"
        )


def environment(pairs: tuple[str, ...], environ: dict[str, str]) -> dict[str, str]:
    """The values of -e. Raises UsageError naming every one that is not set here."""
    found, missing = {}, []
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or (not equals and name not in environ):
            missing.append(f"-e {pair}: not set here; give a value, -e {name or 'NAME'}=VALUE")
        else:
            found[name] = value if equals else environ[name]
    if missing:
        raise UsageError("\n".join(missing))
    return found


def start_and_follow(client: Client, settings: Settings, wanted: Wanted, options: dict[str, Any]) -> int:
    report = client.report
    client.backend.warm_up()
    if sweep_up(client) == USAGE:  # a key that is not accepted: the search would say the same once more
        return USAGE
    while True:
        order, offers = place_order(client, settings, wanted, queue=options["wait"])
        try:
            check_time(client.bucket, order, offers)
            report.say(f"{offers[0].what}, {price_words(order, offers[0].price)}")
            report.detail(f"run {order.run}, kept in {client.bucket.url}/{order.prefix}")
            outcome = execute(client, order, offers, detach=options["detach"])
            break
        except BaseException as error:
            abandon(client, order)
            if isinstance(error, Interrupted):
                report.say("no machine of this run is left")
            if not (options["wait"] and isinstance(error, Held) and last_attempt(client.bucket, order) < 2):
                raise
            report.say(f"queueing: {error}")  # as a new run, that has all its time before it
    if options["detach"]:
        print(order.run, flush=True)
        if order.stranger:
            report.say(ALONE_LATER)
    if outcome is None:
        return 0
    code, pulled = bring_home(client, order, outcome)
    if options["json_file"]:
        written = write_record(options["json_file"], client, order, pulled)
        code = code or written
    return code


def place_order(
    client: Client, settings: Settings, wanted: Wanted, *, queue: bool
) -> tuple[Order, list[Offer]]:
    """Send the project and write the order, once there is an offer."""
    report = client.report
    report.stage("scan")
    prepared = prepare(settings, client.bucket)
    check_script(prepared, wanted)
    report.say(describe(prepared))
    report.stage("offer")
    offers = wait_for_offers(client, prepared.need(settings), queue=queue)
    stranger = client.backend.stranger
    check_limits(settings, offers, stranger=stranger)
    price, once, ways = dearest(offers), most_once(offers), (client.bucket, report)
    return store(prepared, settings, wanted, price, ways, stranger=stranger, once=once), offers


def abandon(client: Client, order: Order) -> None:
    """The end of a run that never asked for a machine."""
    with suppress(CloudrunError):  # what ended the run is what the user should read
        try:
            close(client.bucket, order, [], "failed", FAILED)
        except CloudrunError:
            if not last_attempt(client.bucket, order):
                forget(client.bucket, order.prefix, order.run)


def open_report(quiet: bool = False, verbose: bool = False, **_: object) -> Report:
    return Report(quiet=quiet, verbose=verbose, environ=os.environ)


@contextmanager
def open_client(settings: Settings, report: Report) -> Iterator[Client]:
    """Within this context signals are ours."""
    with Signals() as signals:
        yield Client(open_bucket(settings.bucket), open_backend(settings), report, signals, settings.bounds)
