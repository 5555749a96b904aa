"""Fast tests first: what starts whole runs comes last."""

import signal

import pytest
from cloud.storage import Storage


def pytest_configure(config):
    """A shell starts background jobs with SIGINT ignored, and cloudrun leaves it so, as nohup wants."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "e2e" in item.path.parts)


@pytest.fixture
def storage(monkeypatch):
    """The emulated Cloud Storage with a bucket `b`, where this process finds it."""
    with Storage() as found:
        found.create_bucket("b")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", found.url)
        yield found
