"""What every bucket must do. A test module makes a `bucket` fixture and a subclass of BucketContract.

The bucket is empty at the start, and `open_bucket(bucket.url)` opens it in another process.
"""

import hashlib
import subprocess
import sys
import threading
import zlib

import pytest

from cloudrun.errors import BucketRefused, Conflict, Corrupt, Missing

LARGE = 20 << 20
ODD_NAMES = [
    "a b",
    "é/ü",
    "日本/語.bin",
    "-",
    "--force",
    "a..b",
    "...",
    "a/.hidden",
    "q'\"\\?*[]#%20",
    "~",
    "x" * 250,
]
BAD_NAMES = [
    *("", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "../a", "a/..", "./a", "a/."),
    *("a\nb", "a\rb", "a\0b", "tab\t", "\x7f", "\x1b[31m"),
    *("surrogate-\udcff", "surrogate-\ud800", "/".join(["n" * 40] * 25) + "x"),
]

COUNT_UP = """
import sys
from cloudrun.errors import Conflict, Missing
from cloudrun.storage import open_bucket

bucket, left = open_bucket(sys.argv[1]), int(sys.argv[2])
while left:
    try:
        data, version = bucket.get("counter")
    except Missing:
        data, version = b"0", None
    try:
        bucket.swap("counter", b"%d" % (int(data) + 1), version)
        left -= 1
    except Conflict:
        pass
"""
CREATE_EACH = """
import sys
from cloudrun.errors import Conflict
from cloudrun.storage import open_bucket

bucket, won = open_bucket(sys.argv[1]), 0
for number in range(int(sys.argv[2])):
    try:
        won += bucket.create(f"race/{number}", sys.argv[3].encode())
    except Conflict:
        pass
print(won)
"""


def content(bucket, name):
    return bucket.get(name)[0]


