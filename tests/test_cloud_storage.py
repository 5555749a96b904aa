"""The emulated Cloud Storage, as Google's own library sees it, and request by request."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import threading
import time
from urllib.parse import quote

import pytest
from cloud.storage import Rule, Storage, Token, crc32c, md5
from cloud.storage_objects import Objects

pytest.importorskip("google.cloud.storage", reason="google-cloud-storage is not installed")

from google.api_core import exceptions as api
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import RefreshError
from google.cloud.storage import Client
from google.oauth2.credentials import Credentials

NAMES = ["a", "a b", "é/ü", "日本/語.bin", "100%", "a%2Fb", "q'\"\\?*[]#+&=", "~", "x" * 1024, "..", "a//b"]
QUICK = {"retry": None, "timeout": 10}
CHUNK = 256 << 10


@pytest.fixture
def bucket(storage, monkeypatch):
    return client_of(storage, monkeypatch).bucket("b")


def client_of(storage, monkeypatch, credentials=None):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage.url)
    monkeypatch.setenv("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    return Client(project="p", credentials=credentials or AnonymousCredentials())


def ask(storage, method, path, body=b"", **headers):
    """(status, headers, body) of one raw request."""
    connection = http.client.HTTPConnection(storage.url[len("http://") :], timeout=10)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read()
    connection.close()
    return found


def start(storage, name="a", described=b"{}", query=""):
    path = f"/upload/storage/v1/b/b/o?uploadType=resumable&name={name}{query}"
    status, headers, body = ask(storage, "POST", path, described, Content_Type="application/json")
    assert status == 200, body
    return headers["Location"][len(storage.url) :]


def send(storage, session, first, data, total):
    where = f"bytes {first}-{first + len(data) - 1}/{total}" if data else f"bytes */{total}"
    return ask(storage, "PUT", session, data, Content_Range=where)


# --- objects


def test_what_is_uploaded_can_be_downloaded(bucket, storage):
    blob = bucket.blob("a/b")
    blob.metadata = {"key": "värde"}
    blob.upload_from_string(b"content", content_type="text/x-thing")
    found = bucket.get_blob("a/b")
    assert (found.size, found.content_type, found.metadata) == (7, "text/x-thing", {"key": "värde"})
    assert (found.md5_hash, found.crc32c) == (md5(b"content"), crc32c(b"content"))
    assert found.generation == blob.generation and found.metageneration == 1
    assert found.time_created is not None and found.etag
    assert bucket.blob("a/b").download_as_bytes() == b"content"
    assert list(storage.objects("b")) == ["a/b"]
    assert storage.objects("b")["a/b"].data == b"content"


def test_checksums_are_those_of_the_service():
    """The check value of CRC-32C for the digits, and MD5's: RFC 3720 B.4, RFC 1321 A.5."""
    assert base64.b64decode(crc32c(b"123456789")).hex() == "e3069283"
    assert base64.b64decode(md5(b"abc")).hex() == "900150983cd24fb0d6963f7d28e17f72"


@pytest.mark.parametrize("name", NAMES)
def test_names(bucket, name):
    if name == "..":
        with pytest.raises(api.BadRequest):
            bucket.blob(name).upload_from_string(b"", **QUICK)
        return
    bucket.blob(name).upload_from_string(name.encode(), **QUICK)
    assert bucket.blob(name).download_as_bytes() == name.encode()
    assert [blob.name for blob in bucket.list_blobs()] == [name]
    bucket.rename_blob(bucket.blob(name), "copy of it")
    assert bucket.blob("copy of it").download_as_bytes() == name.encode()
    assert not bucket.blob(name).exists()


@pytest.mark.parametrize("name", ["x" * 1025, "é" * 513, "a\nb", "."])
def test_names_that_are_refused(bucket, name):
    with pytest.raises(api.BadRequest):
        bucket.blob(name).upload_from_string(b"", **QUICK)


