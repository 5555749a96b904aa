"""The layers of the promise that a bill stops: who they are, and how soon each of them ends it alone.

test_layers.py plays them; README.md and docs/stopping.md say the same words, which test_docs.py compares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cloudrun.limits import DEFAULTS


class Layer(NamedTuple):
    """`alone`: what is out of action besides. `bound`: seconds `since` then, with these limits."""

    who: str
    alone: str
    since: str
    bound: Callable[[dict[str, float]], float]
    more: str = ""

    @property
    def promise(self) -> str:
        """With the limits that users have."""
        seconds = self.bound(DEFAULTS)
        return (f"{spelt(seconds)} after {self.since}" if seconds else f"at {self.since}") + self.more

    def row(self, *cells: str) -> str:
        return "| " + " | ".join((self.who, self.alone, self.promise, *cells)) + " |"


def spelt(seconds: float) -> str:
    """Of whole seconds: 90 is `1 min 30 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return " ".join(filter(None, (f"{minutes} min" if minutes else "", f"{rest} s" if rest else "")))


BACKENDS = ("local", "gcp", "vast")
HEAD = ("layer", "out of action besides", "ends the bill", *BACKENDS)
LAYERS = {
    "agent": Layer(
        "1 agent",
        "client killed, guard frozen",
        "the program's end and its save",
        lambda limits: limits["agent_gone"],
    ),
    "guard, agent killed": Layer(
        "2 guard",
        "client killed, agent killed",
        "the agent's death",
        lambda limits: limits["agent_gone"],
    ),
    "guard, agent frozen": Layer(
        "2 guard",
        "client killed, agent frozen",
        "the agent's last sign of life",
        lambda limits: limits["agent_silence"],
    ),
    "guard, at the deadline": Layer(
        "2 guard",
        "client killed, agent frozen, bucket out of reach",
        "the deadline",
        lambda limits: 0.0,
    ),
    "provider": Layer(
        "3 provider",
        "client killed, machine frozen",
        "the deadline",
        lambda limits: limits["provider"],
        "; on vast.ai at the next full hour after that",
    ),
    "client, machine never awake": Layer(
        "4 client",
        "machine frozen before its first word",
        "its start",
        lambda limits: limits["boot"],
    ),
    "client, machine frozen": Layer(
        "4 client",
        "machine frozen while the program runs",
        "its last sign of life",
        lambda limits: 1.5 * limits["agent_silence"] + 2 * limits["state"],
    ),
    "next command": Layer(
        "5 next command",
        "client killed, machine frozen, a minute past the deadline",
        "that command's start",
        lambda limits: limits["stop"],
    ),
}


def table(measured: dict[tuple[str, str], str]) -> list[str]:
    """Lines of Markdown; `measured` is by layer and backend."""
    cells = {name: [measured.get((name, backend), "–") for backend in BACKENDS] for name in LAYERS}
    rows = [layer.row(*cells[name]) for name, layer in LAYERS.items()]
    return [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD), *rows]
