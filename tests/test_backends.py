"""The fake backend and the local one keep the same contract."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from contracts.backend import BackendContract, Rig
from fakes import FakeBackend

from cloudrun.backends import Boot
from cloudrun.backends.local import LocalBackend
from cloudrun.formats import timestamp

IDLE = b"import time\ntime.sleep(60)\n"


class FakeRig:
    def __init__(self) -> None:
        self.backend = FakeBackend()

    def boot(self, run: str, attempt: int, seconds: float) -> Boot:
        if seconds < 1:
            threading.Timer(seconds, self.backend.ends, [f"{run}-{attempt}", "it was time"]).start()
        return Boot(run, attempt, timestamp(time.time() + seconds), {})


class LocalRig:
    """Machines with an agent that sleeps."""

    def __init__(self, bucket: Path) -> None:
        self.backend, self.bucket = LocalBackend(), bucket
        (bucket / "agent").write_bytes(IDLE)

    def boot(self, run: str, attempt: int, seconds: float) -> Boot:
        payload = {
            "run": run,
            "attempt": attempt,
            "instance": f"{run}-{attempt}",
            "backend": "local",
            "bucket": f"file://{self.bucket}",
            "prefix": f"toy/runs/{run}",
            "agent": ["agent", hashlib.sha256(IDLE).hexdigest()],
            "order": ["toy/order.json", "0" * 64],
            "left": seconds,
            "agent_gone": 10.0,
            "agent_silence": 60.0,
        }
        return Boot(run, attempt, timestamp(time.time() + seconds), payload)


class TestFakeBackend(BackendContract):
    @pytest.fixture
    def rig(self) -> Rig:
        return FakeRig()


class TestLocalBackend(BackendContract):
    @pytest.fixture
    def rig(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
        (tmp_path / "bucket").mkdir()
        rig = LocalRig(tmp_path / "bucket")
        yield rig
        for found in rig.backend.all():
            rig.backend.stop(found.name)
