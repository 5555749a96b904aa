"""Containers on machines of strangers, rented through vast.ai.

The label says whose container it is: run, attempt, when it has to be gone. Only a destroyed container costs
nothing: one is destroyed when the service says that there is no such instance, and not before. A host that
was rented once is not rented again by the same client.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from contextlib import suppress
from typing import Any

from cloudrun.backends import ANYTHING, Boot, Cost, Instance, Need, Offer, Survey
from cloudrun.backends.vast_api import GONE, NO_MONEY, Api, ApiError, nothing_made
from cloudrun.backends.vast_boot import Label, environment, label_of, onstart, read_label
from cloudrun.backends.vast_console import Consoles
from cloudrun.backends.vast_jobs import arm, disarm
from cloudrun.backends.vast_money import Usage, charged, charges_query, checked, total
from cloudrun.backends.vast_offers import (
    GB,
    MOST,
    Host,
    Load,
    disk_for,
    expected,
    names_of,
    query,
    ranked,
    wanted,
    worst,
)
from cloudrun.backends.vast_state import (
    AWAY,
    COMING,
    FAILED,
    TAKEN,
    Stage,
    described,
    ended_one,
    number,
    stage,
)
from cloudrun.config import Settings, place
from cloudrun.errors import CloudrunError, NoCapacity, Refused

PAGE = "https://cloud.vast.ai/instances/"
ASK_AGAIN_LOOKS = 2  # looks between two calls that destroy: the service takes one in 3 s
CHARGES_SECONDS = 5.0  # that the end of a run waits for its charges
RUNTYPE = "ssh_direc ssh_proxy"  # as vastai sends it: onstart runs, and a person can log in


class VastBackend:
    """See cloudrun.backends.Backend."""

    name = "vast"
    stranger = True
    least_billed = 0.0
    slowness = 4.0

    def __init__(self, settings: Settings) -> None:
        self._wanted, self._limits = wanted(settings.vm), settings.limits
        self._api = Api(settings.vm["VAST_API_KEY"], os.environ)
        self.warm_up = self._api.warm_up
        self.place = place(self.name, settings.vm)
        self.pace = 1.25 * settings.limits["look"]  # the service takes a look in 2 s
        self.appears_within = settings.limits["appears"] / 2
        self._hosts: dict[str, Host] = {}
        self._used: set[str] = set()  # machines
        self._numbers: dict[str, list[int]] = {}  # instances of a name that were made or seen here
        self._doubts: Counter[str] = Counter()  # create calls of a name of which nobody knows what they did
        self._seen: set[int] = set()
        self._gone: dict[int, float] = {}  # since when
        self._last: dict[str, Instance] = {}
        self._phases: dict[int, tuple[str, float]] = {}
        self._asked: dict[int, float] = {}
        self._disarmed: set[int] = set()
        self._usage: dict[int, Usage] = {}
        self._consoles = Consoles(self._api, self.pace)
        self._made: dict[int, tuple[float, str]] = {}  # when, with which label

    # --- what could be had

    def offers(self, need: Need = ANYTHING) -> list[Offer]:
        load = Load(need.bytes_in / GB, need.bytes_out / GB, need.seconds, need.most)
        disk, late = disk_for(self._wanted, load), self._limits["provider"]
        names = names_of(self._wanted.gpu, self._api.ask("/gpu_names/unique/").get("gpu_names") or ())
        rows = self._api.search(query(self._wanted, names, disk, load)).get("offers")
        if not isinstance(rows, list):
            raise ApiError("its answer to the search cannot be read")
        hosts = [Host(row, disk) for row in rows if isinstance(row, dict)]
        fitting = [host for host in hosts if not host.misfit(self._wanted, names, load, late)]
        unused = [host for host in fitting if host.machine not in self._used]
        best = ranked(self._paid_for(unused, load, late), load, need.hours)
        self._hosts.update({host.id: host for host in best})
        return [self._offer(host, load, need.hours) for host in best]

    def _offer(self, host: Host, load: Load, hours: float) -> Offer:
        return Offer(
            what=host.words,
            price=host.price,
            boot_seconds=self._limits["boot_least"],
            where=host.id,
            once=host.once(load, MOST),  # each host that is tried may have to load the image
            expected=expected(host, load, hours),
            reliability=host.number("reliability2"),
            down=host.number("inet_down"),
            up=host.number("inet_up"),
            place=host.place,
        )

    def _paid_for(self, hosts: list[Host], load: Load, late: float) -> list[Host]:
        """Those that the credit pays for to the end. Raises Refused if there is none."""
        user = self._api.ask("/users/current")
        credit = (number(user, "credit") or 0.0) + min(number(user, "balance") or 0.0, 0.0)
        least = min((worst(host, load, late) for host in hosts), default=0.0)
        if credit <= 0 or credit < least:
            raise Refused(
                f"vast.ai: a credit of {credit:.2f} USD does not pay for the {least:.2f} USD that the run "
                f"can cost: {NO_MONEY['insufficient_credit']}, or limit it with --max-hours or --max-cost"
            )
        return [host for host in hosts if worst(host, load, late) <= credit]

    # --- renting

    def create(self, name: str, offer: Offer, boot: Boot) -> str | None:
        host, label = self._hosts[offer.where], label_of(boot)
        if any(each not in self._gone for each in self._numbers.get(name, ())):
            raise CloudrunError(f"there is a {name} already")
        if host.machine in self._used:
            raise NoCapacity(f"{host.words} was tried already")
        made = self._rent(name, host, label, boot)
        self._used.add(host.machine)
        return arm(self._api, made, self._api.now() + boot.seconds)

    def _rent(self, name: str, host: Host, label: str, boot: Boot) -> int:
        """The number of the instance. Raises NoCapacity, Refused, or ApiError if one may have been made."""
        order = {
            "client_id": "me",
            "image": self._wanted.image,
            "disk": host.disk,
            "label": label,
            "runtype": RUNTYPE,
            "env": environment({**boot.payload, "gpus": self._wanted.gpus, "user": ""}, os.environ),
            "onstart": onstart(name),
            "cancel_unavail": True,
        }
        self._doubts[name] += 1  # a signal may break the call off
        try:
            answer = self._ordered(f"/asks/{host.id}/", order)
        except CloudrunError as error:
            if refused := nothing_made(error, host.words):
                self._doubts[name] -= 1
                raise refused from None
            answer = {"new_contract": self._appeared(error, host, label)}
        made = answer.get("new_contract")
        if not isinstance(made, int):
            raise ApiError("it did not say which instance it made")
        self._note(name, made, host, label)
        self._doubts[name] -= 1
        if answer.get("success") is False:
            self._undo(made)
            raise NoCapacity(f"{host.words} could not start")
        return made

    def _ordered(self, path: str, order: dict[str, Any]) -> dict[str, Any]:
        """The answer to a create call, which is sent again only if the service did not look at it."""
        until = time.monotonic() + self._limits["stop"]
        while True:
            try:
                return self._api.act("put", path, order)
            except ApiError as error:
                if error.code != 429 or time.monotonic() > until:
                    raise
                time.sleep(max(error.pause, self.pace))

    def _note(self, name: str, made: int, host: Host, label: str) -> None:
        self._numbers.setdefault(name, []).append(made)
        self._made[made] = self._api.now(), label
        usage = self._usage.setdefault(made, Usage(host.disk))
        usage.look(self._api.now(), host.row, Stage(COMING, "", ""))

    def _appeared(self, error: CloudrunError, host: Host, label: str) -> int:
        """The instance that a create call without an answer made. Raises NoCapacity if none appears."""
        until = time.monotonic() + self.appears_within
        while time.monotonic() < until:  # never another offer before it is known what was done
            time.sleep(self.pace)
            with suppress(ApiError):
                for row in self._api.listed():
                    if row.get("label") == label and row.get("id") not in self._made:
                        return int(row["id"])
        self._used.add(host.machine)
        raise NoCapacity(f"{host.words}: {error}, and no machine has appeared")

    def _undo(self, made: int) -> None:
        """Destroy what was made and cannot start, and see it gone. Raises ApiError."""
        until = time.monotonic() + self._limits["stop"]
        while True:
            with suppress(ApiError):
                self._destroy(made)
                if self._row(made) is None:
                    return
            if time.monotonic() > until:
                raise ApiError(f"the instance {made}, which cannot start, is still there")
            time.sleep(self.pace)

    # --- looking and ending

    def find(self, name: str) -> Instance | None:
        rows = self._rows(name)
        if rows:
            self._last[name] = self._described(rows[0])
            return self._last[name]
        ends = [end for made in self._numbers.get(name, ()) if (end := self._gone[made]) is not None]
        last = self._last.get(name)
        return last._replace(alive=False, coming=False, ended=max(ends)) if last and ends else None

    def all(self) -> list[Instance]:
        return self.survey().ours

    def survey(self) -> Survey:
        rows = self._api.listed()
        ours = [self._described(row) for row in rows if read_label(row.get("label"))]
        rest = [row for row in rows if not read_label(row.get("label"))]
        return Survey(ours, [f"instance {row.get('id')} ({row.get('label') or 'no label'})" for row in rest])

    def stop(self, name: str) -> None:
        for made in self._numbers.get(name, ()):  # without a look, of which one in 2 s is let through
            self._destroy(made)
        if not self._numbers.get(name) or self._doubts[name]:
            self._rows(name)
            for made in self._numbers.get(name, ()):
                self._destroy(made)
        for made in self._numbers.get(name, ()):
            if made in self._gone and made not in self._disarmed:  # whoever armed it
                self._disarmed.add(made)
                disarm(self._api, made)

    def _destroy(self, made: int) -> None:
        now = time.monotonic()
        if made in self._gone or now - self._asked.get(made, -math.inf) < ASK_AGAIN_LOOKS * self.pace:
            return
        self._asked[made] = now
        try:
            self._api.act("delete", f"/instances/{made}/", {})
        except ApiError as error:
            del self._asked[made]
            if error.slug != GONE or self._is_young(made):
                raise
            self._ended(made)

    def _rows(self, name: str) -> list[dict[str, Any]]:
        """The instances of this name that are there, as the service shows them."""
        known = self._numbers.get(name)
        rows = [row for made in known or () if made not in self._gone and (row := self._row(made))]
        if known and not self._doubts[name]:
            return rows
        for row in self._api.listed():
            label = read_label(row.get("label"))
            if label and label.name == name and row["id"] not in [each["id"] for each in rows]:
                rows.append(row)
                self._described(row)
        return rows or self._unlisted(name)

    def _unlisted(self, name: str) -> list[dict[str, Any]]:
        """A list has hidden instances that went on costing money: what ever did is looked at by itself."""
        rows = []
        for source, cost in self._charged(name, set()).items():
            made = int(source.rpartition("-")[2])
            if made in self._gone or made in self._numbers.get(name, ()):
                continue
            self._seen.add(made)
            self._numbers.setdefault(name, []).append(made)
            row = self._row(made)
            if row:
                rows.append(row)
            elif cost.ended:  # somebody else saw it alive, or nobody
                self._gone[made] = min(cost.ended, self._api.now())
                run, _, attempt = name.rpartition("-")
                self._last.setdefault(name, ended_one(name, run, int(attempt), cost))
        return rows

    def _row(self, made: int) -> dict[str, Any] | None:
        """One instance; None if the service says that there is none. Raises ApiError."""
        try:
            answer = self._api.ask(f"/instances/{made}/", {"owner": "me"}, patience=0)
        except ApiError as error:
            if error.slug != GONE:
                raise
            answer = {"instances": None}
        if "instances" not in answer:
            raise ApiError(f"its answer about the instance {made} cannot be read")
        row = answer["instances"]
        if isinstance(row, list):  # as an older service; one without it says as little as an empty list
            row = next((each for each in row if isinstance(each, dict) and each.get("id") == made), {})
        if row is None:
            if made not in self._seen:
                self._look_for(made)
            self._ended(made)
            return None
        if not isinstance(row, dict) or not row:
            raise ApiError(f"its answer about the instance {made} cannot be read")
        self._seen.add(made)
        return {**row, "id": made}

    def _look_for(self, made: int) -> None:
        """One that was made and never seen: what cannot be seen yet can be destroyed all the same."""
        if self._is_young(made):
            raise ApiError(f"the instance {made} was made, and cannot be seen yet")
        if made not in self._asked:
            self._destroy(made)
            if made not in self._gone:
                raise ApiError(f"the instance {made} was not to be seen, and is being destroyed")

    def _is_young(self, made: int) -> bool:
        """Whether it may be there though the service does not know it yet."""
        age = self._api.now() - self._made.get(made, (-math.inf, ""))[0]
        return made not in self._seen and age < self.appears_within

    def _ended(self, made: int) -> None:
        if made not in self._gone:
            self._gone[made] = self._api.now()
            if made in self._usage:
                self._usage[made].look(self._api.now(), None, None)

    def _described(self, row: dict[str, Any]) -> Instance:
        made, found = int(row["id"]), stage(row)
        self._seen.add(made)
        when, given = self._made.get(made, (self._api.now(), ""))
        label = read_label(row.get("label")) or read_label(given) or Label("", 0, 0)
        if made not in self._numbers.setdefault(label.name, []):
            self._numbers[label.name].append(made)
        usage = self._usage.setdefault(made, Usage(number(row, "disk_space") or 0.0))
        usage.look(self._api.now(), row, found)
        return described(row, label, found, self._lost(made, row, found), when)

    def _lost(self, made: int, row: dict[str, Any], found: Stage) -> str:
        """Why this instance is of no use any more; empty while it is, or may be again."""
        (phase, since), now = self._phases.get(made, ("", 0.0)), time.monotonic()
        if phase != found.phase:
            since = now
            self._phases[made] = found.phase, now
        if found.kind not in (COMING, AWAY):  # one whose program ended it, or the kernel, would end again
            return found.words if found.kind in (TAKEN, FAILED) else ""
        budget = self._limits["away" if found.kind == AWAY else found.phase]
        age = self._api.now() - (number(row, "start_date") or self._api.now())
        late = found.kind == COMING and age > self._limits["provisioning"] + self._limits["pull"]
        return found.words if now - since > budget or late else ""

    # --- money and words

    def taken_away(self, name: str) -> bool:
        return bool((last := self._last.get(name)) and last.lost)

    def cost(self, name: str) -> Cost | None:
        numbers = self._numbers.get(name, [])
        wanted, found = {f"instance-{made}" for made in numbers}, {}
        with suppress(CloudrunError):
            found = self._charged(name, wanted)
        seen = [self._usage[made] for made in numbers if made in self._usage]
        booked = total(list(found.values())) if wanted <= set(found) else None
        return checked(booked, seen) if booked else total([usage.cost() for usage in seen])

    def _charged(self, name: str, wanted: set[str]) -> dict[str, Cost]:
        """What the provider took, by source; without sources `wanted`, of all with the label of this name."""
        run, _, attempt = name.rpartition("-")
        rows = self._api.ask("/charges/", charges_query(self._api.now()), patience=CHARGES_SECONDS).get(
            "results"
        )
        return charged(rows if isinstance(rows, list) else [], wanted, f"cloudrun/{run}/{attempt}/")

    def console(self, name: str) -> str:
        """What is known of it by now: a text is asked for, and there some seconds later."""
        numbers = [made for made in self._numbers.get(name, ()) if made in self._seen or made in self._gone]
        if not numbers:
            return ""
        if self._phases.get(numbers[-1], ("", 0.0))[0] in ("provisioning", "pull"):
            return ""  # there is no container yet that could say anything
        return self._consoles.read(numbers[-1], gone=numbers[-1] in self._gone)

    def by_hand(self, name: str) -> str:
        numbers = [made for made in self._numbers.get(name, ()) if made not in self._gone]
        if not numbers:
            return f"destroy the instance with the label of {name} there: {PAGE}"
        commands = "\n".join(f"vastai destroy instance {made}  # {name}" for made in numbers)
        return f"{commands}\nor there: {PAGE}"
