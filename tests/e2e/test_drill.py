"""The drill plays its faults, and the meter saw the same."""

import re

import pytest

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
