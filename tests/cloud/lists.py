"""List answers: filters, order and pages, the same for every kind of resource."""

from __future__ import annotations

import base64
from typing import Any

from . import catalog, errors
from .filters import compile_filter

MOST = 500


def page(kind: str, items: list[dict[str, Any]], query: dict[str, str], self_link: str) -> dict[str, Any]:
    """One page of a list; an empty one has no `items` at all."""
    chosen, following = choose(items, query)
    shown: dict[str, Any] = {
        "kind": f"compute#{kind}",
        "id": self_link.partition("/v1/")[2],
        "selfLink": self_link,
    }
    if chosen:
        shown["items"] = chosen
    return shown | ({"nextPageToken": following} if following else {})


def aggregated(kind: str, items: list[dict[str, Any]], query: dict[str, str], root: str) -> dict[str, Any]:
    """One page of what is in all zones, zone by zone; one without any says so."""
    chosen, following = choose(items, query)
    scopes: dict[str, Any] = {}
    for zone in catalog.ZONES:
        here = [each for each in chosen if each["zone"].endswith(f"/{zone}")]
        scopes[f"zones/{zone}"] = {f"{kind}s": here} if here else nothing_in(zone)
    link = f"{root}/aggregated/{kind}s"
    shown = {"kind": f"compute#{kind}AggregatedList", "id": link.partition("/v1/")[2], "selfLink": link}
    return {**shown, "items": scopes, **({"nextPageToken": following} if following else {})}


def nothing_in(zone: str) -> dict[str, Any]:
    data = [{"key": "scope", "value": f"zones/{zone}"}]
    message = f"There are no results for scope 'zones/{zone}' on this page."
    return {"warning": {"code": "NO_RESULTS_ON_PAGE", "message": message, "data": data}}


def choose(items: list[dict[str, Any]], query: dict[str, str]) -> tuple[list[dict[str, Any]], str]:
    """The items of the page that was asked for, and the token of the next."""
    if text := query.get("filter", ""):
        try:
            test = compile_filter(text)
        except ValueError as error:
            raise errors.invalid("filter", text, f"Invalid list filter expression: {error}.") from None
        items = [each for each in items if test(each)]
    items = sorted(items, key=lambda each: (each["name"], each.get("zone", "")))
    if query.get("orderBy") == "creationTimestamp desc":
        items.sort(
            key=lambda each: str(each.get("creationTimestamp") or each.get("insertTime")), reverse=True
        )
    elif query.get("orderBy", "name") != "name":
        raise errors.invalid(
            "orderBy", query["orderBy"], "Only name and creationTimestamp desc are supported."
        )
    most = int(query.get("maxResults", MOST))
    if not 0 <= most <= MOST:
        raise errors.invalid("maxResults", most, f"Must be between 0 and {MOST}.")
    start = position(items, query.get("pageToken", ""))
    chosen = items[start : start + (most or MOST)]
    following = "" if start + len(chosen) >= len(items) else token(chosen[-1])
    return chosen, following


def token(item: dict[str, Any]) -> str:
    """Names the last item of a page: what was deleted meanwhile must not shift the rest."""
    return base64.urlsafe_b64encode(f"{item['selfLink']}".encode()).decode()


def position(items: list[dict[str, Any]], text: str) -> int:
    if not text:
        return 0
    try:
        last = base64.urlsafe_b64decode(text).decode()
    except ValueError:
        raise errors.invalid("pageToken", text, "The page token is malformed.") from None
    links = [each["selfLink"] for each in items]
    if last in links:
        return links.index(last) + 1
    name = last.rpartition("/")[2]
    return next((n for n, each in enumerate(items) if each["name"] > name), len(items))
