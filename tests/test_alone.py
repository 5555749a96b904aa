"""A stranger's machine whose client is gone: its token runs out, and what it makes still comes home."""

import json

import pytest
from machine import interpreter
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


TWINS = """
import os
os.makedirs("model", exist_ok=True)
for name in "ab":
    open("model/" + name, "w").write("the same")
"""


def test_what_is_stored_already_is_no_error_for_who_may_not_replace_it(google, tmp_path):
    """The service looks at what the token may do before it looks at conditions."""
    run = Stranger(tmp_path, google, TWINS).run()
    assert run.collect() == [] and run.receipt["save"] == "", run.receipt
    assert run.outputs() == {"model/a": b"the same", "model/b": b"the same"}


CHATTY = """
import os, time
end = time.time() + {seconds}
number = 0
while time.time() < end:
    number += 1
    print("line", number, flush=True)
    if number % 20 == 1:
        os.makedirs("model", exist_ok=True)
        with open("new", "w") as file: file.write(str(number))
        os.rename("new", "model/step")
    time.sleep(0.02)
with open("model/last", "w") as file: file.write(str(number))
print("last", number, flush=True)
"""


def check_all_of(run):
    """Every line is there once, and the outputs are those of the end."""
    assert run.collect() == [] and run.late() == []
    *lines, last = run.output().decode().splitlines()
    assert lines == [f"line {n}" for n in range(1, len(lines) + 1)] and last == f"last {len(lines)}"
    step = (len(lines) - 1) // 20 * 20 + 1
    assert run.outputs() == {"model/step": b"%d" % step, "model/last": b"%d" % len(lines)}
    assert run.receipt["status"] == 0 and run.receipt["save"] == "" and run.receipt["message"] == ""


def used(google, kind):
    """Sessions of this kind that something was stored with."""
    found = {request.name for request in google.storage.requests if request.kind == "chunk"}
    return len([name for name in found if f"/late/{kind}" in name])


@pytest.mark.parametrize("version", ["3.8", "3.13"])
def test_archives_are_spread_over_the_time_that_is_left(google, tmp_path, version):
    google.logins.narrow_seconds = 4.0
    run = Stranger(tmp_path, google, CHATTY.format(seconds=12), left=40.0, limits={"save_interval": 0.1})
    run.run(interpreter(version))
    assert 3 < used(google, "log") < 12, "one in so many seconds, and the last"
    assert 3 < used(google, "save") < 12, "at most as often"
    check_all_of(run)


def test_the_last_sessions_are_kept_for_the_end(google, tmp_path, monkeypatch):
    monkeypatch.setattr(handover, "COUNT", 2)
    google.logins.narrow_seconds = 4.0
    run = Stranger(tmp_path, google, CHATTY.format(seconds=8), left=16.0, limits={"save_interval": 0.1})
    run.run()
    assert used(google, "log") <= 2 and used(google, "save") <= 2
    check_all_of(run)


def test_uploads_that_are_cut_off_or_answered_by_nobody_are_finished(google, tmp_path):
    google.logins.narrow_seconds = 4.0
    for cut in ({"cut": "before", "keep": 100_000}, {"cut": "after"}, {"status": 503}, {"cut": "before"}):
        google.storage.faults.add("chunk", times=2, **cut)
    google.storage.faults.add("status", times=3, cut="before")
    run = Stranger(tmp_path, google, CHATTY.format(seconds=8), left=60.0).run()
    check_all_of(run)


def test_a_session_that_is_over_is_passed_over(google, tmp_path):
    google.logins.narrow_seconds = 5.0
    run = Stranger(tmp_path, google, CHATTY.format(seconds=9), left=60.0).start()
    urls = json.loads(run.gs.get(handover.sessions_name(run.whole, 1))[0])
    for url in (*urls["save"][:2], *urls["log"][:2]):
        run.gs.cancel(url)
    run.finish()
    assert not {"save-001", "save-002", "log-001", "log-002"} & set(run.late())
    check_all_of(run)


def test_with_no_session_left_it_still_ends(google, tmp_path):
    google.logins.narrow_seconds = 4.0
    limits = {"save": 2.0}
    run = Stranger(tmp_path, google, MAIN.format(seconds=6), left=60.0, limits=limits).start()
    for urls in json.loads(run.gs.get(handover.sessions_name(run.whole, 1))[0]).values():
        for url in urls:
            run.gs.cancel(url)
    run.finish()
    assert run.words.endswith(b"R") and run.collect() == [] and run.receipt is None


def test_who_asked_for_it_has_the_run_ended_when_nobody_is_there(google, tmp_path):
    google.logins.narrow_seconds = 4.0
    run = Stranger(tmp_path, google, CHATTY.format(seconds=100), left=200.0, if_client_lost="stop").run()
    assert run.collect() == [] and run.receipt["reason"] == "client-lost"
    assert run.outputs()["model/step"]
