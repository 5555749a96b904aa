"""Where machines come from. A backend is a file beside this one and a line in `open_backend`."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from cloudrun.config import Settings


class Need(NamedTuple):
    """What a run moves and how long it may take, for choosing a machine: bytes, seconds, US dollars.

    `hours`: for so long offers are compared. `most`: what it may cost, if that is limited.
    """

    bytes_in: int = 0
    bytes_out: int = 0
    hours: float = 1.0
    seconds: float = 3600.0
    most: float | None = None


class Offer(NamedTuple):
    """A concrete machine at a price: US dollars per hour, None if nobody knows.

    `where` is what its backend needs to rent it: a zone, say. `once`: US dollars however long it takes,
    for traffic. `expected`: in all, for the hours that were asked for. Speeds in Mbit/s; reliability 0 to 1.
    """

    what: str
    price: float | None
    boot_seconds: float
    where: str = ""
    once: float = 0.0
    expected: float | None = None
    reliability: float | None = None
    down: float | None = None
    up: float | None = None
    place: str = ""


class Cost(NamedTuple):
    """US dollars of one machine; None: nobody knows. And from when to when, if its provider says that.

    `note`: why it may not be what the provider will say.
    """

    gpu: float
    disk: float
    traffic: float | None
    started: float | None = None
    ended: float | None = None
    note: str = ""

    @property
    def total(self) -> float | None:
        return None if self.traffic is None else self.gpu + self.disk + self.traffic

    def plus(self, other: Cost) -> Cost:
        known = self.traffic is not None and other.traffic is not None
        traffic = (self.traffic or 0.0) + (other.traffic or 0.0)
        starts = [cost.started for cost in (self, other) if cost.started is not None]
        ends = [cost.ended for cost in (self, other) if cost.ended is not None]
        return Cost(
            gpu=self.gpu + other.gpu,
            disk=self.disk + other.disk,
            traffic=traffic if known else None,
            started=min(starts, default=None),
            ended=max(ends, default=None),
            note=self.note or other.note,
        )


class Boot(NamedTuple):
    """What a machine gets in the call that creates it. `payload` is CLOUDRUN_BOOT of cloudrun.formats.

    `seconds`: the provider's own limit, from now on.
    """

    run: str
    attempt: int
    deadline: str
    payload: dict[str, Any]
    seconds: float = 0.0


class Instance(NamedTuple):
    """A machine as its provider describes it now.

    `alive`: a guard or an agent can still end it. `ended`: since when the provider does not bill it
    any more; then `why` is the machine's own last word, if it had one, and `leftover` says that
    something of it is billed still that nobody keeps, a disk. `price`: US dollars per hour, if it says so.
    `kept`: it outlives its runs; `parked`: then what that costs while it is stopped. `coming`: no guard can
    be heard of yet, and the backend keeps the time. `lost`: why the run has to go on elsewhere, whatever
    becomes of this machine: taken away, out of reach, of no use.
    """

    name: str
    run: str
    attempt: int
    deadline: str
    started: float
    alive: bool
    ended: float | None = None
    why: str = ""
    leftover: bool = False
    price: float | None = None
    parked: str = ""
    kept: bool = False
    coming: bool = False
    lost: str = ""

    @property
    def billed(self) -> bool:
        """Whether it costs something that nobody wants to pay for."""
        return self.ended is None or self.leftover


class Survey(NamedTuple):
    """What an account has. `ours`: as `all`. `others`: what else is billed there, named and never touched.

    `disks`: with cloudrun's labels and without a machine, as machines that have ended: `leftover` if it is
    a run's, else one that was kept; `parked` says what it costs. `unseen`: why they are not told.
    """

    ours: list[Instance]
    others: list[str]
    disks: list[Instance] = []  # noqa: RUF012
    unseen: str = ""


ANYTHING = Need()


class Backend(Protocol):
    """No retries, no printing, no other backend. Errors are CloudrunError."""

    name: str
    place: str  # see cloudrun.config.place
    pace: float  # seconds between two looks at a machine
    slowness: float  # how much longer than a process of this computer a machine may take to end
    least_billed: float  # seconds that each start of a machine costs at least
    appears_within: float  # seconds from a create call to the moment when its machine can be found
    # Its machines are somebody else's: they get a short-lived token, never an account. One may be of no use.
    stranger: bool

    def warm_up(self) -> None:
        """A machine will be created or ended soon: load what that takes, on a thread. Raises nothing."""

    def offers(self, need: Need = ANYTHING) -> list[Offer]:
        """What could be had now, best first; as many as make sense to try."""

    def create(self, name: str, offer: Offer, boot: Boot) -> str | None:
        """Start a machine under this name; returns what the user has to know of it, if anything.

        Raises NoCapacity if this offer cannot be had, Held if another run has the machine, Refused if no
        offer can be had, and in all cases nothing was started. When it raises anything else, a machine may
        have been started.
        """

    def find(self, name: str) -> Instance | None:
        """The machine of this name, or None if the provider says that there is none."""

    def all(self) -> list[Instance]:
        """Every machine that carries cloudrun's labels, of whatever run, parked ones included."""

    def survey(self) -> Survey:
        """All that there is at one look. From then on `find`, `stop` and `by_hand` know the disks by name."""

    def stop(self, name: str) -> None:
        """Ask for the end of all billing for this name, and free what it left. Absent is success."""

    def taken_away(self, name: str) -> bool:
        """Whether the provider says that it took back the machine of this name, which has ended."""

    def cost(self, name: str) -> Cost | None:
        """What the machine of this name, which was seen ended, has cost; None: time and price say it."""

    def console(self, name: str) -> str:
        """The last words on the machine's console; empty when there are none."""

    def by_hand(self, name: str) -> str:
        """The command with which a person ends it."""


def open_backend(settings: Settings) -> Backend:
    """Raises UsageError for settings that its backend cannot make sense of."""
    if settings.backend == "local":
        from cloudrun.backends.local import LocalBackend

        return LocalBackend(settings.price or 0.0)
    if settings.backend == "gcp":
        from cloudrun.backends.gcp import GcpBackend

        return GcpBackend(settings)
    from cloudrun.backends.vast import VastBackend

    return VastBackend(settings)
