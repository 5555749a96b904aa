"""Whole runs on the emulated vast.ai: what only containers of strangers have. The meter is the judge."""

import json
import signal
import time

import pytest
from cloud.faults import Answer
from cloud.vast_errors import forbidden
from cloud.vast_offers import offer
from machine import signal_all, wait_until
from test_ends import POLITE, RESUMED, SLEEP, WORK, lose

QUICK = {"limit_pull": 1.0, "limit_provisioning": 1.0, "limit_away": 1.0}


def number(vast):
    """Of the container that costs money."""
    (found,) = vast.place.cloud.meter.running()
    return found


def nothing_is_left(vast):
    assert vast.place.cloud.meter.running() == []
    vast.place.cloud.meter.check()


def test_a_run_from_start_to_end_and_what_it_cost(vast):
    vast.place.cloud.offers = [offer(7_300_001, price=0.5)]
    vast.main(WORK + "import subprocess; print(subprocess.check_output(['nvidia-smi', '-L'], text=True))")
    client = vast.start("--json", "record.json", "main.py")
    assert client.wait(60) == 0, vast.err(client)
    assert "GPU 0: NVIDIA GeForce RTX 4090" in vast.out(client)
    said = vast.err(client)
    assert "1 x RTX 4090, host 50001 (California, US), 0.504167 USD/h" in said and "of it traffic" in said
    assert "at most 12." in said, "24 hours of GPU and disk, and the image of each host that may be tried"
    record = json.loads((vast.project / "record.json").read_text())
    meter = vast.place.cloud.meter
    (name,) = meter.names()
    split = meter.cost_split(name)
    for part in ("gpu", "disk", "traffic"):
        assert record[f"{part}_usd"] == pytest.approx(split[part], rel=0.01, abs=1e-6)
    assert record["cost_usd"] == pytest.approx(meter.total(), rel=0.01)
    assert record["note"] is None and vast.place.cloud.jobs == {}, "the scheduled end went with the container"
    nothing_is_left(vast)


def test_what_a_container_is_given(vast):
    """The environment of its image, without the keys to the container and the order of the run."""
    vast.main("print(sorted(os.environ)); print(os.getcwd(), os.getuid())")
    client = vast.start("-e", "ANSWER=42", "main.py")
    assert client.wait(60) == 0, vast.err(client)
    names = vast.out(client)
    assert "'ANSWER'" in names and "'CONTAINER_ID'" in names and "/root/cloudrun/digits 0" in names
    for secret in ("CONTAINER_API_KEY", "CLOUDRUN_BOOT", "CLOUDRUN_PAYLOAD", "JUPYTER_TOKEN", "VAST_API_KEY"):
        assert secret not in names


def test_a_scheduled_end_that_vast_refuses_is_said_and_on_the_bill(vast):
    vast.place.cloud.faults.on("schedule.create", Answer(forbidden("schedule")), times=None)
    vast.main(WORK)
    client = vast.start("main.py")
    assert client.wait(60) == 0, vast.err(client)
    assert "would not end" in vast.err(client) and "would not end" in vast.object("bill.json")["note"]
    nothing_is_left(vast)


def test_a_host_that_loads_for_ever_is_destroyed_and_the_next_one_is_taken(vast):
    first, second, *_ = vast.place.cloud.offers
    vast.place.cloud.offers = [first, {**second, "dph_base": 6.1}]
    vast.place.cloud.faults.stuck_loading = {first["machine_id"]}
    vast.main(WORK + "sys.exit(4)")
    client = vast.start("main.py", **QUICK)
    assert client.wait(60) == 4, vast.err(client)
    assert "did not load the image in time; trying another machine" in vast.err(client)
    bill = vast.ended(2)
    assert bill["attempts"] == 2 and len(vast.place.cloud.meter.names()) == 2
    nothing_is_left(vast)


def test_when_no_host_is_of_use_the_run_has_failed_and_nothing_is_left(vast):
    error = "Error response from daemon: OCI runtime create failed: nvidia-container-cli"
    vast.place.cloud.faults.broken = {each["machine_id"]: error for each in vast.place.cloud.offers}
    vast.main(WORK)
    client = vast.start("main.py", **QUICK)
    assert client.wait(90) == 125
    assert "OCI runtime create failed" in vast.err(client)
    assert vast.object("bill.json")["attempts"] == 5, "so many and no more"
    nothing_is_left(vast)


