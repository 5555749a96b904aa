"""Saves: the outputs as they are, complete or not at all, in the bucket while main.py goes on.

A file enters a save only if its stat is the same before and after it was read, and nobody has it open
for writing in between: then its content is one that was closed under its name.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from contextlib import suppress

from cloudrun.agent.fetch import file_chunks
from cloudrun.agent.watch import now
from cloudrun.errors import BucketError, Corrupt, Missing
from cloudrun.formats import Entry, canonical, parse, read_entry, timestamp
from cloudrun.processes import descendants, open_for_writing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator

    from cloudrun.agent.watch import Watch
    from cloudrun.storage import Bucket

    Stat = tuple[int, int, int, int]  # device, inode, size, and the times of content and inode as one

FRESH = 0.05  # seconds; on older kernels two writes this close can leave the same times


class Saver:
    """Knows what is saved already. `save` runs on one thread at a time; `look` on the main thread."""

    def __init__(self, bucket: Bucket, watch: Watch, attempt: int, roots: list[str]) -> None:
        self.bucket, self.watch, self.attempt, self.roots = bucket, watch, attempt, roots
        self.uncopied = 0
        self._name = watch.prefix + "/outputs.json"
        self._version: str | None = None
        self._sequence = 0
        self._outputs: dict[str, Entry] = {}
        self._stored: dict[str, tuple[Stat, Entry | None]] = {}  # None: an input, as it was sent
        self._absent: set[str] = set()
        self._closed: dict[str, Stat] = {}
        self._lock = threading.Lock()

    def previous(self) -> list[Entry]:
        """The outputs that an earlier attempt saved. Raises Corrupt."""
        try:
            data, self._version = self.bucket.get(self._name)
        except Missing:
            return []
        entries = parse(data, self._name, files=list, sequence=int)["files"]
        found = [read_entry(entry, self._name, with_parts=False) for entry in entries]
        self._outputs = {entry.path: entry for entry in found}
        return found

    def begin(self) -> None:
        """Remember what is here before main.py starts: inputs are no outputs until they change."""
        for path, status in self._walk():
            self._stored[path] = (_key(status), self._outputs.get(path))

    def look(self) -> None:
        """Note which files are closed, and how; one that changed since may be torn if main.py is killed."""
        found = {path: status for path, status in self._walk() if stat.S_ISREG(status.st_mode)}
        busy = open_for_writing(descendants())
        self._closed = {
            path: _key(status) for path, status in found.items() if (status.st_dev, status.st_ino) not in busy
        }

    def every_so_often(self, stop: threading.Event) -> None:
        """Save until told to stop; what goes wrong now can go right the next time."""
        pause = self.watch.limits["save_interval"]
        while not stop.wait(pause):
            started = now()
            with suppress(BucketError, OSError):
                self.save()
            pause = max(self.watch.limits["save_interval"], 10 * (now() - started))

    def save(self, *, last: bool = False, exact: bool = False, killed: bool = False) -> None:
        """Store what changed, then name it in outputs.json.

        last: main.py has ended. exact: a file that is gone is dropped at once, because main.py ended by
        itself; otherwise it is dropped when two saves in a row did not see it. killed: a file that was
        not seen closed as it is now is stored as NAME.incomplete, and the saved one stands.
        Raises BucketError; then the previous save stands.
        """
        with self._lock:
            started = now()
            outputs = dict(self._outputs)
            seen, fresh = set(), {}
            for path, status in self._walk():
                seen.add(path)
                stored = self._stored.get(path)
                if stored and stored[0] == _key(status):
                    if stored[1]:
                        outputs[path] = stored[1]
                elif last or abs(time.time() - status.st_mtime) > FRESH:
                    entry = self._store(path, status)
                    if entry:
                        fresh[path] = (status, entry)
            for path, (status, entry) in self._still_closed(fresh).items():
                if killed and entry.sha256 and self._closed.get(path) != _key(status):
                    outputs[_incomplete(path)] = entry._replace(path=_incomplete(path))
                    seen.add(_incomplete(path))
                else:
                    outputs[path] = entry
                    self._stored[path] = (_key(status), entry)
            absent = set(outputs) - seen
            for path in absent if exact else absent & self._absent:
                del outputs[path]
            self._absent = absent
            if outputs != self._outputs:
                self._commit(outputs)
            self.watch.longest_save = max(self.watch.longest_save, now() - started)

    def finish(self, exact: bool, killed: bool) -> None:
        """The last save, then copies for people under their own names. Raises BucketError for the save.

        `uncopied` counts the copies that the bucket's rules on names, or the time, forbid.
        """
        self.save(last=True, exact=exact, killed=killed)
        for entry in self._outputs.values():
            if entry.sha256:
                try:
                    if self.watch.left() < self.watch.reserve() / 4:
                        raise BucketError("no time is left")
                    source = f"{self.watch.prefix}/saved/{entry.sha256}"
                    self.bucket.copy(source, f"{self.watch.prefix}/{entry.path}")
                except BucketError:
                    self.uncopied += 1

    @property
    def count(self) -> int:
        return len(self._outputs)

    def _walk(self) -> Iterator[tuple[str, os.stat_result]]:
        """Regular files, links to such files, and empty directories below the roots."""
        for root in self.roots:
            stack = [root]
            while stack:
                folder = stack.pop()
                try:
                    entries = list(os.scandir(folder))
                except OSError:
                    continue
                if not entries and folder not in self.roots:
                    with suppress(OSError):
                        yield folder, os.stat(folder)
                for item in entries:
                    if item.is_dir(follow_symlinks=False):
                        stack.append(item.path)
                    elif self._comes_back(item):
                        with suppress(OSError):
                            yield item.path, item.stat()

    def _comes_back(self, item: os.DirEntry[str]) -> bool:
        """A link comes back as the file that it leads to, if that is one of the project's."""
        try:
            if item.is_symlink():
                target = os.path.realpath(item.path)
                return item.is_file() and target.startswith(os.getcwd() + "/")
            return item.is_file()
        except OSError:
            return False

    def _store(self, path: str, status: os.stat_result) -> Entry | None:
        if stat.S_ISDIR(status.st_mode):
            return Entry(path, status.st_mode & 0o777)
        prefix = self.watch.prefix + "/saved/"
        try:
            digest = hashlib.sha256()
            for piece in file_chunks(path):
                digest.update(piece)
            sha256 = digest.hexdigest()
            if self.bucket.size(prefix + sha256) is None:
                stored = self.bucket.put_blob(prefix, file_chunks(path), durable=True)
                if stored != sha256:  # it changed between the two readings
                    return None
        except (FileNotFoundError, PermissionError, Corrupt):
            return None
        return Entry(path, status.st_mode & 0o777, status.st_size, sha256)

    def _still_closed(
        self, fresh: dict[str, tuple[os.stat_result, Entry]]
    ) -> dict[str, tuple[os.stat_result, Entry]]:
        busy = open_for_writing(descendants())
        found = {}
        for path, (status, entry) in fresh.items():
            with suppress(OSError):
                if _key(os.stat(path)) == _key(status) and (status.st_dev, status.st_ino) not in busy:
                    found[path] = (status, entry)
        return found

    def _commit(self, outputs: dict[str, Entry]) -> None:
        self._sequence += 1
        files = []
        for _, entry in sorted(outputs.items()):
            value = {"path": entry.path, "mode": entry.mode}
            kind = {"size": entry.size, "sha256": entry.sha256} if entry.sha256 else {"dir": True}
            files.append(dict(value, **kind))
        content = {
            "attempt": self.attempt,
            "sequence": self._sequence,
            "time": timestamp(time.time()),
            "files": files,
        }
        self._version = self.bucket.swap(self._name, canonical(content), self._version)
        self._outputs = outputs


def _key(status: os.stat_result) -> Stat:
    """Changes whenever a directory's existence or a file's content changes."""
    if stat.S_ISDIR(status.st_mode):
        return status.st_dev, status.st_ino, 0, 0
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns ^ status.st_ctime_ns


def _incomplete(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    raw = os.fsencode(name)[: 255 - len(".incomplete")]
    return folder + slash + os.fsdecode(raw) + ".incomplete"
