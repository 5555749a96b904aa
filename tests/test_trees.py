"""Arbitrary trees of files go to the machine and come home as they were."""

import contextlib
import hashlib
import os
import stat
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_pull import ORDER, PREFIX, REPORT, RUN, Run

from cloudrun.agent.fetch import Fetch
from cloudrun.agent.save import Saver
from cloudrun.index import Index
from cloudrun.project import scan
from cloudrun.pull import pull
from cloudrun.send import plan, send
from cloudrun.storage.folder import FolderBucket

names = (
    st.binary(min_size=1, max_size=12)
    .map(lambda raw: raw.replace(b"\0", b"0").replace(b"/", b"_"))
    .filter(lambda raw: raw not in (b".", b".."))
    .map(os.fsdecode)
) | st.sampled_from([".gitignore", ".env", "a b", "-rf", "n" * 255, "id_rsa", "__pycache__", "*", "é"])
contents = st.binary(max_size=3000) | st.integers(0, 9000).map(lambda size: b"x" * size)
files = st.tuples(contents, st.integers(0, 0o777).map(lambda mode: mode | 0o600))
trees = st.dictionaries(
    names,
    st.recursive(files, lambda inner: st.dictionaries(names, inner, max_size=4), max_leaves=12),
    max_size=5,
)


class Watch:
    """Of the agent's watch, what fetching and saving need."""

    prefix = PREFIX
    number = 1
    longest_save = 0.0

    def __init__(self, bucket, order=None):
        self.bucket, self.order = bucket, order
        self.limits = {"save_interval": 60.0, "save": 900.0}

    def left(self):
        return 3600.0

    def reserve(self):
        return 90.0


class CuttingBucket(FolderBucket):
    part_bytes = 1 << 20


@contextlib.contextmanager
def working_in(folder):
    """Like contextlib.chdir, which Python 3.10 does not have."""
    before = os.getcwd()
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def places():
    """A bucket, and two directories that stand for this computer and the machine."""
    with tempfile.TemporaryDirectory() as top:
        yield CuttingBucket(top + "/bucket"), top + "/here/project", top + "/there/project"


def write(tree, folder):
    os.makedirs(folder, exist_ok=True)
    for name, item in tree.items():
        path = f"{folder}/{name}"
        if isinstance(item, dict):
            write(item, path)
        else:
            with open(path, "wb") as file:
                file.write(item[0])
            os.chmod(path, item[1])


def read(folder, path=""):
    """path → (mode, content) for files, the target for links, and None for empty directories."""
    found = {}
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        name = path + entry.name
        if entry.is_symlink():
            found[name] = os.readlink(entry.path)
        elif entry.is_dir():
            found.update(read(entry.path, name + "/"))
        else:
            with open(entry.path, "rb") as file:
                found[name] = (stat.S_IMODE(entry.stat().st_mode), file.read())
    if not listed and path:
        found[path] = None
    return found


def send_here(bucket):
    """Send the project in the current directory, as far as a machine needs it. Returns the order for it."""
    index = Index(None)
    sent = send(plan(scan(".").found, index, bucket, "p"), index, bucket, "p", lambda files, size: None)
    manifest = b"".join(sent.manifest())
    bucket.put(PREFIX + "/manifest.jsonl", manifest)
    digest = hashlib.sha256(manifest).hexdigest()
    return {"manifest": {"sha256": digest, "files": sent.files, "bytes": sent.size}, "folders": ["data"]}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trees, trees)
def test_inputs_arrive_as_they_were(data, model):
    with places() as (bucket, here, there):
        with working_in(here):
            write(data, "data")
            write(model, "model")
            write({"main.py": (b"print(1)", 0o755)}, ".")
            os.symlink("../main.py", "model/a link")
            os.symlink("model", "weights")
            order = send_here(bucket)
        with working_in(f"{there}-machine"):
            fetch = Fetch(Watch(bucket, order))
        with working_in(there):
            fetch.inputs()
        assert read(there) == read(here)


def test_large_files_of_several_parts_arrive_too():
    with places() as (bucket, here, there):
        with working_in(here):
            write({"large": (os.urandom(7_000_000), 0o600), "other": (b"x", 0o644), "z": ({})}, "data")
            write({"large": (b"x" * (20 << 20), 0o640)}, "model")
            order = send_here(bucket)
        with working_in(f"{there}-machine"):
            fetch = Fetch(Watch(bucket, order))
        with working_in(there):
            fetch.inputs()
        assert read(there) == read(here)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trees, trees)