@pytest.mark.parametrize(("start_at", "end"), [(0, 0), (0, 9), (3, 5), (5, None), (9, 100), (None, 3)])
def test_ranges(bucket, storage, start_at, end):
    bucket.blob("a").upload_from_string(b"0123456789")
    found = bucket.blob("a").download_as_bytes(start=start_at, end=end)
    assert found == b"0123456789"[start_at or 0 : None if end is None else end + 1]


def test_the_answers_of_ranges(bucket, storage):
    bucket.blob("a").upload_from_string(b"0123456789")
    for path in ("/download/storage/v1/b/b/o/a?alt=media", "/storage/v1/b/b/o/a?alt=media"):
        status, headers, body = ask(storage, "GET", path, Range="bytes=2-4")
        assert (status, headers["Content-Range"], body) == (206, "bytes 2-4/10", b"234")
        assert headers["X-Goog-Hash"] == f"crc32c={crc32c(b'0123456789')},md5={md5(b'0123456789')}"
        assert headers["X-Goog-Generation"] == str(storage.objects("b")["a"].generation)
        assert headers["Date"].endswith("GMT")
        assert ask(storage, "GET", path, Range="bytes=-3")[2] == b"789"
        assert ask(storage, "GET", path, Range="bytes=10-")[0] == 416
    bucket.blob("empty").upload_from_string(b"")
    assert ask(storage, "GET", "/download/storage/v1/b/b/o/empty?alt=media", Range="bytes=0-")[0] == 416


def test_a_generation_is_asked_for_by_its_number(bucket):
    first = bucket.blob("a")
    first.upload_from_string(b"1")
    second = bucket.blob("a")
    second.upload_from_string(b"2")
    assert second.generation > first.generation
    assert bucket.blob("a", generation=second.generation).download_as_bytes() == b"2"
    with pytest.raises(api.NotFound):
        bucket.blob("a", generation=first.generation).download_as_bytes()


def test_listing(bucket, storage):
    names = sorted(f"{a}/{n}" for a in ("x", "y", "y-", "z") for n in range(7))
    for name in [*names, "top", "é"]:
        bucket.blob(name).upload_from_string(b"")
    client = bucket.client
    assert [blob.name for blob in client.list_blobs("b", page_size=3)] == [*sorted([*names, "top"]), "é"]
    assert [blob.name for blob in client.list_blobs("b", prefix="y/")] == [f"y/{n}" for n in range(7)]
    found = client.list_blobs("b", delimiter="/", page_size=2)
    assert [blob.name for blob in found] == ["top", "é"]
    assert found.prefixes == {"x/", "y/", "y-/", "z/"}
    found = client.list_blobs("b", start_offset="y/3", end_offset="z/2")
    assert [blob.name for blob in found] == ["y/3", "y/4", "y/5", "y/6", "z/0", "z/1"]
    storage.log.clear()
    assert len(list(client.list_blobs("b", max_results=5))) == 5
    assert len(storage.requests) == 1


def test_partial_answers(bucket, storage):
    bucket.blob("a").upload_from_string(b"1")
    for fields, wanted in {
        "items(name,size),nextPageToken": {"items": [{"name": "a", "size": "1"}]},
        "items/name": {"items": [{"name": "a"}]},
        "items/name,items/size": {"items": [{"name": "a", "size": "1"}]},
        "prefixes": {},
    }.items():
        assert json.loads(ask(storage, "GET", f"/storage/v1/b/b/o?fields={fields}")[2]) == wanted
    assert set(json.loads(ask(storage, "GET", "/storage/v1/b/b/o/a?fields=name,size")[2])) == {"name", "size"}


