"""Answers that are files: logs, and the output of `ls` and `du`. They are behind an address of their own,
which knows no key and is empty for a while (docs.vast.ai, "Request Logs"; vastai 1.9.1 asks 30 times).
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import subprocess
from typing import TYPE_CHECKING, Any

from .server import Call, Reply
from .vast_contract import Contract
from .vast_errors import Refusal

if TYPE_CHECKING:
    from .vast import Request
    from .vast_account import Market

PREFIX = "/instance_logs/"
EARLY = 2  # how often it is asked for in vain
LONGEST = 512


class ResultMethods:
    def __init__(self, market: Market) -> None:
        self.market = market
        self._files: dict[str, tuple[str, int]] = {}

    def instances_request_logs(self, request: Request) -> Any:
        contract, wanted = self.market.contract(request.number), request.body or {}
        if wanted.get("daemon_logs") == "true":
            lines = [f"{when:.3f} {status}" for when, status in contract.history]
        else:
            lines = contract.log.splitlines()
        lines = [line for line in lines if re.search(wanted.get("filter", ""), line)]
        lines = lines[-int(wanted.get("tail", "1000")) :]
        return {"success": True, "result_url": self._file("".join(f"{line}\n" for line in lines)), "msg": ""}

    def instances_command(self, request: Request) -> Any:
        """`rm` is not emulated: nobody may change the lower side of a mounted overlay."""
        contract, command = self.market.contract(request.number), request.body["command"]
        words = shlex.split(command)
        if len(command) > LONGEST or words[:1] not in (["ls"], ["du"]):
            raise Refusal(400, "invalid_args", "Invalid command given. See docs for allowed commands.")
        options = [word for word in words[1:] if word.startswith("-")]
        paths = [word for word in words[1:] if not word.startswith("-")]
        done = subprocess.run(
            [words[0], *options, *(written(contract, path) for path in paths or ["/root"])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        text = done.stdout.replace(str(contract.disk), "").replace("/upper", "")
        return {"success": True, "result_url": self._file(text), "writeable_path": "", "msg": ""}

    def _file(self, text: str) -> str:
        name = f"{secrets.token_hex(16)}.log"
        self._files[name] = text, EARLY
        return f"{self.market.url}{PREFIX}{name}"

    def answer(self, call: Call) -> Reply:
        name = call.path.removeprefix(PREFIX)
        text, left = self._files.get(name, ("", 1))
        if left:
            if name in self._files:
                self._files[name] = text, left - 1
            return Reply(404, b"<Error><Code>NoSuchKey</Code></Error>", "application/xml")
        return Reply(200, text.encode(), "text/plain")


def written(contract: Contract, path: str) -> str:
    """Where that lies of what the container wrote itself."""
    top, _, rest = os.path.normpath(f"/{path}").strip("/").partition("/")
    return str(contract.disk / top / "upper" / rest)
