"""What main.py finds on a rented machine: the environment of a login, and the packages of its project.

Packages go to a virtual environment that sees those of the image. pip leaves alone what is there already; uv
does not look there (its issue 4466) and has to be told, so it is used only where there is a uv.lock.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Collection, Mapping

from cloudrun.agent.account import Account
from cloudrun.agent.earlier import Earlier
from cloudrun.agent.program import Program, find_python
from cloudrun.agent.watch import Task, Watch, now
from cloudrun.errors import CloudrunError
from cloudrun.processes import kill_descendants

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable

    Write = Callable[[str, bytes], None]

TURN_SECONDS = 0.1
MOST = 1 << 20  # bytes of what a command says that are kept
# Requirements that are other files of the project, or name such.
LOCAL = re.compile(
    rb"(?m)^\s*(-[rce]|--(requirement|constraint|editable)|\.|[^#\n:]*(/|\.whl)|[^#\n]*file:)"
    rb"|source = \{ (path|directory) "
)
FACTS = "import sys; print(sys.executable, sys.prefix, sys.version)"
# Where the image's Python is a virtual environment itself, a new one would see past it.
OUTER = """import site, sys
if sys.prefix != sys.base_prefix:
    print(*(f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()), sep="\\n")"""
SATISFIED = """import re
from importlib.metadata import distributions
plain = lambda name, version: (re.sub("[-_.]+", "-", name or "").lower(), version.partition("+")[0])
here = {plain(found.metadata["Name"], found.version) for found in distributions()}
locked = re.findall('(?m)^name = "(.+)"\\nversion = "(.+)"', open("uv.lock").read())
print(*(f"--no-install-package={name}" for name, version in locked if plain(name, version) in here))"""
BUILD = """
python=$1 new=$2 pip="$2/bin/python -m pip --no-input --disable-pip-version-check"
rm -rf "$new"; (cd "${new%/*}"; ls -1t | tail -n +4 | xargs -r rm -rf)
"$python" -m venv --system-site-packages --without-pip "$new"
"$python" -c "$OUTER" >"$(echo "$new"/lib/python*/site-packages)/outer.pth"
$pip --version >/dev/null 2>&1 || "$new/bin/python" -m ensurepip
if [ -f requirements.txt ]; then
    $pip install --progress-bar off -r requirements.txt
else
    PATH="$PATH:$new/bin"; command -v uv >/dev/null || $pip install --progress-bar off uv
    export UV_PROJECT_ENVIRONMENT="$new" UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1
    uv sync --frozen --no-dev --inexact $("$new/bin/python" -c "$SATISFIED")
fi
sync -f "$new"; touch "$new/complete"
"""


class Environment:
    """A step ends early when the run has to; then what it gives is of no use, as the caller will see."""

    def __init__(self, watch: Watch, write: Write) -> None:
        self._watch, self._write = watch, write
        self._account = Account(watch.boot.get("user", ""))
        self._said, self._until = b"", 0.0
        self.keeping: Task | None = None

    def enter(self) -> Earlier:
        """Go to the project's directory, which is empty and still ours alone."""
        self._earlier = Earlier(self._account, self._watch.prefix.split("/")[0])
        return self._earlier

    def settle(self, manifest: str, outputs: Collection[str]) -> None:
        """All is here, the `outputs` of an earlier attempt as well: hand it over."""
        self._manifest = manifest
        self._account.give()
        if self._watch.boot.get("kept"):
            self._earlier.note(manifest, outputs)
            self.keeping = Task(self._earlier.keep)

    def login(self) -> dict[str, str]:
        """What a login of the user sets. A profile that is broken or hangs does not break the run.

        In a container it is what its image says: a login would forget the image's programs and libraries.
        """
        self._until = now() + self._watch.limits["environment"]
        if self._watch.boot["backend"] == "vast":
            return self._account.container()
        self._run(self._account.login, {"PATH": os.environ["PATH"]}, self._keep, self._watch.limits["login"])
        environ = self._account.environment(self._said)
        if self._said.count(b"\0\0") < 2:
            self._write("note", b"the login shell does not work, so main.py gets a plain environment")
        return environ

    def command(self, environ: dict[str, str], order: Mapping[str, Any]) -> list[str]:
        """How main.py is started; `environ` is changed for it. Raises CloudrunError or OSError."""
        python, wanted = find_python(environ) or sys.executable, requirements(order, self._manifest)
        if wanted:
            python = self._installed(python, wanted, environ)
        return self._account.command([python, *order["argv"]])

    def _installed(self, python: str, wanted: bytes, environ: dict[str, str]) -> str:
        """The Python of a virtual environment with what is wanted; an earlier run may have made it."""
        self._step([python, "-c", FACTS], environ, self._keep)
        key = hashlib.sha256(b"\0".join((wanted, python.encode(), self._said))).hexdigest()
        new = os.path.join(self._account.home(".cache", "cloudrun"), key[:32])
        if os.path.exists(new + "/complete"):
            os.utime(new)  # it is the one that was used last
        else:
            self._write("note", b"installing what the project requires")
            scripts = {"OUTER": OUTER, "SATISFIED": SATISFIED}
            self._step(["/bin/sh", "-ec", BUILD, "sh", python, new], {**environ, **scripts}, self._show)
        environ.update({"VIRTUAL_ENV": new, "PATH": f"{new}/bin:{environ['PATH']}"})
        return new + "/bin/python"

    def _step(self, argv: list[str], environ: dict[str, str], write: Write) -> None:
        status = self._run(self._account.command(argv), environ, write)
        if status is None and not self._watch.reason():
            raise CloudrunError("installing what the project requires took too long")
        if status:
            lines = self._said.decode("utf-8", "replace").split("\n")
            raise CloudrunError(next((line for line in reversed(lines) if line.strip()), f"exit {status}"))

    def _run(self, argv: list[str], environ: dict[str, str], write: Write, limit: float = 1e9) -> int | None:
        """The status of a command, of which nothing is left; None: it took too long, or the run must end."""
        self._said, until = b"", min(self._until, now() + limit)
        program = Program(argv, environ, write)
        while program.status is None and now() < until and not self._watch.reason():
            program.pump(TURN_SECONDS)
            self._watch.beat()
        status = program.status
        kill_descendants(5.0)
        program.last_words()
        return status

    def _keep(self, stream: str, data: bytes) -> None:
        if stream == "out":
            self._said = (self._said + data)[:MOST]

    def _show(self, _: str, data: bytes) -> None:
        self._write("err", data)
        self._said = (self._said + data)[-4096:]


def requirements(order: Mapping[str, Any], manifest: str) -> bytes:
    """What decides which packages are installed; empty if the project in the current directory wants none."""
    names = ("requirements.txt",) if os.path.isfile("requirements.txt") else ("pyproject.toml", "uv.lock")
    if not all(map(os.path.isfile, names)):
        return b""
    texts = []
    for name in names:
        with open(name, "rb") as file:
            texts.append(file.read())
    if any(map(LOCAL.search, texts)):
        with open(manifest, "rb") as lines:
            code = [line for line in lines if json.loads(line)["path"].split("/")[0] not in order["folders"]]
        texts += code
    return b"\0".join(texts)