def test_what_is_not_there(bucket, storage, monkeypatch):
    status, _, body = ask(storage, "GET", "/storage/v1/b/b/o/x%2Fy")
    error = json.loads(body)["error"]
    detail = {"message": "No such object: b/x/y", "domain": "global", "reason": "notFound"}
    assert (status, error) == (404, {"code": 404, "message": "No such object: b/x/y", "errors": [detail]})
    assert ask(storage, "GET", "/download/storage/v1/b/b/o/x?alt=media")[2] == b"No such object: b/x"
    for act in (bucket.blob("x").delete, bucket.blob("x").reload, bucket.blob("x").download_as_bytes):
        with pytest.raises(api.NotFound, match="No such object: b/x"):
            act(**QUICK)
    nothing = bucket.client.bucket("nothing")
    with pytest.raises(api.NotFound, match=r"The specified bucket does not exist\."):
        nothing.blob("x").upload_from_string(b"", **QUICK)
    with pytest.raises(api.NotFound, match=r"The specified bucket does not exist\."):
        list(nothing.list_blobs(**QUICK))
    assert bucket.client.get_bucket("b").location == "US-CENTRAL1"


# --- preconditions


def test_preconditions(bucket, storage):
    blob = bucket.blob("a")
    blob.upload_from_string(b"1", if_generation_match=0)
    generation = blob.generation
    refused = [
        lambda: bucket.blob("a").upload_from_string(b"2", if_generation_match=0, **QUICK),
        lambda: bucket.blob("a").upload_from_string(b"2", if_generation_match=generation + 1, **QUICK),
        lambda: bucket.blob("a").upload_from_string(b"2", if_generation_not_match=generation, **QUICK),
        lambda: bucket.blob("a").upload_from_string(b"2", if_metageneration_match=7, **QUICK),
        lambda: bucket.blob("absent").upload_from_string(b"2", if_generation_match=generation, **QUICK),
        lambda: bucket.blob("absent").upload_from_string(b"2", if_generation_not_match=0, **QUICK),
        lambda: bucket.blob("a").delete(if_generation_match=generation + 1, **QUICK),
        lambda: bucket.blob("a").reload(if_generation_match=generation + 1, **QUICK),
        lambda: bucket.blob("a").download_as_bytes(if_generation_match=generation + 1, **QUICK),
        lambda: bucket.blob("c").rewrite(bucket.blob("a"), if_source_generation_match=5, **QUICK),
        lambda: bucket.blob("a").rewrite(bucket.blob("a"), if_generation_match=5, **QUICK),
    ]
    for act in refused:
        with pytest.raises(api.PreconditionFailed, match="pre-conditions you specified did not hold"):
            act()
    assert list(storage.objects("b")) == ["a"] and storage.objects("b")["a"].data == b"1"
    bucket.blob("a").upload_from_string(b"2", if_generation_match=generation)
    bucket.blob("absent").upload_from_string(b"2", if_generation_not_match=7)
    bucket.blob("a").delete(if_generation_not_match=generation)


def test_the_words_of_a_failed_precondition(storage):
    storage.store.put("b", "a", b"", {}, {})
    path = "/upload/storage/v1/b/b/o?uploadType=media&name=a&ifGenerationMatch=0"
    status, headers, body = ask(storage, "POST", path, b"x")
    text = "At least one of the pre-conditions you specified did not hold."
    detail = {"message": text, "domain": "global", "reason": "conditionNotMet"}
    detail.update({"locationType": "header", "location": "If-Match"})
    assert (status, headers["Content-Type"]) == (412, "application/json; charset=UTF-8")
    assert json.loads(body) == {"error": {"code": 412, "message": text, "errors": [detail]}}


def test_of_many_threads_that_create_one_wins(bucket, storage):
    gate, won = threading.Barrier(16), []

    def create(number):
        gate.wait()
        path = "/upload/storage/v1/b/b/o?uploadType=media&name=a&ifGenerationMatch=0"
        won.append(ask(storage, "POST", path, b"%d" % number)[0])

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [200] + [412] * 15


