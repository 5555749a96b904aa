"""Settings from the environment and the command line. Pure: every problem is reported at once."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

from cloudrun.errors import UsageError
from cloudrun.limits import limits

DEFAULT_HOURS = 24.0
FETCH_FILES, FETCH_GB = 1_000_000, 200.0
BACKENDS = ("gcp", "vast", "local")
OF_A_VM = ("GCP_ACCOUNT", "GCLOUD_PROJECT", "VM_", "VAST_")

NEEDED = {"gcp": ("GCLOUD_PROJECT", "GCS_DIR"), "vast": ("VAST_API_KEY", "GCS_DIR"), "local": ()}


class Bounds(NamedTuple):
    """The most that a run may bring home: its machine may be a stranger's."""

    files: float = FETCH_FILES
    gigabytes: float = FETCH_GB


USUAL = Bounds()


class Settings(NamedTuple):
    """What a command needs to know. `chosen` says why this backend, when nobody named one.

    `place` says whose machines are meant, see there. `vm` has the variables that say which VM.
    """

    backend: str
    chosen: str
    project: str
    bucket: str
    max_hours: float
    max_cost: float | None
    price: float | None
    limits: dict[str, float]
    place: str
    vm: dict[str, str]
    bounds: Bounds = USUAL


def from_env(environ: Mapping[str, str], directory: str, **flags: str | float | None) -> Settings:
    """Flags (backend, max_hours, max_cost) win over the environment. Raises UsageError with all problems."""
    problems: list[str] = []

    def number(name: str, flag: object = None, *, zero: bool = False) -> float | None:
        text = environ.get(name) if flag is None else flag
        if text in (None, ""):
            return None
        try:
            value = float(str(text))
        except ValueError:
            value = -1.0
        if 0 < value < float("inf") or (zero and value == 0):
            return value
        problems.append(f"{name}={text}: not a number above 0")
        return None

    backend, chosen = choose_backend(environ, flags.get("backend"))
    if backend not in BACKENDS:
        problems.append(f"CLOUDRUN_BACKEND={backend}: not one of {', '.join(BACKENDS)}")
    missing = [name for name in NEEDED.get(backend, ()) if not environ.get(name)]
    if missing:
        problems.append(f"the {backend} backend also needs {', '.join(missing)}")
    bucket = _bucket(environ, backend, problems)
    try:
        table = limits(environ)
    except ValueError as error:
        problems.append(str(error))
        table = {}
    hours = number("CLOUDRUN_MAX_HOURS", flags.get("max_hours"))
    cost = number("CLOUDRUN_MAX_COST", flags.get("max_cost"))
    price = number("CLOUDRUN_PRICE", zero=True)
    bounds = Bounds(number("CLOUDRUN_FETCH_FILES") or FETCH_FILES, number("CLOUDRUN_FETCH_GB") or FETCH_GB)
    if problems:
        raise UsageError("\n".join(problems))
    return Settings(
        backend=backend,
        chosen=chosen,
        project=project_name(environ.get("CLOUDRUN_PROJECT") or os.path.basename(directory)),
        bucket=bucket.rstrip("/"),
        max_hours=hours if hours or cost else DEFAULT_HOURS,  # type: ignore[arg-type]
        max_cost=cost,
        price=price,
        limits=table,
        place=place(backend, environ),
        vm=of_a_vm(environ),
        bounds=bounds,
    )


def of_a_vm(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that say which VM; an empty one is not set."""
    return {name: value for name, value in environ.items() if name.startswith(OF_A_VM) and value}


def _bucket(environ: Mapping[str, str], backend: str, problems: list[str]) -> str:
    bucket = environ.get("GCS_DIR") or ""
    if backend == "local" and not bucket:
        bucket = os.path.join(data_directory(environ), "bucket")
    if bucket.startswith("/"):
        bucket = "file://" + bucket
    if backend != "local" and bucket and not bucket.startswith("gs://"):
        problems.append(f"GCS_DIR={bucket}: a machine elsewhere needs a bucket, gs://bucket/directory")
    elif bucket and not bucket.startswith(("gs://", "file:///")):
        problems.append(f"GCS_DIR={bucket}: not gs://bucket/directory or file:///directory")
    return bucket


def choose_backend(environ: Mapping[str, str], flag: object) -> tuple[str, str]:
    """The backend, and why it is that one, if nobody named it."""
    named = flag or environ.get("CLOUDRUN_BACKEND")
    if named:
        return str(named), ""
    if environ.get("VM_INSTANCE"):
        return "gcp", "VM_INSTANCE is set"
    if environ.get("VAST_API_KEY"):
        return "vast", "VAST_API_KEY is set"
    return "local", "neither VM_INSTANCE nor VAST_API_KEY is set"


def place(backend: str, environ: Mapping[str, str]) -> str:
    """Whose machines a backend sees: who looks from elsewhere cannot say that one has ended."""
    if backend == "local":
        return f"{os.uname().nodename}:{data_directory(environ)}"
    if backend == "vast":  # its account has no name that can be known without asking
        return "vast:" + hashlib.sha256(environ.get("VAST_API_KEY", "").encode()).hexdigest()[:12]
    return f"{backend}:{environ.get('GCLOUD_PROJECT', '')}"


def data_directory(environ: Mapping[str, str]) -> str:
    """Where local runs live. Raises UsageError if there is no home at all (cron without HOME)."""
    import platformdirs

    with suppress(RuntimeError):  # newer versions of platformdirs
        path = platformdirs.user_data_dir("cloudrun")
        if os.path.isabs(path):
            return path
    raise UsageError("there is no home directory: set HOME or XDG_DATA_HOME")


def project_name(name: str) -> str:
    """A name that may stand in labels and object names: at most 41 of a-z 0-9 - _, first no - or _."""
    slug = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_")[:41].rstrip("-_")
    return (
        slug if slug not in ("", "open") else "project-" + hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    )
