"""The provider's own limit: a job of vast.ai's scheduler that destroys an instance.

A job runs at minute 0 of every hour, from the hour that contains its start on: one that starts at 13:22
would run at 13:00. So it starts in the first full hour after the limit. One user has reported that it works;
nothing relies on it.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

from cloudrun.backends.vast_api import Api
from cloudrun.errors import CloudrunError

HOUR = 3600
LASTS = 24 * HOUR  # seconds; who forgets to remove it leaves nothing for ever
PATH = "/commands/schedule_job/"


def arm(api: Api, made: int, limit: float) -> str | None:
    """Have it destroyed after `limit`, seconds since the epoch; words for the user where that is refused."""
    start = (math.floor(limit / HOUR) + 1) * HOUR
    job = {
        "start_time": start + 1,
        "end_time": start + LASTS,
        "api_endpoint": f"/api/v0/instances/{made}/",
        "request_method": "DELETE",
        "request_body": {},
        "day_of_the_week": None,
        "hour_of_the_day": None,
        "frequency": "HOURLY",
        "instance_id": made,
    }
    try:
        api.act("post", PATH, job)
        if jobs(api, made):
            return None
        why = "the job is not in its list"
    except CloudrunError as error:
        why = str(error)
    return f"vast.ai itself would not end {made} after the deadline: {why}"


def jobs(api: Api, made: int) -> list[Any]:
    """Numbers of the jobs that would destroy this instance."""
    answer = api.ask(PATH, patience=0)
    rows = next((value for value in answer.values() if isinstance(value, list)), [])
    return [row.get("id") for row in rows if isinstance(row, dict) and row.get("instance_id") == made]


def disarm(api: Api, made: int) -> None:
    """Remove them, now that the instance is gone. What stays has nothing to destroy, and an end."""
    with suppress(CloudrunError):
        for job in jobs(api, made):
            api.act("delete", f"{PATH}{job}/", {})
