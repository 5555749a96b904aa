"""The life of a run. `execute` is its story; `lease` is the stretch during which a machine may exist."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from cloudrun.backends import ANYTHING, Backend, Boot, Need, Offer
from cloudrun.bill import Ended, Patience, close, cost_of, end_of, ends_of, see_ended
from cloudrun.config import USUAL, Bounds, Settings
from cloudrun.errors import (
    BucketError,
    CloudrunError,
    Conflict,
    Held,
    Interrupted,
    NoCapacity,
    Refused,
    UsageError,
)
from cloudrun.follow import Seen, conclude, follow, requested_end, since_boot
from cloudrun.formats import canonical, timestamp
from cloudrun.handover import HOURS, give
from cloudrun.order import Order, deadline, time_of
from cloudrun.receipt import Outcome
from cloudrun.report import Report
from cloudrun.runs import last_attempt, read_bill
from cloudrun.signals import Signals
from cloudrun.storage import Bucket

CONSOLE_LINES = 8
ELSEWHERE = ("preempted", "unusable")  # reasons for which a run goes on with another machine …
MOST_UNUSABLE = 5  # … of strangers only so many, one after the other


@dataclass
class Client:
    """What every stage needs: the two services, the user's ear, the user's signals, and who we are."""

    bucket: Bucket
    backend: Backend
    report: Report
    signals: Signals
    bounds: Bounds = USUAL
    identity: str = field(
        default_factory=lambda: f"{os.uname().nodename}-{os.getpid()}-{os.urandom(4).hex()}"
    )


@dataclass
class Lease:
    """What is known of one machine. `end_at`: its deadline, in seconds since this computer was booted.

    `grace`: seconds in which it may end itself; None: it shall live on. `none`: it was never to be had.
    `itself`: who will have ended it, if it does. `note`: what the provider would not do.
    """

    name: str
    end_at: float
    grace: float | None = 0.0
    offer: Offer | None = None
    created: float | None = None
    none: bool = False
    itself: str = "guard"
    ended: Ended | None = None
    note: str = ""


def execute(
    client: Client,
    order: Order,
    offers: list[Offer],
    attempt: int = 1,
    *,
    mine: bool = True,
    detach: bool = False,
    outcome: Outcome | None = None,
    earlier: Iterable[Ended] = (),
) -> Outcome | None:
    """Rent, follow and end machines until the run has an outcome; None if it goes on without us.

    mine: its signals end the run, and its output is shown. outcome: that of the machine before, which stands
    if there is none to go on with; earlier: machines seen ended. Raises StillRunning if one could not be;
    Interrupted if the user ended the run before it was followed. Leaves nothing that this client could end.
    """
    ends, unusable = list(earlier), 0
    end_at = since_boot() + order.left(client.bucket)  # once: a clock that is changed later moves no deadline
    while claim(client, order, attempt, offers[0]):
        machine = Lease(instance_name(order.run, attempt), end_at)
        try:
            with lease(client, order, attempt, offers, machine):
                machine.grace = 0.0 if mine else None
                if not mine:  # a signal to us is none to the run
                    client.signals.rearm()
                seen = follow(client, order, attempt, mine=mine, show=mine and not detach, detach=detach)
                machine.grace, machine.itself = seen.grace, "agent" if seen.receipt else "guard"
        except (CloudrunError, Interrupted) as error:
            ours = mine or isinstance(error, CloudrunError)  # else another client may go on
            before = outcome if machine.none else None
            if ours and machine.ended and give_up(client, order, [*ends, machine.ended], error, before):
                return outcome
            raise
        if machine.ended is None:
            return None
        ends.append(machine.ended)
        if seen.how == "superseded":
            break
        outcome = conclude(client.bucket, order, seen)
        say_console(client.report, seen, outcome)
        unusable = unusable + 1 if outcome.reason == "unusable" else 0
        again = outcome.reason in ELSEWHERE and unusable < MOST_UNUSABLE
        others = other_offers(client, order, end_at, ends) if again else []
        if not others:
            settled = settle(client, order, ends, outcome)
            return outcome if settled else see_through(client, order, mine=mine, earlier=ends)
        client.report.say(going_on(outcome))
        attempt, offers = attempt + 1, others
    return see_through(client, order, mine=mine, earlier=ends)


def give_up(
    client: Client,
    order: Order,
    ends: list[Ended],
    error: CloudrunError | Interrupted,
    before: Outcome | None,
) -> bool:
    """Close the bill of a run whose machine is ended. True: with `before`, the outcome of the machine before.

    That stands if nothing was started since, unless the user did not want it any more.
    """
    if before and isinstance(error, CloudrunError):
        client.report.warn(f"it cannot go on elsewhere: {error}")
        return settle(client, order, ends, before)
    reason = "failed" if isinstance(error, CloudrunError) else "stopped"
    settle(client, order, ends, Outcome(reason, error.exit_code, str(error)))
    return False


def say_console(report: Report, seen: Seen, outcome: Outcome) -> None:
    if outcome.reason in ("failed", "lost") and seen.console.strip():
        tail = "\n".join(seen.console.strip().split("\n")[-CONSOLE_LINES:])
        report.warn(f"the last lines of the machine's console:\n{tail}")


def see_through(
    client: Client, order: Order, *, mine: bool = False, earlier: Iterable[Ended] = ()
) -> Outcome:
    """Be there when a run that another client has in its hands ends: see its machine ended, close its bill.

    A run whose machine was taken away is continued from here. Unless it is `mine`, its output is not
    printed, and a signal to us is none to the run. earlier: as for `execute`.
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
        elsewhere, end_at = outcome.reason in ELSEWHERE, since_boot() + order.left(client.bucket)
        ends = [*earlier, ended] if attempt else []
        others = other_offers(client, order, end_at, ends) if elsewhere else []
        if others:
            client.signals.rearm()
            goes_on = partial(execute, client, order, others, attempt + 1, mine=mine)
            continued = goes_on(outcome=outcome, earlier=ends)
            assert continued
            return continued
        if settle(client, order, ends, outcome):
            client.signals.rearm()
            return outcome


