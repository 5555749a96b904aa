"""What only a bucket on a disk can meet: a full or read-only disk, killed writers, other users."""

import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cloudrun.errors import BucketError, BucketRefused, Conflict
from cloudrun.storage import folder as module
from cloudrun.storage import open_bucket
from cloudrun.storage.folder import FolderBucket

FILL = """
import os, sys
from cloudrun.errors import BucketRefused
from cloudrun.storage.folder import FolderBucket

bucket = FolderBucket(os.path.join(sys.argv[1], "bucket"))
bucket.create("small", b"x")
acts = {
    "create": lambda: bucket.create("large", bytes(4 << 20)),
    "pieces": lambda: bucket.create("large", (bytes(2 << 20) for _ in range(4))),
    "put": lambda: bucket.put("small", bytes(4 << 20)),
    "swap": lambda: bucket.swap("small", bytes(4 << 20), bucket.get("small")[1]),
    "blob": lambda: bucket.put_blob("", (bytes(1 << 20) for _ in range(4))),
    "many": lambda: bucket.put_blob("", (bytes(1000) for _ in range(4000))),
}
for name, act in acts.items():
    try:
        act()
    except BucketRefused as error:
        assert bucket.root in str(error), error
    else:
        raise SystemExit(f"{name} succeeded")
    assert bucket.get("small")[0] == b"x"
    assert list(bucket.names("")) == ["small"], name
    assert os.listdir(os.path.join(bucket.root, ".tmp")) == [], name
print("refused", bucket.create("next", b"fits"))
"""
WRITE_SLOWLY = """
import sys, time
from cloudrun.storage import open_bucket

def pieces():
    yield b"x" * 3_000_000
    print("half", flush=True)
    time.sleep(60)
    yield b"x" * 3_000_000

open_bucket(sys.argv[1]).put_blob("blobs/", pieces())
"""
HOLD = """
import sys, time
from cloudrun.storage import open_bucket

with open_bucket(sys.argv[1])._lock("a"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def bucket(tmp_path):
    return FolderBucket(str(tmp_path / "bucket"))


def files(bucket):
    """Everything below the bucket's folder that is a file, but for locks."""
    return [path for path in Path(bucket.root).rglob("*") if path.is_file() and path.parent.name != ".lock"]


