"""The faults: one table. A line says what it is called, where it can be had, what it does, what it excuses.

What it does is a function of the play that makes it happen; it may give back another one that mends it.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from .judges import ENDS, HAMPERS, JUMPS, KILLS, LATER, OVER, SLEEPS, Fault
from .services import SERVICES, storage_faults

ALL, CLOUDS, LOCAL, GCP, VAST = ("local", "gcp", "vast"), ("gcp", "vast"), ("local",), ("gcp",), ("vast",)


class Entry(NamedTuple):
    """`act(play)`. `events`: at which moments; none: from the start, when it waits for its request."""

    name: str
    backends: tuple[str, ...]
    act: Callable[[Any], Callable[[], None] | None]
    excuses: tuple[str, ...] = ()
    events: tuple[tuple[str, int], ...] = ()


@dataclass
class Drawn:
    """`event`, and so many seconds later: when it happens."""

    told: Fault
    play: Any
    entry: Entry
    event: tuple[str, int] | None
    delay: float
    rng: random.Random
    mend: Callable[[], None] | None = None

    def act(self) -> None:
        self.mend = self.entry.act(self.play)
        if self.play.healed.is_set():  # it comes too late to be mended with the others
            self.heal()

    def heal(self) -> None:
        mend, self.mend = self.mend, None
        if mend:
            mend()


# --- what is done to processes and machines


def signals(*names: str, pause: float = 0.3) -> Callable[[Any], None]:
    def act(play: Any) -> None:
        for name in names:
            if not play.done(play.main_client):
                play.main_client.send_signal(getattr(signal, name))
                time.sleep(pause)

    return act


def interrupt_and_kill(play: Any) -> None:
    signals("SIGINT")(play)
    kill_client(play)


def kill_client(play: Any) -> None:
    play.kill(play.main_client)


def stop_client(play: Any) -> None:
    play.stopped.append(play.main_client.pid)
    play.main_client.send_signal(signal.SIGSTOP)


def pause_client(play: Any) -> None:
    play.main_client.send_signal(signal.SIGSTOP)
    play.over.wait(2.0)
    play.main_client.send_signal(signal.SIGCONT)


def second(*arguments: str, then: Callable[[Any], None] | None = None) -> Callable[[Any], None]:
    """Another client, beside the first one; then something happens to that."""

    def act(play: Any) -> None:
        play.start(*arguments, kind="wait" if arguments == ("wait",) else "other")
        play.over.wait(0.7)
        if then:
            then(play)

    return act


def processes(role: str, name: str, resumed: float | None = None) -> Callable[[Any], None]:
    """A signal to all of this role; SIGCONT after so many seconds."""

    def act(play: Any) -> None:
        found = play.place.role(role)
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, getattr(signal, name))
        if resumed:
            play.over.wait(resumed)
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    return act


def both_die(play: Any) -> None:
    processes("guard", "SIGKILL")(play)
    processes("agent", "SIGKILL")(play)


def both_hang(play: Any) -> None:
    processes("guard", "SIGSTOP")(play)
    processes("agent", "SIGSTOP")(play)


def all_hang(play: Any) -> None:
    both_hang(play)
    processes("program", "SIGSTOP")(play)


def clock_is_wrong(play: Any) -> None:
    play.shift.write_text(str(play.rng.choice((-3600, -30, 30, 3600))))


def take_away(play: Any) -> None:
    play.place.take_away()


def lose_host(play: Any) -> Callable[[], None] | None:
    (name,) = play.cloud.meter.running()
    if play.backend == "gcp":
        play.cloud.host_error(name)
        return None
    play.cloud.offline(name)
    play.over.wait(play.rng.choice((1.0, 4.0)))
    play.cloud.back(name)
    return None


def freeze(play: Any, seconds: float | None = None) -> None:
    (name,) = play.cloud.meter.running()
    if play.backend == "vast":
        play.cloud.freeze(name)
        again = lambda: play.cloud.thaw(name)  # noqa: E731
    else:
        machine = play.cloud.machine(name)
        machine.freeze()
        again = machine.thaw
    if seconds:
        play.over.wait(seconds)
        again()


def freeze_a_while(play: Any) -> None:
    freeze(play, 1.5)


def reboot(play: Any) -> None:
    (name,) = play.cloud.meter.running()
    if play.backend == "vast":
        play.cloud.restart(name)
        return
    with play.cloud.clock.changed:
        play.cloud.instance(name).blink()


def full_disk(play: Any) -> Callable[[], None] | None:
    """What the machine writes, main.py included, is refused from now on; a third of the time, for a while."""
    filler = play.small_disk / "filler"
    with suppress(OSError), open(filler, "wb") as file:
        while True:
            file.write(bytes(1 << 16))
    if play.rng.random() < 0.3:
        play.over.wait(1.5)
        filler.unlink()
        return None
    return lambda: filler.unlink(missing_ok=True)


# --- the table

EARLY = (("order", 0), ("claim", 0), ("agent", 0), ("start", 0))
WORK = (("start", 0), ("step", 1), ("step", 2), ("step", 4), ("writing", 1), ("writing", 3), ("saved", 0))
END = (("end", 0), ("receipt", 0))
ANY = (*EARLY, *WORK, *WORK, *END)

CATALOGUE = [
    Entry("client: killed", ALL, kill_client, (), ANY),
    Entry("client: stopped", ALL, stop_client, (), ANY),
    Entry("client: stopped for a while", ALL, pause_client, (SLEEPS,), ANY),
    Entry("client: INT", ALL, signals("SIGINT"), (ENDS,), ANY),
    Entry("client: INT twice", ALL, signals("SIGINT", "SIGINT"), (ENDS, HAMPERS, KILLS), ANY),
    Entry("client: TERM", ALL, signals("SIGTERM"), (ENDS,), ANY),
    Entry("client: HUP", ALL, signals("SIGHUP"), (ENDS,), ANY),
    Entry("client: INT, then killed", ALL, interrupt_and_kill, (ENDS,), WORK),
    Entry("two clients: wait", ALL, second("wait"), (), WORK),
    Entry("two clients: wait, first killed", ALL, second("wait", then=kill_client), (), WORK),
    Entry("two clients: logs -f, first killed", ALL, second("logs", "-f", then=kill_client), (), WORK),
    Entry("two clients: stop", ALL, second("stop"), (ENDS,), WORK),
    Entry("two clients: stop --now", ALL, second("stop", "--now"), (ENDS, HAMPERS), WORK),
    Entry("client: clock is wrong", ALL, clock_is_wrong),
    Entry("client: clock jumps", ALL, clock_is_wrong, (JUMPS,), ANY),
    Entry("agent: killed", ALL, processes("agent", "SIGKILL"), (HAMPERS, OVER), (*WORK, *END)),
    Entry("agent: stopped", ALL, processes("agent", "SIGSTOP"), (HAMPERS, OVER), (*WORK, *END)),
    Entry("agent: stopped for a while", ALL, processes("agent", "SIGSTOP", 1.5), (HAMPERS,), (*WORK, *END)),
    Entry("guard: killed", ALL, processes("guard", "SIGKILL"), (LATER, HAMPERS), (*WORK, *END)),
    Entry("guard: stopped", ALL, processes("guard", "SIGSTOP"), (LATER,), (*WORK, *END)),
    Entry("guard: stopped for a while", ALL, processes("guard", "SIGSTOP", 1.5), (), (*WORK, *END)),
    Entry("guard and agent: killed", ALL, both_die, (LATER, HAMPERS), (*WORK, *END)),
    Entry("guard and agent: stopped", ALL, both_hang, (LATER, HAMPERS), (*WORK, *END)),
    Entry("memory: main.py is killed", ALL, processes("program", "SIGKILL"), (KILLS,), WORK),
    Entry("disk: full", ALL, full_disk, (HAMPERS,), (*EARLY, *WORK)),
    Entry("machine: preempted", ALL, take_away, (HAMPERS,), (("agent", 0), *WORK, *END)),
    Entry("machine: host lost", CLOUDS, lose_host, (HAMPERS, LATER), (("agent", 0), *WORK, *END)),
    Entry("machine: frozen", CLOUDS, freeze, (HAMPERS, LATER), (("agent", 0), *WORK, *END)),
    Entry("machine: frozen for a while", CLOUDS, freeze_a_while, (HAMPERS,), (("agent", 0), *WORK, *END)),
    Entry("machine: reboot", CLOUDS, reboot, (HAMPERS,), (("agent", 0), *WORK, *END)),
    *(Entry(*each) for each in storage_faults(ANY)),
    *(Entry(*each) for each in SERVICES),
]


def draw(play: Any, names: tuple[str, ...] = ()) -> list[Drawn]:
    """One to three faults that this backend can have; `names`: these."""
    found = []
    possible = [entry for entry in CATALOGUE if play.backend in entry.backends]
    if os.geteuid():  # only root can make a small disk
        possible = [entry for entry in possible if entry.name != "disk: full"]
    # Each fault has its own dice: a seed stays what it was when another fault is added to the table.
    dice = {entry.name: random.Random(f"{play.seed} {entry.name}") for entry in CATALOGUE}
    possible.sort(key=lambda entry: dice[entry.name].random())
    wanted = possible[: play.rng.choice((1, 1, 2, 2, 3))]
    named = {entry.name: entry for entry in possible}
    for entry in [named[name] for name in names] or wanted:
        rng = dice[entry.name]
        event = rng.choice(entry.events) if entry.events else None
        delay = rng.choice((0.0, 0.0, 0.1, 0.5, 1.0)) if event else 0.0
        words = entry.name + (f", at {event[0]} {event[1] or ''}".rstrip() + f" + {delay} s" if event else "")
        lost = (ENDS,) if play.options and "client" in entry.name else ()  # --if-client-lost=stop
        told = Fault(entry.name, words, entry.excuses + lost)
        found.append(Drawn(told, play, entry, event, delay, rng))
    return found
