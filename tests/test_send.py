"""Sending: what the bucket holds afterwards is what was here, and nothing is sent twice."""

import ast
import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from contextlib import contextmanager

import pytest

from cloudrun.config import from_env
from cloudrun.errors import BucketRefused, CloudrunError
from cloudrun.formats import Entry, read_entry
from cloudrun.index import Index, index_path
from cloudrun.order import read_order
from cloudrun.project import scan
from cloudrun.report import Report
from cloudrun.send import PACK, SMALL, plan, send
from cloudrun.start import Wanted, prepare, store
from cloudrun.storage.folder import FolderBucket
from cloudrun.zipapp import agent_archive

LONG_AGO = 1_700_000_000
REWRITE = """
import os, sys, time
path, size, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
file = os.open(path, os.O_WRONLY)
os.pwrite(file, b"a" * size, 0)
print("ready", flush=True)
number = 0
while True:
    os.pwrite(file, bytes([97 + number % 26]) * size, 0)
    number += 1
    time.sleep(pause)
"""
APPEND = """
import sys, time
with open(sys.argv[1], "ab", buffering=0) as file:
    print("ready", flush=True)
    while True:
        file.write(b"a line of a log\\n" * int(sys.argv[2]))
        time.sleep(float(sys.argv[3]))
"""


class CountingBucket(FolderBucket):
    """Remembers the sizes of the blobs that it was given."""

    def __init__(self, root):
        super().__init__(root)
        self.given = []

    def put_blob(self, prefix, content, *, durable=False):
        data = b"".join(content)
        self.given.append(len(data))
        return super().put_blob(prefix, [data], durable=durable)


class CuttingBucket(CountingBucket):
    part_bytes = 3_000_000


class FullBucket(FolderBucket):
    """Takes everything but blobs."""

    def put_blob(self, prefix, content, *, durable=False):
        raise BucketRefused("the bucket is full")


@pytest.fixture
def bucket(tmp_path):
    return CountingBucket(str(tmp_path / "bucket"))


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    put("main.py", b"print(1)\n")
    return folder


def put(path, content, *, fresh=False):
    """Write a file; it looks as if it had not been touched for long, as most have not, unless `fresh`."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)
    if not fresh:
        os.utime(path, (LONG_AGO, LONG_AGO))


def put_many():
    for number in range(50):
        put(f"data/{number:02}", b"%d" % number * number * 100)


@pytest.fixture
def settled(monkeypatch):
    """No file is too young for the index: a test has just written its files, and does not wait for 2 s."""
    monkeypatch.setattr("cloudrun.index.SETTLED_NS", -1)


def send_all(bucket, index=None):
    index = index or Index(index_path(bucket.url, "p"))
    work = plan(scan(".").found, index, bucket, "p")
    return send(work, index, bucket, "p", lambda files, size: None), work


def entries(sent):
    lines = b"".join(sent.manifest()).decode("ascii").splitlines()
    return [read_entry(json.loads(line), "manifest", with_parts=True) for line in lines]


def content(bucket, entry):
    return b"".join(b"".join(bucket.chunks(f"p/blobs/{blob}", *where)) for blob, *where in entry.parts)


def digest(data, entry):
    """What stands in the manifest for this content: of several parts, the sha256 of their sha256s."""
    starts = [sum(length for *_, length in entry.parts[:number]) for number in range(len(entry.parts))]
    pieces = [data[at : at + length] for at, (*_, length) in zip(starts, entry.parts, strict=True)]
    if len(pieces) > 1:
        data = "".join(hashlib.sha256(piece).hexdigest() for piece in pieces).encode()
    return hashlib.sha256(data).hexdigest()


def check(bucket, sent):
    """Every file's parts give its content, whose sha256 is the one in the manifest."""
    for entry in entries(sent):
        if entry.sha256:
            data = content(bucket, entry)
            assert digest(data, entry) == entry.sha256
            with open(entry.path, "rb") as file:
                assert file.read() == data, entry.path
            assert entry.size == len(data)
            assert entry.mode == os.stat(entry.path).st_mode & 0o777


@contextmanager
def program(code, *arguments):
    """A real process that goes on until the end of the block."""
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_packs_and_parts_give_back_the_contents(project, tmp_path):
    bucket = CuttingBucket(str(tmp_path / "bucket"))
    put_many()
    put("data/empty", b"")
    put("data/large", os.urandom(SMALL + 2_500_000))
    put("data/exactly", os.urandom(2 * CuttingBucket.part_bytes))
    put("data/small", os.urandom(SMALL - 1))
    put("run.sh", b"#!")
    os.chmod("run.sh", 0o755)
    sent, work = send_all(bucket)
    check(bucket, sent)
    by_path = {entry.path: entry for entry in entries(sent)}
    assert [length for *_, length in by_path["data/large"].parts] == [3_000_000, 3_000_000, 694_304]
    assert [length for *_, length in by_path["data/exactly"].parts] == [3_000_000, 3_000_000]
    assert len(by_path["data/small"].parts) == 1
    assert (
        (sent.files, sent.size)
        == (work.new_files, work.new_size)
        == (56, sum(e.size for e in by_path.values()))
    )


