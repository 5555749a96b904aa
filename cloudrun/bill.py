"""The end of the bill: a machine seen ended, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from cloudrun.backends import Backend, Cost, Instance
from cloudrun.errors import BucketError, CloudrunError, Conflict, StillRunning
from cloudrun.formats import canonical, seconds_of, timestamp
from cloudrun.handover import take_back
from cloudrun.order import Order, time_of
from cloudrun.runs import attempt_object, is_claimed, last_attempt
from cloudrun.storage import Bucket


class Patience(NamedTuple):
    """Seconds: `grace` for a machine to end itself, then `limit` for it to be seen ended by us.

    `doubtful`: its create call did not come back, so that it may appear after we have looked in vain.
    `itself`: who ended it, if it ended within its grace and does not say why.
    """

    grace: float
    limit: float
    doubtful: bool = False
    itself: str = "guard"


class Ended(NamedTuple):
    """An instance was seen ended. `layer`: agent, guard, lease or sweep; started is None if nobody knows.

    `price`: US dollars per hour; None: that of the order. `least`: seconds that are billed in any case.
    `cost`: if more is known than time and price. `note`: what the provider would not do for it.
    `sure`: False of a machine that nobody saw and that never said a word; its times are those of claims.
    """

    name: str
    started: float | None
    ended: float
    layer: str
    proof: str
    price: float | None = None
    parked: str = ""
    least: float = 0.0
    cost: Cost | None = None
    note: str = ""
    sure: bool = True

    @property
    def seconds(self) -> float:
        """That it lived; 0 if nobody knows."""
        return 0.0 if self.started is None else max(self.ended - self.started, 0.0)

    def charge(self, price: float | None) -> float | None:
        """US dollars, at this price per hour if the machine had none of its own; None: not known."""
        price = price if self.price is None else self.price
        if self.cost:
            return self.cost.total
        return (
            None if price is None else (max(self.seconds, self.least) if self.seconds else 0.0) * price / 3600
        )


def see_ended(
    backend: Backend,
    name: str,
    patience: Patience,
    *,
    layer: str,
    clock: Callable[[], float] = time.time,
    known: Instance | None = None,
) -> Ended:
    """Wait for the machine to end itself, then end it, and look until it is gone.

    clock: seconds since the epoch, for a machine whose provider does not say when it ended. known: as it was
    seen just now: somebody else may free it before it is looked at here.
    Raises StillRunning, with what to do by hand, if that cannot be seen in time.
    """
    began, last, errors, stopped, certain = time.monotonic(), known, [], False, not patience.doubtful
    blind = False
    appears = began + (backend.appears_within if patience.doubtful else backend.pace)  # two looks at least
    while True:
        try:
            if blind and time.monotonic() > began + patience.grace:
                blind, stopped = False, True
                backend.stop(name)  # what cannot be looked at can be ended all the same
            blind = True
            instance = backend.find(name)
            last, blind = instance or last, False
            certain = certain or (instance is not None and instance.ended is None)
            gone = instance is None or (instance.ended is not None and not instance.leftover)
            if gone or stopped or time.monotonic() > began + patience.grace or not last or not last.alive:
                stopped = stopped or (instance is not None and instance.ended is None)
                backend.stop(name)  # also of what is gone: this frees what it left behind
            if gone and ((last and certain) or time.monotonic() >= appears):
                by = layer if stopped or not last else _itself(last, patience)
                return _seen_ended(backend, name, last, by, clock())
        except Exception as error:  # whatever it is, it must not keep us from trying again
            errors.append(str(error))
        if time.monotonic() > max(began + patience.grace, appears) + patience.limit * backend.slowness:
            raise StillRunning(
                f"{name} may still be running: {errors[-1] if errors else 'it was still there'}\n"
                f"end it by hand: {backend.by_hand(name)}"
            )
        time.sleep(backend.pace)


def _itself(last: Instance, patience: Patience) -> str:
    return patience.itself if not last.why else "agent" if last.why == "the run is finished" else "guard"


def _seen_ended(backend: Backend, name: str, last: Instance | None, layer: str, now: float) -> Ended:
    """`last` is what was last seen of it."""
    started, ended, price = (last.started, last.ended, last.price) if last else (None, None, None)
    parked = last.parked if last else ""
    proof = f"{backend.name}: {f'{name} is stopped' if parked else f'no {name}'}, seen {timestamp(now)}"
    cost = None
    with suppress(CloudrunError):  # who has ended a machine owes nobody its price
        cost = backend.cost(name)
    least, ended = backend.least_billed, now if ended is None else ended
    return Ended(name, started, ended, layer, proof, price, parked, least, cost)


def end_of(backend: Backend, bucket: Bucket, order: Order, attempt: int, *, grace: float) -> Ended:
    """The machine of an attempt that may be somebody else's, seen ended. Raises StillRunning.

    With the times that the bucket knows: made after its claim, gone before the next attempt's claim. A
    machine that nobody saw end has not outlived the provider's own limit, and may never have been there.
    """
    patience = Patience(grace, order.limits["stop"])
    clock = partial(time_of, bucket)
    ended = see_ended(backend, f"{order.run}-{attempt}", patience, layer="sweep", clock=clock)
    if ended.started is None:
        ended = ended._replace(ended=min(ended.ended, seconds_of(order.ends_by)))
    with suppress(BucketError):
        claim, after = (attempt_object(bucket, order, n, "claim") for n in (attempt, attempt + 1))
        if claim and "time" in claim and ended.started is None:
            started, price = seconds_of(claim["time"]), ended.price or claim["price"]
            spoke = attempt_object(bucket, order, attempt, "agent") is not None
            ended = ended._replace(started=started, price=price, sure=spoke)
        if after and "time" in after:
            ended = ended._replace(ended=min(ended.ended, seconds_of(after["time"])))
    return ended


def ends_of(
    backend: Backend, bucket: Bucket, order: Order, known: Iterable[Ended], *, grace: float = 0.0
) -> list[Ended]:
    """All machines that a run has had so far, seen ended; `known` are some of them. Raises StillRunning."""
    named, numbers = {end.name: end for end in known}, range(1, last_attempt(bucket, order) + 1)
    return [named.get(f"{order.run}-{n}") or end_of(backend, bucket, order, n, grace=grace) for n in numbers]


def close(bucket: Bucket, order: Order, ends: list[Ended], reason: str, exit_code: int) -> bool:
    """Write the bill, once, and forget what was only needed until now.

    `ends` are all machines that the run has had. False if there is another one meanwhile: the claim
    on the next attempt goes to whoever continues the run, or to whoever closes its bill.
    """
    following = len(ends) + 1
    with suppress(Conflict):
        claim = f"{order.prefix}/attempts/{following}/claim.json"
        bucket.create(claim, canonical({"closed": True}))
    if is_claimed(bucket, order, following):
        return False
    starts = [end.started for end in ends if end.started is not None]
    certain = len(starts) == len(ends) and all(end.sure for end in ends)
    seconds = sum(end.seconds for end in ends) if certain else None
    cost = cost_of(ends, order.price) if ends or order.price is not None else None
    split = split_of(ends)
    bill = {
        "reason": reason,
        "exit_code": exit_code,
        "started": timestamp(min(starts)) if starts else None,
        "ended": timestamp(max(end.ended for end in ends)) if ends else None,
        "seconds": None if seconds is None else round(seconds, 3),
        "price": order.price,
        "cost": None if seconds is None or cost is None else round(cost, 6),
        "gpu": split and round(split.gpu, 6),
        "disk": split and round(split.disk, 6),
        "traffic": None if split is None or split.traffic is None else round(split.traffic, 6),
        "layer": ends[-1].layer if ends else "none",
        "proof": ends[-1].proof if ends else "no machine was ever asked for",
        "attempts": len(ends),
        "parked": ends[-1].parked if ends else "",
        "note": " ".join(filter(None, [*(end.note for end in ends), split.note if split else ""])),
    }
    with suppress(Conflict):  # somebody else saw the end first; one bill is enough
        bucket.create(order.prefix + "/bill.json", canonical(bill))
    take_back(bucket, order)
    forget(bucket, order.prefix, order.run)
    return True


def cost_of(ends: list[Ended], price: float | None) -> float | None:
    """US dollars of all these machines; None if that of one is not known."""
    costs = [end.charge(price) for end in ends]
    return None if None in costs else sum(cost for cost in costs if cost is not None)


def split_of(ends: list[Ended]) -> Cost | None:
    """Its parts, where they are known of every machine."""
    total = None
    for end in ends:
        if end.cost is None and end.started == end.ended:  # it was never to be had
            continue
        if end.cost is None:
            return None
        total = end.cost.plus(total) if total else end.cost
    return total


def forget(bucket: Bucket, prefix: str, run: str) -> None:
    bucket.delete(prefix + "/env.json")
    bucket.delete("open/" + run)
