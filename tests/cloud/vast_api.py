"""Methods of the API about contracts: offers, renting, and what is rented.

Sources: docs.vast.ai, api-reference; what the text leaves open is what vastai 1.9.1 reads.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from . import vast_errors as errors
from . import vast_offers
from .vast_checks import NEW_LABEL
from .vast_errors import Refusal
from .vast_view import instance

if TYPE_CHECKING:
    from .vast import Request
    from .vast_account import Market

PAGE = 25
# Contract columns; computed ones (dph_total, num_gpus) are refused (field report).
COLUMNS = ("id", "label", "actual_status", "gpu_name", "verification", "machine_id", "intended_status")


class InstanceMethods:
    def __init__(self, market: Market) -> None:
        self.market = market

    def bundles_search(self, request: Request) -> Any:
        query = request.body or {}
        now = self.market.clock.now()
        return {"offers": vast_offers.search(self.market.offers, query, now, self.market.faults.unfiltered)}

    def gpu_names_unique(self, request: Request) -> Any:
        return {"gpu_names": sorted({offer["gpu_name"] for offer in self.market.offers})}

    def asks_create(self, request: Request) -> Any:
        market, order = self.market, dict(request.body or {})
        if market.credit <= 0:
            raise errors.insufficient_credit()
        if market.faults.spend_limit:
            raise errors.spend_rate_limit()
        offer = market.find(request.number)
        if offer is None:
            raise errors.no_such_ask(request.number, market.faults.taken_status)
        if float(order["disk"]) > offer["disk_space"]:
            raise Refusal(400, "invalid_args", "disk is larger than what is available")
        price = order.get("price")
        blocked = offer["machine_id"] in market.faults.taken or (price or offer["min_bid"]) < offer["min_bid"]
        # The service's own defaults; vastai sends false (docs.vast.ai, "Create Instance").
        if blocked and order.get("cancel_unavail", not price):
            raise errors.no_such_ask(request.number, market.faults.taken_status)
        contract = market.rent(offer, order)
        answer = {"success": True, "new_contract": contract.id, "ask_id": request.number}
        if blocked or order.get("target_state") == "stopped":
            contract.park()
        else:
            contract.provision()
        if blocked:
            return {**errors.resources_unavailable().body(), **answer, "success": False}
        return {**answer, "instance_api_key": contract.key}

    # --- one

    def instances_get(self, request: Request) -> Any:
        found = self.market.contracts.get(request.number)
        if found is None or not found.visible:
            return {"instances": None}
        return {"instances": instance(found, by_id=True)}

    def instances_put(self, request: Request) -> Any:
        contract, body = self.market.contract(request.number), request.body or {}
        if len(body.get("label", "")) > NEW_LABEL:
            raise Refusal(400, "label_too_long", f"at most {NEW_LABEL} characters")
        contract.label = body.get("label", contract.label)
        state = body.get("state")
        if state not in (None, "running", "stopped"):
            raise Refusal(400, "invalid_args", f"no state {state}")
        if state == "stopped":
            contract.stop()
        if state == "running":
            if self.market.credit <= 0:
                raise Refusal(400, "missing_billing", "Your account lacks credit.")
            if not contract.start():
                raise errors.resources_unavailable()
        return {"success": True}

    def instances_delete(self, request: Request) -> Any:
        self.market.contract(request.number).destroy()
        return {"success": True}

    def instances_delete_many(self, request: Request) -> Any:
        numbers = (request.body or {}).get("instance_ids", [])
        if len(numbers) > 64:
            raise Refusal(400, "invalid_args", "at most 64 instances")
        found = [self.market.contracts.get(number) for number in numbers]
        for contract in found:
            if contract and not contract.gone:
                contract.destroy()
        return {"success": True}

    def instances_reboot(self, request: Request) -> Any:
        self.market.contract(request.number).reboot()
        return {"success": True}

    def instances_recycle(self, request: Request) -> Any:
        self.market.contract(request.number).reboot(wipe=True)
        return {"success": True}

    def instances_bid_price(self, request: Request) -> Any:
        contract, price = self.market.contract(request.number), request.body["price"]
        if not 0.001 <= price <= 32 * contract.offer["num_gpus"]:
            raise Refusal(400, "invalid_price", "0.001 to 32 per GPU")
        contract.rebid(price)
        return {"success": True}

    # --- all

    def instances_list_old(self, request: Request) -> Any:
        raise errors.deprecated()

    def instances_list(self, request: Request) -> Any:
        filters = of_json(request.query.get("select_filters"), {})
        for name in filters:
            if name not in COLUMNS:
                raise Refusal(400, "invalid_request", f"no filter on {name}")
        rows = [instance(each) for each in self.market.contracts.values() if each.visible]
        found = [row for row in rows if all(fits(row, *item) for item in filters.items())]
        for order in reversed(of_json(request.query.get("order_by"), [])):
            if order.get("col") not in COLUMNS:
                raise Refusal(400, "invalid_request", f"no order by {order}")
            found.sort(key=lambda row: str(row[order["col"]]), reverse=order.get("dir") == "desc")
        size = number(request.query.get("limit", PAGE))
        size = 5 if size <= 0 else min(size, PAGE)
        start = place(request.query.get("after_token"))
        page, more = found[start : start + size], start + size < len(found)
        labels = [row["label"] or "" for row in found]
        return {
            "success": True,
            "instances": [chosen(row, request.query.get("select_cols")) for row in page],
            "instances_found": len(page),
            "total_instances": len(found),
            "label_counts": {label: labels.count(label) for label in labels},
            "next_token": token(start + size) if more else None,
        }


def of_json(text: str | None, default: Any) -> Any:
    try:
        return json.loads(text) if text else default
    except ValueError:
        raise Refusal(400, "invalid_request", f"no JSON: {text}") from None


def number(text: Any) -> int:
    try:
        return int(text)
    except ValueError:
        raise Refusal(400, "invalid_request", f"no number: {text}") from None


def fits(row: dict[str, Any], name: str, wanted: dict[str, Any]) -> bool:
    return all(vast_offers.OPERATORS[op](row[name], bound) for op, bound in wanted.items())


def chosen(row: dict[str, Any], columns: str | None) -> dict[str, Any]:
    names = of_json(columns, None)
    return row if not names or "*" in names else {name: row.get(name) for name in {"id", *names}}


def token(start: int) -> str:
    return base64.urlsafe_b64encode(b"%d" % start).decode()


def place(text: str | None) -> int:
    """Of a page, from its token."""
    try:
        return int(base64.urlsafe_b64decode(text)) if text else 0
    except ValueError:
        raise Refusal(400, "invalid_token", "The token is not valid.") from None
