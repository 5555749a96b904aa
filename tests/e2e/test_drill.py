"""The drill plays its faults, and the meter saw the same."""

import re
import signal

import pytest
from machine import wait_until

QUICK = {"limit_client_lost": 1.0, "limit_agent_gone": 0.5}


@pytest.mark.timeout(300)  # six whole runs
def test_every_fault_ends_within_its_bound(here):
    client = here.start("drill", "--yes", **QUICK)
    assert client.wait(280) == 0, here.err(client)
    head, *rows = here.out(client).splitlines()
    assert head.split() == ["FAULT", "ENDED", "BY", "ENDED", "AFTER", "BOUND", "COST"] and len(rows) == 6
    layers = [re.split("  +", row)[1] for row in rows]
    assert layers[3] == "guard" and not {"sweep", "?"} & set(layers), rows
    assert "6 runs on " in here.err(client)
    here.meter.wait_gone(2)
    assert not here.place.open_runs()


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
