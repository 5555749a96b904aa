"""Bring outputs home: each file whole or not at all, nothing deleted, nothing of the user's overwritten."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quote
from typing import IO

from cloudrun.config import USUAL, Bounds
from cloudrun.errors import CloudrunError, Corrupt, Missing
from cloudrun.formats import READ_PIECE, Entry, digest_of, parse, read_entry, shown
from cloudrun.order import Order
from cloudrun.project import DATA
from cloudrun.report import Report, human_bytes
from cloudrun.storage import Bucket

MAX_OUTPUTS = 256 << 20  # bytes of outputs.json, which comes from a machine that is not ours
NOT_A_FILE = ""


@dataclass
class Pulled:
    """Paths in the project. `beside`: stored under another name, because the local file is not ours."""

    fetched: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    unchanged: int = 0
    bytes: int = 0


def outputs(bucket: Bucket, order: Order) -> list[Entry]:
    """The run's last complete set. Raises Corrupt."""
    name = order.prefix + "/outputs.json"
    try:
        return outputs_in(bucket.get(name, MAX_OUTPUTS)[0], name, order)
    except Missing:
        return []


def outputs_in(data: bytes, name: str, order: Order) -> list[Entry]:
    """Raises Corrupt."""
    values = parse(data, name, files=list)["files"]
    entries = [read_entry(value, name, with_parts=False) for value in values]
    for entry in entries:
        if entry.link or not any(f"{entry.path}/".startswith(f"{top}/") for top in order.outputs):
            raise Corrupt(
                f"{name} is damaged: {shown(entry.path)} is no file below {', '.join(order.outputs)}"
            )
    return entries


def check_amount(entries: list[Entry], bounds: Bounds) -> None:
    """Raises CloudrunError, before anything is fetched, for more than the user wants to have."""
    size = sum(entry.size for entry in entries)
    if len(entries) > bounds.files:
        much, raised = f"{len(entries):,} files, more than {bounds.files:,.0f}", "CLOUDRUN_FETCH_FILES"
    elif size > bounds.gigabytes * 1e9:
        much, raised = f"{human_bytes(size)}, more than {bounds.gigabytes:g} GB", "CLOUDRUN_FETCH_GB"
    else:
        return
    raise CloudrunError(
        f"the run wants to bring home {much}: nothing was fetched; raise {raised} and run `cloudrun pull`"
    )


def pull(bucket: Bucket, order: Order, root: str, report: Report, bounds: Bounds = USUAL) -> Pulled:
    """Put the outputs into the project at `root`. Raises CloudrunError; what was fetched until then stays."""
    entries = outputs(bucket, order)
    check_amount(entries, bounds)
    sent = _sent(bucket, order, {entry.path for entry in entries}) if entries else {}
    work, total = _Pull(bucket, order, root, sent), sum(entry.size for entry in entries)
    for number, entry in enumerate(entries):
        report.progress("fetching", number, len(entries), work.pulled.bytes, total)
        work.one(entry)
    return work.pulled