def test_small_files_share_a_blob_and_large_ones_do_not(project, bucket):
    put_many()
    put("data/large", os.urandom(SMALL))
    sent, _ = send_all(bucket)
    check(bucket, sent)
    assert len(bucket.given) == 2


def test_a_pack_has_a_size(project, bucket):
    for number in range(7):
        put(f"data/{number:02}", os.urandom(2 << 20))
    sent, _ = send_all(bucket)
    check(bucket, sent)
    assert len(bucket.given) == 2
    assert max(bucket.given) <= PACK + SMALL


def test_the_second_send_sends_nothing(project, bucket, settled):
    put_many()
    put("data/large", os.urandom(SMALL))
    first, _ = send_all(bucket)
    bucket.given.clear()
    second, work = send_all(bucket)
    assert (work.new_files, work.new_size, bucket.given) == (0, 0, [])
    assert second.lines == first.lines


def test_one_changed_file_sends_one_file(project, bucket, settled):
    put_many()
    send_all(bucket)
    bucket.given.clear()
    put("data/07", b"changed")
    sent, work = send_all(bucket)
    assert (work.new_files, work.new_size, bucket.given) == (1, 7, [7])
    check(bucket, sent)
    bucket.given.clear()
    assert send_all(bucket)[1].new_files == 0


def test_an_edit_that_keeps_size_and_mtime_is_noticed(project, bucket, settled):
    put("data/x", b"before")
    send_all(bucket)
    put("data/x", b"after!")
    sent, work = send_all(bucket)
    assert work.new_files == 1
    check(bucket, sent)


def test_a_change_of_mode_is_noticed(project, bucket, settled):
    send_all(bucket)
    os.chmod("main.py", 0o755)
    check(bucket, send_all(bucket)[0])


def test_a_file_that_was_just_written_is_not_believed(project, bucket):
    """It may change again within the same tick of the clock."""
    put("data/x", b"before", fresh=True)
    send_all(bucket)
    assert send_all(bucket)[1].new_files == 2


@pytest.mark.parametrize("name", ["data/00", "data/large"])
def test_a_blob_that_the_bucket_lost_is_sent_again(project, bucket, settled, name):
    put_many()
    put("data/large", os.urandom(SMALL))
    sent, _ = send_all(bucket)
    blob = next(entry.parts[0][0] for entry in entries(sent) if entry.path == name)
    bucket.delete(f"p/blobs/{blob}")
    sent, work = send_all(bucket)
    assert work.new_files == (1 if name == "data/large" else 51)
    check(bucket, sent)


