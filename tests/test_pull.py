"""Pulling: whole files or nothing, nothing deleted, and nothing of the user's overwritten."""

import hashlib
import json
import os
import stat

import pytest

from cloudrun.config import Bounds
from cloudrun.errors import CloudrunError, Corrupt
from cloudrun.formats import Entry, canonical, digest_of, entry_line, timestamp
from cloudrun.order import Order
from cloudrun.project import scan
from cloudrun.pull import outputs, pull
from cloudrun.report import Report
from cloudrun.storage.folder import FolderBucket

RUN = "p-20261125-092000-abcd"
PREFIX = f"p/runs/{RUN}"
REPORT = Report(quiet=True, verbose=False, environ={})
ORDER = Order(
    **{"run": RUN, "project": "p", "backend": "local", "created": timestamp(0), "deadline": timestamp(1)},
    **{"seconds": 1.0, "limited_by": "deadline", "price": None, "argv": ["main.py"], "env": []},
    **{"outputs": ["model", "checkpoint", "results"], "folders": [], "if_client_lost": "finish"},
    **{"manifest": {}, "agent": [], "limits": {}, "origin": ["here", "/p"]},
)
ODD_NAMES = [
    b"two words",
    b"line\nbreak",
    b"-rf",
    b"\xff\xfe",
    b"n" * 255,
    b"'\"\\",
    b"\x1b[31m",
    "é".encode(),
]


def sha(data):
    return hashlib.sha256(data).hexdigest()


def sent_in_one(path, data):
    return Entry(path, 0o644, len(data), sha(data), ((sha(data), 0, len(data)),))


class Run:
    """What a run sent and what its machine has saved."""

    def __init__(self, bucket):
        self.bucket = bucket
        self.sent()

    def sent(self, **files):
        lines = [entry_line(sent_in_one(path, data)) for path, data in files.items()]
        lines.append(entry_line(Entry("data/empty", 0o755)))
        self.bucket.put(PREFIX + "/manifest.jsonl", "".join(line + "\n" for line in lines).encode())

    def sent_in_parts(self, path, *pieces):
        parts = tuple((sha(piece), 0, len(piece)) for piece in pieces)
        entry = Entry(path, 0o644, sum(map(len, pieces)), digest_of(parts), parts)
        self.bucket.put(PREFIX + "/manifest.jsonl", entry_line(entry).encode())

    def saved(self, files, **more):
        """`files`: content by path, and None for an empty directory."""
        values = []
        for path, data in files.items():
            if data is None:
                values.append({"path": path, "mode": 0o755, "dir": True})
                continue
            self.bucket.put_blob(PREFIX + "/saved/", [data])
            values.append({"path": path, "mode": 0o644, "size": len(data), "sha256": sha(data), **more})
        self.name(values)

    def name(self, values):
        self.bucket.put(PREFIX + "/outputs.json", canonical({"attempt": 1, "sequence": 1, "files": values}))


@pytest.fixture
def run(tmp_path):
    return Run(FolderBucket(str(tmp_path / "bucket")))


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def fetch(run):
    return pull(run.bucket, ORDER, os.curdir, REPORT)


def tree():
    """Content by path of all files here."""
    found = {}
    for folder, _, names in os.walk("."):
        for name in names:
            path = os.path.relpath(os.path.join(folder, name))
            with open(path, "rb") as file:
                found[path] = file.read()
    return found


