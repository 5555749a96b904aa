"""A stranger's machine whose client is gone: its token runs out, and what it makes still comes home."""

import pytest
from stranger import Stranger, google_of

from cloudrun import handover

pytest.importorskip("google.cloud.storage", reason="google-cloud-storage is not installed")

MAIN = """
import os, time
print("begun", flush=True)
os.makedirs("model", exist_ok=True)
open("model/early", "w").write("early")
time.sleep({seconds})
open("model/late", "wb").write(bytes(3_000_000) + b"late")
print("done", flush=True)
raise SystemExit(3)
"""


@pytest.fixture
def google(tmp_path, monkeypatch):
    with google_of(tmp_path, monkeypatch) as found:
        yield found


def test_with_its_client_gone_it_delivers_outputs_log_and_receipt(google, tmp_path):
    google.logins.narrow_seconds = 4.0
    run = Stranger(tmp_path, google, MAIN.format(seconds=8)).run()
    assert run.words.endswith(b"R"), run.console
    assert run.state()["alone"] is True
    assert "receipt" in run.late() and run.receipt is None
    used = {request.token for request in google.storage.requests if request.kind in ("chunk", "status")}
    assert used == {""}, "a session needs no token"
    assert run.collect() == []
    assert run.late() == []
    assert run.output() == b"begun\ndone\n"
    assert run.receipt["status"] == 3 and run.receipt["save"] == ""
    assert run.outputs() == {"model/early": b"early", "model/late": bytes(3_000_000) + b"late"}
    assert run.collect() == [] and run.receipt["status"] == 3
    handover.take_back(run.gs, run.whole)
    assert google.storage.sessions.open() == 0
