"""Buckets of Cloud Storage when network, service or content misbehave; and how often they ask."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from cloud.storage import Rule, Token
from cloud.storage_tokens import Metadata
from contracts.bucket import at_once
from machine import ROOT, VERSIONS, interpreter

from cloudrun.errors import BucketError, BucketRefused, Conflict, Corrupt, Missing, UsageError
from cloudrun.storage import open_bucket
from cloudrun.storage.rest import RestBucket

pytest.importorskip("google.cloud.storage", reason="google-cloud-storage is not installed")

from cloudrun.storage.gcs import GcsBucket

SMALL, LARGE = b"small" * 1000, bytes(range(256)) * (10 << 12)  # in one request, and in a session
EVERYTHING = frozenset(f"storage.objects.{verb}" for verb in ("get", "list", "create", "delete"))


@pytest.fixture(params=[GcsBucket, RestBucket])
def kind(request):
    return request.param


@pytest.fixture
def bucket(kind, storage):
    return kind("gs://b/some/prefix")


@pytest.fixture
def hasty(kind, storage):
    """One that gives up at once, where giving up is what is looked at."""
    return kind("gs://b/some/prefix", patience=0.05)


def data_of(storage, name):
    return storage.objects("b")["some/prefix/" + name].data


def sha256(data):
    return hashlib.sha256(data).hexdigest()


# --- requests


def test_how_many_requests_each_call_makes(storage, bucket):
    acts = {
        "create": (lambda: bucket.create("a", SMALL), {"insert": 1}),
        "create again": (lambda: bucket.create("a", SMALL), {"insert": 1, "get": 1}),
        "get": (lambda: bucket.get("a"), {"read": 1}),
        "size": (lambda: bucket.size("a"), {"get": 1}),
        "put": (lambda: bucket.put("p", SMALL), {"insert": 1}),
        "swap": (lambda: bucket.swap("s", SMALL, None), {"insert": 1}),
        "chunks": (lambda: list(bucket.chunks("a")), {"read": 1}),
        "a small blob": (lambda: bucket.put_blob("", [SMALL]), {"insert": 1}),
        "names": (lambda: list(bucket.names("")), {"list": 1}),
        "dirs": (lambda: bucket.dirs(""), {"list": 1}),
        "copy": (lambda: bucket.copy("a", "c"), {"rewrite": 1}),
        "delete": (lambda: bucket.delete("c"), {"delete": 1}),
        "clone": (lambda: bucket.clone("a", "/nowhere", 0), {"get": 1}),
        "tidy": (bucket.tidy, {}),
    }
    for what, (act, wanted) in acts.items():
        storage.log.clear()
        act()
        assert Counter(request.kind for request in storage.requests) == wanted, what


def test_a_large_blob_that_is_there_is_not_sent_again(storage, bucket):
    bucket.put_blob("blobs/", [LARGE])
    storage.log.clear()
    assert bucket.put_blob("blobs/", [LARGE]) == sha256(LARGE)
    assert [request.kind for request in storage.requests] == ["get"]


def test_a_listing_asks_for_names_only(storage, bucket):
    for number in range(20):
        bucket.put(f"n/{number:02}", b"")
    storage.log.clear()
    assert len(list(bucket.names("n/"))) == 20
    assert storage.counts()["bytes_out"] < 20 * 60


def test_the_library_never_looks_the_bucket_up(storage, bucket):
    """It would in the background, at the first use of a bucket, for a permission that we do not need."""
    results = at_once(8, lambda i: bucket.put(f"a{i}", b"1"))
    assert results == [None] * 8
    bucket.get("a1")
    assert "bucket" not in {request.kind for request in storage.requests}


def test_many_threads_keep_their_connections(storage, bucket, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            at_once(16, lambda i: bucket.put(f"a{i}", SMALL))
    assert "Connection pool is full" not in caplog.text


# --- lost requests and replies


@pytest.mark.parametrize("cut", ["before", "after"])
class TestALostReply:
    def test_of_create(self, storage, bucket, cut):
        storage.faults.add("insert", "/a", cut=cut)
        assert bucket.create("a", SMALL) is True
        assert data_of(storage, "a") == SMALL

    def test_of_swap(self, storage, bucket, cut):
        first = bucket.swap("a", b"1", None)
        storage.faults.add("insert", "/a", cut=cut)
        second = bucket.swap("a", b"2", first)
        assert bucket.get("a") == (b"2", second)
        with pytest.raises(Conflict):
            bucket.swap("a", b"3", first)

    def test_of_put(self, storage, bucket, cut):
        storage.faults.add("insert", "/a", cut=cut)
        bucket.put("a", SMALL)
        assert data_of(storage, "a") == SMALL

    @pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
    def test_of_put_blob(self, storage, bucket, cut, content):
        storage.faults.add("insert|chunk", cut=cut)
        assert bucket.put_blob("blobs/", [content]) == sha256(content)
        assert data_of(storage, f"blobs/{sha256(content)}") == content
        assert storage.sessions.open() == 0

    def test_of_the_beginning_of_a_session(self, storage, bucket, cut):
        storage.faults.add("start", cut=cut)
        bucket.put_blob("blobs/", [LARGE])
        assert data_of(storage, f"blobs/{sha256(LARGE)}") == LARGE

    def test_of_what_only_looks_copies_or_deletes(self, storage, bucket, cut):
        bucket.create("a", SMALL)
        storage.faults.add("get|read|list|rewrite", cut=cut, times=5)
        assert bucket.size("a") == len(SMALL)
        assert bucket.get("a")[0] == SMALL
        bucket.copy("a", "c")
        assert list(bucket.names("")) == ["a", "c"]
        storage.faults.add("delete", cut=cut)
        bucket.delete("a")
        assert list(storage.objects("b")) == ["some/prefix/c"]


def test_swaps_of_equal_content_are_told_apart(storage, bucket):
    """Whoever lost the race must hear of it, although what is stored is what it wanted to store."""
    version = bucket.swap("a", b"1", None)
    bucket.swap("a", b"2", version)
    with pytest.raises(Conflict):
        bucket.swap("a", b"2", version)


@pytest.mark.parametrize("arrived", [0, 100_000, 1 << 20, len(LARGE) - 1])
def test_an_upload_that_is_cut_goes_on_where_it_stood(storage, bucket, arrived):
    storage.faults.add("chunk", cut="before", keep=arrived)
    assert bucket.put_blob("blobs/", [LARGE]) == sha256(LARGE)
    assert data_of(storage, f"blobs/{sha256(LARGE)}") == LARGE


def test_an_upload_that_is_cut_again_and_again(storage, bucket):
    storage.faults.add("chunk", cut="before", keep=3 << 20, times=4)
    storage.faults.add("status", cut="after", times=2)
    bucket.put_blob("blobs/", [LARGE])
    assert data_of(storage, f"blobs/{sha256(LARGE)}") == LARGE


@pytest.mark.parametrize("status", [404, 410])
def test_a_session_that_the_service_forgot_begins_anew(storage, bucket, status):
    storage.faults.add("chunk", status=status)
    bucket.put_blob("blobs/", [LARGE])
    assert data_of(storage, f"blobs/{sha256(LARGE)}") == LARGE
    assert storage.counts()["start"] == 2


# --- the service is busy


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_passes_is_waited_for(storage, bucket, status):
    bucket.create("a", b"1")
    for hit in ("insert", "read", "get", "list", "rewrite", "delete", "start", "chunk"):
        storage.faults.add(hit, status=status)
    bucket.put("a", b"2")
    assert bucket.get("a")[0] == b"2"
    assert bucket.size("a") == 1
    assert list(bucket.names("")) == ["a"]
    bucket.copy("a", "c")
    bucket.delete("c")
    bucket.put_blob("blobs/", [LARGE])
    assert data_of(storage, f"blobs/{sha256(LARGE)}") == LARGE
    assert [request.status for request in storage.requests].count(status) == 8


def test_too_many_writes_of_one_object(storage, bucket):
    """https://cloud.google.com/storage/docs/gcs429: about one a second is what an object takes."""
    storage.faults.add("insert", "/state.json", status=429, times=3)
    bucket.put("state.json", b"{}")
    assert [request.status for request in storage.requests] == [429, 429, 429, 200]