def damage_cut(data):
    return data[: len(data) // 2]


def damage_flip(data):
    """Another sha256 for a file, in a line that looks well."""
    at = data.index(b'"sha256":"') + 10
    return data[:at] + (b"1" if data[at : at + 1] == b"0" else b"0") + data[at + 1 :]


DAMAGES = [
    damage_cut,
    damage_flip,
    lambda data: b"",
    lambda data: os.urandom(5000),
    lambda data: b"\n\t\n",
    bytes.upper,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_costs_time_and_nothing_else(project, bucket, settled, damage):
    put_many()
    first, _ = send_all(bucket)
    path = index_path(bucket.url, "p")
    with open(path, "rb") as file:
        data = file.read()
    with open(path, "wb") as file:
        file.write(damage(data))
    second, work = send_all(bucket)
    assert work.new_files == 51
    assert second.lines == first.lines
    assert send_all(bucket)[1].new_files == 0


def test_a_lost_index_costs_time_and_nothing_else(project, bucket, settled):
    first, _ = send_all(bucket)
    os.unlink(index_path(bucket.url, "p"))
    assert send_all(bucket)[0].lines == first.lines


def test_an_index_that_cannot_be_written_is_no_error(project, bucket, settled, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (None, "/proc/none/index", str(tmp_path / "file" / "index"), str(tmp_path)):
        check(bucket, send_all(bucket, Index(path))[0])
    assert [path.name for path in tmp_path.iterdir() if "." in path.name] == []


def test_there_is_no_index_without_a_home(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "relative")
    assert index_path("file:///b", "p") is None or os.path.isabs(index_path("file:///b", "p"))


def test_buckets_projects_and_directories_have_their_own_index(project, monkeypatch):
    paths = {index_path("file:///a", "p"), index_path("file:///b", "p"), index_path("file:///a", "q")}
    monkeypatch.chdir("/")
    paths.add(index_path("file:///a", "p"))
    assert len(paths) == 4


@pytest.mark.parametrize(
    "size, pause",
    [
        (50_000, 0.15),
        (1_000_000, 0.11),
        (3_000_000, 0.12),
        (SMALL + 99, 0.13),
        (50_000, 0),
        (3_000_000, 0.004),
    ],
)
def test_a_file_that_is_rewritten_is_sent_as_it_was_at_one_moment_or_not_at_all(project, bucket, size, pause):
    """A real writer, whose every write is one letter all over: two letters would be a mixture."""
    put("data/x", b"a" * size)
    with program(REWRITE, "data/x", size, pause):
        for _ in range(12):
            try:
                sent, _ = send_all(bucket, Index(None))
            except CloudrunError as error:
                assert "data/x changed while it was being sent, 3 times; run again" in str(error)
            else:
                (entry,) = (entry for entry in entries(sent) if entry.path == "data/x")
                data = content(bucket, entry)
                assert len(data) == size
                assert len(set(data)) == 1
                assert hashlib.sha256(data).hexdigest() == entry.sha256
    sent, _ = send_all(bucket, Index(None))
    check(bucket, sent)


@pytest.mark.parametrize("lines, pause", [(1, 0.01), (10_000, 0.03)])
def test_a_file_that_grows_is_refused_or_sent_as_it_was(project, bucket, lines, pause):
    put("data/log", b"a line of a log\n" * 300_000)
    with program(APPEND, "data/log", lines, pause):
        for _ in range(3):
            with pytest.raises(CloudrunError, match="data/log changed while it was being sent"):
                send_all(bucket, Index(None))
    check(bucket, send_all(bucket, Index(None))[0])


def test_a_file_that_was_written_a_moment_ago_is_sent(project, bucket):
    put("data/x", b"now", fresh=True)
    put("data/y", b"y" * SMALL, fresh=True)
    check(bucket, send_all(bucket, Index(None))[0])


@pytest.mark.parametrize("size", [10, SMALL])
def test_a_file_that_vanished_is_named(project, bucket, size):
    put("data/x\ny", b"x" * size)
    work = plan(scan(".").found, Index(None), bucket, "p")
    os.unlink("data/x\ny")
    with pytest.raises(
        CloudrunError, match=r"data/x\\ny vanished while the project was being sent; run again"
    ):
        send(work, Index(None), bucket, "p", lambda files, size: None)


@pytest.mark.parametrize("size", [10, SMALL])
def test_a_file_that_became_a_pipe_is_named_and_does_not_block(project, bucket, size):
    put("data/x", b"x" * size)
    work = plan(scan(".").found, Index(None), bucket, "p")
    os.unlink("data/x")
    os.mkfifo("data/x")
    with pytest.raises(CloudrunError, match="data/x was replaced by something that is no file"):
        send(work, Index(None), bucket, "p", lambda files, size: None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
@pytest.mark.parametrize("size", [10, SMALL])
def test_a_file_that_cannot_be_read_is_named(project, bucket, size):
    put("data/x", b"x" * size)
    os.chmod("data/x", 0)
    with pytest.raises(
        CloudrunError, match="cannot read data/x: Permission denied; make it readable or leave"
    ):
        send_all(bucket)


def test_an_error_of_the_bucket_comes_out_of_either_thread(project, tmp_path):
    bucket = FullBucket(str(tmp_path / "bucket"))
    with pytest.raises(BucketRefused, match="full"):
        send_all(bucket)
    for number in range(12):
        put(f"data/{number}", bytes([number]) * (3 << 20))
    with pytest.raises(BucketRefused, match="full"):
        send_all(bucket)


def test_progress_adds_up(project, bucket):
    put_many()
    put("data/large", os.urandom(SMALL))
    said = []
    work = plan(scan(".").found, Index(None), bucket, "p")
    send(work, Index(None), bucket, "p", lambda files, size: said.append((files, size)))
    assert [sum(column) for column in zip(*said, strict=True)] == [work.new_files, work.new_size]


def test_links_and_empty_directories_are_in_the_manifest(project, bucket):
    os.makedirs("data/empty")
    os.chmod("data/empty", 0o750)
    os.symlink("main.py", "again.py")
    by_path = {entry.path: entry for entry in entries(send_all(bucket)[0])}
    assert by_path["data/empty"] == Entry("data/empty", 0o750)
    assert by_path["again.py"] == Entry("again.py", link="main.py")


@pytest.fixture
def settings(project, tmp_path):
    environ = {"GCS_DIR": f"file://{tmp_path}/bucket", "CLOUDRUN_BACKEND": "local", "CLOUDRUN_PROJECT": "p"}
    return from_env(environ, str(project))


REPORT = Report(quiet=True, verbose=False, environ={})


def test_store_writes_an_order_that_names_what_was_sent(project, bucket, settings):
    put_many()
    wanted = Wanted(["main.py", "-x"], {"KEY": "secret"}, ("results",))
    order = store(prepare(settings, bucket), settings, wanted, 0.5, (bucket, REPORT))
    assert read_order(bucket.get(order.prefix + "/order.json")[0], "order.json") == order
    assert (order.argv, order.env, order.price) == (["main.py", "-x"], ["KEY"], 0.5)
    assert order.outputs == ["model", "checkpoint", "results"]
    manifest = bucket.get(order.prefix + "/manifest.jsonl")[0]
    assert hashlib.sha256(manifest).hexdigest() == order.manifest["sha256"]
    assert order.manifest["files"] == len(manifest.splitlines()) == 51
    assert json.loads(bucket.get(order.prefix + "/env.json")[0]) == {"KEY": "secret"}
    assert b"secret" not in order.content()
    assert json.loads(bucket.get("open/" + order.run)[0]) == {"run": order.run, "project": "p"}
    name, sha256 = order.agent
    assert hashlib.sha256(bucket.get(name)[0]).hexdigest() == sha256


class HalfBucket(FolderBucket):
    """Refuses one object."""

    refuse = ""

    def create(self, name, content):
        if name.endswith(self.refuse):
            raise BucketRefused(os.strerror(errno.ENOSPC))
        return super().create(name, content)


@pytest.mark.parametrize("refuse", ["manifest.jsonl", "env.json", "order.json"])
def test_a_store_that_fails_half_way_leaves_no_open_run_and_no_secret(project, settings, tmp_path, refuse):
    bucket = HalfBucket(str(tmp_path / "bucket"))
    bucket.refuse = refuse
    with pytest.raises(BucketRefused):
        store(
            prepare(settings, bucket), settings, Wanted(["main.py"], {"A": "secret"}), None, (bucket, REPORT)
        )
    assert list(bucket.names("open/")) == []
    assert [name for name in bucket.names("") if name.endswith(("env.json", "order.json"))] == []


def test_a_send_that_fails_leaves_no_open_run(project, settings, bucket):
    prepared = prepare(settings, bucket)
    os.unlink("main.py")
    with pytest.raises(CloudrunError, match=r"main\.py vanished"):
        store(prepared, settings, Wanted(["main.py"], {"A": "secret"}), None, (bucket, REPORT))
    assert list(bucket.names("")) == []


def test_the_agent_has_always_the_same_bytes():
    code = "import sys; from cloudrun.zipapp import agent_archive; sys.stdout.buffer.write(agent_archive())"
    other = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout
    assert agent_archive() == agent_archive() == other


def agent_sources():
    with zipfile.ZipFile(io.BytesIO(agent_archive())) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")}


def test_the_agent_is_complete_and_needs_only_the_standard_library():
    sources = agent_sources()
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in sources}
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            imported = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, name
                imported = [node.module]
            for module in imported:
                if module == "cloudrun.storage.gcs":
                    continue  # open_bucket never gets there for the agent
                known = module in modules or module.partition(".")[0] in sys.stdlib_module_names
                assert known, f"{name} imports {module}"


def test_the_agent_is_written_in_python_3_8():
    for name, source in agent_sources().items():
        ast.parse(source, name, feature_version=(3, 8))
    guard = os.path.join(os.path.dirname(sys.modules["cloudrun.start"].__file__), "guard.py")
    with open(guard, encoding="utf-8") as file:
        ast.parse(file.read(), guard, feature_version=(3, 8))


def test_the_agent_can_be_imported_by_itself(tmp_path):
    """Each module, from the archive alone, with nothing that is installed."""
    path = tmp_path / "agent.pyz"
    path.write_bytes(agent_archive())
    modules = [name[:-3].replace("/", ".") for name in agent_sources() if name != "__main__.py"]
    lines = [f"import sys; sys.path.insert(0, {str(path)!r})"]
    lines += [f"import {module.removesuffix('.__init__')}" for module in modules]
    subprocess.run([sys.executable, "-I", "-S", "-c", "\n".join(lines)], check=True, cwd=tmp_path)
