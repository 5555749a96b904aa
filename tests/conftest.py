"""Fast tests first: what starts whole runs comes last."""

import signal

import pytest
from cloud.storage import Storage
from layers import table


def pytest_configure(config):
    """A shell starts background jobs with SIGINT ignored, and cloudrun leaves it so, as nohup wants."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "e2e" in item.path.parts)


def pytest_addoption(parser):
    parser.addoption("--table", action="store_true", help="print what test_layers.py measured, for README.md")


def pytest_terminal_summary(terminalreporter, config):
    """Each worker's reports come here, with what their tests have recorded."""
    reports = terminalreporter.getreports("passed")
    measured = {tuple(value[:2]): value[2] for each in reports for _, value in each.user_properties}
    if config.getoption("--table"):
        terminalreporter.write("\n".join(["", *table(measured), ""]))


@pytest.fixture
def storage(monkeypatch):
    """The emulated Cloud Storage with a bucket `b`, where this process finds it."""
    with Storage() as found:
        found.create_bucket("b")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", found.url)
        yield found