def test_a_limit_on_requests_that_comes_as_forbidden(storage, bucket):
    storage.faults.add("insert", status=403, reason="rateLimitExceeded", message="slow down")
    bucket.put("a", b"1")
    assert [request.status for request in storage.requests] == [403, 200]


def test_giving_up_says_that_it_may_work_later(storage, hasty):
    acts = [
        lambda: hasty.create("a", b"1"),
        lambda: hasty.put("a", b"1"),
        lambda: hasty.swap("a", b"1", None),
        lambda: hasty.get("a"),
        lambda: hasty.size("a"),
        lambda: list(hasty.chunks("a")),
        lambda: list(hasty.names("")),
        lambda: hasty.copy("a", "c"),
        lambda: hasty.delete("a"),
        lambda: hasty.put_blob("", [LARGE]),
    ]
    storage.faults.add(status=503, times=float("inf"))
    for act in acts:
        with pytest.raises(BucketError, match="try again") as caught:
            act()
        assert not caught.value.permanent
    storage.faults.clear()
    with storage.faults.unreachable():
        for act in acts:
            with pytest.raises(BucketError, match="try again") as caught:
                act()
            assert not caught.value.permanent
    assert hasty.create("a", b"1") is True


def test_a_slow_answer_is_waited_for(storage, bucket):
    go_on = threading.Event()
    storage.faults.add("insert", hold=go_on)
    threading.Timer(0.2, go_on.set).start()
    assert bucket.create("a", SMALL) is True
    assert len(storage.requests) == 1