@pytest.mark.parametrize("field", ["md5_hash", "crc32c"])
def test_a_wrong_checksum_stores_nothing(bucket, storage, field):
    for chunk in (None, CHUNK):
        blob = bucket.blob("a", chunk_size=chunk)
        setattr(blob, field, {"md5_hash": md5(b"other"), "crc32c": crc32c(b"other")}[field])
        size = 9 << 20 if chunk else 5
        with pytest.raises(api.BadRequest, match=r"Provided .* hash .* doesn't match calculated"):
            blob.upload_from_file(io.BytesIO(bytes(size)), size=size, checksum=None, **QUICK)
    hashed = f"md5={md5(b'other')}"
    path = "/upload/storage/v1/b/b/o?uploadType=media&name=a"
    assert ask(storage, "POST", path, b"x", X_Goog_Hash=hashed)[0] == 400
    assert storage.objects("b") == {}


# --- copies


def test_rewrite_takes_several_calls_if_it_has_to(bucket, storage):
    source = bucket.blob("dir/source")
    source.metadata = {"a": "b"}
    source.upload_from_string(bytes(5000), content_type="text/x-thing")
    storage.rewrite_step = 2000
    storage.log.clear()
    target, token, done = bucket.blob("target"), None, []
    while True:
        token, rewritten, total = target.rewrite(source, token=token)
        done.append((rewritten, total))
        if token is None:
            break
    assert done == [(2000, 5000), (4000, 5000), (5000, 5000)]
    assert (target.content_type, target.metadata, target.size) == ("text/x-thing", {"a": "b"}, 5000)
    copy = bucket.copy_blob(source, bucket, "copy")
    assert copy.download_as_bytes() == bytes(5000)
    with pytest.raises(api.BadRequest):
        target.rewrite(source, token="stale", **QUICK)


def test_compose(bucket):
    for name in ("1", "2"):
        bucket.blob(name).upload_from_string(name * 10)
    both = bucket.blob("both")
    both.compose([bucket.blob("1"), bucket.blob("2")], if_generation_match=0)
    assert both.download_as_bytes() == b"1" * 10 + b"2" * 10
    assert (both.component_count, both.md5_hash, both.crc32c) == (2, None, crc32c(b"1" * 10 + b"2" * 10))
    with pytest.raises(api.NotFound):
        both.compose([bucket.blob("absent")], **QUICK)


# --- sessions


def test_a_session_takes_pieces_and_says_what_it_has(storage):
    session, data = start(storage), bytes(range(256)) * 3000
    assert send(storage, session, 0, b"", "*")[0] == 308
    assert "Range" not in send(storage, session, 0, b"", len(data))[1]
    status, headers, _ = send(storage, session, 0, data[:CHUNK], len(data))
    assert (status, headers["Range"]) == (308, f"bytes=0-{CHUNK - 1}")
    assert send(storage, session, 0, b"", "*")[1]["Range"] == f"bytes=0-{CHUNK - 1}"
    again = send(storage, session, 0, data[: 2 * CHUNK], "*")  # what it has already is not taken twice
    assert again[1]["Range"] == f"bytes=0-{2 * CHUNK - 1}"
    assert storage.objects("b") == {} and storage.sessions.open() == 1
    status, _, body = send(storage, session, 2 * CHUNK, data[2 * CHUNK :], len(data))
    assert status == 200 and json.loads(body)["md5Hash"] == md5(data)
    assert send(storage, session, 0, b"", len(data))[0] == 200  # asked again after a lost reply
    assert storage.objects("b")["a"].data == data and storage.sessions.open() == 0


def test_a_client_in_go_asks_for_no_308(storage):
    session = start(storage)
    answer = ask(
        storage,
        "POST",
        session,
        bytes(CHUNK),
        Content_Range=f"bytes 0-{CHUNK - 1}/*",
        X_GUploader_No_308="yes",
    )
    assert (answer[0], answer[1]["X-HTTP-Status-Code-Override"]) == (200, "308")
    assert answer[1]["Range"] == f"bytes=0-{CHUNK - 1}" and storage.objects("b") == {}


