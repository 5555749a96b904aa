"""The bucket of a machine that belongs to a stranger: its token runs out, and then it goes on alone.

What it stores from then on travels in archives through upload sessions that its client opened in advance
(cloudrun.handover); nothing can be read any more. An archive is described in cloudrun.formats.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial

from cloudrun.agent.watch import now
from cloudrun.errors import BucketRefused, Conflict, Missing
from cloudrun.formats import canonical, parse
from cloudrun.jsonapi import Content
from cloudrun.storage.rest import Answer, Handed, RestBucket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PIECE = 1 << 20
LONGEST = 1e6  # seconds; no wait is longer
TOKEN = "token"  # in the directory of the guard, which takes it up when the container starts again
# Of a token's life: with so little left, and no fresh one, the machine says that it goes on alone.
FAREWELL = 0.2


class Region:
    """Bytes of a file, read anew each time."""

    def __init__(self, file: int, start: int, size: int) -> None:
        self._file, self._start, self.size = file, start, size

    def __iter__(self) -> Iterator[bytes]:
        for at in range(self._start, self._start + self.size, PIECE):
            yield os.pread(self._file, min(PIECE, self._start + self.size - at), at)


class Archive:
    """Named contents, one after the other, below a line that says where which begins."""

    def __init__(self, objects: list[tuple[str, Region | bytes]]) -> None:
        index = [[name, data.size if isinstance(data, Region) else len(data)] for name, data in objects]
        self._head = canonical({"objects": index}) + b"\n"
        self._contents = [data for _, data in objects]

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        for data in self._contents:
            yield from data if isinstance(data, Region) else [data]


class AloneBucket(RestBucket):
    """See cloudrun.storage.Bucket. `alone`: nobody hears this machine before it has ended, nor it anybody.

    `end_at`: until when the sessions have to last, as `now` counts. What is saved waits in a spool on disk.
    """

    def __init__(self, boot: dict[str, Any]) -> None:
        self.token = Handed(boot["token"], boot["token_left"])
        super().__init__(boot["bucket"], token=self.token)
        self.end_at: float = now() + boot["left"]
        self._attempt = f"{boot['prefix']}/attempts/{boot['attempt']}"
        self._fresh, self._receipt = boot["prefix"] + "/token.json", boot["prefix"] + "/receipt.json"
        self._disk = os.path.abspath(TOKEN)
        self._sessions: dict[str, list[str]] = {}
        self._sent_at: dict[str, float] = {}
        self._spool, self._alone = -1, False
        self._kept: dict[str, Region] = {}  # what is in the spool, by its sha256
        self._stuck: tuple[Content, object] | None = None
        with suppress(Missing):
            found, age = self._aged(self._attempt + "/sessions.json")
            self._sessions = parse(found, "sessions.json", save=list, log=list, receipt=list)
            if os.path.exists(TOKEN):  # it is no more the one that was made when they were opened
                age = boot["token_left"] - self._handed()[1]
            self.token.age(age)

    @property
    def alone(self) -> bool:
        return self._alone or not self.token.left()

    def renew(self) -> bool:
        """Take up a fresh token if there is one. True: say now that this machine goes on alone."""
        if not self.alone and self.token.left() < self.token.life / 2:
            with suppress(Missing):
                value, left = self._handed()
                if self.token.take(value, left):
                    self._keep(value)
        return self.token.left() < FAREWELL * self.token.life

    def _handed(self) -> tuple[str, float]:
        """The token that was handed over last, and the seconds that it is good for. Raises Missing."""
        found, age = self._aged(self._fresh)
        fresh = parse(found, "token.json", token=str, seconds=(int, float))
        return fresh["token"], fresh["seconds"] - age

    def _keep(self, value: str) -> None:
        """For the guard of a container that starts again: that of its creation may be over by then."""
        with suppress(OSError):
            with open(self._disk + ".new", "w", opener=partial(os.open, mode=0o600)) as file:
                file.write(value)
            os.replace(self._disk + ".new", self._disk)

    def leave(self) -> None:
        """That was said: go on alone, whatever comes."""
        self._alone = True
        self._sent_at.update(dict.fromkeys(("save", "log"), now()))

    def pause(self, kind: str) -> float:
        """Seconds until the next archive: they are spread over the time that is left, the last is kept."""
        left, since = len(self._sessions.get(kind, ())) - 1, self._sent_at.get(kind, 0.0)
        if left < 1:
            return LONGEST
        return min(max(since + (self.end_at - since) / left - now(), 0.0), LONGEST)

    def archive_logs(self, chunks: list[tuple[str, bytes]]) -> None:
        """Chunks by their names below the attempt. What was tried before has to be tried again as it was."""
        self._deliver("log", Content(Archive(list(chunks))))

    # --- what is asked of a bucket while it is alone

    def create(self, name: str, content: bytes | Iterable[bytes]) -> bool:
        if not (self.alone and name == self._receipt):
            return super().create(name, content)
        self._deliver("receipt", Content([content if isinstance(content, bytes) else b"".join(content)]))
        return True

    def put_blob(self, prefix: str, content: Iterable[bytes], *, durable: bool = False) -> str:
        if not self.alone:
            return super().put_blob(prefix, content, durable=durable)
        if self._spool < 0:
            self._spool = _unnamed()
        digest, start = hashlib.sha256(), os.lseek(self._spool, 0, os.SEEK_END)
        try:
            for piece in content:
                digest.update(piece)
                _write(self._spool, piece)
        except BaseException:
            os.ftruncate(self._spool, start)
            raise
        sha256, end = digest.hexdigest(), os.lseek(self._spool, 0, os.SEEK_CUR)
        if sha256 in self._kept:
            os.ftruncate(self._spool, start)
        else:
            self._kept[sha256] = Region(self._spool, start, end - start)
        return sha256

    def swap(self, name: str, data: bytes, version: str | None) -> str:
        """An archive whose sending was broken off goes first, as it was; often that is all."""
        if not self.alone:
            return super().swap(name, data, version)
        files = json.loads(data)["files"]
        before = self._stuck[1] if self._stuck else None
        if self._stuck:
            self._unstick()
        if before != files:
            wanted = [file["sha256"] for file in files if file.get("sha256") in self._kept]
            saved: list[tuple[str, Region | bytes]] = [
                (f"saved/{sha256}", self._kept[sha256]) for sha256 in dict.fromkeys(wanted)
            ]
            self._stuck = Content(Archive([*saved, ("outputs.json", data)])), files
            self._unstick()
        return "alone"

    def _unstick(self) -> None:
        assert self._stuck
        content, files = self._stuck
        self._deliver("save", content)
        self._stuck = None
        for file in files if isinstance(files, list) else ():
            self._kept.pop(file.get("sha256"), None)
        if not self._kept and self._spool >= 0:
            os.ftruncate(self._spool, 0)

    def _deliver(self, kind: str, content: Content) -> None:
        """Through the next session that is not over. Raises BucketError: then it is to be tried again."""
        sessions = self._sessions.get(kind, [])
        while sessions:
            with suppress(BucketRefused, Conflict, Missing):
                self.fill(sessions[0], content)
                del sessions[0]
                self._sent_at[kind] = now()
                return
            del sessions[0]
        raise BucketRefused(f"no upload session for a {kind} is left")

    def _aged(self, name: str) -> tuple[bytes, float]:
        """A small object, and the seconds since it was written, both times by the service's own clock."""
        path = self._path(name)
        answer = self._ask("GET", f"/download{self._object(path)}", path, {"alt": "media"})
        sent, written = (answer.headers.get(key) for key in ("Date", "Last-Modified"))
        known = sent and written
        age = (parsedate_to_datetime(sent) - parsedate_to_datetime(written)).total_seconds() if known else 0.0
        return answer.body, max(age, 0.0) + 1.0  # both are whole seconds

    def _insert(self, path: str, content: Content, generation: str, mark: str) -> str:
        """Who may not replace an object is told 403 of one that is there, whatever the condition."""
        try:
            return super()._insert(path, content, generation, mark)
        except Missing:
            raise Conflict(f"{path} is there already") from None

    def _refusal(self, answer: Answer, path: str) -> Any:
        """Who may not list a bucket is told 403 of what is not there."""
        return super()._refusal(answer._replace(status=404) if answer.status == 403 else answer, path)


def _unnamed() -> int:
    """A file that nobody else sees, in the directory of the machine's disk that the agent works in."""
    import tempfile

    file, path = tempfile.mkstemp(dir=".")
    os.unlink(path)
    return file


def _write(file: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(file, view) :]
