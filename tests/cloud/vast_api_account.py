"""Methods of the API about the account: the user, its credit and its charges.

Source: docs.vast.ai, api-reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .vast import Request
    from .vast_account import Market


class AccountMethods:
    def __init__(self, market: Market) -> None:
        self.market = market

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