def test_outputs_come_home_as_they_were(model, results):
    with places() as (bucket, here, there):
        Run(bucket)
        with working_in(there):
            os.makedirs("model")
            saver = Saver(Watch(bucket), ["model", "results"])
            saver.begin()
            write(model, "model")
            write(results, "results")
            saver.save(last=True, exact=True)
        with working_in(here):
            pulled = pull(bucket, ORDER, ".", REPORT)
            assert pulled.beside == []
        expected = read(there)
        assert read(here) == {
            path: item for path, item in expected.items() if path not in ("model/", "results/")
        }


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trees, trees, trees)
def test_a_pull_over_anything_loses_nothing_of_it(sent, local, saved):
    """Whatever was here stays under its name, or was what the run sent; whatever was saved is here."""
    with places() as (bucket, here, there):
        run = Run(bucket)
        with working_in(there):
            write(sent, "model")
            before = {path: item[1] for path, item in read(".").items() if isinstance(item, tuple)}
            run.sent(**before)
            saver = Saver(Watch(bucket), ["model"])
            saver.begin()
            write_over(saved, "model")
            saver.save(last=True, exact=True)
        with working_in(here):
            write(local, "model")
            mine = read(".")
            with contextlib.suppress(Exception):  # a directory where a file is, and the like
                pull(bucket, ORDER, ".", REPORT)
            now = read(".")
        everything = {item[1] for item in now.values() if isinstance(item, tuple)}
        for path, item in mine.items():
            if isinstance(item, tuple):
                assert item[1] in everything or item[1] == before.get(path)
                assert now[path][1] == item[1] or item[1] == before.get(path) or is_saved(bucket, item[1])


def write_over(tree, folder):
    """As `write`; what is of another kind already stays."""
    with contextlib.suppress(OSError):
        write(tree, folder)


def is_saved(bucket, data):
    return bucket.size(f"{PREFIX}/saved/{hashlib.sha256(data).hexdigest()}") is not None


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A saver in a directory as the agent works in, with an empty model/."""
    (tmp_path / "there" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "there")
    saver = Saver(Watch(FolderBucket(str(tmp_path / "bucket"))), ["model", "checkpoint"])
    Run(saver.bucket)
    saver.begin()
    return saver


def home(saver, tmp_path):
    with working_in(str(tmp_path / "here")):
        pull(saver.bucket, ORDER, ".", REPORT)
        return read(".")


def test_links_come_home_as_files_if_they_stay_inside(machine, tmp_path):
    (tmp_path / "outside").write_text("secret")
    write({"best": (b"weights", 0o644)}, "model")
    os.symlink("best", "model/latest")
    os.symlink(tmp_path / "outside", "model/outside")
    os.symlink("nothing", "model/dangling")
    machine.save(last=True, exact=True)
    assert home(machine, tmp_path) == {"model/best": (0o644, b"weights"), "model/latest": (0o644, b"weights")}


def test_a_link_that_leads_to_itself_hides_nothing(machine, tmp_path):
    os.symlink("loop", "model/loop")
    for number in range(20):
        write({f"{number}": (b"%d" % number, 0o644)}, "model")
    machine.save(last=True, exact=True)
    assert len(home(machine, tmp_path)) == 20


def test_a_file_that_cannot_be_read_does_not_stop_the_others(machine, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root can read everything")
    write({"a": (b"1", 0o644), "b": (b"2", 0o000), "c": (b"3", 0o644)}, "model")
    machine.save(last=True, exact=True)
    assert sorted(home(machine, tmp_path)) == ["model/a", "model/c"]


def test_inputs_that_did_not_change_are_no_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bucket = FolderBucket(str(tmp_path / "bucket"))
    write({"sent": (b"sent", 0o644), "changed": (b"sent", 0o644)}, "model")
    saver = Saver(Watch(bucket), ["model"])
    saver.begin()
    write({"changed": (b"new", 0o644), "new": (b"new", 0o644)}, "model")
    saver.save(last=True, exact=True)
    assert RUN in PREFIX
    assert sorted(entry.path for entry in saver.previous()) == ["model/changed", "model/new"]