def test_a_host_that_is_silent_is_destroyed_and_the_next_one_is_taken(vast):
    first = vast.place.cloud.offers[0]
    vast.place.cloud.faults.isolated = {first["machine_id"]}
    vast.main(WORK + "sys.exit(4)")
    client = vast.start("main.py", limit_boot=3.0)
    assert client.wait(90) == 4, vast.err(client)
    assert vast.object("bill.json")["attempts"] == 2
    nothing_is_left(vast)


def test_a_host_without_a_network_says_so_and_the_next_one_is_taken(vast):
    """Its guard gives up long before a host is called silent."""
    first = vast.place.cloud.offers[0]
    vast.place.cloud.faults.isolated = {first["machine_id"]}
    vast.main(WORK + "sys.exit(4)")
    client = vast.start("main.py", limit_boot=200.0)
    assert client.wait(120) == 4, vast.err(client)
    assert "urlopen error" in vast.err(client) and "trying another machine" in vast.err(client)
    assert vast.object("bill.json")["attempts"] == 2
    nothing_is_left(vast)


def test_a_host_whose_gpu_does_not_answer_is_left_for_the_next_one(vast):
    """Before anything is fetched; here the first container's card is broken, and no other one."""
    vast.main(WORK + "sys.exit(4)")
    client = vast.start("main.py")
    wait_until(lambda: vast.place.cloud.all_machines, 30)
    vast.place.cloud.all_machines[0].set_gpu("fail")
    assert client.wait(60) == 4, vast.err(client)
    assert "0 of 1 GPUs can be used" in vast.err(client) and "trying another machine" in vast.err(client)
    assert vast.object("bill.json")["attempts"] == 2
    nothing_is_left(vast)


def test_outbid_and_continued(vast):
    vast.main(RESUMED)
    client = vast.running("main.py", text="step 0\n")
    wait_until(lambda: vast.saved("model/step"))
    vast.take_away()
    assert client.wait(60) == 0, vast.err(client)
    assert vast.out(client) == "step 0\nstep 7\n" and "going on with another one" in vast.err(client)
    assert vast.object("bill.json")["cost"] == pytest.approx(vast.place.cloud.meter.total(), rel=0.01)
    nothing_is_left(vast)


def test_where_there_is_no_other_machine_what_was_saved_comes_home(vast):
    """main.py was started, so that this is not 125; all offers are taken when the next host is wanted."""
    vast.main(RESUMED)
    client = vast.running("main.py", text="step 0\n")
    wait_until(lambda: vast.saved("model/step"))
    vast.place.cloud.faults.taken = {each["machine_id"] for each in vast.place.cloud.offers}
    vast.take_away()
    assert client.wait(60) == 121, vast.err(client)
    assert "cannot go on elsewhere" in vast.err(client)
    assert vast.local("model/step") == "7"
    bill = vast.object("bill.json")
    assert bill["reason"] == "preempted" and bill["gpu"] == pytest.approx(bill["cost"], abs=1e-5)
    nothing_is_left(vast)


@pytest.mark.parametrize("harm", ["offline", "freeze"])
def test_a_host_that_is_lost_is_destroyed_and_the_run_goes_on(vast, harm):
    vast.main(RESUMED)
    client = vast.running("main.py", text="step 0\n", **QUICK)
    wait_until(lambda: vast.saved("model/step"))
    getattr(vast.place.cloud, harm)(number(vast))
    assert client.wait(60) == 0, vast.err(client)
    assert vast.out(client) == "step 0\nstep 7\n"
    nothing_is_left(vast)


def test_a_host_that_stays_away_and_cannot_be_ended_is_122_and_swept_when_it_is_back(vast):
    vast.main(SLEEP)
    client = vast.running("main.py", limit_stop=0.5, **QUICK)
    made = number(vast)
    vast.place.cloud.faults.stuck = {vast.place.cloud.instances[made].offer["machine_id"]}
    vast.place.cloud.offline(made)
    assert client.wait(60) == 122
    assert f"vastai destroy instance {made}" in vast.err(client)
    assert vast.object("bill.json") is None, "it may cost money again"
    vast.place.cloud.faults.stuck = set()
    assert vast.run("ps") == 0
    wait_until(lambda: vast.place.cloud.instances[made].gone, 20)
    nothing_is_left(vast)


def test_an_exhausted_credit_ends_in_a_destroyed_container_and_a_verdict(vast):
    vast.main(SLEEP)
    client = vast.running("main.py")
    vast.place.cloud.credit = 0.0
    assert client.wait(60) == 121
    assert "taken away; run it again to go on" in vast.err(client)
    nothing_is_left(vast)


def test_without_credit_for_the_worst_case_nothing_is_rented(vast):
    vast.place.cloud.credit = 1.0
    vast.main(WORK)
    client = vast.start("main.py")
    assert client.wait(60) == 125 and "does not pay for" in vast.err(client)
    assert vast.place.cloud.meter.names() == []