class _Pull:
    """One pull into the project at `root`; `sent` has what the run sent."""

    def __init__(self, bucket: Bucket, order: Order, root: str, sent: dict[str, Entry]) -> None:
        self.pulled = Pulled()
        self._bucket, self._root, self._run, self._sent = bucket, root, order.run, sent
        self._saved = order.prefix + "/saved/"
        self._ready = {""}  # directories that are there and inside the project

    def one(self, entry: Entry) -> None:
        folder, slash, name = entry.path.rpartition("/")
        if not entry.sha256:
            if not os.path.isdir(self._local(entry.path)):
                self._make(entry.path)
                self.pulled.fetched.append(entry.path)
            return
        self._make(folder)
        path, ours, local = entry.path, True, _local_sha256(self._local(entry.path))
        while not (local is None or local == entry.sha256 or self._is_ours(path, local)):
            name, ours = _beside(name, self._run), False
            path = folder + slash + name
            local = _local_sha256(self._local(path))
        if local == entry.sha256:
            if ours:
                with suppress(OSError):
                    os.chmod(self._local(path), entry.mode)
            self.pulled.unchanged += 1
            return
        self._fetch(entry, path)
        self.pulled.bytes += entry.size
        (self.pulled.fetched if ours else self.pulled.beside).append(path)

    def _local(self, path: str) -> str:
        return os.path.join(self._root, path)

    def _is_ours(self, path: str, local: str) -> bool:
        """What this run sent as this file, or saved: then nothing is lost when it is replaced."""
        if local == NOT_A_FILE:
            return False
        sent = self._sent.get(path)
        if sent and (_parts_digest(self._local(path), sent) if len(sent.parts) > 1 else local) == sent.sha256:
            return True
        return self._bucket.size(self._saved + local) is not None

    def _make(self, folder: str) -> None:
        """Make a directory, never through a link that leaves the project, model/ or checkpoint/."""
        missing = []
        while folder not in self._ready:
            missing.append(folder)
            folder = folder.rpartition("/")[0]
        for folder in reversed(missing):
            try:
                self._make_one(folder, self._local(folder))
            except OSError as error:
                raise CloudrunError(
                    f"cannot make the directory {shown(folder)}: {error.strerror}; "
                    "move what is in its way and run `cloudrun pull`"
                ) from None
            self._ready.add(folder)

    def _make_one(self, folder: str, path: str) -> None:
        if not os.path.isdir(path):
            os.mkdir(path)
        if not os.path.islink(path) or folder in DATA:
            return
        top, real = folder.split("/")[0], os.path.realpath(path, strict=True)
        base = os.path.realpath(self._local(top) if top in DATA else self._root)
        if not f"{real}/".startswith(base.rstrip("/") + "/"):
            raise CloudrunError(
                f"{shown(folder)} is a link that leaves the project, and nothing was fetched through it; "
                "make it a directory and run `cloudrun pull`"
            )

    def _fetch(self, entry: Entry, path: str) -> None:
        parent, source = os.path.dirname(self._local(path)), self._saved + entry.sha256
        # a name that is never sent up, should we be killed
        temporary = os.path.join(parent, f".cloudrun-pull-{os.getpid()}.{self._run}")
        digest, size = hashlib.sha256(), 0
        try:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with open(os.open(temporary, flags, 0o600), "wb") as file:
                for piece in self._bucket.chunks(source):
                    digest.update(piece)
                    size += len(piece)
                    if size > entry.size:
                        break
                    file.write(piece)
                if size != entry.size or digest.hexdigest() != entry.sha256:
                    raise Corrupt(f"{source} is damaged in the bucket; {shown(path)} was not fetched")
                file.flush()
                os.fchmod(file.fileno(), entry.mode)
                os.fsync(file.fileno())
            os.replace(temporary, self._local(path))
        except OSError as error:
            raise CloudrunError(
                f"cannot write {shown(path)}: {error.strerror}; repair that and run `cloudrun pull`"
            ) from None
        finally:
            with suppress(OSError):
                os.unlink(temporary)


def _local_sha256(path: str) -> str | None:
    """None if there is nothing; NOT_A_FILE for what is no regular file that we can read."""
    try:
        if not os.path.lexists(path):
            return None
        if os.path.islink(path) or not os.path.isfile(path):
            return NOT_A_FILE
        with open(path, "rb", buffering=0) as file:
            return _sha256(file, sys.maxsize)
    except OSError:
        return NOT_A_FILE


def _parts_digest(path: str, sent: Entry) -> str | None:
    """What `digest_of` would say of a local file in the parts in which it was sent."""
    if os.path.getsize(path) != sent.size:
        return None
    with open(path, "rb", buffering=0) as file:
        return digest_of((_sha256(file, length), 0, length) for *_, length in sent.parts)


def _sha256(file: IO[bytes], length: int) -> str:
    digest = hashlib.sha256()
    while length and (data := file.read(min(length, READ_PIECE))):
        digest.update(data)
        length -= len(data)
    return digest.hexdigest()


def _beside(name: str, run: str) -> str:
    raw, suffix = os.fsencode(name), "." + run
    if len(raw) + len(suffix) > 255:  # what is cut off must not make two names one
        suffix = "." + hashlib.sha256(raw).hexdigest()[:8] + suffix
        raw = raw[: 255 - len(suffix)]
    return os.fsdecode(raw) + suffix


def _sent(bucket: Bucket, order: Order, wanted: set[str]) -> dict[str, Entry]:
    """path → what this run sent, for the wanted paths; nothing if the manifest is gone."""
    name = order.prefix + "/manifest.jsonl"
    keys = {quote(path).encode("ascii") for path in wanted}
    found: dict[str, Entry] = {}
    with suppress(Missing):
        for line in _lines(bucket, name):
            if line[8 : line.find(b',"mode":')] in keys:  # past {"path": as entry_line writes it
                entry = read_entry(parse(line, name), name, with_parts=True)
                found[entry.path] = entry
    return found


def _lines(bucket: Bucket, name: str) -> Iterator[bytes]:
    rest = b""
    for piece in bucket.chunks(name):
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    if rest:
        yield rest
