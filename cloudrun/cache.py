"""What only saves time, in the user's cache directory: losing it, or finding it damaged, costs time only.

A file is what was kept, which ends with a newline, and its sha256.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

PIECE = 1 << 20  # bytes
HEX = 64  # digits of a sha256


def cache_path(*parts: str) -> str | None:
    """None where there is no place for a cache."""
    import platformdirs

    try:
        folder = platformdirs.user_cache_dir("cloudrun")
    except RuntimeError:  # there is no home; older versions return a path with ~
        return None
    return os.path.join(folder, *parts) if os.path.isabs(folder) else None


def read(path: str) -> Iterator[bytes]:
    """In pieces of whole lines. Raises OSError; ValueError at the end if it is damaged."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - HEX
        while left > 0 and (piece := file.read(min(left, PIECE))):
            if len(piece) < left:
                piece += file.readline()
            left -= len(piece)
            digest.update(piece)
            yield piece
        if file.read().decode("ascii") != digest.hexdigest():
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
