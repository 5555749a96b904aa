"""What vast.ai has to let: a catalogue of believable offers, and the search through them.

Sources: docs.vast.ai, "Search Offers" (api-reference); the field names are those that vastai 1.9.1 knows.
"""

from __future__ import annotations

from typing import Any

from .vast_errors import Refusal

MONTH = 720.0  # hours, as storage is billed (measured: both examples of the docs come out to the last digit)
MOST = 64  # offers in one answer, whatever `limit` says (field report)
DAY = 86400.0
CONTROLS = {"order", "limit", "type", "allocated_storage", "select_cols", "q", "disable_bundling"}
# Filters that are no field of an offer as it is shown.
ALIASES = {
    "verified": lambda offer: offer["verification"] == "verified",
    "datacenter": lambda offer: offer["hosting_type"] == 1,
    "geolocation": lambda offer: offer["geolocation"].rpartition(",")[2].strip(),
    "reliability": lambda offer: offer["reliability2"],
}
OPERATORS = {
    "eq": lambda a, b: a == b,
    "neq": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "gte": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "lte": lambda a, b: a <= b,
    "in": lambda a, b: a in b,
    "notin": lambda a, b: a not in b,
}

# gpu_name: (MiB, compute capability * 100, dlperf per card)
CARDS = {
    "RTX 3060": (12288, 860, 9.0),
    "RTX 3090": (24576, 860, 24.0),
    "RTX 4090": (24564, 890, 70.0),
    "RTX 5090": (32607, 1200, 110.0),
    "RTX A6000": (49140, 860, 32.0),
    "L40S": (46068, 890, 60.0),
    "Tesla T4": (15360, 750, 8.0),
    "A100 SXM4": (81920, 800, 95.0),
    "H100 SXM": (81559, 900, 220.0),
}


def offer(number: int, gpu: str = "RTX 4090", price: float = 0.35, **fields: Any) -> dict[str, Any]:
    """An offer that nothing speaks against, but for `fields`. `price` is dph_base, dollars an hour."""
    memory, capability, speed = CARDS[gpu]
    cards = fields.get("num_gpus", 1)
    found = {
        "id": number,
        "machine_id": 50_000 + number % 1000,
        "host_id": 90_000 + number % 1000,
        "hosting_type": 0,
        "gpu_name": gpu,
        "num_gpus": cards,
        "gpu_ram": memory,
        "gpu_frac": 1.0,
        "compute_cap": capability,
        "cuda_max_good": 12.8,
        "driver_version": "570.133.07",
        "driver_vers": 570133007,
        "dlperf": speed * cards,
        "cpu_arch": "amd64",
        "cpu_name": "AMD EPYC 7543",
        "cpu_cores": 64,
        "cpu_cores_effective": 16.0,
        "cpu_ram": 64_345,
        "disk_space": 320.0,
        "disk_name": "nvme",
        "disk_bw": 2600.0,
        "dph_base": price,
        "min_bid": round(price * 0.55, 4),
        "storage_cost": 0.15,
        "inet_up": 620.0,
        "inet_down": 870.0,
        "inet_up_cost": 0.004,
        "inet_down_cost": 0.003,
        "reliability2": 0.9931,
        "verification": "verified",
        "rentable": True,
        "rented": False,
        "external": False,
        "is_bid": False,
        "geolocation": "California, US",
        "direct_port_count": 100,
        "static_ip": True,
        "public_ipaddr": f"198.51.100.{number % 250 + 1}",
        "duration": 30 * DAY,
        "score": round(200 * speed * cards / max(price, 0.01) / 100, 3),
        **fields,
    }
    return {**found, "ask_contract_id": number, "gpu_total_ram": found["gpu_ram"] * cards}


