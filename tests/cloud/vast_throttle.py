"""How often vast.ai may be called: per method and key, with a plain text for who comes too often.

Source: docs.vast.ai, "Rate Limits" and x-rateLimit of its api-reference. What is refused does not count.
"""

from __future__ import annotations

from .vast_errors import too_many_requests

# Least seconds between two calls.
APART = {
    "asks.create": 4.5,
    "instances.get": 2.0,
    "instances.list": 1.0,
    "instances.delete": 3.0,
    "charges.list": 1.0,
    "schedule.create": 3.5,
    "schedule.list": 3.5,
    "schedule.delete": 3.5,
}
SEARCHES, MINUTE = 10, 60.0


class Throttle:
    """`scale`: 1.0 is the service's own pace, 0.0 none."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._calls: dict[tuple[str, str], list[float]] = {}

    def check(self, method: str, key: str, now: float) -> None:
        """Raises Plain, 429."""
        most, seconds = (SEARCHES, MINUTE) if method == "bundles.search" else (1, APART.get(method, 0.0))
        recent = [each for each in self._calls.get((method, key), ()) if now - each < seconds * self._scale]
        if len(recent) >= most:
            raise too_many_requests(seconds)
        self._calls[method, key] = [*recent, now]
