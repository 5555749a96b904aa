"""Whole runs on the emulated Google Cloud: what only a rented machine has. The meter is the judge."""

import os
import signal
import threading

import pytest
from cloud.errors import bad_request
from cloud.faults import Answer, Empty, Slow
from cloud.tokens import Granted
from gce import Gce, key_file
from machine import signal_all, wait_until
from test_ends import POLITE, RESUMED, SLEEP, UNTIL_STOPPED, WORK, hang_when_finished, hours, lose

from cloudrun.backends.gcp_prices import disk_per_month

ROBOT = "robot@test-project.iam.gserviceaccount.com"
VM = {"VM_INSTANCE": "my-vm", "VM_SPOT": "0"}


def status(gcp):
    return gcp.place.cloud.status("my-vm")


def test_a_kept_machine_is_parked_and_used_again(gcp):
    gcp.main(
        WORK + "print(open('/boots').read() if os.path.exists('/boots') else 'new', flush=True)\n"
        "open('/boots', 'w').write('used')"
    )
    first = gcp.start("main.py", **VM)
    assert first.wait(60) == 0, gcp.err(first)
    assert status(gcp) == "TERMINATED" and "parked, its disk costs about 10.00 USD a month" in gcp.err(first)
    second = gcp.start("main.py", **VM)
    assert second.wait(60) == 0, gcp.err(second)
    assert (gcp.out(first), gcp.out(second)) == ("new\n", "used\n")
    assert status(gcp) == "TERMINATED" and len(gcp.place.cloud.inserts()) == 1
    gcp.meter.wait_gone(2)


def test_a_second_run_names_the_one_that_has_the_machine_or_queues(gcp):
    gcp.main(POLITE)
    first = gcp.running("main.py", **VM)
    second = gcp.start("main.py", **VM)
    assert second.wait(60) == 125
    assert "was last used by the run digits-" in gcp.err(second) and "--wait" in gcp.err(second)
    third = gcp.start("--wait", "main.py", **VM)
    wait_until(lambda: "queueing: my-vm is running" in gcp.err(third), 30)
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130
    wait_until(lambda: "up\n" in gcp.out(third), 60)
    third.send_signal(signal.SIGINT)
    assert third.wait(60) == 130
    gcp.meter.wait_gone(2)


class Together:
    """Requests of two clients that are let through when both are there."""

    def __init__(self):
        self.both = threading.Barrier(2, timeout=60)

    def around(self, faults, request, perform):
        self.both.wait()
        return perform()


def test_of_two_that_take_the_machine_at_once_one_waits_for_the_other(gcp):
    """Both have an offer and an order; the one that comes too late queues as long as it has to."""
    gcp.main(WORK)
    assert gcp.run(hours(60), "main.py", **VM) == 0
    gcp.place.cloud.faults.on("instances.setLabels", Together(), times=2)
    gcp.main(POLITE)
    clients = [gcp.start("--wait", hours(60), "main.py", **VM) for _ in range(2)]
    wait_until(lambda: any("queueing: my-vm" in gcp.err(client) for client in clients), 60)
    first, second = sorted(clients, key=lambda client: "queueing" in gcp.err(client))
    wait_until(lambda: "up\n" in gcp.out(first), 60)
    deadlines = [order["deadline"] for order in gcp.place.orders()]
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130
    wait_until(lambda: "up\n" in gcp.out(second), 60)
    assert max(order["deadline"] for order in gcp.place.orders()) > max(deadlines), "it has all its time"
    second.send_signal(signal.SIGINT)
    assert second.wait(60) == 130, gcp.err(second)
    gcp.meter.wait_gone(2)
    assert len(gcp.place.cloud.inserts()) == 1 and not gcp.place.open_runs()


def test_who_does_not_wait_and_comes_too_late_is_told(gcp):
    gcp.main(WORK)
    assert gcp.run("main.py", **VM) == 0
    gcp.place.cloud.faults.on("instances.setLabels", Together(), times=2)
    clients = [gcp.start("main.py", **VM) for _ in range(2)]
    assert sorted(client.wait(60) for client in clients) == [0, 125]
    late = next(client for client in clients if client.returncode)
    assert "my-vm" in gcp.err(late) and not gcp.place.open_runs()
    gcp.meter.wait_gone(2)


def test_who_waits_for_a_run_that_is_just_taking_the_machine_waits_for_its_end(gcp):
    """Between the labels and the start it is parked still, and belongs to the run already."""
    gcp.main(WORK)
    assert gcp.run("main.py", **VM) == 0
    cloud = gcp.place.cloud
    cloud.faults.on("instances.setMetadata", Slow(10.0), nth=1)
    client = gcp.start("main.py", **VM)
    wait_until(lambda: any(each.method == "instances.setMetadata" for each in cloud.requests), 40)
    assert gcp.run("wait", **VM) == 0
    assert client.wait(60) == 0
    gcp.meter.wait_gone(2)


