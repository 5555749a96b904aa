"""`cloudrun doctor`: everything that a run needs, looked at piece by piece, and what to type to mend it.

Each check has its own time and its own errors, so that one failure does not hide the others.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import NamedTuple

from cloudrun.config import choose_backend, from_env, of_a_vm
from cloudrun.errors import USAGE, UsageError
from cloudrun.report import ESCAPED

SECONDS = 12.0  # for a check; several are made at the same time
SKEW = 30.0  # seconds between two clocks from which on tokens and deadlines suffer
OK, WRONG, UNKNOWN, NONE = "ok", "wrong", "unknown", "-"
COLOURS = {OK: "32", WRONG: "31", UNKNOWN: "33", NONE: "2"}
EXAMPLES = {
    "GCLOUD_PROJECT": "my-project-id",
    "GCS_DIR": "gs://my-bucket/runs",
    "CLOUDRUN_BACKEND": "gcp",
    "CLOUDRUN_MAX_HOURS": "2",
    "CLOUDRUN_MAX_COST": "5",
    "CLOUDRUN_PRICE": "0.71",
    "VM_INSTANCE": "my-vm",
    "VM_ZONE": "'us-central1-a us-central1-b'",
    "VM_GPU": "L4",
    "VM_TYPE": "g2-standard-4",
    "VM_DISK": "100",
    "VM_SPOT": "1",
    "VM_USER": "$USER",
    "VM_IMAGE": "projects/my-project-id/global/images/my-image",
    "VAST_API_KEY": "my-key",
    "VAST_IMAGE": "pytorch/pytorch:2.7.1-cuda12.8-cudnn9-runtime",
}


class Finding(NamedTuple):
    """`state`: ok, wrong (a run fails, or costs more than it has to), unknown, - (does not apply).

    `mend` is what to type, a line each.
    """

    check: str
    state: str
    words: str
    mend: str = ""


Check = Callable[[], Iterable[Finding]]


def doctor(backend: str | None, *, as_json: bool, quiet: bool) -> int:
    """Prints its findings as they come. Returns the exit code: 0 if nothing is wrong."""
    found = []
    show = None if as_json else Printer(quiet=quiet, environ=os.environ)
    for finding in examine(os.environ, backend):
        found.append(finding)
        if show:
            show(finding)
    if as_json:
        print(json.dumps([finding._asdict() for finding in found], indent=1))
    return USAGE if any(finding.state == WRONG for finding in found) else 0


def examine(environ: Mapping[str, str], flag: str | None) -> Iterator[Finding]:
    backend, _ = choose_backend(environ, flag)
    yield from settings(environ, flag)
    if backend == "gcp":
        from cloudrun.doctor import gcp

        yield from gcp.examine(environ)
    elif backend == "vast":
        from cloudrun.doctor import vast

        yield from vast.examine(environ)
    elif backend == "local":
        yield from together({"python": python, "bucket": lambda: local_bucket(environ)})


def together(checks: dict[str, Check], seconds: float = SECONDS) -> Iterator[Finding]:
    """All at the same time, their findings in this order. What takes longer, or breaks, is unknown."""
    deadline = time.monotonic() + seconds
    jobs = [(name, *_started(name, check)) for name, check in checks.items()]
    for name, thread, found in jobs:
        thread.join(max(deadline - time.monotonic(), 0))
        late = thread.is_alive()
        yield from list(found)
        if late:
            yield Finding(name, UNKNOWN, f"no answer within {seconds:.0f} s")


def _started(name: str, check: Check) -> tuple[threading.Thread, list[Finding]]:
    found: list[Finding] = []
    # A daemon: it may hang for longer than anybody waits.
    thread = threading.Thread(target=_work, args=(name, check, found), daemon=True)
    thread.start()
    return thread, found


def _work(name: str, check: Check, found: list[Finding]) -> None:
    try:
        for finding in check():
            found.append(finding)
    except Exception as error:
        found.append(Finding(name, UNKNOWN, str(error) or repr(error), getattr(error, "mend", "")))


def allowed(asked: list[str], held: list[str], where: str, mend: str) -> Iterator[Finding]:
    """A line for each permission that is missing, or one for all of them."""
    for permission in asked:
        if permission not in held:
            yield Finding(permission, WRONG, f"not allowed in {where}", mend)
    if set(asked) <= set(held):
        yield Finding(f"{asked[0].partition('.')[0]} permissions", OK, f"all {len(asked)} needed in {where}")


# --- what does not need a cloud


def settings(environ: Mapping[str, str], flag: str | None) -> Iterator[Finding]:
    """All that is wrong with them, a line each."""
    backend, chosen = choose_backend(environ, flag)
    problems = _problems(from_env, environ, os.getcwd(), backend=flag)
    if backend == "gcp":
        from cloudrun.backends.gcp_wanted import wanted

        problems += _problems(wanted, of_a_vm(environ))
    if backend == "vast":
        from cloudrun.backends.vast_offers import wanted as container

        problems += _problems(container, of_a_vm(environ))
    for problem in problems:
        yield Finding("settings", WRONG, problem, _exports(problem))
    if not problems:
        yield Finding("settings", OK, f"backend {backend}" + (f", because {chosen}" if chosen else ""))


def _problems(check: Callable[..., object], *values: object, **flags: object) -> list[str]:
    try:
        check(*values, **flags)
    except UsageError as error:
        return str(error).split("\n")
    return []


def _exports(problem: str) -> str:
    named = [name for name in EXAMPLES if re.search(rf"\b{name}\b", problem)]
    return "\n".join(f"export {name}={EXAMPLES[name]}" for name in named)


def sdk(extra: str = "gcp") -> Iterator[Finding]:
    """`extra`: the backend's, of this package."""
    ours = {"gcp": ("google-cloud-compute", "google.cloud.compute_v1"), "vast": ("vastai", "vastai")}[extra]
    missing = []
    for package, module in (ours, ("google-cloud-storage", "google.cloud.storage")):
        try:
            spec = find_spec(module)
        except (ImportError, ValueError):
            spec = None
        missing += [] if spec else [package]
    if missing:
        yield Finding(
            "SDK", WRONG, f"{', '.join(missing)} is not installed", f"pip install 'cloudrun[{extra}]'"
        )
    else:
        yield Finding("SDK", OK, f"{ours[0]} and google-cloud-storage are installed")