# --- downloads


@pytest.mark.parametrize("arrived", [0, 1, 1 << 20, 3_000_001, len(LARGE) - 1])
def test_a_download_that_is_cut_goes_on_where_it_stood(storage, bucket, arrived):
    bucket.put("a", LARGE)
    storage.faults.add("read", truncate=arrived)
    assert b"".join(bucket.chunks("a")) == LARGE
    _, second = [request for request in storage.requests if request.kind == "read"]
    assert "generation=" in second.path and second.bytes_out <= len(LARGE) - arrived + (1 << 20)
    storage.faults.add("read", truncate=min(arrived, 5000))
    assert b"".join(bucket.chunks("a", 1000, 6000)) == LARGE[1000:7000]


def test_whole_objects_that_arrive_incomplete_are_read_again(storage, bucket):
    bucket.put("a", SMALL)
    storage.faults.add("read", truncate=100, times=2)
    assert bucket.get("a")[0] == SMALL


def test_an_object_that_is_replaced_while_it_is_read(storage, hasty):
    """The second half of another object must not be taken for that of the first."""
    hasty.put("a", LARGE)
    storage.faults.add("read", truncate=2 << 20)
    pieces = hasty.chunks("a")
    next(pieces)
    hasty.put("a", LARGE[::-1])
    with pytest.raises(BucketError, match="replaced while it was read"):
        list(pieces)


def test_a_range_is_one_request_whatever_its_length(storage, bucket):
    bucket.put("a", LARGE)
    storage.log.clear()
    assert sum(map(len, bucket.chunks("a", 5, 9 << 20))) == 9 << 20
    assert len(storage.requests) == 1
    with pytest.raises(Corrupt, match="1 bytes are missing"):
        list(bucket.chunks("a", 5, len(LARGE) - 4))


# --- content


class Changing:
    """Content that becomes another one after it was read for the first time; or each time."""

    def __init__(self, content, *, shorter=False, always=False):
        self.turn, self.content, self.shorter, self.always = 0, content, shorter, always

    def __iter__(self):
        self.turn += 1
        changed = self.content[:-7] + b"" if self.shorter else self.content[:-7] + b"changed"
        data = self.content if self.turn == 1 else changed
        yield data[:10]
        yield data[10:] + b"%d" % self.turn * self.always


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("shorter", [False, True])
def test_content_that_changes_between_two_readings(storage, bucket, content, shorter):
    """The name is that of the first reading, so the service must refuse what the second one gave."""
    found = bucket.put_blob("blobs/", Changing(content, shorter=shorter))
    assert found == sha256(data_of(storage, f"blobs/{found}"))
    assert len(storage.objects("b")) == 1


