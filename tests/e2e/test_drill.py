"""The drill plays its faults, and the meter saw the same."""

import re
import signal

import pytest
from machine import wait_until

from cloudrun.formats import seconds_of

QUICK = {"limit_client_lost": 1.0, "limit_agent_gone": 0.5, "limit_boot_least": 3.0}


def played(text):
    """{fault: (run, when)}, as --verbose says it."""
    lines = re.findall(r"^cloudrun: (\S+): (.+), at (\S+Z)$", text, re.M)
    return {fault: (run, seconds_of(when)) for run, fault, when in lines}


@pytest.mark.timeout(300)  # six whole runs, side by side
def test_every_fault_ends_within_its_bound(machinery):
    client = machinery.start("--verbose", "drill", "--yes", **QUICK)
    assert client.wait(280) == 0, machinery.err(client)
    head, *rows = machinery.out(client).splitlines()
    assert head.split() == ["FAULT", "ENDED", "BY", "ENDED", "AFTER", "BOUND", "COST"] and len(rows) == 6
    rows = [re.split("  +", row) for row in rows]
    layers = [row[1] for row in rows]
    assert layers[3] == "guard" and not {"sweep", "?"} & set(layers), rows
    machinery.meter.wait_gone(2)
    assert not machinery.place.open_runs()
    assert "6 runs on " in machinery.err(client)
    known = played(machinery.err(client))
    assert list(known) != [] and set(known) == {row[0] for row in rows}
    for fault, _, took, *_ in rows if hasattr(machinery.place, "ended_at") else ():
        run, when = known[fault]
        assert float(took.removesuffix(" s")) == pytest.approx(machinery.place.ended_at(run) - when, abs=2.0)


def test_nothing_that_costs_money_is_started_unasked(here):
    client = here.start("drill", CLOUDRUN_PRICE="1")
    assert client.wait(30) == 2 and "say --yes" in here.err(client)
    assert here.object("order.json") is None and here.meter.seconds == 0


def test_on_vast_the_cheapest_machine_has_a_gpu(vast):
    client = vast.start("drill")
    assert client.wait(60) == 2 and "say --yes" in vast.err(client), vast.err(client)
    assert vast.meter.seconds == 0


@pytest.mark.parametrize("role", ["guard", "program"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_nothing_of_a_drill_that_is_broken_off_goes_on(here, role, signum):
    client = here.start("drill", "--yes", **QUICK)
    wait_until(lambda: here.role(role), 30)
    client.send_signal(signum)
    assert client.wait(60) == 128 + signum, here.err(client)
    assert not here.meter.members and not here.place.open_runs()
