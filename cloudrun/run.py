"""The life of a run. `execute` is its story; `lease` is the stretch during which a machine may exist."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cloudrun.backends import Backend, Boot, Offer
from cloudrun.bill import Ended, close, end_of, ends_of, see_ended
from cloudrun.errors import BucketError, CloudrunError, Conflict, Interrupted
from cloudrun.follow import Seen, conclude, follow, requested_end
from cloudrun.formats import canonical, timestamp
from cloudrun.order import Order
from cloudrun.receipt import Outcome
from cloudrun.report import Report
from cloudrun.runs import last_attempt, read_bill
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
    created: float | None = None
    ended: Ended | None = None


def execute(
    client: Client, order: Order, offer: Offer, attempt: int = 1, *, mine: bool = True, detach: bool = False
) -> Outcome | None:
    """Rent, follow and end machines until the run has an outcome; None if it goes on without us.

    mine: the run is this client's own, so that its signals end it and its output is shown. Raises
    StillRunning if a machine could not be seen ended; Interrupted if the user ended the run before it
    was followed. Either way nothing is left running that this client could end.
    """
    ends: list[Ended] = []
    while claim(client, order, attempt, offer):
        machine = Lease(instance_name(order.run, attempt))
        try:
            with lease(client, order, attempt, offer, machine):
                machine.grace = 0.0 if mine else None
                seen = follow(client, order, attempt, mine=mine, show=mine and not detach, detach=detach)
                machine.grace = seen.grace
        except (CloudrunError, Interrupted) as error:
            if machine.ended:
                reason = "failed" if isinstance(error, CloudrunError) else "stopped" if mine else "preempted"
                settle(client, order, [*ends, machine.ended], Outcome(reason, error.exit_code, str(error)))
            raise
        if machine.ended is None:
            return None
        ends.append(machine.ended)
        if seen.how == "superseded":
            break
        outcome = conclude(client.bucket, order, seen)
        if outcome.reason != "preempted" or not may_continue(client, order, offer):
            if settle(client, order, ends, outcome):
                return outcome
            break
        client.report.say("the machine was taken away; going on with another one, from the last save")
        attempt += 1
    return see_through(client, order, mine=mine)


def see_through(client: Client, order: Order, *, mine: bool = False) -> Outcome:
    """Be there when a run that another client has in its hands ends: see its machine ended, close its bill.

    A run whose machine was taken away is continued from here. Unless it is `mine`, its output is not
    printed, and a signal to us is none to the run.
    """
    while True:
        attempt, bill = last_attempt(client.bucket, order), read_bill(client.bucket, order)
        if bill:
            return conclude(client.bucket, order, Seen("gone"), bill)
        seen = follow(client, order, attempt, mine=mine, show=mine)
        ended = end_of(client.backend, client.bucket, order, attempt, grace=seen.grace or 0.0)
        if last_attempt(client.bucket, order) > attempt:
            continue
        outcome = conclude(client.bucket, order, seen)
        if outcome.reason == "preempted":
            offer = best_offer(client.backend)
            if may_continue(client, order, offer):
                client.signals.rearm()
                continued = execute(client, order, offer, attempt + 1, mine=mine)
                assert continued
                return continued
        if settle(client, order, [ended] if attempt else [], outcome):
            client.signals.rearm()
            return outcome


@contextmanager
def lease(client: Client, order: Order, attempt: int, offer: Offer, machine: Lease) -> Iterator[None]:
    """A machine for one attempt, seen ended when this is left, whatever happens inside.

    The shape matters: create is inside both `try`s, because a create call that raised may have started
    a machine; and from `hold` on no signal can skip the stop.
    """
    try:
        try:
            client.report.stage("create")
            client.backend.create(machine.name, offer, boot_of(client.bucket, order, attempt, machine.name))
            machine.created = time.time()
            client.report.stage("created")
            yield
        finally:
            client.signals.hold()
            client.report.stage("stop")
    finally:
        if machine.grace is not None:
            limit, grace = order.limits["stop"], machine.grace
            ended = see_ended(client.backend, machine.name, grace=grace, limit=limit, layer="lease")
            machine.ended = ended._replace(started=ended.started or machine.created)
        client.signals.rearm()


def settle(client: Client, order: Order, ends: list[Ended], outcome: Outcome) -> bool:
    """Close the bill; False if another client continues the run. A bucket that refuses changes nothing."""
    client.report.stage("bill")
    try:
        every = ends_of(client.backend, client.bucket, order, ends)
        return close(client.bucket, order, every, outcome.reason, outcome.exit_code)
    except BucketError as error:
        client.report.warn(f"the machine is ended, but the bill could not be closed: {error}")
    return True


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
        "left": min(order.left(), order.seconds),  # never more than the whole run, whatever the clock says
        "agent_gone": order.limits["agent_gone"],
        "agent_silence": order.limits["agent_silence"],
    }
    return Boot(order.run, attempt, order.deadline, payload)


def best_offer(backend: Backend) -> Offer:
    """Raises CloudrunError."""
    offers = backend.offers()
    if not offers:
        raise CloudrunError(f"{backend.name} has no such machine now; try again later or ask for another one")
    return offers[0]


def may_continue(client: Client, order: Order, offer: Offer) -> bool:
    """Whether another machine makes sense: nobody wants the end, and more than boot and reserve is left."""
    if client.signals.received or order.left() <= least_seconds(order, offer):
        return False
    try:
        return requested_end(client.bucket, order.prefix)[0] == 0
    except BucketError:
        return False


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
