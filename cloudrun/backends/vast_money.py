"""What a vast.ai instance has cost: as the provider says it, or as it was seen. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cloudrun.backends import Cost
from cloudrun.backends.vast_state import DEAD, UP, Stage, number

GB_MONTH = 720.0 * 3600  # seconds for which storage_cost is the price of a GB
DAY = 86400
LONGEST_DAYS = 121  # that a run may have begun before its bill is closed
BOOKED = 0.99  # of what was certainly used: with less the charges are not complete yet


class Usage:
    """What one instance has used, as far as it was seen: seconds, from one look to the next."""

    def __init__(self, gb: float) -> None:
        self.gb, self.seconds = gb, [0.0, 0.0]  # of GPU and disk …
        self.surely = [0.0, 0.0]  # … without what began or ended between two looks
        self.rates: dict[str, float | None] = {}
        self._looked: float | None = None
        self._bills = (False, False)

    def look(self, when: float, row: Mapping[str, Any] | None, found: Stage | None) -> None:
        """`row`: None when it is gone."""
        bills = (False, False)
        if row is not None and found is not None:
            names = ("dph_base", "storage_cost", "inet_down_cost", "inet_up_cost")
            self.rates.update({name: value for name in names if (value := number(row, name)) is not None})
            gpu = found.kind in (UP, DEAD) or found.phase == "frozen"
            bills = gpu, found.phase not in ("offline", "unknown")
        passed = max(when - self._looked, 0.0) if self._looked is not None else 0.0
        for part in (0, 1):
            self.seconds[part] += passed * self._bills[part]
            self.surely[part] += passed * (self._bills[part] and bills[part])
        self._looked, self._bills = (when if row is not None else None), bills

    def cost(self, *, surely: bool = False) -> Cost | None:
        """Rates times what was seen; bytes are not seen, so that only what is free has a known price."""
        gpu, disk = self.surely if surely else self.seconds
        rates = self.rates
        hourly, monthly = rates.get("dph_base"), rates.get("storage_cost")
        if hourly is None or monthly is None:
            return None
        free = rates.get("inet_down_cost") == 0 and rates.get("inet_up_cost") == 0
        return Cost(gpu * hourly / 3600, disk * monthly * self.gb / GB_MONTH, 0.0 if free else None)


def checked(booked: Cost, seen: list[Usage]) -> Cost:
    """What was booked; where that cannot be all of it yet, the rates times what was seen if that is more."""
    least, most = (total([usage.cost(surely=surely) for usage in seen]) for surely in (True, False))
    if not (least and most) or booked.gpu + booked.disk >= BOOKED * (least.gpu + least.disk):
        return booked
    note = f"vast.ai has booked {booked.gpu + booked.disk:.4f} USD so far: the cost is rates times time seen"
    return booked._replace(gpu=max(booked.gpu, most.gpu), disk=max(booked.disk, most.disk), note=note)


def charged(rows: list[Any], wanted: set[str], label: str) -> dict[str, Cost]:
    """{source: what the provider took for it}, of these sources, or without any of labels that begin so."""
    found: dict[str, Cost] = {}
    for row in rows:
        source = str(row.get("source")) if isinstance(row, dict) else ""
        named = str((row.get("metadata") or {}).get("label") or "") if source else ""
        if source and (source in wanted or (not wanted and named.startswith(label))):
            parts = {"gpu": 0.0, "disk": 0.0, "bwd": 0.0, "bwu": 0.0}
            for item in row.get("items") or ():
                if item.get("type") in parts:
                    parts[item["type"]] += number(item, "amount") or 0.0
            new = Cost(parts["gpu"], parts["disk"], parts["bwd"] + parts["bwu"])
            new = new._replace(started=number(row, "start"), ended=number(row, "end"))
            found[source] = new.plus(found[source]) if source in found else new
    return found


def charges_query(now: float) -> dict[str, str]:
    """For the newest charges of instances. The days have to be given."""
    days = {"gte": int(now - LONGEST_DAYS * DAY), "lte": int(now + DAY)}
    select = json.dumps({"day": days, "type": {"in": ["instance"]}})
    return {"select_filters": select, "latest_first": "true", "limit": "500", "format": "table"}


def total(costs: list[Cost | None]) -> Cost | None:
    """Of all of them; None if one is not known."""
    known = [cost for cost in costs if cost]
    if len(known) < len(costs) or not known:
        return None
    found = known[0]
    for cost in known[1:]:
        found = found.plus(cost)
    return found
