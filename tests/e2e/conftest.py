"""Machines in three places, for the tests here."""

import tempfile
from contextlib import contextmanager

import gce
import pytest
import vast_client
from cloud import machines
from machinery import Machinery
from places import GcpPlace, VastPlace


@pytest.fixture
def here(tmp_path):
    """Machines on this computer: for what only they have."""
    found = Machinery(tmp_path)
    yield found
    found.close()


CLOUDS = {"gcp": (gce.need_client, GcpPlace), "vast": (vast_client.need_client, VastPlace)}


@contextmanager
def on_cloud(name, top):
    need_client, place = CLOUDS[name]
    need_client()
    if reason := machines.unavailable():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(dir=machines.disk_root(), ignore_cleanup_errors=True) as disks:
        found = Machinery(top, place(disks))
        yield found
        found.close()


@pytest.fixture
def gcp(tmp_path):
    """Machines of the emulated Google Cloud: for what only they have."""
    with on_cloud("gcp", tmp_path) as found:
        yield found


@pytest.fixture
def vast(tmp_path):
    """Containers of the emulated vast.ai: for what only they have."""
    with on_cloud("vast", tmp_path) as found:
        yield found


@pytest.fixture(params=["local", "gcp", "vast"])
def machinery(request, tmp_path):
    """Machines everywhere: the life of a run is the same."""
    if request.param in CLOUDS:
        with on_cloud(request.param, tmp_path) as found:
            yield found
        return
    found = Machinery(tmp_path)
    yield found
    found.close()
