"""The guard fetches the agent from Cloud Storage, under every Python at hand."""

import hashlib
import json
import subprocess
import sys

import pytest
from cloud.storage import Storage
from cloud.storage_tokens import Metadata
from machine import GUARD, VERSIONS, archived, interpreter

AGENT = archived(
    "import os; print('the agent ran', flush=True); os.write(int(os.environ['CLOUDRUN_GUARD']), b'R')"
)
NAME = "p/blobs/an agent%2F\u00e9"


@pytest.fixture
def storage():
    with Storage() as found:
        found.create_bucket("b")
        yield found


def boot(storage, folder, python=sys.executable, agent=AGENT, stored=AGENT, **env):
    """What a guard says that boots with this agent in the bucket."""
    if stored:
        storage.store.put("b", f"some/prefix/{NAME}", stored, {}, {})
    order = {"backend": "local", "bucket": "gs://b/some/prefix", "instance": "i", "left": 30.0}
    order.update({"agent": [NAME, hashlib.sha256(agent).hexdigest()], "agent_gone": 5, "agent_silence": 30})
    done = subprocess.run(
        [python, "-I", "-S", str(GUARD)],
        cwd=folder,
        env={"CLOUDRUN_BOOT": json.dumps(order), "STORAGE_EMULATOR_HOST": storage.url, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_every_python(storage, tmp_path, version):
    said = boot(storage, tmp_path, interpreter(version))
    assert said == "the agent ran\ncloudrun guard: the run is finished\n"
    assert [request.kind for request in storage.requests] == ["read"]


def test_with_the_service_account_of_the_machine(storage, tmp_path):
    storage.tokens = {}
    with Metadata(storage.tokens) as metadata:
        assert "the agent ran" in boot(storage, tmp_path, GCE_METADATA_HOST=metadata.host)
    assert storage.requests[0].token == "token-1"


def test_a_network_that_is_not_there_yet(storage, tmp_path):
    storage.faults.add("read", cut="before")
    storage.faults.add("read", status=503)
    assert "the agent ran" in boot(storage, tmp_path)
    assert len(storage.requests) == 3


def test_what_will_not_get_better_ends_the_machine_at_once(storage, tmp_path):
    assert "CLOUDRUN-FATAL i HTTP Error 404" in boot(storage, tmp_path, stored=None)
    storage.tokens = {}
    assert "CLOUDRUN-FATAL i HTTP Error 401" in boot(storage, tmp_path)
    assert len(storage.requests) == 2


def test_an_agent_that_is_another_one_is_not_run(storage, tmp_path):
    said = boot(storage, tmp_path, stored=AGENT + b" ")
    assert "CLOUDRUN-FATAL i the agent in the bucket" in said and "is damaged" in said
    assert "the agent ran" not in said
