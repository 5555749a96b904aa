"""Saves: the outputs as they are, complete or not at all, in the bucket while main.py goes on.

A file enters a save only if its stat is the same before and after it was read, and nobody has it open
for writing in between: then its content is one that was closed under its name.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from cloudrun.agent.fetch import Stretch
from cloudrun.agent.watch import Watch, now, stamp
from cloudrun.errors import BucketError, Missing
from cloudrun.formats import Entry, canonical, parse, read_entry
from cloudrun.processes import descendants, open_for_writing

LOOK_SECONDS = 2.0  # between two looks at which files are closed; 20 times what a look takes if that is more
FRESH = 0.05  # seconds; on older kernels two writes this close can leave the same times


class Saver:
    """Knows what is saved already. `ended` tells `every_so_often` to end."""

    def __init__(self, watch: Watch, roots: list[str]) -> None:
        self.bucket, self.watch, self.roots = watch.bucket, watch, roots
        self.uncopied = 0
        self.is_running: Callable[[], bool] = lambda: False
        self._inside = ""
        self._name = watch.prefix + "/outputs.json"
        self._version: str | None = None
        self._sequence = 0
        self.outputs: dict[str, Entry] = {}
        self._stored: dict[str, tuple[tuple[int, ...], Entry | None]] = {}  # None: an input, as it was sent
        self._absent: set[str] = set()
        self._closed: dict[str, tuple[int, ...]] = {}
        self._lock = threading.Lock()
        self.ended = threading.Event()

    def previous(self) -> list[Entry]:
        """The outputs that an earlier attempt saved, or we ourselves before a reboot. Raises Corrupt."""
        try:
            data, self._version = self.bucket.get(self._name, sys.maxsize)
        except Missing:
            return []
        before = parse(data, self._name, files=list, attempt=int, sequence=int)
        if before["attempt"] == self.watch.number:
            self._sequence = before["sequence"]
        found = [read_entry(entry, self._name, with_parts=False) for entry in before["files"]]
        self.outputs = {entry.path: entry for entry in found}
        return found

    def begin(self) -> None:
        """Remember what is here before main.py starts: inputs are no outputs until they change."""
        self._inside = os.getcwd() + "/"
        self._stored = {path: (key, self.outputs.get(path)) for path, _, key in self._walk()}

    def look(self, *, ended: bool = False) -> None:
        """Note which files are closed, and how: one that changes later may be torn by a kill."""
        closed = self._closed_files()
        if ended or self.is_running():  # else it may be closed because its writer has just been killed
            self._closed = closed

    def every_so_often(self, note: Callable[[bytes], None]) -> None:
        """Save until main.py ended; what goes wrong now can go right the next time."""
        interval, looking = self.watch.limits["save_interval"], 0.0
        due = now() + interval
        while not self.ended.wait(max(min(LOOK_SECONDS, interval), 20 * looking)):
            started = now()
            try:
                self.look()
                looking = now() - started
                if now() >= due:
                    self.save(last=False)
                    due = now() + max(interval, 10 * (now() - started), self._rationed())
            except Exception as error:
                due = now() + interval
                note(f"the outputs cannot be saved for now: {error}".encode("utf-8", "replace"))

    def _rationed(self) -> float:
        """Seconds: who goes on alone can save only so often."""
        stranger = self.watch.stranger
        return stranger.pause("save") if stranger and stranger.alone else 0.0

    def save(self, *, last: bool = True, exact: bool = False, torn: bool = False) -> None:
        """Store what changed, then name it in outputs.json.

        last: main.py has ended. exact: a file that is gone is dropped at once, because main.py ended by
        itself; otherwise it is dropped when two saves in a row did not see it. torn: a writer was killed,
        so that a file that was not seen closed as it is now is stored as NAME.incomplete, and the saved
        one stands. Raises BucketError or OSError; then the previous save stands.
        """
        with self._lock:
            started = now()
            outputs, seen, fresh = dict(self.outputs), set(), []
            for path, status, key in self._walk():
                seen.add(path)
                stored, entry = self._stored.get(path, (None, None))
                if key != stored and (last or abs(time.time() - status.st_mtime) > FRESH):
                    fresh.append((path, key, self._store(path, status)))
                elif key == stored and entry:
                    outputs[path] = entry
            closed = self._closed_files()
            if not last and not self.is_running():
                return  # what is closed now may be so because it was torn
            for path, key, entry in fresh:
                if entry and closed.get(path) == key:
                    if torn and entry.sha256 and self._closed.get(path) != key:
                        entry = entry._replace(path=_incomplete(path))
                        seen.add(entry.path)
                    else:
                        self._stored[path] = (key, entry)
                    outputs[entry.path] = entry
            absent = set(outputs) - seen
            for path in absent if exact else absent & self._absent:
                del outputs[path]
            self._absent = absent
            if outputs != self.outputs:
                files = [_line(entry) for _, entry in sorted(outputs.items())]
                self._sequence += 1
                content = {"attempt": self.watch.number, "sequence": self._sequence, "time": stamp()}
                named = canonical(dict(content, files=files))
                self._version = self.bucket.swap(self._name, named, self._version)
                self.outputs = outputs
            self.watch.longest_save = max(self.watch.longest_save, now() - started)

    def copy_names(self) -> None:
        """Copies of the saved files under their own names, for people and other tools.

        `uncopied` counts those that the bucket's rules on names, or the time, forbid.
        """
        self.uncopied = sum(1 for entry in self.outputs.values() if entry.sha256)
        for entry in self.outputs.values():
            if entry.sha256 and self.watch.left() > self.watch.reserve() / 4:
                with suppress(BucketError):
                    source = f"{self.watch.prefix}/saved/{entry.sha256}"
                    self.bucket.copy(source, f"{self.watch.prefix}/{entry.path}")
                    self.uncopied -= 1

    def _walk(self) -> Iterator[tuple[str, os.stat_result, tuple[int, ...]]]:
        """Regular files, links to such files of the project, and empty directories below the roots."""
        for root in self.roots:
            stack = [root] if self._is_inside(root) else []
            while stack:
                folder = stack.pop()
                with suppress(OSError):
                    entries = list(os.scandir(folder))
                    if not entries and folder not in self.roots:
                        yield folder, os.stat(folder), _key(os.stat(folder))
                    for item in entries:
                        with suppress(OSError):  # a link that leads to itself
                            if item.is_dir(follow_symlinks=False):
                                stack.append(item.path)
                            elif item.is_file() and (not item.is_symlink() or self._is_inside(item.path)):
                                yield item.path, item.stat(), _key(item.stat())

    def _is_inside(self, path: str) -> bool:
        return os.path.realpath(path).startswith(self._inside)

    def _store(self, path: str, status: os.stat_result) -> Entry | None:
        """The entry of a file whose content is in the bucket now; None if it cannot be read any more."""
        mode = status.st_mode & 0o777
        if stat.S_ISDIR(status.st_mode):
            return Entry(path, mode)
        try:
            sha256 = self.bucket.put_blob(
                self.watch.prefix + "/saved/", Stretch(path, inside=self._inside), durable=True
            )
        except (FileNotFoundError, PermissionError):
            return None
        return Entry(path, mode, status.st_size, sha256)

    def _closed_files(self) -> dict[str, tuple[int, ...]]:
        busy = open_for_writing(descendants())
        return {path: key for path, _, key in self._walk() if key[:2] not in busy}


def _key(status: os.stat_result) -> tuple[int, ...]:
    """Begins with device and inode; changes when a directory's existence or a file's content does."""
    if stat.S_ISDIR(status.st_mode):
        return status.st_dev, status.st_ino
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _incomplete(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return folder + slash + os.fsdecode(os.fsencode(name)[:244]) + ".incomplete"


def _line(entry: Entry) -> dict[str, object]:
    kind = {"size": entry.size, "sha256": entry.sha256} if entry.sha256 else {"dir": True}
    return {"path": entry.path, "mode": entry.mode, **kind}