def test_a_person_who_starts_a_parked_machine_finds_it_left_on(gcp):
    gcp.main(WORK)
    assert gcp.run("main.py", **VM) == 0
    by_hand(gcp)
    wait_until(lambda: gcp.place.role("agent") == [] and "startup-script" in gcp.place.cloud.console("my-vm"))
    wait_until(lambda: not gcp.place.role("guard"), 20)
    assert status(gcp) == "RUNNING" and "the run is finished" not in gcp.place.cloud.console("my-vm")
    assert gcp.run("ps", **VM) == 0, "and nobody ends it as overdue"
    assert status(gcp) == "RUNNING"


def by_hand(gcp):
    """As a person does in the console."""
    gce = Gce(gcp.place.cloud)
    gce.vm("start_unary", "my-vm")
    gcp.place.cloud.wait("my-vm", "RUNNING")
    gcp.place.cloud.machine("my-vm")


def test_a_guest_that_reboots_goes_on_with_its_run(gcp):
    gcp.main(
        WORK + "print('up', os.path.exists('model/step'), flush=True)\n"
        "if os.path.exists('model/step'): sys.exit(9)\n"
        "write('model/step', '1'); time.sleep(100)"
    )
    client = gcp.running("main.py", text="up False\n", **VM)
    wait_until(lambda: gcp.saved("model/step"))
    Gce(gcp.place.cloud).vm("reset_unary", "my-vm")
    assert client.wait(60) == 9, gcp.err(client)
    assert gcp.out(client) == "up False\nup True\n"
    assert gcp.ended(2)["attempts"] == 1


def test_a_stop_from_outside_ends_the_run_and_is_no_preemption(gcp):
    gcp.main(POLITE)
    client = gcp.running("main.py", **VM)
    Gce(gcp.place.cloud).vm("stop_unary", "my-vm")
    assert client.wait(60) == 121
    assert "shut down from outside" in gcp.err(client)
    assert gcp.ended(2)["attempts"] == 1 and status(gcp) == "TERMINATED"


def taken_without_a_word(gcp, *arguments, **settings):
    """A client whose machine is taken away while no process on it can do anything."""
    gcp.main(RESUMED)
    client = gcp.running(*arguments, "main.py", text="step 0\n", **settings)
    wait_until(lambda: gcp.saved("model/step"))
    (name,) = gcp.meter.members
    gcp.place.cloud.machine(name).freeze()
    return client, name


@pytest.mark.parametrize("kept", [False, True])
def test_a_machine_that_is_taken_away_without_a_word_is_preempted_all_the_same(gcp, kept):
    client, name = taken_without_a_word(gcp, **({**VM, "VM_SPOT": "1"} if kept else {}))
    gcp.place.cloud.preempt(name)
    assert client.wait(60) == 0, gcp.err(client)
    assert gcp.out(client) == "step 0\nstep 7\n"
    gcp.meter.wait_gone(2)
    assert gcp.object("attempts/1/end.json") is None and gcp.object("bill.json")["attempts"] == 2


def test_a_run_that_was_taken_away_without_a_word_is_gone_on_with_by_who_comes_later(gcp):
    client, name = taken_without_a_word(gcp)
    lose(client)
    gcp.place.cloud.preempt(name)
    gcp.meter.wait_gone(20)
    assert gcp.run("wait") == 0
    gcp.meter.wait_gone(2)
    assert gcp.object("bill.json")["attempts"] == 2


def test_a_host_that_fails_is_no_preemption(gcp):
    client, name = taken_without_a_word(gcp)
    gcp.place.cloud.host_error(name)
    assert client.wait(60) == 121, gcp.err(client)
    assert gcp.ended(2)["reason"] == "lost"


@pytest.mark.parametrize("ended_by", ["who looks", "itself"])
def test_a_run_costs_what_was_said_to_who_started_it(gcp, ended_by):
    """Whatever price the settings of the one have who closes its bill."""
    gcp.main(SLEEP if ended_by == "who looks" else WORK + "print('up', flush=True); time.sleep(1)")
    lose(gcp.running("main.py", CLOUDRUN_PRICE="6", **VM))
    if ended_by == "who looks":
        assert gcp.run("stop", "--now", CLOUDRUN_PRICE="0.5", **VM) == 0
    else:
        gcp.wait_for("receipt.json")
        gcp.place.cloud.wait("my-vm", "TERMINATED")
        assert gcp.run("ps", CLOUDRUN_PRICE="0.5", **VM) == 0
    bill = gcp.ended(2)
    assert bill["cost"] == pytest.approx(max(bill["seconds"], 60) * 6 / 3600, abs=1e-5)


