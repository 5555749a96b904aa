"""`cloudrun ps` sees what is billed, from a computer that has never seen it."""

import json

from gce import Gce
from test_ends import SLEEP, WORK, lose
from test_gcp_runs import by_hand

VM = {"VM_INSTANCE": "my-vm", "VM_SPOT": "0"}


def listing(gcp, **variables):
    done = gcp.start("ps", "--json", **variables)
    assert done.wait(60) == 0, gcp.err(done)
    return json.loads(gcp.out(done)), gcp.err(done)


def elsewhere(gcp):
    """The settings of the same account on a computer without a trace of us."""
    return gcp.place.elsewhere(gcp.top / "elsewhere")


def test_a_parked_machine_is_seen_with_its_price_and_another_ones_is_named_and_left_alone(gcp):
    cloud = gcp.place.cloud
    assert gcp.main(WORK).run("main.py", **VM) == 0
    (found,), err = listing(gcp, **elsewhere(gcp))
    assert found["state"] == "parked" and "about 10.00 USD a month" in found["note"]
    assert "not made by cloudrun" not in err
    by_hand(gcp)
    with cloud.clock.changed:
        cloud.instance("my-vm").body["labels"] = {"mine": "yes"}
    found, err = listing(gcp, **elsewhere(gcp))
    assert found == [] and "not made by cloudrun, billed, and left alone: gcp: my-vm in us-central1-a" in err
    assert cloud.status("my-vm") == "RUNNING"
    Gce(cloud).vm("stop_unary", "my-vm")
    gcp.meter.wait_gone(10)


def test_a_run_and_its_machine_are_one_row_and_a_machine_without_a_run_another(gcp):
    client = gcp.main(SLEEP).running("main.py")
    (found,), _ = listing(gcp, **elsewhere(gcp))
    assert found["state"] == "run" and found["machine"] == f"{found['run']}-1"
    lose(client)
    (found,), _ = listing(gcp, GCS_DIR="gs://b/somewhere-else", **elsewhere(gcp))
    assert found["state"] == "billed without a run" and found["machine"].endswith("-1")
    assert gcp.run("stop", "--now") == 0
    assert listing(gcp)[0] == []
    gcp.meter.wait_gone(5)
