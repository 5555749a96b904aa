"""What the machine of a stranger is given, and what is taken back: nothing of it is good for long."""

import json
import time

import pytest
from given import Judge, of_files, of_processes
from machine import wait_until
from stranger import REFRESH, Stranger, google_of

from cloudrun import handover
from cloudrun.backends import Offer
from cloudrun.errors import BucketRefused, UsageError
from cloudrun.run import check_limits
from cloudrun.storage.gcs import GcsBucket

pytest.importorskip("google.cloud.storage", reason="google-cloud-storage is not installed")

WAITS = "import time, os\nprint('up', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.05)\n"


@pytest.fixture
def google(tmp_path, monkeypatch):
    with google_of(tmp_path, monkeypatch) as found:
        yield found


def up(run):
    wait_until(lambda: run.phase_there() == "run", 20, "main.py")


def test_nothing_that_a_machine_has_reads_later_or_changes_anything(google, tmp_path):
    run = Stranger(tmp_path, google, WAITS).start()
    up(run)
    handover.renew(run.gs, run.whole, 1)
    boot = json.dumps(run.given)
    stored = [found.data.decode("utf-8", "replace") for found in google.storage.objects("b").values()]
    judge = Judge(
        google.storage,
        google.tokens,
        [boot, *stored, *of_processes([run.process.pid]), *of_files(run.folder)],
    )
    judge.no_account(REFRESH, "client_secret")
    assert len(judge.given) == 2 and len(judge.sessions) == 2 * handover.COUNT + 1
    judge.narrow("some/dir/", "p", run.whole.run, 1)
    google.tokens.expire()
    late = [f"some/dir/{run.whole.prefix}/attempts/1/late/"]
    assert all(name.startswith(late[0]) for name in judge.nothing_later())
    run.kill()


def test_a_session_creates_and_never_replaces(google, tmp_path):
    run = Stranger(tmp_path, google)
    name = f"{run.whole.prefix}/attempts/1/late/receipt"
    url = run.gs.session(name)
    run.gs.put(name, b"there already")
    judge = Judge(google.storage, google.tokens, [url])
    assert judge.ask("PUT", url[len(google.storage.url) :], b"other") == 412
    assert run.gs.get(name)[0] == b"there already"


def test_a_machine_takes_up_fresh_tokens_while_a_client_is_there(google, tmp_path):
    google.logins.narrow_seconds = 5.0
    run = Stranger(tmp_path, google, WAITS).start()
    up(run)
    end = time.monotonic() + 11
    while time.monotonic() < end:
        handover.renew(run.gs, run.whole, 1)
        time.sleep(1.5)
    assert "alone" not in run.state()
    (run.work / "go").touch()
    run.finish()
    used = {request.token for request in google.storage.requests if request.kind in ("insert", "read")}
    assert len([token for token in used if google.tokens[token].rules is not None]) > 2
    assert run.late() == [] and run.collect() == [] and run.receipt["status"] == 0


def test_what_is_not_used_is_taken_back(google, tmp_path):
    run = Stranger(tmp_path, google)
    run.boot()
    handover.renew(run.gs, run.whole, 1)
    assert google.storage.sessions.open() == 2 * handover.COUNT + 1
    handover.take_back(run.gs, run.whole)
    assert google.storage.sessions.open() == 0
    assert not [name for name in run.gs.names("") if name.endswith(("token.json", "sessions.json"))]
    handover.take_back(run.gs, run.whole)


def test_only_sessions_of_our_bucket_are_cancelled_and_nobody_gets_our_token(google, tmp_path):
    run = Stranger(tmp_path, google)
    google.storage.create_bucket("other")
    strange = [
        f"{google.storage.url}/storage/v1/b/b/o/x",
        f"{google.storage.url}/upload/storage/v1/b/other/o?upload_id=1",
        "http://127.0.0.1:9/upload/storage/v1/b/b/o?upload_id=1",
        7,
    ]
    ours = run.gs.session("x")
    listed = {"save": [*strange, ours], "log": "no list", "receipt": []}
    run.gs.put(handover.sessions_name(run.whole, 1), json.dumps(listed).encode())
    google.storage.log.clear()
    handover.take_back(run.gs, run.whole)
    cancelled = [request for request in google.storage.requests if request.kind == "cancel"]
    assert [request.token for request in cancelled] == [""]
    assert not [request for request in google.storage.requests if "/other/" in request.path]
    assert google.storage.sessions.open() == 0


def test_whoever_may_not_exchange_tokens_reads_what_to_do(google, tmp_path, monkeypatch):
    run = Stranger(tmp_path, google)
    monkeypatch.setenv(handover.STS, f"{google.storage.url}/")
    with pytest.raises(BucketRefused, match=r"gcloud services enable sts\.googleapis\.com"):
        handover.give(run.gs, run.whole, 1)


def test_an_emulator_that_asks_nobody_gives_no_token(google, tmp_path, monkeypatch):
    google.storage.tokens = None
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    run = Stranger(tmp_path, google)
    assert isinstance(run.gs, GcsBucket) and handover.give(run.gs, run.whole, 1) == {}


def test_a_run_of_more_than_160_hours_is_refused_for_a_strangers_machine(tmp_path):
    from cloudrun.config import from_env

    offers = [Offer("a machine", 1.0, 1.0)]
    long = from_env({"CLOUDRUN_MAX_HOURS": "161", "CLOUDRUN_BACKEND": "local", "HOME": "/x"}, "/p")
    with pytest.raises(UsageError, match="may take 160 hours, and the limits leave 161"):
        check_limits(long, offers, stranger=True)
    check_limits(long, offers)
    check_limits(long._replace(max_hours=160), offers, stranger=True)
