"""Bring outputs home: each file whole or not at all, nothing deleted, nothing of the user's overwritten."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from cloudrun.errors import CloudrunError, Corrupt, Missing
from cloudrun.formats import Entry, parse, read_entry
from cloudrun.order import Order
from cloudrun.project import DATA
from cloudrun.report import Report
from cloudrun.storage import Bucket

TEMPORARY = ".cloudrun-pull"


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
        data, _ = bucket.get(name)
    except Missing:
        return []
    entries = [read_entry(value, name, with_parts=False) for value in parse(data, name, files=list)["files"]]
    for entry in entries:
        if not any(entry.path == top or entry.path.startswith(top + "/") for top in order.outputs):
            raise Corrupt(f"{name} is damaged: {entry.path} is not below {', '.join(order.outputs)}")
    return entries


def pull(bucket: Bucket, order: Order, root: str, report: Report) -> Pulled:
    """Put the outputs into the project at `root`. Raises CloudrunError; what was fetched until then stays."""
    entries = outputs(bucket, order)
    wanted, total = Pulled(), sum(entry.size for entry in entries)
    sent = _sent(bucket, order, {entry.path for entry in entries}) if entries else {}
    for number, entry in enumerate(entries):
        report.progress("fetching", number, len(entries), wanted.bytes, total)
        _pull_one(bucket, order, root, entry, sent.get(entry.path), wanted)
    return wanted


def _pull_one(
    bucket: Bucket, order: Order, root: str, entry: Entry, sent: str | None, wanted: Pulled
) -> None:
    parent, name = _local_parent(root, entry)
    path = os.path.join(parent, name)
    if not entry.sha256:
        if not os.path.isdir(path):
            _make(path)
            wanted.fetched.append(entry.path)
        return
    local = _local_sha256(path)
    if local == entry.sha256:
        with suppress(OSError):
            os.chmod(path, entry.mode)
        wanted.unchanged += 1
        return
    ours = local is None or local == sent or bucket.size(f"{order.prefix}/saved/{local}") is not None
    if not ours:
        path = os.path.join(parent, _beside(name, order.run))
        if _local_sha256(path) == entry.sha256:
            wanted.unchanged += 1
            return
    _fetch(bucket, f"{order.prefix}/saved/{entry.sha256}", entry, path)
    wanted.bytes += entry.size
    (wanted.fetched if ours else wanted.beside).append(os.path.relpath(path, root))


def _local_parent(root: str, entry: Entry) -> tuple[str, str]:
    """Where the file goes, as a directory without links below the project, model/ or checkpoint/."""
    folder, _, name = entry.path.rpartition("/")
    top = folder.split("/")[0]
    base = os.path.realpath(os.path.join(root, top)) if top in DATA else os.path.realpath(root)
    parent = os.path.join(root, folder)
    _make(parent)
    real = os.path.realpath(parent)
    if real != base and not real.startswith(base.rstrip("/") + "/"):
        raise CloudrunError(f"{folder} is a link that leaves the project; {entry.path} was not fetched")
    return parent, name


def _make(folder: str) -> None:
    try:
        os.makedirs(folder or ".", exist_ok=True)
    except OSError as error:
        raise CloudrunError(f"cannot make the directory {folder}: {error.strerror}") from None


def _local_sha256(path: str) -> str | None:
    """None if there is nothing; an impossible value for what is not a regular file."""
    if os.path.islink(path) or (os.path.lexists(path) and not os.path.isfile(path)):
        return "not a file"
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            for piece in iter(lambda: file.read(1 << 20), b""):
                digest.update(piece)
    except FileNotFoundError:
        return None
    except OSError:
        return "not readable"
    return digest.hexdigest()


def _fetch(bucket: Bucket, source: str, entry: Entry, path: str) -> None:
    temporary = os.path.join(os.path.dirname(path), f"{TEMPORARY}-{os.getpid()}")
    digest, size = hashlib.sha256(), 0
    try:
        with open(temporary, "wb", buffering=0) as file:
            for piece in bucket.chunks(source):
                digest.update(piece)
                size += len(piece)
                view = memoryview(piece)
                while view:
                    view = view[file.write(view) :]
            if digest.hexdigest() != entry.sha256 or size != entry.size:
                raise Corrupt(f"{source} is damaged in the bucket; {entry.path} was not fetched")
            os.fchmod(file.fileno(), entry.mode)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CloudrunError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def _beside(name: str, run: str) -> str:
    suffix = "." + run
    return os.fsdecode(os.fsencode(name)[: 255 - len(suffix)]) + suffix


def _sent(bucket: Bucket, order: Order, wanted: set[str]) -> dict[str, str]:
    """path → sha256 of what this run sent, for the wanted paths."""
    name = order.prefix + "/manifest.jsonl"
    found = {}
    for line in _lines(bucket, name):
        try:
            value = json.loads(line)
        except ValueError:
            raise Corrupt(f"{name} is damaged") from None
        if value.get("path") in wanted and "sha256" in value:
            found[value["path"]] = value["sha256"]
    return found


def _lines(bucket: Bucket, name: str) -> Iterator[bytes]:
    rest = b""
    for piece in bucket.chunks(name):
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    if rest:
        yield rest