def put(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def test_new_outputs_come_home(run, project):
    run.saved(
        {"model/a": b"1", "checkpoint/deep/er/b": b"2" * 5_000_000, "results/empty": b"", "model/none": None}
    )
    pulled = fetch(run)
    assert tree() == {"model/a": b"1", "checkpoint/deep/er/b": b"2" * 5_000_000, "results/empty": b""}
    assert os.path.isdir("model/none")
    assert sorted(pulled.fetched) == ["checkpoint/deep/er/b", "model/a", "model/none", "results/empty"]
    assert (pulled.beside, pulled.unchanged, pulled.bytes) == ([], 0, 5_000_001)


def test_a_run_without_outputs(run, project):
    assert fetch(run).fetched == []
    assert tree() == {}


def test_modes_come_home_without_the_dangerous_bits(run, project):
    run.saved({"model/a": b"1"}, mode=0o6754)
    fetch(run)
    assert stat.S_IMODE(os.stat("model/a").st_mode) == 0o754


def test_the_second_pull_fetches_nothing(run, project):
    run.saved({"model/a": b"1", "model/none": None})
    fetch(run)
    before = os.stat("model/a")
    pulled = fetch(run)
    assert (pulled.fetched, pulled.beside, pulled.unchanged, pulled.bytes) == ([], [], 1, 0)
    assert os.stat("model/a").st_ino == before.st_ino


def test_what_this_run_sent_is_replaced(run, project):
    put("model/a", b"sent")
    run.sent(**{"model/a": b"sent"})
    run.saved({"model/a": b"new"})
    assert fetch(run).fetched == ["model/a"]
    assert tree() == {"model/a": b"new"}


def test_what_an_earlier_pull_of_this_run_wrote_is_replaced(run, project):
    run.saved({"model/a": b"first"})
    fetch(run)
    run.saved({"model/a": b"second"})
    assert fetch(run).fetched == ["model/a"]
    assert tree() == {"model/a": b"second"}


@pytest.mark.parametrize(("here", "replaced"), [(b"onetwo", True), (b"oneTwo", False), (b"onetwo!", False)])
def test_what_was_sent_in_parts_is_known_by_its_parts(run, project, here, replaced):
    run.sent_in_parts("model/w", b"one", b"two")
    run.saved({"model/w": b"new"})
    put("model/w", here)
    pulled = fetch(run)
    assert (pulled.fetched, len(pulled.beside)) == ((["model/w"], 0) if replaced else ([], 1))
    with open("model/w", "rb") as file:
        assert file.read() == (b"new" if replaced else here)


def test_a_manifest_that_is_gone_makes_every_file_the_users(run, project):
    run.saved({"model/w": b"new", "model/v": b"new"})
    put("model/w", b"old")
    run.bucket.delete(PREFIX + "/manifest.jsonl")
    pulled = fetch(run)
    assert (pulled.fetched, len(pulled.beside)) == (["model/v"], 1)


def test_what_the_user_changed_stays_and_the_output_is_stored_beside(run, project):
    put("model/a", b"mine")
    run.sent(**{"model/a": b"sent"})
    run.saved({"model/a": b"new"})
    pulled = fetch(run)
    assert (pulled.fetched, pulled.beside) == ([], [f"model/a.{RUN}"])
    assert tree() == {"model/a": b"mine", f"model/a.{RUN}": b"new"}
    pulled = fetch(run)
    assert (pulled.fetched, pulled.beside, pulled.unchanged) == ([], [], 1)


def test_what_was_sent_under_another_name_is_not_replaced(run, project):
    put("model/a", b"of b")
    run.sent(**{"model/b": b"of b"})
    run.saved({"model/a": b"new"})
    assert fetch(run).beside == [f"model/a.{RUN}"]
    assert tree()["model/a"] == b"of b"


def test_a_newer_output_replaces_the_older_one_that_was_stored_beside(run, project):
    put("model/a", b"mine")
    for data in (b"first", b"second"):
        run.saved({"model/a": data})
        assert fetch(run).beside == [f"model/a.{RUN}"]
        assert tree() == {"model/a": b"mine", f"model/a.{RUN}": data}


def test_what_the_user_changed_beside_stays_too(run, project):
    put("model/a", b"mine")
    put(f"model/a.{RUN}", b"mine too")
    run.saved({"model/a": b"new"})
    assert fetch(run).beside == [f"model/a.{RUN}.{RUN}"]
    assert tree() == {"model/a": b"mine", f"model/a.{RUN}": b"mine too", f"model/a.{RUN}.{RUN}": b"new"}


def test_nothing_is_deleted(run, project):
    put("model/other", b"x")
    put("model/a", b"sent")
    run.sent(**{"model/a": b"sent", "model/other": b"x"})
    run.saved({"model/b": b"1"})
    fetch(run)
    assert sorted(tree()) == ["model/a", "model/b", "model/other"]


def test_what_was_stored_beside_is_never_sent(run, project):
    put("model/a", b"mine")
    put("model/" + "n" * 255, b"mine")
    run.saved({"model/a": b"new", "model/" + "n" * 255: b"new"})
    assert len(fetch(run).beside) == 2
    assert [item.path for item in scan(".").found] == ["model/a", "model/" + "n" * 255]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(run, project, name):
    path = os.fsdecode(b"model/" + name)
    run.saved({path: b"new"})
    assert fetch(run).fetched == [path]
    put(path, b"mine")
    (beside,) = fetch(run).beside
    assert tree() == {path: b"mine", beside: b"new"}


def test_long_names_that_begin_alike_stay_apart(run, project):
    names = [os.fsdecode(b"model/" + b"\xc3\xa9" * 126 + end) for end in (b"abc", b"abd")]
    for name in names:
        put(name, b"mine")
    run.saved({name: name.encode() for name in names})
    besides = fetch(run).beside
    assert [tree()[beside] for beside in besides] == [name.encode() for name in names]
    assert [tree()[name] for name in names] == [b"mine", b"mine"]


def test_a_path_of_4000_bytes(run, project):
    path = "model/" + "/".join(["x" * 199] * 19 + ["y" * 193])
    assert len(path) == 3999
    run.saved({path: b"1"})
    assert fetch(run).fetched == [path]
    with open(path, "rb") as file:
        assert file.read() == b"1"


@pytest.mark.parametrize("kind", ["directory", "link", "dangling", "pipe"])
def test_what_is_no_file_stays_as_it_is(run, project, tmp_path, kind):
    os.makedirs("model")
    (tmp_path / "precious").write_bytes(b"precious")
    make = {
        "directory": lambda: os.mkdir("model/a"),
        "link": lambda: os.symlink(tmp_path / "precious", "model/a"),
        "dangling": lambda: os.symlink(tmp_path / "new", "model/a"),
        "pipe": lambda: os.mkfifo("model/a"),
    }
    make[kind]()
    before = os.lstat("model/a")
    run.saved({"model/a": b"new"})
    assert fetch(run).beside == [f"model/a.{RUN}"]
    assert os.lstat("model/a") == before
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_file_that_we_cannot_read_stays(run, project):
    put("model/a", b"mine")
    os.chmod("model/a", 0)
    run.saved({"model/a": b"new"})
    assert fetch(run).beside == [f"model/a.{RUN}"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_we_may_not_write_to_is_named(run, project):
    os.makedirs("model", mode=0o500)
    run.saved({"model/a": b"new"})
    with pytest.raises(CloudrunError, match="cannot write model/a: Permission denied"):
        fetch(run)


@pytest.mark.parametrize("path", ["model/a/b", "model/a/b/c"])
def test_a_parent_that_is_a_file_is_named(run, project, path):
    put("model/a", b"mine")
    run.saved({path: b"new"})
    with pytest.raises(CloudrunError, match=r"cannot make the directory model/a.*move what is in its way"):
        fetch(run)
    assert tree() == {"model/a": b"mine"}


@pytest.mark.parametrize("link", ["model/out", "results", "checkpoint/a"])
@pytest.mark.parametrize("absolute", [True, False])
def test_nothing_is_written_through_a_link_that_leaves_the_project(run, project, tmp_path, link, absolute):
    (tmp_path / "outside").mkdir()
    os.makedirs("model")
    os.makedirs("checkpoint")
    os.symlink(tmp_path / "outside" if absolute else "../" * (link.count("/") + 1) + "outside", link)
    for data in (b"new", None):
        run.saved({f"{link}/deep/x": data})
        with pytest.raises(CloudrunError, match=f"{link} is a link that leaves the project"):
            fetch(run)
    assert os.listdir(tmp_path / "outside") == []


def test_a_link_out_of_model_does_not_lead_into_the_code(run, project):
    os.makedirs("model")
    os.makedirs("src")
    os.symlink("../src", "model/src")
    run.saved({"model/src/x": b"new"})
    with pytest.raises(CloudrunError, match="model/src is a link that leaves"):
        fetch(run)
    assert os.listdir("src") == []


def test_model_itself_may_be_a_link_and_links_inside_it_are_fine(run, project, tmp_path):
    (tmp_path / "disk" / "v1").mkdir(parents=True)
    os.symlink(tmp_path / "disk", "model")
    os.symlink("v1", "model/latest")
    run.saved({"model/a": b"1", "model/latest/b": b"2"})
    fetch(run)
    assert (tmp_path / "disk" / "a").read_bytes() == b"1"
    assert (tmp_path / "disk" / "v1" / "b").read_bytes() == b"2"


def test_a_planted_link_with_the_temporary_name_is_not_followed(run, project, tmp_path):
    os.makedirs("model")
    (tmp_path / "precious").write_bytes(b"precious")
    os.symlink(tmp_path / "precious", f"model/.cloudrun-pull-{os.getpid()}.{RUN}")
    run.saved({"model/a": b"new"})
    fetch(run)
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert tree() == {"model/a": b"new"}


def overwritten(run, content):
    """The saved object of b"good" gets another content, without the bucket's knowledge."""
    run.saved({"model/a": b"good"})
    with open(os.path.join(run.bucket.root, PREFIX, "saved", sha(b"good")), "wb") as file:
        file.write(content)


@pytest.mark.parametrize("content", [b"evil", b"", b"goo", b"good and more", b"x" * 9_000_000])
def test_a_damaged_saved_object_replaces_nothing(run, project, content):
    put("model/a", b"sent")
    run.sent(**{"model/a": b"sent"})
    overwritten(run, content)
    with pytest.raises(Corrupt, match=r"saved/.* is damaged in the bucket; model/a was not fetched"):
        fetch(run)
    assert tree() == {"model/a": b"sent"}


def test_a_saved_object_that_is_gone_replaces_nothing(run, project):
    put("model/a", b"sent")
    run.sent(**{"model/a": b"sent"})
    run.saved({"model/a": b"good"})
    run.bucket.delete(f"{PREFIX}/saved/{sha(b'good')}")
    with pytest.raises(CloudrunError, match=r"there is no .*saved/"):
        fetch(run)
    assert tree() == {"model/a": b"sent"}


def test_what_was_fetched_before_an_error_stays(run, project):
    run.saved({"model/a": b"1", "model/b": b"2", "model/c": b"3"})
    run.bucket.delete(f"{PREFIX}/saved/{sha(b'2')}")
    with pytest.raises(CloudrunError):
        fetch(run)
    assert tree() == {"model/a": b"1"}


GOOD = {"path": "model/a", "mode": 0o644, "size": 1, "sha256": sha(b"1")}


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"path": path}
            for path in ("../a", "/etc/passwd", "model/../../a", "model/../main.py", "a", "models/a")
        ),
        *(
            {"path": path}
            for path in ("main.py", "data/x", "src/x", "", ".", "model/", "model//a", "model/\ud800")
        ),
        *({"path": path} for path in ("model/a\0b", 5, None, ["model"], ".cloudrunignore", "modelx")),
        *({"mode": "x"}, {"mode": -1}, {"size": -1}, {"size": "1"}, {"sha256": "../../../etc/passwd"}),
        *({"link": "/etc"}, {"link": "a"}, {"link": "../src"}),
    ],
)
def test_outputs_that_a_machine_may_not_have_are_corrupt(run, project, change):
    run.saved({"model/b": b"1"})
    run.name([{**GOOD, "path": "model/b"}, {**GOOD, **change}])
    with pytest.raises(Corrupt, match=r"outputs\.json is damaged") as caught:
        fetch(run)
    str(caught.value).encode("utf-8")
    assert tree() == {}


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"files": 5}', b"[" * 100_000, b"\xff", b'{"files": [1]}']
)
def test_damaged_outputs(run, project, data):
    run.bucket.put(PREFIX + "/outputs.json", data)
    with pytest.raises(Corrupt, match=r"outputs\.json is damaged"):
        outputs(run.bucket, ORDER)