@contextmanager
def lease(client: Client, order: Order, attempt: int, offers: list[Offer], machine: Lease) -> Iterator[None]:
    """A machine for one attempt, seen ended when this is left, whatever happens inside.

    The shape matters: create is inside both `try`s, because a create call that raised may have started
    a machine; and from `hold` on no signal can skip the stop.
    """
    try:
        try:
            client.report.stage("create")
            rent(client, order, attempt, offers, machine)
            machine.created = time_of(client.bucket)
            client.report.stage("created")
            client.signals.hold()  # a signal between this and the caller's body would skip both `finally`s
            yield
        finally:
            client.signals.hold()
            client.report.stage("stop")
    finally:
        if machine.grace is not None:
            doubtful = machine.created is None and not machine.none
            patience = Patience(machine.grace, order.limits["stop"], doubtful, machine.itself)
            clock = partial(time_of, client.bucket)
            ended = see_ended(client.backend, machine.name, patience, layer="lease", clock=clock)
            price = machine.offer.price if machine.offer and ended.price is None else ended.price
            started = ended.ended if machine.none else ended.started or machine.created
            machine.ended = ended._replace(started=started, price=price, note=machine.note)
        client.signals.rearm()


def rent(client: Client, order: Order, attempt: int, offers: list[Offer], machine: Lease) -> None:
    """The first of these offers that can be had. Raises CloudrunError."""
    for number, offer in enumerate(offers, 1):
        machine.none = True  # nothing was started so far
        boot = boot_of(client.bucket, order, attempt, machine)
        machine.none = False
        try:
            machine.offer = offer
            machine.note = client.backend.create(machine.name, offer, boot) or ""
            if machine.note:
                client.report.warn(machine.note)
            return
        except Refused:
            machine.none = True
            raise
        except NoCapacity as error:
            late = machine.end_at - since_boot() < least_seconds(order.seconds, order.limits, [offer])
            if number == len(offers) or late:
                machine.none = True
                raise
            client.report.say(f"{error}; trying {offers[number].what}")
        except Held:
            machine.none = True
            raise


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
        "time": timestamp(time_of(client.bucket)),
    }
    try:
        client.bucket.create(f"{order.prefix}/attempts/{attempt}/claim.json", canonical(content))
    except Conflict:
        return False
    return True


def instance_name(run: str, attempt: int) -> str:
    return f"{run}-{attempt}"