def test_content_that_never_stops_changing_is_not_stored(storage, bucket):
    with pytest.raises(BucketError, match="changed while it was read") as caught:
        bucket.put_blob("blobs/", Changing(SMALL, always=True))
    assert not caught.value.permanent
    assert storage.objects("b") == {}


def test_an_error_of_the_content_at_its_second_reading_comes_out(storage, bucket):
    class Vanishing:
        turn = 0

        def __iter__(self):
            self.turn += 1
            yield SMALL
            if self.turn > 1:
                raise FileNotFoundError("gone")
            yield SMALL

    with pytest.raises(FileNotFoundError, match="gone"):
        bucket.put_blob("blobs/", Vanishing())
    assert storage.objects("b") == {}


def test_eight_threads_amid_faults_of_all_kinds(storage, bucket):
    blobs = [bytes([n]) * (200_000 + n) for n in range(40)]
    storage.faults.add(lambda call: call.nth == 0 and len(call.name) % 2 == 0, times=15, cut="after")
    storage.faults.add("insert", nth=0, times=10, status=503)
    storage.faults.add("insert", nth=0, times=5, cut="before")

    def work(i):
        for data in blobs[i::8]:
            name = bucket.put_blob("blobs/", [data])
            assert b"".join(bucket.chunks("blobs/" + name)) == data
            assert bucket.create(f"own/{i}/{name}", data) is True
        return "done"

    assert at_once(8, work) == ["done"] * 8
    assert len(storage.objects("b")) == 80


# --- refusals


def test_a_bucket_that_does_not_exist(storage, kind):
    bucket = kind("gs://nothing/here")
    acts = [
        lambda: bucket.put("a", b""),
        lambda: bucket.get("a"),
        lambda: bucket.size("a"),
        lambda: list(bucket.names("")),
        lambda: bucket.put_blob("", [LARGE]),
    ]
    for act in acts:
        with pytest.raises(BucketRefused, match=r"no bucket gs://nothing: make it .* or correct GCS_DIR"):
            act()


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        ({"status": 403}, "roles/storage.objectAdmin"),
        ({"status": 403, "reason": "accountDisabled", "message": "The billing account is closed"}, "billing"),
        ({"status": 401}, "gcloud auth application-default login"),
        ({"status": 400, "message": "Invalid bucket name"}, "Invalid bucket name"),
    ],
)
def test_a_refusal_says_why_and_what_to_do(storage, bucket, fault, advice):
    for act in (lambda: bucket.put("a", b""), lambda: bucket.get("a"), lambda: list(bucket.names(""))):
        storage.faults.add(times=1, **fault)
        with pytest.raises(BucketRefused, match=advice) as caught:
            act()
        assert caught.value.permanent and "gs://b" in str(caught.value)
        storage.faults.clear()


def test_a_url_without_a_bucket(kind):
    for url in ("gs://", "gs:///x", "gs://b/a//b", "gs://b/../x", "gs://b?x/y", "gs://B"):
        with pytest.raises(UsageError, match="not gs://bucket/directory"):
            kind(url)


def test_without_credentials_a_sentence_says_how_to_log_in(tmp_path, monkeypatch):
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "GCE_METADATA_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "CLOUDSDK_CONFIG"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with pytest.raises(BucketRefused, match="gcloud auth application-default login"):
        GcsBucket("gs://b")


