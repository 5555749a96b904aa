"""`cloudrun offers`: what could be rented now, best first, without renting it."""

from __future__ import annotations

import json
import sys
from typing import Any

from cloudrun.backends import Offer
from cloudrun.config import Settings
from cloudrun.report import human_bytes
from cloudrun.run import Client, find_offers
from cloudrun.start import prepare

COLUMNS = "{:<44} {:>8} {:>9} {:>6} {:>12} {}"
HEADINGS = ("OFFER", "USD/H", "EXPECTED", "RELI.", "MBIT/S", "PLACE")


def offers(client: Client, settings: Settings, *, hours: float, as_json: bool) -> int:
    """For the project in this directory; a table, or with `as_json` one JSON array."""
    need = prepare(settings, client.bucket).need(settings, hours)
    found = find_offers(client.backend, need)
    if as_json:
        json.dump([record(client.backend.name, offer, hours) for offer in found], sys.stdout, indent=1)
        print()
        return 0
    size = f"{human_bytes(need.bytes_in)} up, {human_bytes(need.bytes_out)} back"
    client.report.say(f"expected for {hours:g} h, with {size}:")
    print(COLUMNS.format(*HEADINGS))
    for offer in found:
        print(COLUMNS.format(*row(offer)).rstrip())
    return 0


def record(backend: str, offer: Offer, hours: float) -> dict[str, Any]:
    return {
        "backend": backend,
        "offer": offer.what,
        "price_usd_per_hour": offer.price,
        "hours": hours,
        "expected_usd": offer.expected,
        "reliability": offer.reliability,
        "down_mbit_s": offer.down,
        "up_mbit_s": offer.up,
        "place": offer.place,
    }


def row(offer: Offer) -> tuple[str, ...]:
    def words(value: float | None, form: str) -> str:
        return "unknown" if value is None else format(value, form)

    reliability = "-" if offer.reliability is None else f"{offer.reliability:.3f}"
    speeds = "-" if offer.down is None or offer.up is None else f"{offer.down:.0f}/{offer.up:.0f}"
    what = offer.what.removesuffix(f" ({offer.place})")  # which has a column of its own
    return (
        *(what, words(offer.price, ".3f"), words(offer.expected, ".3f")),
        *(reliability, speeds, offer.place),
    )
