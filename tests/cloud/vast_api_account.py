"""Methods of the API about the account: the user, its credit and its charges.

Source: docs.vast.ai, api-reference.
"""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

from .vast_api import number, of_json, place, token
from .vast_contract import Contract
from .vast_errors import Refusal

if TYPE_CHECKING:
    from .vast import Request
    from .vast_account import Market


class AccountMethods:
    def __init__(self, market: Market) -> None:
        self.market = market
        self._numbers = itertools.count(601)

    def users_current(self, request: Request) -> Any:
        return {
            "id": 4711,
            "email": "user@example.com",
            "username": "user",
            "credit": self.market.credit,
            "balance": 0.0,
            "balance_threshold": 0.0,
            "balance_threshold_enabled": False,
            "autobill_threshold": None,
            "can_pay": True,
            "has_billing": True,
            "ssh_key": "",
            "api_key": self.market.key,
            "tfa_enabled": False,
            "host_agreement_accepted": False,
        }

    # --- ssh keys

    def ssh_create(self, request: Request) -> Any:
        key = self._key(request.body["ssh_key"])
        self.market.ssh_keys.append(key)
        return {"success": True, "key": key}

    def ssh_list(self, request: Request) -> Any:
        return self.market.ssh_keys

    def ssh_delete(self, request: Request) -> Any:
        self.market.ssh_keys[:] = without(self.market.ssh_keys, request.number)
        return {"success": True}

    def instances_attach_ssh(self, request: Request) -> Any:
        self.market.contract(request.number).ssh_keys.append(self._key(request.body["ssh_key"]))
        return {"success": True, "msg": "SSH key added to instance."}

    def instances_list_ssh(self, request: Request) -> Any:
        """The list is JSON inside of a text (field report)."""
        return {"success": True, "ssh_keys": json.dumps(self.market.contract(request.number).ssh_keys)}

    def instances_detach_ssh(self, request: Request) -> Any:
        contract = self.market.contract(request.number)
        contract.ssh_keys = without(contract.ssh_keys, request.numbers[1])
        return {"success": True}

    def _key(self, text: str) -> dict[str, Any]:
        if not text.startswith(("ssh-", "ecdsa-")):
            raise Refusal(400, "invalid_args", "Invalid ssh key.")
        now = self.market.clock.now()
        return {
            "id": next(self._numbers),
            "user_id": 4711,
            "public_key": text,
            "key": text,
            "created_at": now,
        }

    # --- charges

    def charges_list(self, request: Request) -> Any:
        filters = of_json(request.query.get("select_filters"), {})
        day = filters.get("day", {})
        if not {"gte", "lte"} <= set(day):
            text = "Must provide both 'day' gte and lte filters for instance charges"
            raise Refusal(400, "invalid_request", text)
        kinds = filters.get("type", {}).get("in", ["instance"])
        booked = self.market.clock.now() - self.market.faults.booked_late
        contracts = [each for each in self.market.contracts.values() if each.created <= booked]
        found = [self._charge(each, booked) for each in contracts if "instance" in kinds]
        found = [row for row in found if row["start"] <= day["lte"] and row["end"] >= day["gte"]]
        found.sort(key=lambda row: row["start"], reverse=request.query.get("latest_first") != "false")
        start, size = place(request.query.get("after_token")), number(request.query.get("limit", 100))
        page = found[start : start + min(size, 500)]
        more = start + len(page) < len(found)
        return {
            "success": True,
            "count": len(page),
            "total": len(found),
            "next_token": token(start + len(page)) if more else None,
            "results": page,
        }

    def _charge(self, contract: Contract, now: float) -> dict[str, Any]:
        """Of its whole life until then; the service makes one a day and adds them up."""
        account = self.market.meter.accounts[contract.id]
        start, end = int(account.created), int(min(account.destroyed or now, now))
        hours = account.gpu.seconds(now) / 3600
        amounts = account.amounts(now)
        texts = {"gpu": f"{hours:.3f} hours at ${account.price:.3f}/hour", "disk": f"{account.gigabytes} GB"}
        items = [
            charge(start, end, kind, None, texts.get(kind, ""), amount, {}, [])
            for kind, amount in amounts.items()
        ]
        text = f"Instance {contract.id} Charges"
        known = {"template_id": None, "label": contract.label}
        total = sum(amounts.values())
        return charge(start, end, "instance", f"instance-{contract.id}", text, total, known, items)


def charge(
    start: int,
    end: int,
    kind: str,
    source: str | None,
    text: str,
    amount: float,
    known: dict[str, Any],
    items: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "start": start,
        "end": end,
        "type": kind,
        "source": source,
        "description": text,
        "amount": amount,
        "metadata": known,
        "items": items,
    }


def without(keys: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    left = [key for key in keys if key["id"] != number]
    if len(left) == len(keys):
        raise Refusal(404, "not_found", f"no ssh key {number}")
    return left
