"""Faults of the services: the bucket, Compute Engine, vast.ai. Lines of the catalogue's table."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cloud import errors, vast_errors
from cloud.faults import Answer, Empty, LostReply, LostRequest, Slow, Stale
from cloud.vast_account import NOTHING_RUNS, Instead

from .judges import BLINDS, HAMPERS, LATER

METHODS = {
    "gcp": ("instances.insert", "instances.get", "instances.aggregatedList", "instances.delete", "*"),
    "vast": ("asks.create", "instances.get", "instances.list", "instances.delete", "charges.list", "*"),
}
WINDOW = 2.0  # seconds that a storm takes


def refusal(backend: str, status: int) -> Any:
    if backend == "vast":
        return vast_errors.too_many_requests(0.1) if status == 429 else vast_errors.bad_gateway(status)
    if status == 429:
        return errors.ApiError(429, "rateLimitExceeded", "Rate Limit Exceeded")
    return errors.ApiError(status, "backendError", "Backend Error")


def calls(effect: Callable[[Any], Any], *, only: dict[str, str] | None = None, most: int = 3) -> Any:
    """The n-th call of some method, and perhaps those after it, ends like this."""

    def act(play: Any) -> None:
        method = only[play.backend] if only else play.rng.choice(METHODS[play.backend])
        nth, times = play.rng.randint(1, 3), play.rng.randint(1, most)
        play.cloud.faults.on(method, effect(play), nth=nth, times=times)

    return act


def storm(effect: Callable[[Any], Any]) -> Any:
    """Every call for a while, from some moment on."""

    def act(play: Any) -> None:
        rule = play.cloud.faults.on("*", effect(play), times=None)
        play.over.wait(WINDOW)
        with suppress(ValueError):
            play.cloud.faults.rules.remove(rule)

    return act


def appears_late(play: Any) -> None:
    play.cloud.faults.appear_after["*"] = play.rng.choice((0.03, 0.7))


def stuck(play: Any) -> None:
    """Whatever is stopped stays, and is billed, for a while."""
    names = play.cloud.meter.running()
    if play.backend == "vast":
        names = [play.cloud.instances[name].offer["machine_id"] for name in names]
    play.cloud.faults.stuck.update(names)
    play.over.wait(2.5)
    play.cloud.faults.stuck.clear()


def offline(play: Any) -> Callable[[], None]:
    """The machine cannot reach its provider."""
    names = play.cloud.meter.running()
    if play.backend == "vast":
        names = [play.cloud.instances[name].offer["machine_id"] for name in names]
    play.cloud.faults.offline.update(names)
    return play.cloud.faults.offline.clear


def expire(play: Any) -> None:
    play.cloud.tokens.expire()


def bad_key(play: Any) -> None:
    storm(lambda _: Answer(vast_errors.bad_key()))(play)


def forbidden(play: Any) -> None:
    storm(lambda _: Answer(errors.forbidden("compute.instances.get", "this")))(play)


# --- the bucket


def cut(play: Any) -> None:
    """Nobody reaches the bucket for a while."""
    if play.storage:
        with play.storage.faults.unreachable():
            play.over.wait(play.rng.choice((1.0, 3.0)))
        return
    bucket = play.top / "share/cloudrun/bucket"
    bucket.rename(bucket.with_name("hidden"))
    bucket.touch()
    play.over.wait(play.rng.choice((0.5, 2.0)))
    bucket.unlink()
    bucket.with_name("hidden").rename(bucket)


def one_side(client: bool) -> Callable[[Any], None]:
    """Only the client, or only machines, cannot reach it. The client's libraries say who they are."""

    def act(play: Any) -> None:
        def matches(call: Any) -> bool:
            return call.user_agent.startswith(("gcloud-python", "python-requests")) == client

        fault = play.storage.faults.add(matches, times=float("inf"), cut="before")
        play.over.wait(3.0)
        fault.left = 0

    return act


def slow(play: Any) -> None:
    fault = play.storage.faults.add(times=float("inf"), hold=0.3)
    play.over.wait(4.0)
    fault.left = 0


