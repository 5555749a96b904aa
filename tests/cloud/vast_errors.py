"""Errors of the vast.ai API: a status, a slug and a text (docs.vast.ai, "Create Instance" and the like)."""

from __future__ import annotations

from typing import Any

from .errors import ApiError
from .server import Reply, json_reply


class Refusal(ApiError):
    """An error answer. `more` stands beside the slug and the text."""

    def __init__(self, status: int, slug: str, text: str, **more: Any) -> None:
        super().__init__(status, slug, text)
        self.more = more
        self.headers: tuple[tuple[str, str], ...] = ()

    def body(self) -> dict[str, Any]:
        return {"success": False, "error": self.reason, "msg": self.message, **self.more}

    def reply(self) -> Reply:
        return json_reply(self.body(), self.code)._replace(headers=self.headers)


class Plain(ApiError):
    """An answer that is no JSON."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status, "plain", text)

    def reply(self) -> Reply:
        return Reply(self.code, self.message.encode(), "text/html; charset=utf-8")


def bad_key(status: int = 401) -> Refusal:
    """404 was seen too (field report), and is in the docs of the search."""
    return Refusal(status, "auth_error", "Invalid user key")


def forbidden(what: str) -> Refusal:
    return Refusal(403, "forbidden", f"This key has no permission: {what}")  # assumed


def no_such_ask(offer: int, status: int = 410) -> Refusal:
    """410 with cancel_unavail; 404 and 400 were seen for an offer that had been taken (field reports)."""
    text = f"error {status}/3603: no_such_ask Instance type by id {offer} is not available."
    return Refusal(status, "no_such_ask", text, ask_id=offer)


def no_such_instance(number: Any, status: int = 404) -> Refusal:
    return Refusal(status, "no_such_instance", f"Instance {number} not found.")


def deprecated() -> Refusal:
    text = "/api/v0/instances/ is deprecated. Use /api/v1/instances/ instead."
    return Refusal(410, "deprecated_endpoint", text)


def resources_unavailable() -> Refusal:
    text = "Required resources are currently unavailable, state change queued."
    return Refusal(200, "resources_unavailable", text)


def insufficient_credit() -> Refusal:
    return Refusal(400, "insufficient_credit", "Your account lacks credit; see the billing page.")


def spend_rate_limit() -> Refusal:
    """Of new accounts (docs.vast.ai, "Troubleshooting"); the status is assumed."""
    return Refusal(400, "spend_rate_limit", "Your account has reached its spend rate limit.")


def too_many_requests(threshold: float) -> Plain:
    return Plain(429, f"API requests too frequent endpoint threshold={threshold}")


def search_quota_exceeded(reset: float) -> Refusal:
    """Of the day; `reset` in unix seconds. vastai 1.9.1 does not ask again."""
    error = Refusal(429, "search_quota_exceeded", "Daily search quota exceeded.")
    error.headers = (("X-RateLimit-Reset", str(int(reset))),)
    return error


def bad_gateway(status: int = 502) -> Plain:
    return Plain(status, f"<html><head><title>{status} Bad Gateway</title></head></html>")
