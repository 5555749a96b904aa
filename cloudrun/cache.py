"""What only saves time, in the user's cache directory: losing it, or finding it damaged, costs time only.

A file is what was kept, a newline, and the sha256 of what was kept.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress


def cache_path(*parts: str) -> str | None:
    """None where there is no place for a cache."""
    import platformdirs

    try:
        folder = platformdirs.user_cache_dir("cloudrun")
    except RuntimeError:  # there is no home; older versions return a path with ~
        return None
    return os.path.join(folder, *parts) if os.path.isabs(folder) else None


def read(path: str) -> Iterator[bytes]:
    """Line by line, each with its newline. Raises OSError; ValueError at the end if it is damaged."""
    digest, before = hashlib.sha256(), b""
    with open(path, "rb") as file:
        for line in file:
            if before:
                digest.update(before)
                yield before
            before = line
    if before.decode("ascii") != digest.hexdigest():
        raise ValueError(path)


def keep(path: str, pieces: Iterable[bytes]) -> None:
    """Whole or not at all. A disk that is full or read-only costs the next time some time, no more."""
    temporary, digest, data = f"{path}.{os.getpid()}", hashlib.sha256(), b""
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(temporary, "wb") as file:
            for data in pieces:
                digest.update(data)
                file.write(data)
            if not data.endswith(b"\n"):
                digest.update(b"\n")
                file.write(b"\n")
            file.write(digest.hexdigest().encode("ascii"))
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