def test_what_a_session_refuses(storage):
    session = start(storage)
    assert send(storage, session, CHUNK, bytes(10), CHUNK + 10)[0] == 503  # a gap
    assert send(storage, session, 0, bytes(10), "*")[0] == 400  # no multiple of 256 KiB, and not the end
    assert ask(storage, "PUT", session, b"x", Content_Range="nonsense")[0] == 400
    assert send(storage, "/upload/storage/v1/b/b/o?uploadType=resumable&upload_id=no", 0, b"x", 1)[0] == 404
    assert ask(storage, "DELETE", session)[0] == 499
    assert send(storage, session, 0, b"x", 1)[0] == 499
    assert storage.objects("b") == {}


def test_a_session_expires_after_a_week():
    now = [1e9]
    with Storage(clock=lambda: now[0]) as storage:
        storage.create_bucket("b")
        session = start(storage)
        now[0] += 7 * 24 * 3600 - 1
        assert send(storage, session, 0, b"", "*")[0] == 308
        now[0] += 2
        assert send(storage, session, 0, b"x", 1)[0] == 410


def test_the_preconditions_of_a_session_hold_at_its_end(storage):
    first, second = (start(storage, query="&ifGenerationMatch=0") for _ in range(2))
    assert send(storage, first, 0, b"1", 1)[0] == 200
    assert send(storage, second, 0, b"2", 1)[0] == 412
    path = "/upload/storage/v1/b/b/o?uploadType=resumable&name=a&ifGenerationMatch=0"
    assert ask(storage, "POST", path, b"{}")[0] == 412
    assert storage.objects("b")["a"].data == b"1"


def test_the_library_sends_large_content_in_pieces(bucket, storage):
    data = bytes(range(256)) * 40000
    bucket.blob("a", chunk_size=4 << 20).upload_from_file(io.BytesIO(data), size=len(data))
    assert storage.objects("b")["a"].data == data
    assert storage.counts()["start"] == 1 and storage.counts()["chunk"] == 3


# --- who may


def test_tokens(monkeypatch):
    now = [1e9]
    rules = [
        Rule("p/blobs/", {"storage.objects.get"}, "b"),
        Rule("p/runs/", {"storage.objects.get", "storage.objects.create", "storage.objects.list"}),
    ]
    tokens = {"wide": Token(), "narrow": Token(now[0] + 100, rules)}
    with Storage(tokens=tokens, clock=lambda: now[0]) as storage:
        storage.create_bucket("b")
        wide = client_of(storage, monkeypatch, Credentials("wide")).bucket("b")
        narrow = client_of(storage, monkeypatch, Credentials("narrow")).bucket("b")
        wide.blob("p/blobs/x").upload_from_string(b"1")
        assert narrow.blob("p/blobs/x").download_as_bytes() == b"1"
        narrow.blob("p/runs/a").upload_from_string(b"1")
        assert [blob.name for blob in narrow.list_blobs(prefix="p/runs/")] == ["p/runs/a"]
        refused = {
            "storage.objects.create": lambda: narrow.blob("p/blobs/y").upload_from_string(b"", **QUICK),
            "storage.objects.delete": lambda: narrow.blob("p/runs/a").upload_from_string(b"", **QUICK),
            "storage.objects.list": lambda: list(narrow.list_blobs(prefix="p/", **QUICK)),
            "storage.objects.get": lambda: narrow.blob("q").download_as_bytes(**QUICK),
            "storage.buckets.get": lambda: narrow.reload(**QUICK),
        }
        for permission, act in refused.items():
            with pytest.raises(api.Forbidden, match=f"someone@example.com does not have {permission} access"):
                act()
        now[0] += 101
        with pytest.raises(RefreshError):  # what the library makes of a 401: this kind cannot be renewed
            narrow.blob("p/blobs/x").reload(**QUICK)
        status, _, body = ask(storage, "GET", "/storage/v1/b/b/o/x")
        assert status == 401 and b"Anonymous caller does not have storage.objects.get access" in body