@pytest.mark.parametrize("ahead", [-7200, 7200])
def test_a_client_with_a_wrong_clock_gives_a_run_the_time_that_was_asked_for(gcp, ahead):
    """And its bill the seconds that Google counts, though the end of the machine was seen by that clock."""
    gcp.main(POLITE)
    client = gcp.start(hours(15), "main.py", **gcp.other_clock(ahead))
    assert client.wait(60) == 124, gcp.err(client)
    assert gcp.ended(2)["reason"] == "deadline" and gcp.local("model/last") == "SIGINT"
    assert gcp.object("receipt.json")["seconds"] > 5


@pytest.mark.parametrize("ahead", [-7200, 7200])
def test_a_wrong_clock_of_who_looks_ends_no_run_and_lets_none_live_on(gcp, ahead):
    gcp.main(SLEEP)
    lose(gcp.running(hours(25), "main.py", limit_provider=1.0))
    assert gcp.run("ps", **gcp.other_clock(ahead)) == 0
    assert gcp.meter.members, "it goes on"
    signal_all(gcp.role("guard") + gcp.role("agent") + gcp.role("program"), signal.SIGSTOP)
    waiting = gcp.start("wait", **gcp.other_clock(ahead))
    assert waiting.wait(90) == 124, gcp.err(waiting)
    assert gcp.ended(2)["layer"] == "sweep"


def test_a_list_without_a_machine_that_runs_closes_no_bill_before_it_has_ended(gcp):
    """It has a receipt and hangs; Google's lists do not have it, and whoever asks by its name finds it."""
    gcp.main(UNTIL_STOPPED)
    lose(gcp.running("main.py", limit_agent_gone=10.0))
    hang_when_finished(gcp)
    gcp.place.cloud.faults.on("instances.aggregatedList", Empty(), times=None)
    assert gcp.run("ps") == 0
    assert gcp.ended(2)["layer"] == "sweep"


@pytest.mark.parametrize("roles", [["guard"], ["guard", "agent"]])
def test_a_machine_whose_guard_is_killed_is_ended_by_systemd(gcp, roles):
    """With the guard systemd kills all that was below it; what was saved stands. Nobody else is there."""
    gcp.main(SLEEP)
    client = gcp.running("main.py")
    wait_until(lambda: gcp.saved("model/first"))
    lose(client)
    signal_all([pid for role in roles for pid in gcp.role(role)], signal.SIGKILL)
    gcp.meter.wait_gone(10)
    assert gcp.run("wait") == 121 and gcp.run("pull") == 0
    assert gcp.ended(2)["layer"] == "guard" and gcp.local("model/first") == "first"


def test_a_machine_without_systemd_whose_guard_and_agent_are_killed_is_ended_by_what_started_it(gcp):
    gcp.place.cloud.faults.lacking.add("systemd")
    gcp.main(SLEEP)
    client = gcp.running("main.py")
    wait_until(lambda: gcp.saved("model/first"))
    lose(client)
    signal_all(gcp.role("guard") + gcp.role("agent"), signal.SIGKILL)
    gcp.meter.wait_gone(10)
    assert gcp.run("wait") == 121 and gcp.run("pull") == 0
    assert gcp.ended(2) and gcp.local("model/first") == "first"


def test_a_machine_without_systemd_whose_guard_is_killed_is_saved_and_ended_by_its_agent(gcp):
    gcp.place.cloud.faults.lacking.add("systemd")
    gcp.main(POLITE)
    lose(gcp.running("main.py"))
    signal_all(gcp.role("guard"), signal.SIGKILL)
    assert gcp.wait_for("receipt.json")["reason"] == "guard-lost"
    gcp.meter.wait_gone(10)
    assert gcp.run("wait") == 121 and gcp.run("pull") == 0
    assert gcp.ended(2) and gcp.local("model/last") == "SIGINT"


def test_an_image_without_python_is_said_with_what_to_do(gcp):
    gcp.place.cloud.faults.lacking.add("python3")
    gcp.main(WORK)
    client = gcp.start("main.py")
    assert client.wait(60) == 125
    assert "main.py was not started: this image has no python3: choose another one (VM_IMAGE)" in gcp.err(
        client
    )
    gcp.ended(2)


def test_a_machine_that_may_not_read_the_bucket_is_said_with_what_to_do(gcp):
    gcp.main(WORK)
    gcp.place.storage.faults.add(
        lambda call: call.kind == "read" and "/blobs/" in call.name, times=float("inf"), status=403
    )
    client = gcp.start("main.py")
    assert client.wait(60) == 125
    assert "main.py was not started: HTTP Error 403" in gcp.err(client)
    assert "cloudrun doctor says what allows it" in gcp.err(client)
    gcp.ended(2)


