"""Where machines come from. A backend is a file beside this one and a line in `open_backend`."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from cloudrun.config import Settings
from cloudrun.errors import UsageError


class Offer(NamedTuple):
    """A concrete machine at a price: US dollars per hour, None if nobody knows.

    `where` is what its backend needs to rent it: a zone, say.
    """

    what: str
    price: float | None
    boot_seconds: float
    where: str = ""


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
    `kept`: it outlives its runs; `parked`: then what that costs while it is stopped.
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

    @property
    def billed(self) -> bool:
        """Whether it costs something that nobody wants to pay for."""
        return self.ended is None or self.leftover


class Backend(Protocol):
    """No retries, no printing, no other backend. Errors are CloudrunError."""

    name: str
    place: str  # see cloudrun.config.place
    pace: float  # seconds between two looks at a machine
    slowness: float  # how much longer than a process of this computer a machine may take to end
    least_billed: float  # seconds that each start of a machine costs at least
    appears_within: float  # seconds from a create call to the moment when its machine can be found
    stranger: bool  # its machines are somebody else's: they get a short-lived token, never an account

    def offers(self) -> list[Offer]:
        """What could be had now, best first; as many as make sense to try."""

    def create(self, name: str, offer: Offer, boot: Boot) -> None:
        """Start a machine under this name.

        Raises NoCapacity if this offer cannot be had, Held if another run has the machine, and in both
        cases nothing was started. When it raises anything else, a machine may have been started.
        """

    def find(self, name: str) -> Instance | None:
        """The machine of this name, or None if the provider says that there is none."""

    def all(self) -> list[Instance]:
        """Every machine that carries cloudrun's labels, of whatever run, parked ones included."""

    def others(self) -> list[str]:
        """Machines of this account that are billed and are not ours: named, never touched."""

    def stop(self, name: str) -> None:
        """Ask for the end of all billing for this name, and free what it left. Absent is success."""

    def taken_away(self, name: str) -> bool:
        """Whether the provider says that it took back the machine of this name, which has ended."""

    def console(self, name: str) -> str:
        """The last words on the machine's console; empty when there are none."""

    def by_hand(self, name: str) -> str:
        """The command with which a person ends it."""


def open_backend(settings: Settings) -> Backend:
    """Raises UsageError for a backend that this installation does not have."""
    if settings.backend == "local":
        from cloudrun.backends.local import LocalBackend

        return LocalBackend(settings.price or 0.0)
    if settings.backend == "gcp":
        from cloudrun.backends.gcp import GcpBackend

        return GcpBackend(settings)
    raise UsageError(f"the {settings.backend} backend is not part of this version; use --backend local")