def test_without_the_package_a_sentence_says_how_to_install_it():
    code = (
        "import sys; sys.modules['google.cloud.storage'] = None\n"
        "from cloudrun.storage import open_bucket\nopen_bucket('gs://b')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "UsageError: GCS_DIR=gs://b needs Google's library: pip install 'cloudrun[gcp]'" in done.stderr


# --- credentials


@pytest.fixture
def metadata(storage, monkeypatch):
    storage.tokens = {}
    with Metadata(storage.tokens) as found:
        monkeypatch.setenv("GCE_METADATA_HOST", found.host)
        yield found


def test_a_machine_uses_its_service_account(storage, metadata):
    bucket = RestBucket("gs://b")
    assert at_once(8, lambda i: bucket.create(f"a{i}", b"1")) == [True] * 8
    assert metadata.given == 1
    assert {request.token for request in storage.requests} == {"token-1"}


def test_a_token_is_replaced_before_it_expires(storage, metadata):
    metadata.seconds = 200  # less than what it should be good for
    bucket = RestBucket("gs://b")
    bucket.put("a", b"1")
    time.sleep(1.1)  # what a token is kept for at least, however short its life
    bucket.put("a", b"2")
    assert metadata.given == 2


def test_a_machine_without_a_service_account(storage, metadata):
    metadata.status = 404
    with pytest.raises(BucketRefused, match="no service account"):
        RestBucket("gs://b").get("a")
    metadata.status = 503
    with pytest.raises(BucketError, match="try again"):
        RestBucket("gs://b", patience=0.2).get("a")


def test_a_token_for_a_part_of_the_bucket(storage, monkeypatch):
    """A boundary of two rules, as a stranger's machine gets it."""
    from google.oauth2.credentials import Credentials

    rules = [
        Rule("p/blobs/", {"storage.objects.get"}),
        Rule("p/runs/r/", {"storage.objects.get", "storage.objects.create"}),
    ]
    storage.tokens = {"narrow": Token(time.time() + 60, rules), "wide": Token()}
    GcsBucket("gs://b/p", credentials=Credentials("wide")).create("blobs/x", SMALL)
    narrow = GcsBucket("gs://b/p", credentials=Credentials("narrow"))
    assert narrow.get("blobs/x")[0] == SMALL
    assert narrow.create("runs/r/a", b"1") is True
    refused = [
        lambda: narrow.create("blobs/y", b""),
        lambda: narrow.put("runs/r/a", b"2"),
        lambda: narrow.create("runs/other/a", b""),
        lambda: list(narrow.names("runs/r/")),
        lambda: narrow.delete("runs/r/a"),
    ]
    for act in refused:
        with pytest.raises(BucketRefused, match=r"does not have storage\.objects"):
            act()


# --- where it runs

TRIP = """
import sys
sys.path.insert(0, sys.argv[1])
before = set(sys.modules)
from cloudrun.storage import open_bucket
bucket = open_bucket("gs://b/some/prefix", agent=True)
data = bytes(range(256)) * 50000
sha256 = bucket.put_blob("blobs/", [data[:1000], data[1000:]])
assert b"".join(bucket.chunks("blobs/" + sha256)) == data
assert bucket.create("a", b"1") is True and bucket.create("a", b"1") is False
version = bucket.swap("s", b"1", None)
assert bucket.get("s") == (b"1", version)
bucket.copy("a", "c")
assert list(bucket.names("")) == ["a", "blobs/" + sha256, "c", "s"], list(bucket.names(""))
assert bucket.dirs("") == ["blobs"]
bucket.delete("a")
assert bucket.size("a") is None
assert not {name for name in sys.modules if name.split(".")[0] in ("google", "requests", "urllib3")}
print("ok")
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_every_python_of_a_machine(storage, version):
    done = subprocess.run(
        [interpreter(version), "-I", "-S", "-c", TRIP, str(ROOT)],
        env={"STORAGE_EMULATOR_HOST": storage.url},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("ok\n", "")


def test_the_agent_and_the_client_open_the_same_bucket(storage):
    here, there = open_bucket("gs://b/x"), open_bucket("gs://b/x", agent=True)
    assert (type(here), type(there)) == (GcsBucket, RestBucket)
    here.put("a", b"1")
    assert there.get("a") == here.get("a")
    with pytest.raises(Missing, match="there is no gs://b/x/absent"):
        there.get("absent")


def test_nothing_of_google_is_imported_before_a_bucket_is_opened():
    code = (
        "import sys, cloudrun.cli, cloudrun.storage, cloudrun.launch\n"
        "print({n for n in sys.modules if n.split('.')[0] in ('google', 'requests') or n == 'cloudrun.gs'})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