def test_a_container_without_its_key_is_destroyed_and_the_next_host_is_taken(vast):
    vast.place.cloud.faults.keyless = {vast.place.cloud.offers[0]["machine_id"]}
    vast.main(WORK + "sys.exit(4)")
    client = vast.start("main.py")
    assert client.wait(60) == 4, vast.err(client)
    assert "there is no CONTAINER_API_KEY; trying another machine" in vast.err(client)
    assert vast.ended(2)["attempts"] == 2
    nothing_is_left(vast)


def test_an_image_without_python_is_said_with_what_to_do(vast):
    """It is the same on every host, so that no second one is paid for."""
    vast.place.cloud.faults.lacking.add("python3")
    vast.main(WORK)
    client = vast.start("main.py")
    assert client.wait(60) == 125, vast.err(client)
    assert "main.py was not started: the image has no Python 3.8 or newer: choose another" in vast.err(client)
    assert vast.ended(2)["attempts"] == 1 and len(vast.place.cloud.meter.names()) == 1
    nothing_is_left(vast)


def test_guard_and_agent_killed_with_the_client_lost(vast):
    """Nothing in the container is left that could end it but the shell that started the guard, much later."""
    vast.main(SLEEP)
    lose(vast.running("main.py"))
    made = number(vast)
    signal_all(vast.role("guard") + vast.role("agent"), signal.SIGKILL)
    assert vast.place.cloud.meter.running() == [made]
    vast.place.cloud.fire_jobs()
    wait_until(lambda: vast.place.cloud.instances[made].gone, 20)
    assert vast.run("wait") == 121
    nothing_is_left(vast)


def test_a_container_that_starts_again_goes_on_with_its_run(vast):
    vast.main(
        WORK + "print('up', os.path.exists('model/step'), flush=True)\n"
        "if os.path.exists('model/step'): sys.exit(9)\n"
        "write('model/step', '1'); time.sleep(100)"
    )
    client = vast.running("main.py", text="up False\n")
    wait_until(lambda: vast.saved("model/step"))
    vast.place.cloud.restart(number(vast))
    assert client.wait(60) == 9, vast.err(client)
    assert vast.out(client) == "up False\nup True\n"
    assert vast.ended(2)["attempts"] == 1
    nothing_is_left(vast)


def test_a_container_of_a_finished_run_that_starts_again_ends_itself(vast):
    """Its client is gone, and its guard was stopped before it could end it."""
    vast.main(POLITE)
    lose(vast.running("main.py", limit_agent_gone=10.0))
    made = number(vast)
    signal_all(vast.role("guard"), signal.SIGSTOP)
    assert vast.place.object("receipt.json") is None
    signal_all(vast.role("program"), signal.SIGINT)
    vast.wait_for("receipt.json")
    time.sleep(0.5)
    assert vast.place.cloud.meter.running() == [made]
    vast.place.cloud.restart(made)
    wait_until(lambda: vast.place.cloud.instances[made].gone, 30)
    assert vast.run("wait") == 5
    nothing_is_left(vast)


def test_a_container_that_comes_back_after_the_deadline_ends_itself(vast):
    """The seconds that it was given count from its creation: the clock of the bucket says what is left."""
    vast.main(SLEEP)
    lose(vast.running(f"--max-hours={8 / 3600:.9f}", "main.py"))
    made = number(vast)
    vast.place.cloud.offline(made)
    time.sleep(8)
    vast.place.cloud.back(made)
    wait_until(lambda: vast.place.cloud.instances[made].gone, 15)
    assert vast.run("wait") in (121, 124)
    nothing_is_left(vast)


def test_a_wrong_key_is_said_once_and_before_anything_is_sent(vast):
    vast.main(WORK)
    client = vast.start("main.py", VAST_API_KEY="of-nobody")
    assert client.wait(30) == 2
    assert vast.err(client) == "cloudrun: vast.ai does not accept VAST_API_KEY: Invalid user key\n"


def test_offers_are_shown_and_nothing_is_rented(vast):
    vast.main(WORK)
    table = vast.start("offers")
    assert table.wait(30) == 0
    assert "host 50001 " in vast.out(table) and vast.out(table).count("California, US") == 5, vast.out(table)
    as_json = vast.start("offers", "--hours", "2", "--json")
    assert as_json.wait(30) == 0
    found = json.loads(vast.out(as_json))
    assert found[0]["expected_usd"] == pytest.approx(12.0, abs=0.1) and found[0]["reliability"] == 0.9931
    assert vast.place.cloud.meter.names() == []
