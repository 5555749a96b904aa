"""What a lost client left behind is found and ended by whoever comes by. The meter is the judge."""

import json
import time

from test_ends import POLITE, UNTIL_STOPPED, WORK, hang_when_finished, lose


def gc(machinery, *options):
    """What it says, exit code 0."""
    client = machinery.start("gc", *options)
    assert client.wait(60) == 0 and machinery.out(client) == ""
    return machinery.err(client)


def test_gc_says_what_there_is_to_do_and_does_it_and_is_silent_when_there_is_nothing(machinery):
    client = machinery.main(UNTIL_STOPPED).running("main.py", limit_self_end=0.5, limit_agent_gone=10.0)
    assert gc(machinery) == ""
    lose(client)
    hang_when_finished(machinery)
    time.sleep(1.5)
    assert "would end digits-" in gc(machinery, "--dry-run") and machinery.meter.members
    assert "ended digits-" in gc(machinery)
    assert machinery.ended(3)["layer"] == "sweep"
    assert gc(machinery) == gc(machinery, "--dry-run") == ""


def test_stop_all_ends_every_run(here):
    here.main(POLITE)
    clients = [here.running("main.py") for _ in range(2)]
    assert here.run("stop", "--all") == 0
    assert [client.wait(30) for client in clients] == [130, 130]
    here.meter.wait_gone(5)
    assert not here.place.open_runs()
    assert here.run("stop", "--all") == 0 and here.run("stop", "--all", "digits") == 2


def test_gc_deletes_disks_of_runs_that_are_over_and_names_those_that_were_kept(gcp):
    assert gcp.main(WORK).run("main.py") == 0
    (over,), cloud = (order["run"] for order in gcp.place.orders()), gcp.place.cloud
    labels = {"cloudrun-attempt": "1", "cloudrun-ends": str(int(time.time()) + 9000)}
    disks = {
        "over": {"cloudrun-run": over, **labels},
        "open": {"cloudrun-run": "digits-20261125-101112-00ff", **labels},  # in another bucket
        "late": {"cloudrun-run": "digits-20261125-101112-00fe", **labels, "cloudrun-ends": "1"},
        "kept": {"cloudrun-kept": "yes"},
        "theirs": {"run": over},
    }
    with cloud.clock.changed:
        for name, marks in disks.items():
            disk = cloud.project.make_disk("us-central1-a", name, "pd-balanced", 100, "", marks)
            disk.created -= 3600
    shown = gcp.start("ps", "--json")
    assert shown.wait(60) == 0
    found = {row["note"].split()[2]: row for row in json.loads(gcp.out(shown))}
    assert {name: row["state"] for name, row in found.items()} == {
        **dict.fromkeys(("over", "open", "late"), "left over"),
        "kept": "parked",
    }
    assert "costs about 10.00 USD a month" in found["over"]["note"]
    by_hand = "gcloud compute disks delete kept --zone=us-central1-a --project=test-project"
    said = gc(gcp, "--dry-run")
    assert f"would end {over}-1, which has left the disk over in" in said and by_hand in said
    assert len(cloud.meter.disks()) == len(disks)
    said = gc(gcp)
    assert f"ended {over}-1" in said and "the disk late" in said and "the disk open" not in said
    assert by_hand in said
    assert cloud.meter.disks() == ["open", "kept", "theirs"]
