"""What a program on another computer may do to the user's terminal: colours, and moves on its own line."""

from __future__ import annotations

import re

HELD = 4096  # bytes of a sequence that does not end; then it is no sequence

# https://www.xfree86.org/current/ctlseqs.html: CSI, strings that end in BEL or ST, other escapes, controls.
_CSI = rb"\x1b\[[0-?]*[ -/]*[@-~]"
_STRING = rb"\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)"
_ESCAPE = rb"\x1b[ -/]*[0-~]|\x1b"
_CONTROL = rb"[\x00-\x07\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]|\xc2[\x80-\x9f]+|(?<![\x80-\xff])[\x80-\x9f]+"
_ANY = re.compile(b"|".join((_CSI, _STRING, _ESCAPE, _CONTROL)))
_HARMLESS = re.compile(rb"\x1b\[[0-9;:]*[mKCDG]")  # colours, erasing and columns on the line
_BEGUN = re.compile(
    rb"(?:\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b]*\x1b?|[ -/]*)?|[\xc2-\xf4][\x80-\xbf]{0,2})\Z"
)


class Filter:
    """Takes out of a stream of bytes what could do more: titles, the clipboard, other lines, answers.

    Call it with each piece; the beginning of a sequence, or of a character, waits for the rest.
    """

    def __init__(self) -> None:
        self._held = b""

    def __call__(self, data: bytes) -> bytes:
        data = self._held + data
        begun = _BEGUN.search(data, max(len(data) - HELD, 0))
        end = len(data)
        if begun and not _whole(begun[0]):
            end = begun.start()
        self._held = data[end:]
        return _ANY.sub(_harmless, data[:end])


def _whole(character: bytes) -> bool:
    return character[0] >= 0xC2 and len(character) > 1 + (character[0] >= 0xE0) + (character[0] >= 0xF0)


def _harmless(found: re.Match[bytes]) -> bytes:
    return found[0] if _HARMLESS.fullmatch(found[0]) else b""
