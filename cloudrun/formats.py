"""The formats that client, guard and agent share. Sent with the agent: standard library, Python 3.8.

Under the bucket's directory (times are UTC, RFC 3339; JSON is ASCII, file names are os.fsdecode'd,
so that bytes which are not UTF-8 survive as lone surrogates):

    open/<run>                        {"run", "project"}; deleted when the bill is closed
    <project>/blobs/<sha256>          inputs and agent, immutable, shared by all runs
    <project>/runs/<run>/order.json   see cloudrun.order.Order
                        /manifest.jsonl  a line per input, in the order in which it was scanned:
                            {"path", "mode", "size", "sha256", "parts": [[blob, offset, length], ...]};
                            several parts are whole blobs, and sha256 is that of `digest_of` them
                            {"path", "mode", "dir": true} for an empty directory
                            {"path", "link": target} for a link that stays inside the project
                        /env.json     {NAME: value}; deleted when the bill is closed
                        /control.json {"level": 1 interrupt | 2 now, "by": "SIGINT" | ... | "stop"}
                        /client.json  {"client", "beat"}: alive as long as beat changes
                        /token.json   {"token", "seconds"}: a fresh one for a stranger's machine; deleted
                                      when the bill is closed
                        /attempts/<n>/claim.json  {"client", "instance", "offer", "price", "time"}
                                     /agent.json  {"machine", "python", "time"}
                                     /state.json  {"phase", "time", "beat"}; while it fetches also
                                                  {"files", "bytes", "of_files", "of_bytes"};
                                                  "alone": true: it hears nobody any more;
                                                  "began": true: main.py was started before a reboot
                                     /sessions.json {"save", "log", "receipt": [URL, ...]}: upload sessions
                                                  of a stranger's machine; cancelled with the bill
                                     /late/save-<3 digits>, /late/log-<3 digits>  archives, see below
                                     /late/receipt  what is to be receipt.json
                                     /log/<8 digits>  frames, see `frame`
                                     /end.json    {"reason", "time"}: the attempt ended, the run may go on;
                                                  of a machine that is of no use also {"why"}
                        /saved/<sha256>  output content, immutable
                        /outputs.json {"attempt", "sequence", "time", "files": [manifest lines without parts]}
                        /model/... /checkpoint/...  copies of the final outputs under their own names
                        /receipt.json {"run", "attempt", "reason", "status", "signal", "by", "message",
                                       "save", "started", "ended", "seconds", "chunks", "files",
                                       "uncopied"}
                        /bill.json    {"reason", "exit_code", "started", "ended", "seconds", "cost",
                                       "price", "layer", "proof", "attempts", "parked", "gpu", "disk",
                                       "traffic", "note"}

The guard gets CLOUDRUN_BOOT in its environment, a JSON object: run, attempt, instance, backend, bucket,
prefix (<project>/runs/<run>), agent and order ([object, sha256]), left (seconds until the deadline),
agent_gone and agent_silence (seconds); of a stranger's machine also token and token_left (seconds that it is
good for; then its bucket can be written through sessions.json only; the file `token` in the guard's directory
has the one that was handed over last, which counts when the container starts again); of a machine in a cloud
also kept (whether it outlives the run), gpus (so many have to work) and user (whose main.py is; empty:
root's). The agent gets the same, and CLOUDRUN_GUARD, the number of the pipe to its parent: `.` alive, `R` the
run is finished (an agent that outlives that by agent_gone ends the machine in the guard's place),
`L<seconds>\\n` so much is left at most, `H` hands off: leave the machine on.

An archive is a line of JSON, {"objects": [[name, size], ...]}, then the contents one after the other. Names
are log/<8 digits> of the attempt, or saved/<sha256> and last of all outputs.json of the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import namedtuple
from datetime import datetime, timezone
from json.encoder import encode_basestring_ascii as quote

from cloudrun.errors import Corrupt

TYPE_CHECKING = False  # importing typing costs the agent 6 ms; type checkers know this name
if TYPE_CHECKING:
    from typing import Any, Iterable, Iterator

MAX_PATH = 4096
READ_PIECE = 256 << 10  # bytes of a file read at once: more would leave the processor's cache unhashed
HEX64 = re.compile(r"[0-9a-f]{64}\Z")
STREAMS = ("out", "err", "note")


def canonical(value: Any) -> bytes:
    """The one way to write an object: the same value always has the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def parse(data: bytes, name: str, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """Read a JSON object whose `fields` have these types. Raises Corrupt, naming the object."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise Corrupt(f"{name} is damaged: it is not JSON") from None
    if not isinstance(value, dict):
        raise Corrupt(f"{name} is damaged: it is not a JSON object")
    for field, kind in fields.items():
        if not isinstance(value.get(field), kind):
            raise Corrupt(f"{name} is damaged: {field!r} is missing or of the wrong type")
    return value


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339 in UTC, e.g. 2026-11-25T09:10:56.123Z."""
    when = datetime.fromtimestamp(seconds, timezone.utc)
    return when.strftime("%Y-%m-%dT%H:%M:%S.") + f"{when.microsecond // 1000:03d}Z"


def seconds_of(text: str) -> float:
    """The inverse of `timestamp`. Raises Corrupt."""
    try:
        when = datetime.fromisoformat(text[:-1] if text.endswith("Z") else "")
    except (ValueError, AttributeError):
        raise Corrupt(f"{text!r} is not a time") from None
    return when.replace(tzinfo=timezone.utc).timestamp()


def has_begun(state: dict[str, Any]) -> bool:
    """Whether main.py was started, as a state.json tells it; what was printed before that was pip's."""
    return state.get("phase") in ("run", "save") or state.get("began") is True


def shown(path: str) -> str:
    """A path for people: what would confuse a terminal is escaped."""
    return repr(path)[1:-1]


# One thing that goes up or comes back. A file has a sha256; a link has a target; a directory neither.
Entry = namedtuple("Entry", "path mode size sha256 parts link", defaults=(0, 0, "", (), ""))


def entry_line(entry: Entry) -> str:
    """One line of a manifest, without its newline. `path` comes first: the index looks it up by that."""
    path = quote(entry.path)
    if entry.link:
        return f'{{"path":{path},"link":{quote(entry.link)}}}'
    if not entry.sha256:
        return f'{{"path":{path},"mode":{entry.mode},"dir":true}}'
    parts = ",".join(f'["{blob}",{offset},{length}]' for blob, offset, length in entry.parts)
    return (
        f'{{"path":{path},"mode":{entry.mode},"size":{entry.size},'
        f'"sha256":"{entry.sha256}","parts":[{parts}]}}'
    )


def read_entry(value: Any, name: str, *, with_parts: bool) -> Entry:
    """Check one parsed manifest or outputs line and make an Entry of it. Raises Corrupt."""
    try:
        path, mode = value["path"], value.get("mode", 0)
        check_path(path)
        if not isinstance(mode, int) or not 0 <= mode <= 0o7777:
            raise ValueError(mode)
        if "link" in value:
            check_link(path, value["link"])
            return Entry(path, link=value["link"])
        if value.get("dir"):
            return Entry(path, mode & 0o777)
        size, sha256 = value["size"], value["sha256"]
        parts = tuple(_read_part(part) for part in value["parts"]) if with_parts else ()
        if not isinstance(size, int) or not 0 <= size < 1 << 62 or not HEX64.match(sha256):
            raise ValueError(sha256)
        if with_parts and sum(length for _, _, length in parts) != size:
            raise ValueError(size)
        if len(parts) > 1 and (any(offset for _, offset, _ in parts) or digest_of(parts) != sha256):
            raise ValueError(parts)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Corrupt(f"{name} is damaged: {str(value)[:200]!r} is no entry of it") from None
    return Entry(path, mode & 0o777, size, sha256, parts)


def digest_of(parts: Iterable[tuple[str, int, int]]) -> str:
    """The sha256 of a file in several parts: of their sha256s, so that they can be hashed side by side."""
    return hashlib.sha256("".join(blob for blob, _, _ in parts).encode("ascii")).hexdigest()


def _read_part(part: Any) -> tuple[str, int, int]:
    blob, offset, length = part
    if not HEX64.match(blob) or min(offset, length) < 0 or not isinstance(offset + length, int):
        raise ValueError(part)
    return blob, offset, length


def check_path(path: Any) -> None:
    """A path is relative, normal, and stays where it is. Raises ValueError."""
    if not isinstance(path, str) or "\0" in path or not 0 < len(os.fsencode(path)) <= MAX_PATH:
        raise ValueError("not a path")
    if path.startswith("/") or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError("not a path inside the project")


def check_link(path: str, target: Any) -> None:
    """A link is relative and its target, taken by its words, stays inside the project. Raises ValueError."""
    if not isinstance(target, str) or "\0" in target or not 0 < len(os.fsencode(target)) <= MAX_PATH:
        raise ValueError("not a link")
    if target.startswith("/"):
        raise ValueError("not a link inside the project")
    depth = path.count("/")
    for part in target.split("/"):
        depth += -1 if part == ".." else 0 if part in ("", ".") else 1
        if depth < 0:
            raise ValueError("not a link inside the project")


def frame(when: float, stream: str, data: bytes) -> bytes:
    """One piece of main.py's output: `time stream length\\n`, then the bytes unchanged."""
    return b"%.3f %s %d\n%s" % (when, stream.encode(), len(data), data)


def read_frames(chunk: bytes, name: str) -> Iterator[tuple[float, str, memoryview]]:
    """(time, stream, bytes) of each frame of a log chunk, in order. Raises Corrupt."""
    view, at = memoryview(chunk), 0
    while at < len(chunk):
        end = chunk.find(b"\n", at, at + 64)
        try:
            when, stream, length = chunk[at:end].decode("ascii").split(" ")
            start, stop = end + 1, end + 1 + int(length)
            if end < 0 or stream not in STREAMS or not end < stop <= len(chunk):
                raise ValueError
            yield float(when), stream, view[start:stop]
        except ValueError:
            raise Corrupt(f"{name} is damaged: no frame starts at byte {at}") from None
        at = stop
