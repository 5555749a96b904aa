"""What a container has written to its console: asked for by its number, and there some seconds later."""

from __future__ import annotations

import math
import time
from contextlib import suppress

from cloudrun.backends.vast_api import Api, ApiError

READ_LOOKS = 4  # looks between two requests for a console …
TEXT_SECONDS = 30.0  # … of which the text is there by then, or never


class Consoles:
    """`pace`: seconds between two looks."""

    def __init__(self, api: Api, pace: float) -> None:
        self._api, self._pause = api, READ_LOOKS * pace
        self._known: dict[int, tuple[float, str, str]] = {}  # when asked for, where it is, what it said

    def read(self, made: int, *, gone: bool) -> str:
        """What is known of it by now; of one that is gone nothing new can be asked for."""
        asked, url, text = self._known.get(made, (-math.inf, "", ""))
        if url and (new := self._api.fetched(url)) is not None:
            url, text = "", new
        age = time.monotonic() - asked
        if not gone and age > (TEXT_SECONDS if url else self._pause):
            asked = time.monotonic()
            with suppress(ApiError):
                answer = self._api.act("put", f"/instances/request_logs/{made}/", {"tail": "200"})
                url = str(answer.get("result_url") or "")
        self._known[made] = asked, url, text
        return text.replace("\r\n", "\n")[-4000:]