def test_two_outputs_of_one_name_or_one_below_the_other_do_no_harm(run, project):
    run.bucket.put_blob(PREFIX + "/saved/", [b"1"])
    run.name([GOOD, GOOD])
    assert fetch(run).fetched == ["model/a"]
    run.name([GOOD, {**GOOD, "path": "model/a/b"}])
    with pytest.raises(CloudrunError, match="cannot make the directory model/a"):
        fetch(run)
    assert tree() == {"model/a": b"1"}


def test_a_manifest_of_many_inputs_is_read_for_the_outputs_alone(run, project):
    put("model/é\udcff", b"sent")
    files = {f"data/{number}": b"" for number in range(2000)}
    run.sent(**files, **{"model/é\udcff": b"sent", 'data/x","mode":1': b""})
    run.saved({"model/é\udcff": b"new"})
    assert fetch(run).fetched == ["model/é\udcff"]


def test_json_in_the_manifest_is_what_is_expected():
    """`pull` looks at the beginning of a line to see whether it matters."""
    line = entry_line(Entry("model/a", 0o644, 1, sha(b"1")))
    assert line.startswith('{"path":"model/a","mode":')
    assert json.loads(line)["sha256"] == sha(b"1")


@pytest.mark.parametrize(
    ("bounds", "size", "words"),
    [
        (Bounds(files=1), 1, "2 files, more than 1: nothing was fetched; raise CLOUDRUN_FETCH_FILES"),
        (Bounds(), 10**12, "1.0 TB, more than 200 GB: nothing was fetched; raise CLOUDRUN_FETCH_GB"),
        (Bounds(), 10**400, "outputs.json is damaged"),
    ],
)
def test_more_than_the_user_wants_is_refused_before_anything_is_fetched(run, project, bounds, size, words):
    run.saved({"model/a": b"a"})
    one = {"path": "model/b", "mode": 0o644, "size": size, "sha256": sha(b"b")}
    run.name([{"path": "model/a", "mode": 0o644, "size": 1, "sha256": sha(b"a")}, one])
    with pytest.raises(CloudrunError, match=words):
        pull(run.bucket, ORDER, str(project), REPORT, bounds)
    assert not (project / "model" / "a").exists()
