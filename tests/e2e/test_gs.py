"""Whole runs whose bucket is one of Cloud Storage: Google's library here, the standard library there."""

import json
import signal

import pytest
from client import SLEEPER, open_home, says
from cloud.storage import Storage

pytest.importorskip("google.cloud.storage", reason="google-cloud-storage is not installed")

MAIN = """
import os, pathlib, sys
print("data:", pathlib.Path("data/in").read_text(), os.environ["GIVEN"])
print("to stderr", file=sys.stderr)
pathlib.Path("model/weights").write_bytes(bytes(9_000_000))
sys.exit(3)
"""


@pytest.fixture
def storage():
    with Storage() as found:
        found.create_bucket("b")
        yield found


@pytest.fixture
def home(tmp_path, storage):
    for found in open_home(tmp_path):
        found.env.update(GCS_DIR="gs://b/some/prefix", STORAGE_EMULATOR_HOST=storage.url)
        yield found


def project(home, main=MAIN):
    folder = home.project(main)
    (folder / "data").mkdir()
    (folder / "data" / "in").write_text("input")
    return folder


def found(storage, name):
    """The only object of this name."""
    (path,) = [path for path in storage.objects("b") if path.endswith(name)]
    return json.loads(storage.objects("b")[path].data)


def assert_over(home, storage):
    assert not home.machines()
    assert all(path.startswith("some/prefix/toy/") for path in storage.objects("b"))
    assert not [path for path in storage.objects("b") if path.endswith("env.json")]
    assert storage.sessions.open() == 0


def test_a_run(home, storage):
    folder = project(home)
    done = home.run(folder, "-e", "GIVEN=value", "main.py")
    assert (done.returncode, done.stdout) == (3, "data: input value\n"), done.stderr
    assert "to stderr" in done.stderr
    assert (folder / "model" / "weights").read_bytes() == bytes(9_000_000)
    assert found(storage, "receipt.json")["status"] == 3
    assert found(storage, "bill.json")["exit_code"] == 3
    assert_over(home, storage)
    assert "bucket" not in storage.counts()


def test_a_run_amid_lost_replies_and_a_busy_service(home, storage):
    storage.faults.add(
        lambda call: call.nth == 0 and call.kind in ("insert", "delete"), times=99, cut="after"
    )
    storage.faults.add(lambda call: call.nth == 0 and call.kind in ("read", "list"), times=99, status=503)
    done = home.run(project(home), "-e", "GIVEN=value", "main.py")
    assert (done.returncode, done.stdout) == (3, "data: input value\n"), done.stderr
    assert_over(home, storage)


def test_a_run_that_is_interrupted(home, storage):
    client = home.start(project(home, SLEEPER), "main.py")
    says(client)
    client.send_signal(signal.SIGINT)
    client.communicate(timeout=60)
    assert client.returncode == 130
    assert found(storage, "receipt.json")["reason"] == "stopped"
    assert_over(home, storage)


def test_a_bucket_that_is_not_there_costs_nothing(home, storage):
    done = home.run(project(home), "-e", "GIVEN=value", "main.py", env={"GCS_DIR": "gs://nothing/x"})
    assert done.returncode == 125
    assert "there is no bucket gs://nothing: make it" in done.stderr
    assert not home.machines()
