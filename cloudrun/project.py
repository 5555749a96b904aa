"""Which files of the project go up: data/, model/ and checkpoint/ whole, code as the ignore files say."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from cloudrun.errors import CloudrunError, UsageError
from cloudrun.formats import check_link, shown

DATA = ("data", "model", "checkpoint")
RETURNED = ("model", "checkpoint")
IGNORE_FILES = (".gitignore", ".cloudrunignore")
LEFT_OUT = {
    "version control": (".git", ".hg", ".svn"),
    "virtual environments": (".venv", "venv"),
    "caches": (
        *("__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints"),
        *(".tox", ".nox", ".cache", "node_modules", "*.pyc"),
    ),
    "secrets": (".env", ".env.*", "*.pem", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*"),
}
PULLED_BESIDE = re.compile(r".*\.[a-z0-9_-]+-\d{8}-\d{6}-[0-9a-f]{4}\Z", re.DOTALL)
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
    return path


def scan(root: str) -> Scan:
    """Walk the project; paths are relative to root. Raises CloudrunError for what cannot be read."""
    result = Scan()
    for entry in _sorted(root):
        if entry.name in DATA and entry.is_dir():
            _walk(entry.path, entry.name, result, _Data(entry.name == "data"), (os.stat(entry.path),))
        else:
            _visit(entry, entry.name, result, _Code(root), ())
    return result


class _Data:
    """The rules of the three data directories: everything goes up; links are followed in data/."""

    def __init__(self, follow: bool) -> None:
        self.follow = follow

    def excludes(self, entry: os.DirEntry[str], path: str) -> str | None:
        return "stored beside by an earlier pull" if PULLED_BESIDE.match(entry.name) else None

    def inside(self, folder: str, path: str) -> _Data:
        return self


class _Code:
    """The rules of everything else: defaults first, then each ignore file on the way down."""

    def __init__(self, folder: str, path: str = "", outer: _Code | None = None) -> None:
        self.follow = False
        self._specs: list[tuple[str, str, Any]] = list(outer._specs) if outer else []
        for name in IGNORE_FILES:
            try:
                with open(os.path.join(folder, name), encoding="utf-8", errors="surrogateescape") as file:
                    lines = file.read().splitlines()
            except (FileNotFoundError, IsADirectoryError):
                continue
            except OSError as error:
                raise CloudrunError(f"cannot read {path}{name}: {error.strerror}") from None
            from pathspec import (
                GitIgnoreSpec,
            )  # a project without such a file does not pay for this

            self._specs.append((path, name, GitIgnoreSpec.from_lines(lines)))

    def inside(self, folder: str, path: str) -> _Code:
        return _Code(folder, path + "/", self)

    def excludes(self, entry: os.DirEntry[str], path: str) -> str | None:
        why = _by_default(entry)
        shown = path + "/" if entry.is_dir(follow_symlinks=False) else path
        for base, name, spec in self._specs:
            verdict = spec.check_file(shown[len(base) :]).include
            if verdict is not None:
                why = name if verdict else None
        return why


def _by_default(entry: os.DirEntry[str]) -> str | None:
    for why, patterns in LEFT_OUT.items():
        if any(fnmatchcase(entry.name, pattern) for pattern in patterns):
            return why
    if PULLED_BESIDE.match(entry.name):
        return "stored beside by an earlier pull"
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


def _sorted(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise CloudrunError(
            f"cannot read the directory {shown(folder)}: {error.strerror}; "
            "make it readable, or leave it out in .cloudrunignore"
        ) from None


def _walk(
    folder: str, path: str, result: Scan, rules: _Data | _Code, above: tuple[os.stat_result, ...]
) -> None:
    before = len(result.found)
    for entry in _sorted(folder):
        _visit(entry, f"{path}/{entry.name}", result, rules, above)
    if len(result.found) == before:
        result.found.append(Found(path, os.stat(folder)))


def _visit(
    entry: os.DirEntry[str],
    path: str,
    result: Scan,
    rules: _Data | _Code,
    above: tuple[os.stat_result, ...],
) -> None:
    why = rules.excludes(entry, path)
    if why:
        result.skip(why, path)
        return
    try:
        link = entry.is_symlink()
        if link and not rules.follow:
            _visit_link(entry, path, result)
            return
        status = entry.stat()
    except FileNotFoundError:
        if link:
            result.skip("dangling links", path)
        return
    except OSError as error:
        if not link:
            raise CloudrunError(f"cannot read {path}: {error.strerror}") from None
        result.skip("link loops", path)
        return
    if stat.S_ISREG(status.st_mode):
        result.found.append(Found(path, status))
    elif stat.S_ISDIR(status.st_mode):
        if link and any(os.path.samestat(status, folder) for folder in above):
            result.skip("link loops", path)
        else:
            _walk(entry.path, path, result, rules.inside(entry.path, path), (*above, status))
    else:
        result.skip("sockets, pipes and devices", path)


def _visit_link(entry: os.DirEntry[str], path: str, result: Scan) -> None:
    target = os.readlink(entry.path)
    try:
        check_link(path, target)
    except ValueError:
        result.skip("links that leave the project", path)
        return
    result.found.append(Found(path, os.lstat(entry.path), target))


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
        if path.startswith(("/", "..")) or path == "." or path in DATA[:1] or path.startswith("data/"):
            raise UsageError(f"--output {output}: not a directory inside the project that can come back")
        if not any(path == folder or path.startswith(folder + "/") for folder in folders):
            folders.append(path)
    return folders
