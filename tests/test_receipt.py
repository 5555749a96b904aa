"""What a receipt means: exit code and words, whatever a machine wrote into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes import receipt_of

from cloudrun.errors import Corrupt
from cloudrun.formats import canonical
from cloudrun.receipt import billed_outcome, outcome_of, read_receipt, user_code
from cloudrun.storage.folder import FolderBucket

CASES: list[tuple[dict[str, Any], int, str]] = [
    ({}, 0, "exit 0"),
    ({"status": 1}, 1, "exit 1"),
    ({"status": 255}, 255, "exit 255"),
    ({"status": 124}, 124, "exit 124"),
    ({"status": None, "signal": "SIGKILL"}, 137, "SIGKILL"),
    ({"status": None, "signal": "SIGSEGV"}, 139, "SIGSEGV"),
    ({"status": None, "signal": "SIG37"}, 165, "SIG37"),
    ({"reason": "deadline", "status": None, "signal": "SIGINT"}, 124, "ended at the deadline (SIGINT)"),
    ({"reason": "deadline", "status": 0}, 124, "ended at the deadline (exit 0)"),
    ({"reason": "deadline", "status": None}, 124, "ended at the deadline (not started)"),
    ({"reason": "cost", "status": 0}, 124, "ended at the cost cap (exit 0)"),
    ({"reason": "stopped", "by": "SIGINT", "status": 0}, 130, "ended by the user (exit 0)"),
    ({"reason": "stopped", "by": "SIGTERM", "status": 7}, 143, "ended by the user (exit 7)"),
    (
        {"reason": "stopped", "by": "SIGHUP", "status": None, "signal": "SIGINT"},
        129,
        "ended by the user (SIGINT)",
    ),
    (
        {"reason": "stopped", "by": "SIGPIPE", "status": None, "signal": "SIGINT"},
        141,
        "ended because the reader closed the output (SIGINT)",
    ),
    ({"reason": "stopped", "by": "stop", "status": 0}, 130, "ended by the user (exit 0)"),
    ({"reason": "client-lost", "status": 0}, 129, "ended because no client was left (exit 0)"),
    ({"reason": "failed", "status": None, "message": "no space"}, 125, "main.py was not started: no space"),
    ({"reason": "guard-lost", "status": 0}, 121, "ended early, guard-lost (exit 0)"),
    ({"reason": "preempted", "status": 0}, 121, "ended early, preempted (exit 0)"),
    ({"reason": "never heard of", "status": 0}, 121, "ended early, never heard of (exit 0)"),
    ({"status": None}, 121, "not started"),
    ({"save": "no space"}, 121, "exit 0; its last outputs could not be saved: no space"),
    ({"status": 3, "save": "no space"}, 3, "exit 3; its last outputs could not be saved: no space"),
    # A machine may write anything.
    ({"status": None, "signal": "alarm"}, 121, "signal alarm"),
    ({"status": None, "signal": "SIG_DFL"}, 121, "signal SIG_DFL"),
    ({"status": None, "signal": "\x1b[2J"}, 121, "signal \\x1b[2J"),
    ({"reason": "stopped", "by": "Signals", "status": 0}, 130, "ended by the user (exit 0)"),
]


@pytest.mark.parametrize(("fields", "code", "words"), CASES)
def test_table(fields: dict[str, Any], code: int, words: str) -> None:
    outcome = outcome_of(receipt_of(**fields))
    assert (outcome.exit_code, outcome.words) == (code, words)
    assert type(outcome.exit_code + 0) is int and 0 <= outcome.exit_code <= 255 and outcome.seconds == 0.5


@pytest.fixture
def bucket(tmp_path: Path) -> FolderBucket:
    return FolderBucket(str(tmp_path))


def test_there_is_none_or_it_is_read(bucket: FolderBucket) -> None:
    assert read_receipt(bucket, "toy/runs/r") is None
    bucket.create("toy/runs/r/receipt.json", canonical(receipt_of(status=4)))
    receipt = read_receipt(bucket, "toy/runs/r")
    assert receipt and receipt["status"] == 4


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        canonical({}),
        *(
            canonical({**receipt_of(), name: {}})
            for name in ("reason", "status", "signal", "chunks", "seconds")
        ),
        *(canonical(receipt_of(status=status)) for status in (-1, 256, 10**30, 1.5)),
    ],
)
def test_a_damaged_one_is_corrupt_and_named(bucket: FolderBucket, data: bytes) -> None:
    bucket.create("toy/runs/r/receipt.json", data)
    with pytest.raises(Corrupt, match=r"toy/runs/r/receipt\.json is damaged"):
        read_receipt(bucket, "toy/runs/r")


def test_a_bill_remembers_how_a_run_without_a_receipt_ended() -> None:
    outcome = billed_outcome({"reason": "lost", "exit_code": 121})
    assert (outcome.exit_code, outcome.words, outcome.seconds) == (121, "ended, lost", None)
    assert billed_outcome({"reason": "x", "exit_code": "soon"}).exit_code == 121


def test_the_users_signals() -> None:
    assert [user_code(by) for by in ("SIGHUP", "SIGINT", "SIGPIPE", "SIGTERM", "stop", "")] == [
        *(129, 130, 141, 143, 130, 130)
    ]
