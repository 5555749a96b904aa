"""Everything that the user is told, on stderr: plain lines; on a terminal also one that is redrawn."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Mapping
from contextlib import suppress

REDRAW_SECONDS = 0.1
PATIENCE_SECONDS = 1.0  # for somebody to read what we say; then it is lost
BAR = 20
ESCAPED = {code: f"\\x{code:02x}" for code in (*range(10), *range(11, 32), *range(127, 160))}


def human_bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def human_seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def human_money(cost: float | None) -> str:
    if cost is None:
        return "cost unknown"
    return f"{cost:.2f} USD" if cost >= 0.01 or cost == 0 else f"{cost:.4f} USD"


class Report:
    """`stage` names what happens next, for those who watch the story; the rest is for the user.

    quiet: only what is wrong. verbose: also what is usually of no interest.
    """

    def __init__(self, *, quiet: bool, verbose: bool, environ: Mapping[str, str], fd: int = 2) -> None:
        self._quiet, self._verbose, self._fd = quiet, verbose, fd
        self._terminal = os.isatty(fd) and environ.get("TERM") != "dumb"
        self._colour = self._terminal and not environ.get("NO_COLOR")
        self.unfinished = False  # main.py has begun a line on the terminal: what we drew would wipe it out
        self._drawn = False
        self._drawn_at = 0.0
        self._begun: dict[str, float] = {}

    def stage(self, name: str) -> None:
        """The story has come to this point."""

    def say(self, text: str) -> None:
        if not self._quiet:
            self._line(text)

    def detail(self, text: str) -> None:
        if self._verbose:
            self._line(text)

    def warn(self, text: str) -> None:
        self._line(text, "33")

    def error(self, text: str) -> None:
        self._line(text, "31")

    def progress(self, what: str, files: int, of_files: int, size: int, of_size: int) -> None:
        """How far the sending or fetching is, redrawn on a terminal and nowhere else."""
        begun = self._begun.setdefault(what, time.monotonic())
        if not self._may_draw():
            return
        share = size / of_size if of_size else files / max(of_files, 1)
        filled = int(BAR * min(share, 1))
        left = ""
        if share > 0.01 and time.monotonic() - begun > 1:
            left = f", {human_seconds((time.monotonic() - begun) * (1 - share) / share)} left"
        bar = "#" * filled + "-" * (BAR - filled)
        counts = f"{human_bytes(size)} of {human_bytes(of_size)}, {files} of {of_files} files"
        self._draw(f"{what} [{bar}] {counts}{left}")

    def status(self, text: str) -> None:
        """What is going on, redrawn on a terminal and nowhere else."""
        if self._may_draw():
            self._draw(text)

    def clear(self) -> None:
        """Make room for main.py's own output."""
        if self._drawn:
            self._write("\r\x1b[K")
            self._drawn = False

    def _may_draw(self) -> bool:
        if not self._terminal or self._quiet or self.unfinished:
            return False
        return time.monotonic() - self._drawn_at > REDRAW_SECONDS

    def _draw(self, text: str) -> None:
        width = 80
        with suppress(OSError):
            width = os.get_terminal_size(self._fd).columns or width
        self._write("\r" + f"cloudrun: {text.translate(ESCAPED)}"[: width - 1] + "\x1b[K")
        self._drawn, self._drawn_at = True, time.monotonic()

    def _line(self, text: str, colour: str = "") -> None:
        self.clear()
        if self._terminal and self.unfinished:
            self._write("\n")
            self.unfinished = False
        for line in text.translate(ESCAPED).split("\n"):  # a machine's words must not move the cursor
            line = f"cloudrun: {line}"
            self._write(f"\x1b[{colour}m{line}\x1b[0m\n" if colour and self._colour else line + "\n")

    def _write(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        with suppress(OSError):  # a closed terminal is no reason to stop anything, nor is one that hangs
            while data and select.select([], [self._fd], [], PATIENCE_SECONDS)[1]:
                data = data[os.write(self._fd, data[:4096]) :]