@pytest.fixture
def program(bucket):
    """Start a program that is given the bucket; ended at the end."""
    started = []

    def start(code):
        process = subprocess.Popen([sys.executable, "-c", code, bucket.url], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_full_disk_is_refused_and_leaves_nothing(tmp_path):
    """A real disk of 1 MB, in a mount namespace that ends with the program."""
    script = 'mount -t tmpfs -o size=1m,mode=700 none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    try:
        done = subprocess.run(
            [*command, "sh", "-c", script, "sh", str(tmp_path), sys.executable, FILL],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no private disk can be mounted here: {done.stderr.strip()}")
    assert (done.stdout, done.stderr, done.returncode) == ("refused True\n", "", 0)


def test_a_limit_on_file_size_is_refused_and_leaves_nothing(tmp_path):
    limit = (1 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert (done.stdout, done.stderr, done.returncode) == ("refused True\n", "", 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(bucket):
    bucket.create("a", b"1")
    folders = [bucket.root, os.path.join(bucket.root, ".tmp")]
    for path in folders:
        os.chmod(path, 0o500)
    try:
        for act in (
            lambda: bucket.create("b", b""),
            lambda: bucket.put("a", b"2"),
            lambda: bucket.swap("a", b"2", bucket.get("a")[1]),
            lambda: bucket.delete("a"),
        ):
            with pytest.raises(BucketRefused, match="Permission denied"):
                act()
        assert bucket.get("a")[0] == b"1"
    finally:
        for path in folders:
            os.chmod(path, 0o700)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BucketRefused, match="Not a directory"):
        FolderBucket(str(tmp_path / "file" / "bucket")).create("a", b"")


def test_an_object_cannot_stand_where_a_directory_of_objects_is(bucket):
    """A file system's own rule; Cloud Storage has no such limit."""
    bucket.create("a/b", b"1")
    for act in (
        lambda: bucket.create("a", b""),
        lambda: bucket.put("a", b""),
        lambda: bucket.swap("a", b"", None),
        lambda: bucket.create("a/b/c", b""),
        lambda: bucket.put("a/b/c", b""),
        lambda: bucket.copy("a/b", "a"),
        lambda: bucket.put("n" * 300, b""),
    ):
        with pytest.raises(BucketRefused):
            act()
    assert list(bucket.names("")) == ["a/b"]
    assert len(files(bucket)) == 1


@pytest.mark.parametrize("name", [".tmp/a", ".tmp", ".lock/a", ".lock"])
def test_names_that_are_our_own_are_refused(bucket, name):
    with pytest.raises(BucketRefused):
        bucket.create(name, b"")


def test_a_killed_writer_leaves_no_object_and_tidy_removes_the_rest(bucket, program):
    writer = program(WRITE_SLOWLY)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert list(bucket.names("")) == []
    (left,) = files(bucket)
    bucket.tidy()
    assert left.exists(), "it may belong to a writer that lives"
    long_ago = time.time() - module.STALE_SECONDS - 60
    os.utime(left, (long_ago, long_ago))
    bucket.tidy()
    assert files(bucket) == []


def test_tidy_without_a_folder_does_nothing(bucket):
    bucket.tidy()
    assert not os.path.exists(bucket.root)


def test_a_stopped_holder_of_a_lock_does_not_stop_others_for_ever(bucket, program, monkeypatch):
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.2)
    holder = program(HOLD)
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(BucketError, match="locked") as caught:
        bucket.swap("a", b"1", None)
    assert not caught.value.permanent
    holder.kill()
    holder.wait()
    bucket.swap("a", b"1", None)
    assert [path.name for path in files(bucket)] == ["a"]


def test_one_name_does_not_wait_for_another_ones_lock(bucket, program, monkeypatch):
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.2)
    program(HOLD)
    bucket.swap("b", b"1", None)


def test_nobody_else_can_read_what_is_stored(tmp_path):
    os.umask(before := os.umask(0o077))  # what it is now
    os.umask(0)
    try:
        bucket = FolderBucket(str(tmp_path / "new" / "bucket"))
        bucket.create("p/runs/r/order.json", b"")
        bucket.put("open/r", b"")
        bucket.swap("p/control", b"", None)
        bucket.copy("open/r", "p/copies/r")
        bucket.put_blob("p/blobs/", [b"x"])
    finally:
        os.umask(before)
    modes = {
        stat.S_IMODE(os.lstat(path).st_mode) for path in Path(bucket.root).parent.rglob("*") if path.is_dir()
    }
    assert modes == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files(bucket)} == {0o600}


def test_the_last_copy_is_gone_from_the_temporary_folder_after_every_call(bucket):
    bucket.create("a", b"1")
    bucket.create("a", b"1")
    with pytest.raises(Conflict):
        bucket.create("a", b"2")
    with pytest.raises(Conflict):
        bucket.swap("a", b"2", None)
    bucket.put_blob("", [b"1"])
    bucket.put_blob("", [b"1"])
    assert os.listdir(os.path.join(bucket.root, ".tmp")) == []


def test_locks_do_not_pile_up(bucket):
    for number in range(300):
        bucket.swap(f"{number}", b"", None)
    assert len(os.listdir(os.path.join(bucket.root, ".lock"))) <= 256


def test_an_object_shortened_by_somebody_is_corrupt(bucket):
    bucket.create("a", b"0123456789")
    pieces = bucket.chunks("a", 0, 10)
    os.truncate(os.path.join(bucket.root, "a"), 4)
    with pytest.raises(BucketError, match="6 bytes are missing"):
        b"".join(pieces)


def test_the_deepest_names_are_listed(bucket):
    name = "/".join("x" * 500)
    bucket.create(name, b"1")
    assert list(bucket.names("")) == [name]
    subprocess.run(["rm", "-rf", bucket.root], check=True)  # too deep for those who clean up after tests


def test_threads_that_make_one_directory_do_not_trip(bucket):
    errors = []

    def create(number):
        try:
            bucket.create(f"a/b/c/d/{number}", b"")
        except BucketError as error:
            errors.append(error)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(list(bucket.names("a/b/c/d/"))) == 8


def test_urls(tmp_path):
    bucket = open_bucket(f"file://{tmp_path}/x")
    bucket.create("a", b"1")
    assert open_bucket(bucket.url).get("a")[0] == b"1"
    assert (tmp_path / "x" / "a").read_bytes() == b"1"