def boot_of(bucket: Bucket, order: Order, attempt: int, machine: Lease) -> Boot:
    left = min(machine.end_at - since_boot(), order.seconds)  # never more than the whole run
    payload = {
        "run": order.run,
        "attempt": attempt,
        "instance": machine.name,
        "backend": order.backend,
        "bucket": bucket.url,
        "prefix": order.prefix,
        "agent": order.agent,
        "order": [order.prefix + "/order.json", hashlib.sha256(order.content()).hexdigest()],
        "left": left,
        "agent_gone": order.limits["agent_gone"],
        "agent_silence": order.limits["agent_silence"],
    }
    if order.stranger:
        payload.update(give(bucket, order, attempt))
    return Boot(order.run, attempt, order.deadline, payload, left + order.limits["provider"])


def going_on(outcome: Outcome) -> str:
    if outcome.reason == "unusable":
        return f"{outcome.words.removeprefix('main.py was not started: ')}; trying another machine"
    return "the machine was taken away; going on with another one, from the last save"


def find_offers(backend: Backend, need: Need = ANYTHING, at_most: float | None = None) -> list[Offer]:
    """At least one. `at_most` (USD per hour): what a run may cost was said before it started.

    Raises CloudrunError.
    """
    offers = backend.offers(need)
    if at_most is not None:
        offers = [offer for offer in offers if offer.price is not None and offer.price <= at_most]
    if not offers:
        raise CloudrunError(f"{backend.name} has no such machine now; try again later or ask for another one")
    return offers


def dearest(offers: list[Offer]) -> float | None:
    """USD per hour of whichever of them it will be, at most; None if that is not known of one."""
    prices = [offer.price for offer in offers]
    return None if None in prices else max(price for price in prices if price is not None)


def most_once(offers: list[Offer]) -> float:
    """US dollars that whichever of them it will be takes at most, however short the run is."""
    return max(offer.once for offer in offers)


def other_offers(client: Client, order: Order, end_at: float, ends: list[Ended]) -> list[Offer]:
    """For a run that has to go on elsewhere; none if nobody wants that, or it has not enough left.

    Neither of time nor of money: it never costs more than was said before it started.
    """
    left = end_at - since_boot()
    try:
        if client.signals.received or requested_end(client.bucket, order.prefix)[0]:
            return []
        back = order.manifest.get("bytes_back", 0)  # an order of an older version has none
        need = Need(order.manifest["bytes"], back, left / 3600, left)
        offers = find_offers(client.backend, need, order.price)
    except CloudrunError:
        return []
    spent = cost_of(ends, order.price)
    if order.worst is not None and spent is not None:
        late = order.limits["provider"]
        offers = [each for each in offers if spent + cost_within(each, left, late) <= order.worst]
    return offers if offers and left > least_seconds(order.seconds, order.limits, offers) else []


def cost_within(offer: Offer, left: float, late: float) -> float:
    """US dollars until the deadline, `left` seconds from now, and `late` more; its image and inputs again."""
    hourly = offer.price or 0.0
    return (hourly * left / 3600 if offer.expected is None else offer.expected) + hourly * late / 3600


def least_seconds(seconds: float, limits: dict[str, float], offers: list[Offer]) -> float:
    """A machine with less time left than this could not do anything before it has to end."""
    reserve = min(limits["reserve_grace"] + limits["reserve_save"], 0.2 * seconds)
    return reserve + max(offer.boot_seconds for offer in offers)


def check_limits(settings: Settings, offers: list[Offer], *, stranger: bool = False) -> None:
    """Raises UsageError for a run that would have to end before it began: nothing need be sent for it.

    So it does for one that is too long for a stranger's machine: its last results could not come back.
    """
    hours, late = settings.max_hours, settings.limits["provider"]
    limits, once = (hours, settings.max_cost), most_once(offers)
    _, seconds, _ = deadline(*limits, dearest(offers), 0.0, late, once=once)
    if stranger and seconds > HOURS * 3600:
        raise UsageError(
            f"a run on somebody else's machine may take {HOURS:g} hours, and the limits leave "
            f"{seconds / 3600:g}; allow less with --max-hours"
        )
    _check(seconds, least_seconds(seconds, settings.limits, offers), UsageError)


def check_time(bucket: Bucket, order: Order, offers: list[Offer]) -> None:
    """Raises CloudrunError if sending has taken the time that the machine would need."""
    _check(order.left(bucket), least_seconds(order.seconds, order.limits, offers), CloudrunError)


def _check(left: float, least: float, kind: type[CloudrunError]) -> None:
    if left < least:
        raise kind(
            f"the limits leave {max(left, 0):.1f} s, and {least:.1f} s are needed to start a machine "
            "and to save; allow more with --max-hours or --max-cost"
        )
