"""What can be made to go wrong, from outside, while clients talk to the emulated services."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol

from .errors import ApiError
from .server import Cut, Reply, json_reply


class Effect(Protocol):
    def around(self, faults: Faults, request: Any, perform: Callable[[], Reply]) -> Reply:
        """Answer this request; `perform` does what was asked for and returns the true answer."""


@dataclass
class LostRequest:
    """The connection breaks before anything was done."""

    def around(self, faults: Faults, request: Any, perform: Callable[[], Reply]) -> Reply:
        raise Cut


@dataclass
class LostReply:
    """Done, but the connection breaks before the answer."""

    def around(self, faults: Faults, request: Any, perform: Callable[[], Reply]) -> Reply:
        perform()
        raise Cut


@dataclass
class Answer:
    """This error is answered; with `done`, after doing what was asked for (an insert that leaves a VM)."""

    error: ApiError
    done: bool = False

    def around(self, faults: Faults, request: Any, perform: Callable[[], Reply]) -> Reply:
        if self.done:
            perform()
        return self.error.reply()


@dataclass
class Slow:
    """Done at once and answered so many seconds later; with `late`, done only then."""

    seconds: float
    late: bool = False

    def around(self, faults: Faults, request: Any, perform: Callable[[], Reply]) -> Reply:
        if self.late:
            faults.closed.wait(self.seconds)
            return perform()
        reply = perform()
        faults.closed.wait(self.seconds)
        return reply


@dataclass
class Stale:
    """The answer that the same question got last time."""

    def around(self, faults: Faults, request: Any, perform: Callable[[], Reply]) -> Reply:
        return faults.last.get(request.address) or perform()


@dataclass
class Empty:
    """A list without its items."""

    def around(self, faults: Faults, request: Any, perform: Callable[[], Reply]) -> Reply:
        found = json.loads(perform().body)
        return json_reply(
            {key: value for key, value in found.items() if key not in ("items", "nextPageToken")}
        )


@dataclass
class Rule:
    """`effect` for the matching calls from the `nth` on, `times` of them. `calls` and `fired` count."""

    method: str
    effect: Effect
    nth: int = 1
    times: int | None = 1
    when: Callable[[Any], bool] | None = None
    calls: int = 0
    fired: int = 0

    def takes(self, request: Any) -> bool:
        if not fnmatchcase(request.method, self.method) or (self.when and not self.when(request)):
            return False
        self.calls += 1
        if self.calls < self.nth or (self.times is not None and self.fired >= self.times):
            return False
        self.fired += 1
        return True


@dataclass
class Faults:
    """Rules about single requests, and states of the cloud that tests write to directly."""

    rules: list[Rule] = field(default_factory=list)
    # Names whose instance shows up in get and list only so many seconds after its insert (patterns).
    appear_after: dict[str, float] = field(default_factory=dict)
    stuck: set[str] = field(default_factory=set)  # instances that stay STOPPING, and are billed
    offline: set[str] = field(default_factory=set)  # instances whose every connection breaks
    isolated: set[str] = field(default_factory=set)  # instances that boot without any network
    lacking: set[str] = field(default_factory=set)  # what images do not have: systemd, python3
    denied: set[tuple[str, str]] = field(default_factory=set)  # (principal or *, permission)
    disabled: set[str] = field(default_factory=set)  # APIs, compute.googleapis.com
    anonymous: bool = True  # requests without a token are let in
    last: dict[str, Reply] = field(default_factory=dict)
    closed: threading.Event = field(default_factory=threading.Event)
    _counting: threading.Lock = field(default_factory=threading.Lock)

    def on(
        self,
        method: str,
        effect: Effect,
        *,
        nth: int = 1,
        times: int | None = 1,
        when: Callable[[Any], bool] | None = None,
    ) -> Rule:
        """`method` as in the discovery document, `instances.insert`, or a pattern; `times=None`: for ever."""
        rule = Rule(method, effect, nth, times, when)
        self.rules.append(rule)
        return rule

    def clear(self) -> None:
        """Everything works again."""
        self.rules.clear()
        self.appear_after.clear()
        for each in (self.stuck, self.offline, self.isolated, self.lacking, self.denied, self.disabled):
            each.clear()

    def answer(self, request: Any, perform: Callable[[], Reply]) -> Reply:
        with self._counting:
            rule = next((rule for rule in self.rules if rule.takes(request)), None)
        reply = rule.effect.around(self, request, perform) if rule else perform()
        if reply.status == 200 and not rule:
            self.last[request.address] = reply
        return reply

    def delay_of(self, name: str) -> float:
        return max((s for pattern, s in self.appear_after.items() if fnmatchcase(name, pattern)), default=0.0)