def test_a_session_needs_no_token_once_it_is_begun():
    with Storage(tokens={"t": Token()}) as storage:
        storage.create_bucket("b")
        path = "/upload/storage/v1/b/b/o?uploadType=resumable&name=a"
        assert ask(storage, "POST", path, b"{}")[0] == 401
        place = ask(storage, "POST", path, b"{}", Authorization="Bearer t")[1]["Location"]
        assert send(storage, place[len(storage.url) :], 0, b"x", 1)[0] == 200


# --- faults, log and costs


def test_faults(storage):
    put = "/upload/storage/v1/b/b/o?uploadType=media&name="
    storage.faults.add("insert", "a", nth=1, status=503, times=2)
    assert [ask(storage, "POST", put + "a", b"x")[0] for _ in range(4)] == [200, 503, 503, 200]
    storage.faults.add("insert", "cut", cut="before")
    storage.faults.add("insert", "lost", cut="after")
    for name in ("cut", "lost"):
        with pytest.raises(ConnectionError):
            ask(storage, "POST", put + name, b"x")
    assert list(storage.objects("b")) == ["a", "lost"]
    storage.faults.add(lambda call: call.kind == "read", truncate=0)
    with pytest.raises(http.client.IncompleteRead):
        ask(storage, "GET", "/storage/v1/b/b/o/a?alt=media")
    with storage.faults.unreachable(), pytest.raises(ConnectionError):
        ask(storage, "GET", "/storage/v1/b/b/o/a")
    go_on = threading.Event()
    storage.faults.add("get", hold=go_on)
    threading.Timer(0.05, go_on.set).start()
    assert ask(storage, "GET", "/storage/v1/b/b/o/a")[0] == 200
    assert go_on.is_set()


def test_counts_and_costs(bucket, storage):
    bucket.blob("a").upload_from_string(b"12345")
    bucket.blob("a").download_as_bytes()
    bucket.get_blob("a")
    list(bucket.list_blobs())
    bucket.blob("c").rewrite(bucket.blob("a"))
    bucket.blob("a").delete()
    counts = storage.counts()
    assert {kind: counts[kind] for kind in ("A", "B", "free", "all")} == {"A": 3, "B": 2, "free": 1, "all": 6}
    assert storage.cost() == pytest.approx(3 * 0.005 / 1000 + 2 * 0.0004 / 1000)
    assert counts["bytes_in"] > 5 and counts["bytes_out"] > 5
    kinds = [(request.kind, request.name, request.status) for request in storage.requests]
    assert kinds[0] == ("insert", "a", 200) and kinds[-1] == ("delete", "a", 204)


def test_a_request_costs_the_same_whatever_the_number_of_objects():
    """Without HTTP, so that only the store is measured; a scan would cost a hundred times more."""
    objects = Objects(time.time)
    objects.create_bucket("b")

    def seconds(number):
        taken = []
        for turn in range(200):
            began = time.perf_counter()
            objects.put("b", f"probe/{number}/{turn}", b"", {}, {})
            objects.list("b", {"prefix": f"probe/{number}/{turn}", "delimiter": "/"})
            taken.append(time.perf_counter() - began)
        return sorted(taken)[100]

    few = seconds(0)
    for number in range(30_000):
        objects.put("b", f"many/{hashlib.md5(b'%d' % number).hexdigest()}", b"", {}, {})
    assert seconds(1) < 5 * few


def test_the_path_of_a_name_is_one_part(storage):
    """A slash in a name is %2F in a path: what is not encoded is another method."""
    storage.store.put("b", "a/b", b"1", {}, {})
    assert ask(storage, "GET", f"/storage/v1/b/b/o/{quote('a/b', safe='')}?alt=media")[2] == b"1"
    assert ask(storage, "GET", "/storage/v1/b/b/o/a/b?alt=media")[0] == 404