def python() -> Iterator[Finding]:
    """A local machine's guard is started with the Python that runs us."""
    if os.access(sys.executable or "", os.X_OK):
        yield Finding("python", OK, f"{sys.executable}, {sys.version.split()[0]}")
    else:
        yield Finding("python", WRONG, "the Python that runs cloudrun has no file", "command -v python3")


def local_bucket(environ: Mapping[str, str]) -> Iterator[Finding]:
    """The bucket of local runs, and its file system's clock: on a server's disk it is the server's."""
    try:
        bucket = from_env(environ, os.getcwd(), backend="local").bucket
    except UsageError:
        yield Finding("bucket", UNKNOWN, "the settings are wrong")
        return
    if not bucket.startswith("file://"):
        from cloudrun.doctor import gcp

        yield from gcp.examine(environ, "storage")
        return
    path = bucket.removeprefix("file://")
    probe = os.path.join(path, f"doctor-{os.urandom(8).hex()}")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        with open(probe, "xb"):
            skew = os.stat(probe).st_mtime - time.time()
        os.remove(probe)
    except OSError as error:
        mend = f"ls -ld {path}\nexport GCS_DIR=file://$HOME/cloudrun-bucket"
        yield Finding("bucket", WRONG, f"{path} cannot be written: {error.strerror}", mend)
        yield Finding("clock", UNKNOWN, "nothing to compare it with")
        return
    yield Finding("bucket", OK, f"{path} can be written")
    yield clock(skew, "that of the bucket's file system")


def clock(skew: float, other: str) -> Finding:
    if abs(skew) <= SKEW:
        return Finding("clock", OK, f"within {SKEW:.0f} s of {other}")
    words = f"this computer's clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} {other}"
    return Finding("clock", WRONG, words, "sudo timedatectl set-ntp true")


# --- what is printed


class Printer:
    """A line for each finding; quiet: only for what is wrong."""

    def __init__(self, *, quiet: bool, environ: Mapping[str, str]) -> None:
        self._quiet = quiet
        terminal = sys.stdout.isatty() and environ.get("TERM") != "dumb"
        self._colour = terminal and not environ.get("NO_COLOR")

    def __call__(self, finding: Finding) -> None:
        if self._quiet and finding.state != WRONG:
            return
        state = f"{finding.state:<8}"
        if self._colour:
            state = f"\x1b[{COLOURS[finding.state]}m{state}\x1b[0m"
        words = finding.words.replace("\n", " ").translate(ESCAPED)  # others' words must not move the cursor
        print(f"{state} {finding.check}: {words}", flush=True)
        for line in finding.mend.split("\n") if finding.mend else ():
            print(f"{'':<8}   {line.translate(ESCAPED)}", flush=True)
