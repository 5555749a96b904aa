"""Scheduled jobs: calls that vast.ai makes by itself, in the name of the account.

Sources: docs.vast.ai, api-reference, "Create Scheduled Job", for the answers. When a job fires was seen by
one public project only (field report): at minute 0, from the hour on that holds start_time, even if that is
before start_time. What is called is not limited to what the CLI schedules.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import TYPE_CHECKING, Any

from .server import Reply
from .vast_errors import Refusal

if TYPE_CHECKING:
    from .vast import Request
    from .vast_account import Market

HOUR = 3600.0
HORIZON = 24 * 7  # hours: a job of each frequency is due within it
MOST = 2048


class JobMethods:
    def __init__(self, market: Market) -> None:
        self.market = market
        self.jobs: dict[int, dict[str, Any]] = {}
        self.fired: list[tuple[int, float, int]] = []  # (job, time, status of the answer)
        self._numbers = itertools.count(4201)

    # --- the API

    def schedule_create(self, request: Request) -> Any:
        body = request.body
        self._check(body)
        same = ("instance_id", "api_endpoint", "request_method")
        for number, job in self.jobs.items():
            if all(job[name] == body[name] for name in same):
                text = "A matching scheduled job exists."
                raise Refusal(422, "job_exists", text, scheduled_job_id=number)
        number = next(self._numbers)
        self.jobs[number] = {"id": number, "user_id": 4711, **body}
        self._plan(number)
        text = (
            f"Successfully inserted new scheduled job with ID {number} for instance_id {body['instance_id']}"
        )
        return {"success": True, "scheduled_job_id": number, "msg": text}

    def schedule_list(self, request: Request) -> Any:
        return Reply(200, json.dumps(list(self.jobs.values())[:MOST]).encode())

    def schedule_update(self, request: Request) -> Any:
        job = self._job(request.number)
        new = {**job, **request.body}
        self._check(new)
        self.jobs[request.number] = new
        self._plan(request.number)
        return {"success": True, "msg": f"Scheduled job {request.number} updated"}

    def schedule_delete(self, request: Request) -> Any:
        self._job(request.number)
        del self.jobs[request.number]
        return {"success": True, "msg": f"Scheduled job {request.number} deleted successfully"}

    def _job(self, number: int) -> dict[str, Any]:
        if number not in self.jobs:
            raise Refusal(404, "not_found", f"no scheduled job {number}")
        return self.jobs[number]

    def _check(self, body: dict[str, Any]) -> None:
        wrong = [
            name
            for name, needed in (
                ("start_time", isinstance(body.get("start_time"), (int, float))),
                ("frequency", body.get("frequency") in ("HOURLY", "DAILY", "WEEKLY")),
                ("api_endpoint", str(body.get("api_endpoint")).startswith("/api/")),
                ("request_method", body.get("request_method") in ("GET", "PUT", "POST", "DELETE")),
                ("instance_id", body.get("instance_id") in self.market.contracts),
                (
                    "hour_of_the_day",
                    _fits(body.get("hour_of_the_day"), body.get("frequency") != "HOURLY", 23),
                ),
                ("day_of_the_week", _fits(body.get("day_of_the_week"), body.get("frequency") == "WEEKLY", 6)),
            )
            if not needed
        ]
        if wrong:
            raise Refusal(400, "invalid_args", f"invalid or missing: {', '.join(wrong)}")

    # --- the clock

    def _plan(self, number: int) -> None:
        job = self.jobs[number]
        when = self._next(job)
        if when is not None:
            self.market.clock.at(when, self._due, number, job)

    def _next(self, job: dict[str, Any]) -> float | None:
        """The next full hour of this job; None when it is over."""
        hour = job["start_time"] // HOUR * HOUR
        while hour <= self.market.clock.now():
            hour += HOUR
        for _ in range(HORIZON):
            if job.get("end_time") is not None and hour > job["end_time"]:
                return None
            if _matches(job, hour):
                return float(hour)
            hour += HOUR
        return None

    def _due(self, number: int, job: dict[str, Any]) -> None:
        if self.jobs.get(number) is job:  # neither deleted nor changed
            self.fire(number)
            self._plan(number)

    def fire(self, number: int) -> None:
        job = self.jobs[number]
        reply = self.market.call(job["request_method"], job["api_endpoint"], job["request_body"])
        self.fired.append((number, self.market.clock.now(), reply.status))


def _fits(value: Any, needed: bool, most: int) -> bool:
    return value in range(most + 1) if needed else value is None


def _matches(job: dict[str, Any], hour: float) -> bool:
    when = time.gmtime(hour)
    # Sunday is 0 here (vastai 1.9.1), and 6 in Python.
    day, wanted = (when.tm_wday + 1) % 7, job.get("day_of_the_week")
    return (job["frequency"] == "HOURLY" or when.tm_hour == job["hour_of_the_day"]) and wanted in (None, day)
