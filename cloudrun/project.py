"""Which files of the project go up: data/, model/ and checkpoint/ whole, code as the ignore files say."""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cloudrun.errors import CloudrunError, UsageError
from cloudrun.formats import check_link, shown

DATA = ("data", "model", "checkpoint")
RETURNED = ("model", "checkpoint")
IGNORE_FILES = (".gitignore", ".cloudrunignore")
LEFT_OUT = {  # names
    **dict.fromkeys((".git", ".hg", ".svn"), "version control"),
    **dict.fromkeys((".venv", "venv"), "virtual environments"),
    **dict.fromkeys(("__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"), "caches"),
    **dict.fromkeys((".ipynb_checkpoints", ".tox", ".nox", ".cache", "node_modules"), "caches"),
    ".env": "secrets",
}
SECRETS = (".env.", "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519")  # what their names begin with
PULLED_BESIDE = re.compile(r"\.[a-z0-9_-]+-\d{8}-\d{6}-[0-9a-f]{4}\Z")
BESIDE = "stored beside by an earlier pull"
CREDENTIALS = re.compile(
    rb'"type"\s*:\s*"(service_account|authorized_user|external_account)"|"client_secret"'
)


class Found(NamedTuple):
    """Something of the project that goes up. `status` is that of the file, or of the empty directory."""

    path: str
    status: os.stat_result
    link: str = ""


@dataclass
class Scan:
    """What was found, in the order of the walk, and why what else there is stays here."""

    found: list[Found] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, why: str, path: str) -> None:
        self.left_out.setdefault(why, []).append(path)


def check_project(directory: str, script: str) -> str:
    """The script's path inside the project, which is `directory`. Raises UsageError."""
    home = os.path.realpath(os.path.expanduser("~"))
    if os.path.realpath(directory) in ("/", home):
        raise UsageError(
            f"{directory} is no project: cloudrun never sends a whole home or disk; cd to a project"
        )
    if not os.path.isfile(os.path.join(directory, "main.py")):
        raise UsageError(f"there is no main.py in {directory}: cd to the project's directory")
    path = os.path.relpath(os.path.join(directory, script), directory)
    if path.startswith("../"):
        raise UsageError(f"{script} is outside the project {directory}: cd to its project, or move it here")
    if not os.path.isfile(os.path.join(directory, path)):
        raise UsageError(f"there is no file {script} in {directory}")
    real = os.path.realpath(os.path.join(directory, path))
    if not real.startswith(os.path.realpath(directory) + "/"):
        raise UsageError(f"{script} is a link that leaves the project: put {real} itself there")
    return path


def scan(root: str) -> Scan:
    """Walk the project; paths are relative to root. Raises CloudrunError for what cannot be read."""
    result = Scan()
    stack = [_Folder("", os.stat(root), _entries(root), 0, _Code(root))]
    while stack:  # a path of 4,096 bytes is deeper than Python can call itself
        here = stack[-1]
        if here.rules is None:
            _take_plain_files(here, result)
        if here.entries:
            inside = _visit(here.entries.pop(), stack, result)
            if inside:
                stack.append(inside)
        elif stack.pop() and here.path and len(result.found) == here.before:
            result.found.append(Found(here.path, here.status))
    return result


class _Folder(NamedTuple):
    """A directory on the way down; `entries` are still to be visited, `before` were found before it.

    Without `rules` it belongs to a data directory, where everything goes up; `follow`: links are followed.
    """

    path: str
    status: os.stat_result
    entries: list[os.DirEntry[str]]
    before: int
    rules: _Code | None
    follow: bool = False


class _Code:
    """The rules of everything else: defaults first, then each ignore file on the way down."""

    def __init__(self, folder: str, path: str = "", outer: _Code | None = None) -> None:
        self._specs: list[tuple[str, str, Any]] = list(outer._specs) if outer else []
        for name in IGNORE_FILES:
            if os.path.isfile(os.path.join(folder, name)):
                self._specs.append((path, name, _read_rules(os.path.join(folder, name), path + name)))

    def excludes(self, entry: os.DirEntry[str], path: str) -> str | None:
        why = _by_default(entry)
        shown = path + "/" if entry.is_dir(follow_symlinks=False) else path
        for base, name, spec in self._specs:
            verdict = spec.check_file(shown[len(base) :]).include
            if verdict is not None:
                why = name if verdict else None
        return why


def _read_rules(file: str, path: str) -> Any:
    from pathspec import GitIgnoreSpec  # a project without such a file does not pay for this

    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape") as text:
            return GitIgnoreSpec.from_lines(text.read().split("\n"))
    except OSError as error:
        raise CloudrunError(f"cannot read {shown(path)}: {error.strerror}; make it readable") from None
    except (ValueError, re.error) as error:
        raise CloudrunError(f"{shown(path)}: {error}; correct that line") from None


