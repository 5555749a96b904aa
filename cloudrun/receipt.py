"""The agent's last word, checked, and what exit code a run ends in."""

from __future__ import annotations

import re
import signal
from typing import Any, NamedTuple

from cloudrun.errors import FAILED, LIMIT, UNKNOWN, Corrupt, Missing
from cloudrun.formats import parse, shown
from cloudrun.storage import Bucket

MAX_RECEIPT = 1 << 20  # bytes
FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("reason", "message", "save", "by", "started", "ended"), str),
    **dict.fromkeys(("chunks", "attempt", "uncopied"), int),
    **{"status": (int, type(None)), "signal": (str, type(None)), "seconds": (int, float)},
}


class Outcome(NamedTuple):
    """How a run ended, whoever said so. `reason`: exited, deadline, cost, stopped, client-lost, guard-lost,
    failed, unusable, preempted or lost; `exit_code` is cloudrun's own; `seconds` is main.py's, if known."""

    reason: str
    exit_code: int
    words: str
    seconds: float | None = None
    receipt: dict[str, Any] | None = None


def read_receipt(bucket: Bucket, prefix: str) -> dict[str, Any] | None:
    """The receipt, or None while there is none. Raises Corrupt."""
    name = prefix + "/receipt.json"
    try:
        receipt = parse(bucket.get(name, MAX_RECEIPT)[0], name, **FIELDS)
    except Missing:
        return None
    if not (0 <= (receipt["status"] or 0) <= 255 and 0 <= receipt["seconds"] < 1e9):  # JSON can say infinity
        raise Corrupt(f"{name} is damaged: no program ends like that")
    return receipt


def outcome_of(receipt: dict[str, Any]) -> Outcome:
    """What a receipt means for the user."""
    code, words = _exit_of(receipt)
    reason = receipt["reason"]
    if reason == "failed":
        code, words = FAILED, f"main.py was not started: {receipt['message']}"
    elif reason in ("deadline", "cost"):
        limit = "the deadline" if reason == "deadline" else "the cost cap"
        code, words = LIMIT, f"ended at {limit} ({words})"
    elif reason == "stopped":
        code, words = user_code(receipt["by"]), f"{ended_by(receipt['by'])} ({words})"
    elif reason == "client-lost":
        code, words = user_code("SIGHUP"), f"ended because no client was left ({words})"
    elif reason != "exited":
        code, words = UNKNOWN, f"ended early, {reason} ({words})"
    elif receipt["message"]:
        words += f"; {receipt['message']}"
    if receipt["save"]:
        words += f"; its last outputs could not be saved: {receipt['save']}"
        code = code or UNKNOWN
    return Outcome(reason, code, words, float(receipt["seconds"]), receipt)


def billed_outcome(bill: dict[str, Any]) -> Outcome:
    """How a run ended that left no receipt, as its bill remembers."""
    code = bill.get("exit_code")
    return Outcome(
        str(bill.get("reason")),
        code if isinstance(code, int) else UNKNOWN,
        f"ended, {bill.get('reason')}",
    )


def user_code(by: str) -> int:
    """The exit code of a run that the user ended with this signal, or with `cloudrun stop`."""
    return 128 + _number(by, signal.SIGINT)


def ended_by(name: str) -> str:
    """The same in words."""
    return "ended because the reader closed the output" if name == "SIGPIPE" else "ended by the user"


def _number(name: str, default: int) -> int:
    """The signal of this name, which comes from a machine and may be anything."""
    if re.fullmatch("SIG[1-9][0-9]", name):  # a real-time signal has no name
        return int(name[3:])
    return signal.Signals.__members__.get(name, default)


def _exit_of(receipt: dict[str, Any]) -> tuple[int, str]:
    status, name = receipt["status"], receipt["signal"]
    if name:
        number = _number(name, 0)
        return (128 + number, name) if number else (UNKNOWN, f"signal {shown(name)}")
    return (UNKNOWN, "not started") if status is None else (status, f"exit {status}")