def catalogue() -> list[dict[str, Any]]:
    """From cheap to dear; the cheapest ones each break a bound that a careful renter has."""
    return [
        offer(7_100_001, "RTX 4090", 0.11, verification="unverified", reliability2=0.71),
        offer(7_100_002, "RTX 4090", 0.14, inet_down_cost=0.09, inet_up_cost=0.09, geolocation=", PL"),
        offer(7_100_003, "RTX 4090", 0.17, duration=0.1 * DAY, geolocation="Ontario, CA"),
        offer(7_100_004, "RTX 4090", 0.19, cuda_max_good=11.8, driver_version="520.61.05"),
        offer(7_100_005, "RTX 3060", 0.07, disk_space=14.0, geolocation="Vietnam, VN"),
        offer(7_100_006, "RTX 4090", 0.21, cpu_arch="arm64", geolocation="Taiwan, TW"),
        offer(7_100_007, "RTX 4090", 0.23, inet_down=18.0, inet_up=6.0, geolocation="Argentina, AR"),
        offer(7_100_008, "RTX 4090", 0.24, rentable=False, rented=True),
        offer(7_100_011, "Tesla T4", 0.09, geolocation="Oregon, US", hosting_type=1),
        offer(7_100_012, "RTX 3090", 0.16, geolocation="Sweden, SE"),
        offer(7_100_013, "RTX 4090", 0.31, geolocation="Washington, US", reliability2=0.9978),
        offer(7_100_014, "RTX 4090", 0.34, machine_id=50_013, host_id=90_013, geolocation="Washington, US"),
        offer(7_100_015, "RTX 4090", 0.37, geolocation="Germany, DE", storage_cost=0.3),
        offer(7_100_016, "RTX 4090", 0.72, num_gpus=2, cpu_cores_effective=32.0, geolocation="Spain, ES"),
        offer(7_100_017, "RTX 5090", 0.58, cuda_max_good=13.0, geolocation="Norway, NO"),
        offer(7_100_018, "RTX A6000", 0.49, geolocation="Texas, US"),
        offer(7_100_019, "L40S", 0.64, geolocation="Netherlands, NL", hosting_type=1),
        offer(7_100_020, "A100 SXM4", 0.93, geolocation="Virginia, US", hosting_type=1, disk_space=1400.0),
        offer(7_100_021, "H100 SXM", 2.12, geolocation="Iceland, IS", hosting_type=1, disk_space=2100.0),
    ]


def shown(offer: dict[str, Any], gigabytes: float, now: float, *, bid: bool = False) -> dict[str, Any]:
    """As a search answers it: dph_total holds the GPU and the disk that was asked for."""
    base = offer["min_bid"] if bid else offer["dph_base"]
    disk = offer["storage_cost"] * gigabytes / MONTH
    costs = {"gpuCostPerHour": base, "diskHour": disk, "totalHour": base + disk, "discountTotalHour": 0}
    return {
        **offer,
        "is_bid": bid,
        "reliability": offer["reliability2"],
        "dph_total": base + disk,
        "dph_total_adj": base + disk,
        "discounted_dph_total": base + disk,
        "storage_total_cost": disk,
        "dlperf_per_dphtotal": offer["dlperf"] / (base + disk),
        "internet_up_cost_per_tb": offer["inet_up_cost"] * 1000,
        "internet_down_cost_per_tb": offer["inet_down_cost"] * 1000,
        "start_date": now - DAY,
        "end_date": now + offer["duration"],
        "search": {**costs, "discountedTotalPerHour": base + disk},
        "instance": {**costs, "discountedTotalPerHour": base + disk},
    }


def problems(query: dict[str, Any]) -> list[str]:
    """What of a search the service does not know."""
    found = []
    for name, wanted in query.items():
        if name in CONTROLS:
            continue
        if name not in ALIASES and name not in FIELDS:
            found.append(f"bundles.search: no field {name!r}")
        elif not isinstance(wanted, dict) or set(wanted) - set(OPERATORS):
            found.append(f"bundles.search: {name} is no filter: {wanted!r}")
    return found


def search(
    offers: list[dict[str, Any]], query: dict[str, Any], now: float, ignored: set[str]
) -> list[dict[str, Any]]:
    """`ignored`: fields whose filters do nothing, as was seen in the field."""
    bid = query.get("type") in ("bid", "interruptible")
    gigabytes = number(query.get("allocated_storage", 5.0))
    rows = [shown(each, gigabytes, now, bid=bid) for each in offers]
    filters = {k: v for k, v in query.items() if k not in CONTROLS and k not in ignored and k in KNOWN}
    found = [row for row in rows if all(fits(row, name, wanted) for name, wanted in filters.items())]
    for name, direction in reversed(query.get("order") or [["score", "desc"]]):
        found.sort(key=lambda row, name=name: row.get(name) or 0, reverse=direction == "desc")
    return found[: min(MOST, int(query.get("limit") or MOST))]


def fits(row: dict[str, Any], name: str, wanted: dict[str, Any]) -> bool:
    value = ALIASES[name](row) if name in ALIASES else row[name]
    return all(OPERATORS[op](value, like(value, bound)) for op, bound in wanted.items())


def like(value: Any, bound: Any) -> Any:
    """A bound in the type of the value: the service takes "50" and 50 alike."""
    if isinstance(bound, (list, tuple)):
        return [like(value, each) for each in bound]
    if isinstance(value, bool):
        return bound if isinstance(bound, bool) else str(bound).lower() in ("true", "1")
    if isinstance(value, (int, float)):
        return number(bound)
    return str(bound)


def number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise Refusal(400, "invalid_args", f"not a number: {value!r}") from None


FIELDS = set(shown(catalogue()[0], 5.0, 0.0))
KNOWN = FIELDS | set(ALIASES)