def answered(kinds: str, most: int, **what: Any) -> Callable[[Any], None]:
    """The n-th request of a kind, and some after it."""

    def act(play: Any) -> None:
        kind, nth = play.rng.choice(kinds.split()), play.rng.randint(0, 6)
        seen = iter(range(10**9))

        def matches(call: Any) -> bool:
            return kind in ("*", call.kind) and next(seen) >= nth

        play.storage.faults.add(matches, times=play.rng.randint(1, most), **what)

    return act


KINDS = "insert read get list delete * *"
CLOUDS = ("gcp", "vast")


def storage_faults(any_time: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    return [
        ("bucket: out of reach", ("local", *CLOUDS), cut, (HAMPERS, BLINDS), any_time),
        ("bucket: out of the client's reach", CLOUDS, one_side(True), (BLINDS,), any_time),
        ("bucket: out of the machine's reach", CLOUDS, one_side(False), (HAMPERS,), any_time),
        ("bucket: slow", CLOUDS, slow, (HAMPERS,), any_time),
        ("bucket: 503", CLOUDS, answered(KINDS, 4, status=503), (HAMPERS,)),
        ("bucket: 429", CLOUDS, answered(KINDS, 4, status=429), (HAMPERS,)),
        ("bucket: lost reply", CLOUDS, answered(KINDS, 2, cut="after"), (HAMPERS,)),
        ("bucket: lost request", CLOUDS, answered(KINDS, 2, cut="before"), (HAMPERS,)),
    ]


AT = (("claim", 0), ("agent", 0), ("step", 2), ("end", 0), ("receipt", 0))
DELETE = {"gcp": "instances.delete", "vast": "instances.delete"}
LISTS = {"gcp": "instances.aggregatedList", "vast": "instances.list"}
GET = {"gcp": "instances.get", "vast": "instances.get"}
MAY = (LATER, BLINDS)

SERVICES: list[tuple[Any, ...]] = [
    ("provider: 429 for a while", CLOUDS, storm(lambda p: Answer(refusal(p.backend, 429))), MAY, AT),
    ("provider: 503 for a while", CLOUDS, storm(lambda p: Answer(refusal(p.backend, 503))), MAY, AT),
    ("provider: out of reach", CLOUDS, storm(lambda p: LostRequest()), MAY, AT),
    ("provider: 429", CLOUDS, calls(lambda p: Answer(refusal(p.backend, 429))), MAY),
    ("provider: 502", CLOUDS, calls(lambda p: Answer(refusal(p.backend, 502))), MAY),
    (
        "provider: 502 after the effect",
        CLOUDS,
        calls(lambda p: Answer(refusal(p.backend, 502), done=True)),
        MAY,
    ),
    ("provider: lost reply", CLOUDS, calls(lambda p: LostReply()), MAY),
    ("provider: lost request", CLOUDS, calls(lambda p: LostRequest()), MAY),
    ("provider: slow", CLOUDS, calls(lambda p: Slow(1.5)), MAY),
    ("provider: stale reads", CLOUDS, calls(lambda p: Stale(), only=GET), MAY),
    ("provider: stale lists", CLOUDS, calls(lambda p: Stale(), only=LISTS), MAY),
    ("provider: empty lists", ("gcp",), calls(lambda p: Empty(), only=LISTS, most=6), MAY),
    ("provider: empty lists", ("vast",), calls(lambda p: NOTHING_RUNS, only=LISTS, most=6), MAY),
    (
        "provider: a stop is refused",
        CLOUDS,
        calls(lambda p: Answer(refusal(p.backend, 503)), only=DELETE),
        MAY,
    ),
    (
        "provider: a destroy is ignored",
        ("vast",),
        calls(lambda p: Instead({"success": True}), only=DELETE),
        MAY,
    ),
    ("provider: machines appear late", CLOUDS, appears_late, MAY),
    ("provider: stuck stopping", CLOUDS, stuck, MAY, AT),
    ("provider: out of the machine's reach", CLOUDS, offline, MAY, AT[1:]),
    ("credentials: of the machine expire", ("gcp",), expire, (HAMPERS,), AT[1:]),
    ("credentials: refused for a while", ("vast",), bad_key, MAY, AT),
    ("credentials: refused for a while", ("gcp",), forbidden, MAY, AT),
]