def test_what_a_lost_client_leaves_is_a_disk_until_the_next_command(gcp):
    """README says what that costs."""
    gcp.main(WORK + "print('up', flush=True); time.sleep(1)")
    lose(gcp.running("main.py"))
    name = gcp.place.cloud.inserts()[0].body["name"]
    gcp.place.cloud.wait(name, "TERMINATED")
    assert gcp.place.cloud.meter.disks() == [name]
    assert gcp.run("ps") == 0
    bill = gcp.ended(2)
    assert bill["reason"] == "exited" and gcp.place.cloud.meter.disks() == []
    assert round(disk_per_month("pd-balanced", 100) / 730, 3) == 0.014


def test_the_provider_ends_what_nobody_else_ends(gcp):
    """Client gone, guard and agent stopped: Google's own limit, a minute after the deadline."""
    gcp.main(SLEEP)
    lose(gcp.running(hours(20), "main.py", **VM))
    signal_all(gcp.role("guard") + gcp.role("agent") + gcp.role("program"), signal.SIGSTOP)
    gcp.place.cloud.clock.advance(20 + 60 + 5)
    gcp.meter.wait_gone(15)
    assert gcp.run("wait", **VM) in (121, 124)
    assert gcp.object("bill.json")


def test_a_driver_that_does_not_answer_is_found_before_anything_is_fetched(gcp):
    gcp.main(WORK)
    (gcp.project / "data").mkdir()
    (gcp.project / "data/big").write_bytes(os.urandom(9_000_000))
    client = gcp.start("main.py", VM_GPU="L4", VM_SPOT="0")
    name = wait_until(lambda: gcp.meter.members, 30)[0]
    gcp.place.cloud.machine(name).set_gpu("fail")
    assert client.wait(60) == 125, gcp.err(client)
    assert "0 of 1 GPUs can be used: nvidia-smi says" in gcp.err(client)
    gcp.ended(2)


def test_a_gpu_that_answers_is_used(gcp):
    gcp.main("import subprocess; print(subprocess.check_output(['nvidia-smi', '-L'], text=True))")
    client = gcp.start("main.py", VM_GPU="L4", VM_SPOT="0")
    assert client.wait(60) == 0 and "GPU 0: NVIDIA L4" in gcp.out(client)
    gcp.ended(2)


def test_an_insert_that_fails_and_leaves_a_machine(gcp):
    gcp.main(WORK)
    failure = Answer(bad_request("something went wrong"), done=True)
    gcp.place.cloud.faults.on("instances.insert", failure, nth=1)
    client = gcp.start("main.py")
    assert client.wait(60) == 125 and "something went wrong" in gcp.err(client)
    gcp.meter.wait_gone(2)
    assert gcp.place.cloud.meter.disks() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="a user namespace of an ordinary user has no other users")
def test_the_program_runs_as_the_user_of_the_machine(gcp):
    gcp.main(
        WORK
        + "import pwd\n"
        + "print(pwd.getpwuid(os.getuid()).pw_name, os.getcwd(), os.environ['HOME'], len(os.environ['KEY']))"
    )
    client = gcp.start("-e", "KEY=in-no-metadata", "main.py", VM_USER="student", **VM)
    assert client.wait(60) == 0, gcp.err(client)
    assert gcp.out(client) == "student /home/student/cloudrun/digits /home/student 14\n"
    assert gcp.ended(2) and gcp.local("model/first") == "first"
    cloud = gcp.place.cloud
    assert not any("in-no-metadata" in str(request.body) for request in cloud.requests)
    assert "in-no-metadata" not in cloud.console("my-vm")
    assert not any(b"in-no-metadata" in found.data for found in gcp.place.storage.objects("b").values())


def test_a_bucket_that_asks_for_tokens_gets_those_of_the_client_and_of_the_machine(gcp):
    cloud, storage = gcp.place.cloud, gcp.place.storage
    key = key_file(cloud, gcp.top / "key.json", ROBOT)
    storage.tokens = Granted(cloud.tokens)
    client = gcp.main(WORK).start("main.py", GOOGLE_APPLICATION_CREDENTIALS=str(key))
    assert client.wait(60) == 0, gcp.err(client)
    assert gcp.ended(3)["layer"] == "agent" and gcp.local("model/first") == "first"
    asked = {cloud.tokens[each.token].principal for each in storage.requests if each.token}
    assert asked == {ROBOT, cloud.project.service_account} and all(each.token for each in storage.requests)