def _by_default(entry: os.DirEntry[str]) -> str | None:
    if entry.name in LEFT_OUT:
        return LEFT_OUT[entry.name]
    if entry.name.endswith(".pyc"):
        return "caches"
    if entry.name.startswith(SECRETS) or entry.name.endswith(".pem"):
        return "secrets"
    if beside := _beside(entry):
        return beside
    if entry.is_dir(follow_symlinks=False):
        return "virtual environments" if os.path.exists(os.path.join(entry.path, "pyvenv.cfg")) else None
    if entry.name.startswith("id_") and "." not in entry.name:
        return "secrets"
    if entry.name.endswith(".json") and entry.is_file(follow_symlinks=False):
        try:
            with open(entry.path, "rb") as file:
                return "secrets" if CREDENTIALS.search(file.read(16384)) else None
        except OSError:
            return None  # the walk says what is wrong
    return None


def _beside(entry: os.DirEntry[str]) -> str | None:
    return BESIDE if PULLED_BESIDE.search(entry.name) else None


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """To be taken from the end, in the order of their names."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name, reverse=True)
    except OSError as error:
        raise _unreadable(folder, error) from None


def _unreadable(path: str, error: OSError) -> CloudrunError:
    return CloudrunError(
        f"cannot read {shown(path)}: {error.strerror}; make it readable, or move it out of the project"
    )


def _take_plain_files(here: _Folder, result: Scan) -> None:
    """The common case of `_visit` in one loop: of 100,000 files each pays for every call."""
    entries, found, folder = here.entries, result.found, here.path + "/"
    while entries and entries[-1].is_file(follow_symlinks=False):
        if entries[-1].name[-5:-4] == "-" and PULLED_BESIDE.search(entries[-1].name):
            return
        entry = entries.pop()
        try:
            found.append(Found(folder + entry.name, entry.stat(follow_symlinks=False)))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _unreadable(folder + entry.name, error) from None


def _visit(entry: os.DirEntry[str], stack: list[_Folder], result: Scan) -> _Folder | None:
    """Note what this is. A directory comes back, to be walked next."""
    here, link = stack[-1], entry.is_symlink()
    path = f"{here.path}/{entry.name}" if here.path else entry.name
    try:
        if not here.path and entry.name in DATA and entry.is_dir():
            before, follow = len(result.found), entry.name == "data"
            return _Folder(path, entry.stat(), _entries(entry.path), before, None, follow)
        why = here.rules.excludes(entry, path) if here.rules else _beside(entry)
        if why:
            result.skip(why, path)
        elif link and not here.follow:
            _visit_link(entry, path, result)
        else:
            return _visit_target(entry, path, stack, result)
    except FileNotFoundError:
        if link:
            result.skip("dangling links", path)
    except OSError as error:
        if not link or error.errno != errno.ELOOP:
            raise _unreadable(path, error) from None
        result.skip("link loops", path)
    return None


def _visit_target(entry: os.DirEntry[str], path: str, stack: list[_Folder], result: Scan) -> _Folder | None:
    status, here = entry.stat(), stack[-1]
    if stat.S_ISREG(status.st_mode):
        result.found.append(Found(path, status))
    elif not stat.S_ISDIR(status.st_mode):
        result.skip("sockets, pipes and devices", path)
    elif entry.is_symlink() and any(os.path.samestat(status, above.status) for above in stack):
        result.skip("link loops", path)
    else:
        rules = _Code(entry.path, path + "/", here.rules) if here.rules else None
        return _Folder(path, status, _entries(entry.path), len(result.found), rules, here.follow)
    return None


def _visit_link(entry: os.DirEntry[str], path: str, result: Scan) -> None:
    target = os.readlink(entry.path)
    try:
        check_link(path, target)
    except ValueError:
        result.skip("links that leave the project", path)
        return
    result.found.append(Found(path, entry.stat(follow_symlinks=False), target))


def summary(left_out: dict[str, list[str]]) -> str:
    """`left out: 2 secrets (.env, key.pem), .git`, or nothing."""
    parts = []
    for why, paths in left_out.items():
        names = ", ".join(shown(path) for path in paths[:3]) + (", …" if len(paths) > 3 else "")
        parts.append(f"{names} ({why})" if len(paths) == 1 else f"{len(paths)} {why} ({names})")
    return "; ".join(parts)


def returned(outputs: tuple[str, ...]) -> list[str]:
    """The directories that come back: model, checkpoint and those of --output. Raises UsageError."""
    folders = list(RETURNED)
    for output in outputs:
        path = os.path.normpath(output)
        if path.startswith(("/", "../", "data/")) or path in (".", "..", "data") or os.path.isfile(path):
            raise UsageError(f"--output {output}: not a directory inside the project that can come back")
        if not any(f"{path}/".startswith(f"{folder}/") for folder in folders):
            folders = [folder for folder in folders if not folder.startswith(f"{path}/")] + [path]
    return folders