def at_once(number, act):
    """Run `act(i)` on so many threads at the same moment; what each returned or raised."""
    results, gate = [None] * number, threading.Barrier(number)

    def run(i):
        gate.wait()
        try:
            results[i] = act(i)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def programs(bucket, code, *arguments_of_each):
    """Run a program in several processes at once; what each printed."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, bucket.url, *arguments], stdout=subprocess.PIPE, text=True
        )
        for arguments in arguments_of_each
    ]
    printed = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started)
    return printed


class BucketContract:
    def test_what_was_created_can_be_read(self, bucket):
        assert bucket.create("a/b", b"content") is True
        assert content(bucket, "a/b") == b"content"
        assert bucket.size("a/b") == 7

    def test_an_object_that_is_too_large_is_not_read(self, bucket):
        bucket.create("a", b"12345")
        assert bucket.get("a", 5)[0] == b"12345"
        with pytest.raises(Corrupt, match="it has 5 bytes"):
            bucket.get("a", 4)
        with pytest.raises(Missing):
            bucket.get("absent", 4)

    def test_creating_the_same_content_again_is_our_own_lost_reply(self, bucket):
        bucket.create("a", b"content")
        assert bucket.create("a", b"content") is False
        assert bucket.create("a", iter([b"con", b"", b"tent"])) is False

    def test_creating_another_content_is_a_conflict_and_changes_nothing(self, bucket):
        bucket.create("a", b"content")
        for other in (b"contenT", b"", b"content and more"):
            with pytest.raises(Conflict):
                bucket.create("a", other)
        assert content(bucket, "a") == b"content"

    def test_a_failing_source_stores_nothing_and_its_error_comes_out(self, bucket):
        class Failing:
            def __iter__(self):
                yield b"half"
                raise PermissionError("the source")

        with pytest.raises(PermissionError, match="the source"):
            bucket.create("a", iter(Failing()))
        with pytest.raises(PermissionError, match="the source"):
            bucket.put_blob("blobs/", Failing())
        assert list(bucket.names("")) == []

    def test_of_eight_threads_that_create_one_name_one_wins(self, bucket):
        for attempt in range(10):
            results = at_once(8, lambda i, name=f"a{attempt}": bucket.create(name, b"%d" % i))
            assert results.count(True) == 1
            assert sum(isinstance(result, Conflict) for result in results) == 7
            assert content(bucket, f"a{attempt}") == b"%d" % results.index(True)

    def test_eight_threads_that_create_the_same_content_all_succeed(self, bucket):
        results = at_once(8, lambda i: bucket.create("a", b"same" * 1000))
        assert sorted(results) == [False] * 7 + [True]

    def test_each_of_many_names_is_created_by_one_of_several_processes(self, bucket):
        printed = programs(bucket, CREATE_EACH, *[("40", f"process-{i}") for i in range(4)])
        assert sum(map(int, printed)) == 40

    def test_put_replaces(self, bucket):
        for data in (b"first", b"", b"third" * 100):
            bucket.put("a", data)
            assert content(bucket, "a") == data

    def test_readers_see_the_old_or_the_new_content(self, bucket):
        bucket.put("a", bytes(300_000))
        stop, torn = threading.Event(), []

        def read():
            while not stop.is_set():
                data = content(bucket, "a")
                if len(data) != 300_000 or len(set(data)) != 1:
                    torn.append(data)

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for number in range(60):
            bucket.put("a", bytes([number]) * 300_000)
        stop.set()
        for reader in readers:
            reader.join()
        assert not torn

    def test_swap_creates_and_replaces_exactly_the_version_that_was_read(self, bucket):
        first = bucket.swap("a", b"1", None)
        assert bucket.get("a") == (b"1", first)
        second = bucket.swap("a", b"2", first)
        assert bucket.get("a") == (b"2", second)
        assert first != second

    def test_swap_of_another_version_is_a_conflict_and_changes_nothing(self, bucket):
        first = bucket.swap("a", b"1", None)
        bucket.swap("a", b"2", first)
        for version in (first, None):
            with pytest.raises(Conflict):
                bucket.swap("a", b"3", version)
        assert content(bucket, "a") == b"2"

    def test_swap_of_what_was_deleted_is_a_conflict(self, bucket):
        version = bucket.swap("a", b"1", None)
        bucket.delete("a")
        with pytest.raises(Conflict):
            bucket.swap("a", b"2", version)
        assert bucket.size("a") is None

    def test_the_version_changes_with_put_too(self, bucket):
        version = bucket.swap("a", b"1", None)
        bucket.put("a", b"2")
        with pytest.raises(Conflict):
            bucket.swap("a", b"3", version)

    def test_of_eight_threads_that_swap_one_version_one_wins(self, bucket):
        version = None
        for _ in range(10):
            results = at_once(8, lambda i, version=version: bucket.swap("a", b"%d" % i, version))
            winners = [result for result in results if isinstance(result, str)]
            assert len(winners) == 1
            assert sum(isinstance(result, Conflict) for result in results) == 7
            assert bucket.get("a") == (b"%d" % results.index(winners[0]), winners[0])
            version = bucket.swap("a", b"again", winners[0])

    def test_no_swap_of_several_processes_is_lost(self, bucket):
        programs(bucket, COUNT_UP, *[("15",)] * 4)
        assert content(bucket, "counter") == b"60"

    def test_a_blob_is_called_by_its_sha256(self, bucket):
        data = [b"one", b"", b"two" * 100_000]
        sha256 = bucket.put_blob("p/blobs/", data)
        assert sha256 == hashlib.sha256(b"".join(data)).hexdigest()
        assert content(bucket, f"p/blobs/{sha256}") == b"".join(data)

    def test_a_blob_that_is_there_is_success(self, bucket):
        first = bucket.put_blob("blobs/", [b"ab"], durable=True)
        assert bucket.put_blob("blobs/", [b"a", b"b"]) == first
        assert list(bucket.names("blobs/")) == [f"blobs/{first}"]

    def test_eight_threads_may_store_one_blob(self, bucket):
        results = at_once(8, lambda i: bucket.put_blob("blobs/", [b"x" * 100_000]))
        assert set(results) == {hashlib.sha256(b"x" * 100_000).hexdigest()}

    def test_objects_of_no_bytes(self, bucket):
        bucket.create("empty", b"")
        sha256 = bucket.put_blob("", [])
        assert content(bucket, "empty") == content(bucket, sha256) == b""
        assert bucket.size("empty") == 0
        assert list(bucket.chunks("empty")) == []
        assert list(bucket.chunks("empty", 0, 0)) == []

    def test_a_large_object_comes_back_in_pieces(self, bucket):
        piece = bytes(range(256)) * 4096
        sha256 = bucket.put_blob("", [piece] * (LARGE // len(piece)))
        assert bucket.size(sha256) == LARGE
        whole, pieces = hashlib.sha256(), 0
        for part in bucket.chunks(sha256):
            assert 0 < len(part) <= 4 << 20
            whole.update(part)
            pieces += 1
        assert whole.hexdigest() == sha256
        assert pieces >= 5

    @pytest.mark.parametrize(
        "offset, length",
        [(0, None), (0, 10), (3, 4), (9, 1), (10, 0), (0, 0), (4, None), (9, None), (10, None)],
    )
    def test_ranges(self, bucket, offset, length):
        bucket.create("a", b"0123456789")
        stop = 10 if length is None else offset + length
        assert b"".join(bucket.chunks("a", offset, length)) == b"0123456789"[offset:stop]

    def test_ranges_of_a_large_object(self, bucket):
        data = b"".join(zlib.crc32(b"%d" % i).to_bytes(4, "big") for i in range(1 << 20))
        bucket.create("a", data * 3)
        for offset, length in ((1, 9 << 20), ((4 << 20) - 1, 2), (5 << 20, None)):
            stop = None if length is None else offset + length
            assert b"".join(bucket.chunks("a", offset, length)) == (data * 3)[offset:stop]

    @pytest.mark.parametrize("offset, length", [(0, 11), (10, 1), (5, 6), (50, 1)])
    def test_a_range_that_is_short_is_corrupt(self, bucket, offset, length):
        bucket.create("a", b"0123456789")
        with pytest.raises(Corrupt):
            b"".join(bucket.chunks("a", offset, length))

    @pytest.mark.parametrize("name", ["absent", "a/absent", "a/b/absent", "a", "file/below"])
    def test_what_is_not_there_is_missing(self, bucket, name):
        bucket.create("a/b/c", b"")
        bucket.create("file", b"")
        with pytest.raises(Missing):
            bucket.get(name)
        with pytest.raises(Missing):
            b"".join(bucket.chunks(name, 0, 1))
        with pytest.raises(Missing):
            bucket.copy(name, "target")
        assert bucket.size(name) is None
        bucket.delete(name)
        assert list(bucket.names("")) == ["a/b/c", "file"]

    def test_copy_replaces_the_target_and_keeps_the_source(self, bucket):
        bucket.create("source", b"new" * 1000)
        bucket.create("x/target", b"old")
        bucket.copy("source", "x/target")
        bucket.copy("source", "y/z/target")
        for name in ("source", "x/target", "y/z/target"):
            assert content(bucket, name) == b"new" * 1000
        bucket.put("source", b"changed")
        assert content(bucket, "x/target") == b"new" * 1000

    def test_delete(self, bucket):
        bucket.create("a/b", b"1")
        bucket.delete("a/b")
        bucket.delete("a/b")
        bucket.delete("never/was")
        assert bucket.size("a/b") is None
        assert bucket.create("a/b", b"2") is True

    def test_names_are_sorted_and_below_the_prefix(self, bucket):
        names = [
            "a",
            "a-",
            "a.b",
            "b/1",
            "b/10",
            "b/2/3",
            "b-c/1",
            "b0",
            "c/d/e/f",
            "Ä",
            "ä/1",
            "日",
            ".first",
            "z",
        ]
        for name in reversed(names):
            bucket.create(name, b"")
        assert list(bucket.names("")) == sorted(names)
        assert list(bucket.names("b/")) == ["b/1", "b/10", "b/2/3"]
        assert list(bucket.names("c/d/")) == ["c/d/e/f"]
        assert list(bucket.names("nothing/")) == []
        assert list(bucket.names("a/")) == []
        assert list(bucket.names("z/nothing/")) == []

    def test_names_sort_a_slash_as_a_character(self, bucket):
        names = sorted(["x/1", "x-/1", "x0/1", "x.d/1", "x!", "x", "x~"][:5])
        for name in names:
            bucket.create(name, b"")
        assert list(bucket.names("")) == names

    def test_dirs_are_the_next_parts_that_lead_on(self, bucket):
        for name in ("p/runs/b/order", "p/runs/a/order", "p/runs/a/log/1", "p/runs/file", "q/1", "top"):
            bucket.create(name, b"")
        assert bucket.dirs("") == ["p", "q"]
        assert bucket.dirs("p/runs/") == ["a", "b"]
        assert bucket.dirs("nothing/") == bucket.dirs("top/") == bucket.dirs("q/") == []

    def test_many_objects_are_all_listed(self, bucket):
        names = [f"many/{number:04}" for number in range(1100)]
        for name in names:
            bucket.put(name, b"")
        assert list(bucket.names("many/")) == names

    @pytest.mark.parametrize("name", ODD_NAMES)
    def test_odd_names(self, bucket, name):
        bucket.create(name, name.encode())
        assert content(bucket, name) == name.encode()
        assert list(bucket.names("")) == [name]

    def test_a_name_of_1024_bytes(self, bucket):
        name = "/".join(["é" * 20] * 24) + "/" + "x" * 40
        assert len(name.encode()) == 1024
        bucket.create(name, b"1")
        assert list(bucket.names("")) == [name]
        assert content(bucket, name) == b"1"

    @pytest.mark.parametrize("name", BAD_NAMES)
    def test_names_that_no_storage_can_hold_are_refused(self, bucket, name):
        bucket.create("good", b"")
        acts = [
            lambda: bucket.create(name, b""),
            lambda: bucket.put(name, b""),
            lambda: bucket.swap(name, b"", None),
            lambda: bucket.copy("good", name),
            lambda: bucket.get(name),
            lambda: bucket.size(name),
            lambda: bucket.delete(name),
        ]
        for act in acts:
            with pytest.raises(BucketRefused) as caught:
                act()
            str(caught.value).encode("utf-8")  # the message can be printed
        assert list(bucket.names("")) == ["good"]

    def test_tidy_leaves_every_object(self, bucket):
        bucket.create("a", b"1")
        bucket.tidy()
        assert list(bucket.names("")) == ["a"]

    def test_clone_shares_or_says_that_it_cannot(self, bucket, tmp_path):
        bucket.create("a", b"content" * 1000)
        path = str(tmp_path / "clone")
        if bucket.clone("a", path, 0):
            with open(path, "rb") as file:
                assert file.read() == b"content" * 1000
        with pytest.raises(Missing):
            bucket.clone("absent", path, 0)

    def test_a_second_client_sees_the_same_bucket(self, bucket):
        bucket.create("a/b", b"1")
        code = (
            "import sys; from cloudrun.storage import open_bucket; print(*open_bucket(sys.argv[1]).names(''))"
        )
        assert programs(bucket, code, ()) == ["a/b\n"]
