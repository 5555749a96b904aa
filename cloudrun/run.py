"""The life of a run. `execute` is its story; `lease` is the stretch during which a machine may exist."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from cloudrun.backends import Backend, Boot, Offer
from cloudrun.bill import Ended, close, see_ended
from cloudrun.errors import CloudrunError, Conflict, Interrupted
from cloudrun.follow import Seen, follow
from cloudrun.formats import canonical, seconds_of, timestamp
from cloudrun.order import Order
from cloudrun.receipt import Outcome, billed_outcome, outcome_of, read_receipt
from cloudrun.report import Report
from cloudrun.runs import attempt_object, last_attempt, read_bill
from cloudrun.signals import Signals
from cloudrun.storage import Bucket


@dataclass
class Client:
    """What every stage needs: the two services, the user's ear, the user's signals, and who we are."""

    bucket: Bucket
    backend: Backend
    report: Report
    signals: Signals
    identity: str = field(
        default_factory=lambda: f"{os.uname().nodename}-{os.getpid()}-{os.urandom(4).hex()}"
    )


@dataclass
class Lease:
    """What is known of one machine. `grace`: seconds in which it may end itself; None: it shall live on."""

    name: str
    grace: float | None = 0.0
    ended: Ended | None = None


def execute(client: Client, order: Order, offer: Offer, *, detach: bool = False) -> Outcome | None:
    """Rent, follow and end machines until the run has an outcome; None if it goes on without us.

    Raises StillRunning if a machine could not be seen ended; Interrupted if the user ended the run
    before main.py was started. Either way nothing is left running that this client could end.
    """
    ends: list[Ended] = []
    attempt = last_attempt(client.bucket, order) + 1
    while claim(client, order, attempt, offer):
        try:
            with lease(client, order, attempt, offer) as machine:
                seen = follow(client, order, attempt, detach=detach)
                machine.grace = seen.grace
        except Interrupted as error:
            ends.extend(filter(None, [machine.ended]))
            close(client.bucket, order, ends, "stopped", error.exit_code)
            raise
        if machine.ended is None:
            return None
        ends.append(machine.ended)
        outcome = seen.outcome(order, machine.ended)
        if outcome.reason != "preempted" or not may_continue(client, order, offer):
            client.report.stage("bill")
            close(client.bucket, order, ends, outcome.reason, outcome.exit_code)
            return outcome
        client.report.say("the machine was taken away; going on with another one, from the last save")
        attempt += 1
    return see_through(client, order)


def see_through(client: Client, order: Order) -> Outcome:
    """Be there when a run that another client started ends: see its machine ended, close its bill.

    The output is not printed, and a signal to us is none to the run. A run whose machine was taken
    away is continued from here.
    """
    while True:
        attempt = last_attempt(client.bucket, order)
        bill, receipt = read_bill(client.bucket, order), read_receipt(client.bucket, order.prefix)
        if bill:
            return outcome_of(receipt) if receipt else billed_outcome(bill)
        seen = follow(client, order, attempt, mine=False)
        outcome, ended = end_of(client, order, attempt, seen.grace or 0, seen)
        offer = client.backend.offers()[0]
        if outcome.reason == "preempted" and may_continue(client, order, offer):
            continued = execute(client, order, offer)
            assert continued
            return continued
        if last_attempt(client.bucket, order) == attempt:
            close(client.bucket, order, [ended], outcome.reason, outcome.exit_code)
            return outcome


def end_of(client: Client, order: Order, attempt: int, grace: float, seen: Seen) -> tuple[Outcome, Ended]:
    """The machine of somebody else's attempt, seen ended, and what that means."""
    name, limit = instance_name(order.run, attempt), order.limits["stop"]
    ended = see_ended(client.backend, name, grace=grace, limit=limit, layer="client")
    if ended.started is None:
        made = attempt_object(client.bucket, order, attempt, "claim") or {}
        ended = replace(ended, started=seconds_of(made["time"]) if "time" in made else None)
    return seen.outcome(order, ended), ended


@contextmanager
def lease(client: Client, order: Order, attempt: int, offer: Offer) -> Iterator[Lease]:
    """A machine for one attempt, seen ended when this is left, whatever happens inside.

    The shape matters: create is inside both `try`s, because a create call that raised may have started
    a machine; and from `hold` on no signal can skip the stop.
    """
    machine = Lease(instance_name(order.run, attempt))
    try:
        try:
            client.report.stage("create")
            client.backend.create(machine.name, offer, boot_of(client.bucket, order, attempt, machine.name))
            client.report.stage("created")
            yield machine
        finally:
            client.signals.hold()
    finally:
        if machine.grace is not None:
            client.report.stage("stop")
            limit = order.limits["stop"]
            machine.ended = see_ended(
                client.backend, machine.name, grace=machine.grace, limit=limit, layer="lease"
            )
        client.signals.rearm()


def claim(client: Client, order: Order, attempt: int, offer: Offer) -> bool:
    """Say in the bucket what we are about to create; False if another client said it first."""
    content = {
        "client": client.identity,
        "instance": instance_name(order.run, attempt),
        "offer": offer.what,
        "price": offer.price,
        "time": timestamp(time.time()),
    }
    try:
        client.bucket.create(f"{order.prefix}/attempts/{attempt}/claim.json", canonical(content))
    except Conflict:
        return False
    return True


def instance_name(run: str, attempt: int) -> str:
    return f"{run}-{attempt}"


def boot_of(bucket: Bucket, order: Order, attempt: int, name: str) -> Boot:
    payload = {
        "run": order.run,
        "attempt": attempt,
        "instance": name,
        "backend": order.backend,
        "bucket": bucket.url,
        "prefix": order.prefix,
        "agent": order.agent,
        "order": [order.prefix + "/order.json", hashlib.sha256(order.content()).hexdigest()],
        "left": order.left(),
        "agent_gone": order.limits["agent_gone"],
        "agent_silence": order.limits["agent_silence"],
    }
    return Boot(order.run, attempt, order.deadline, payload)


def may_continue(client: Client, order: Order, offer: Offer) -> bool:
    """Whether another machine makes sense: no signal came, and more than its boot and the reserve is left."""
    return not client.signals.received and order.left() > least_seconds(order, offer)


def least_seconds(order: Order, offer: Offer) -> float:
    """A machine with less time left than this could not do anything before it has to end."""
    reserve = min(order.limits["reserve_grace"] + order.limits["reserve_save"], 0.2 * order.seconds)
    return reserve + offer.boot_seconds


def check_time(order: Order, offer: Offer) -> None:
    """Raises CloudrunError instead of renting a machine that has no time for anything."""
    if order.left() < least_seconds(order, offer):
        raise CloudrunError(
            f"the limits leave {max(order.left(), 0):.0f} s, and {least_seconds(order, offer):.0f} s are "
            "needed to start a machine and to save; allow more with --max-hours or --max-cost"
        )
