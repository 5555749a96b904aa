"""The emulated vast.ai as the real client sees it, and its containers, which are real processes."""

import tempfile
from pathlib import Path

import pytest
from cloud import machines
from cloud.vast import Vast
from vast_client import Client, need_client

# As docs.vast.ai has it, "Docker Execution Environment".
DELETE = (
    'curl -sS --max-time 30 -X DELETE -H "Authorization: Bearer $CONTAINER_API_KEY" '
    "-H 'Content-Type: application/json' -d '{}' $VAST_URL/api/v0/instances/%s/"
)


@pytest.fixture
def vast(tmp_path):
    need_client()
    with Vast(tmp_path, machines=False) as vast:
        yield vast
        vast.meter.check()
        assert vast.violations == []


@pytest.fixture
def client(vast):
    return Client(vast)


@pytest.fixture
def real():
    """With containers that are processes."""
    need_client()
    if reason := machines.unavailable():
        pytest.skip(reason)
    with (
        tempfile.TemporaryDirectory(dir=machines.disk_root(), ignore_cleanup_errors=True) as folder,
        Vast(Path(folder)) as vast,
    ):
        yield Client(vast)
        vast.meter.check()
        assert vast.violations == []


def test_an_instance_comes_up_is_destroyed_and_gone(vast, client):
    number = client.run()
    assert [status for _, status in vast.instances[number].history] == [None, "created", "loading", "running"]
    assert vast.meter.running() == [number]
    assert client.delete(number) == (200, {"success": True})
    vast.wait(number, "destroyed")
    assert client.get(number) is None and vast.meter.running() == []
    status, answer = client.delete(number)
    assert status == 404 and answer["error"] == "no_such_instance"


# --- containers


def test_a_container_destroys_itself_and_nothing_else(real):
    other = real.run()
    number = real.run(
        f"{DELETE % other}; cat /var/log/onstart.log > /proc/1/fd/1; {DELETE % '$CONTAINER_ID'}; sleep 100"
    )
    contract = real.vast.wait(number, "destroyed")
    assert '"error": "forbidden"' in contract.log
    assert real.get(number) is None and real.vast.meter.running() == [other]
    assert real.vast.requests[-2].key == str(number)
    assert real.vast.meter.processes(number) == set() and real.vast.meter.processes(other)
