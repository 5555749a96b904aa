"""The gcp backend through Google's own client, against the emulated Compute Engine; no machine boots here."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cloud import errors as cloud_errors
from cloud.compute import Cloud
from cloud.faults import Answer, Empty, LostReply, LostRequest, Slow, Stale
from cloud.project import Timing
from cloud.server import json_reply
from contracts.backend import RUNS, BackendContract, Rig
from gce import need_client

from cloudrun.backends import Boot
from cloudrun.backends.gcp import GcpBackend
from cloudrun.backends.gcp_vm import gce_name
from cloudrun.bill import Patience, see_ended
from cloudrun.config import from_env
from cloudrun.errors import CloudrunError, Held, NoCapacity, UsageError
from cloudrun.formats import timestamp

QUICK = Timing(0.02, 0.02, boot=0.05, stopping=0.02, shortest_run=0.1)
PAYLOAD = {"instance": "i", "left": 60.0}


class GcpRig:
    """`settings` are VM_… variables."""

    def __init__(self, cloud: Cloud, **settings: str) -> None:
        self.cloud = cloud
        self.environ = {**cloud.environ(), "GCS_DIR": "gs://b/runs", "VM_GPU": "none", **settings}
        self.environ["CLOUDRUN_LIMITS"] = "look=0.05,appears=1,stop=20"
        self.backend = self.client()

    def client(self, **settings: str) -> GcpBackend:
        return GcpBackend(from_env({**self.environ, **settings}, "/toy", backend="gcp"))

    def boot(self, run: str, attempt: int, seconds: float) -> Boot:
        if seconds < 1:
            threading.Timer(0.5, self.power_off).start()
        payload = {**PAYLOAD, "instance": f"{run}-{attempt}", "run": run}
        return Boot(run, attempt, timestamp(time.time() + seconds), payload, max(seconds, 1.0) + 60)

    def power_off(self) -> None:
        with self.cloud.clock.changed:
            for instance in self.cloud.project.instances.values():
                instance._machine_ended(instance.machine, "poweroff")  # type: ignore[arg-type]

    def create(self, run: str = RUNS[0], attempt: int = 1, number: int = 0) -> str:
        offer = self.backend.offers()[number]
        self.backend.create(f"{run}-{attempt}", offer, self.boot(run, attempt, 60.0))
        return f"{run}-{attempt}"


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    need_client()
    with Cloud(tmp_path, timing=QUICK, machines=False) as cloud:
        for name, value in cloud.environ().items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
        yield cloud
        assert cloud.violations == []
        for request in cloud.requests:
            if request.method in ("instances.insert", "instances.setScheduling"):
                scheduling = request.body.get("scheduling", request.body)
                assert int(scheduling["maxRunDuration"]["seconds"]) >= 30
                assert scheduling["instanceTerminationAction"] in ("STOP", "DELETE")
                assert scheduling["automaticRestart"] is False
            if request.verb != "GET" and "wait" not in request.method:
                assert request.query.get("requestId"), request.method


class TestNewMachines(BackendContract):
    @pytest.fixture
    def rig(self, cloud: Cloud) -> Rig:
        return GcpRig(cloud)


class TestAKeptMachine(BackendContract):
    @pytest.fixture
    def rig(self, cloud: Cloud) -> Rig:
        return GcpRig(cloud, VM_INSTANCE="my-vm")

    def test_stop_ends_only_its_own(self, rig: Rig) -> None:
        """One machine, one attempt after the other: who stops the first does not stop the second."""
        first = self.make(rig, attempt=1)
        self.end(rig, first)
        second = self.make(rig, attempt=11)
        rig.backend.stop(first)
        assert [found.name for found in rig.backend.all()] == [second]
        self.end(rig, second)


def until(check: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while not (value := check()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def ended(rig: GcpRig, name: str) -> Any:
    return see_ended(rig.backend, name, Patience(0, 20, doubtful=True), layer="lease")


# --- a machine for each attempt


def test_a_machine_of_a_run_is_deleted_with_its_disk(cloud: Cloud) -> None:
    rig = GcpRig(cloud)
    name = rig.create()
    (insert,) = cloud.inserts()
    assert insert.body["scheduling"]["instanceTerminationAction"] == "DELETE"
    assert insert.body["disks"][0]["autoDelete"] is True
    end = ended(rig, name)
    assert cloud.meter.running() == cloud.meter.disks() == []
    assert abs((end.ended - end.started) - cloud.meter.seconds(gce_name(name))) < 1.0


def test_a_machine_that_powered_itself_off_is_deleted_and_billed_until_then(cloud: Cloud) -> None:
    rig = GcpRig(cloud)
    name = rig.create()
    rig.power_off()
    cloud.wait(gce_name(name), "TERMINATED")
    time.sleep(1.5)
    end = see_ended(rig.backend, name, Patience(30, 20), layer="lease")
    assert end.layer == "guard" and cloud.meter.disks() == []
    assert abs((end.ended - end.started) - cloud.meter.seconds(gce_name(name))) < 1.0


@pytest.mark.parametrize("name", [f"{run}-1" for run in (*RUNS, "9_lives-20261125-101112-00ff")])
def test_names_that_google_takes(name: str) -> None:
    import re

    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", gce_name(name))
    assert gce_name(name).endswith("20261125-101112-00ff-1")


@pytest.mark.parametrize("effect", [LostReply(), LostRequest(), Answer(cloud_errors.backend_error(503))])
def test_an_insert_whose_answer_is_lost_makes_one_machine(cloud: Cloud, effect: Any) -> None:
    cloud.faults.on("instances.insert", effect, nth=1)
    rig = GcpRig(cloud)
    name = rig.create()
    assert len(cloud.project.instances) == 1 and rig.backend.find(name)
    ended(rig, name)
    assert cloud.meter.running() == []


def test_an_insert_that_fails_and_leaves_a_machine_is_ended(cloud: Cloud) -> None:
    failure = cloud_errors.bad_request("something went wrong")
    cloud.faults.on("instances.insert", Answer(failure, done=True), nth=1)
    rig = GcpRig(cloud)
    with pytest.raises(CloudrunError, match="something went wrong"):
        rig.create()
    ended(rig, f"{RUNS[0]}-1")
    assert cloud.meter.running() == cloud.meter.disks() == []


# --- zones and quota


def test_where_it_is_sold_out_the_next_zone_is_tried(cloud: Cloud) -> None:
    rig = GcpRig(cloud, VM_GPU="L4")
    cloud.quotas.stock_out("us-central1-a", "g2-standard-4")
    with pytest.raises(NoCapacity, match="us-central1-a has no such machine now"):
        rig.create()
    name = rig.create(number=1)
    assert next(iter(cloud.project.instances))[0] == "us-central1-b" or rig.backend.find(name)
    ended(rig, name)


def test_a_quota_that_holds_everywhere_is_said_with_what_to_ask_for(cloud: Cloud) -> None:
    cloud.quotas.limits["GPUS_ALL_REGIONS"] = 0
    rig = GcpRig(cloud, VM_GPU="L4")
    with pytest.raises(CloudrunError, match="GPUS_ALL_REGIONS") as caught:
        rig.create()
    assert not isinstance(caught.value, NoCapacity) and "no zone can help" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"VM_GPU": "H100"}, "VM_SPOT=1"),
        ({"VM_GPU": "nonsense"}, "VM_GPU=nonsense"),
        ({"VM_INSTANCE": "No_Name"}, "VM_INSTANCE=No_Name"),
        ({"VM_ZONE": "moon"}, "VM_ZONE: moon"),
        ({"VM_DISK": "much"}, "VM_DISK=much"),
        ({"VM_SPOT": "perhaps"}, "VM_SPOT=perhaps"),
    ],
)
def test_nonsense_is_refused_before_any_request(cloud: Cloud, settings: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        GcpRig(cloud, **settings)
    assert cloud.requests == []


def test_an_image_that_is_not_there_is_said_before_anything_is_made(cloud: Cloud) -> None:
    rig = GcpRig(cloud, VM_IMAGE="projects/deeplearning-platform-release/global/images/family/common-gpu")
    with pytest.raises(UsageError, match="set VM_IMAGE"):
        rig.backend.offers()


# --- a machine that is kept


@pytest.fixture
def kept(cloud: Cloud) -> GcpRig:
    rig = GcpRig(cloud, VM_INSTANCE="my-vm")
    ended(rig, rig.create())
    return rig


def test_a_kept_machine_is_parked_and_started_again(cloud: Cloud, kept: GcpRig) -> None:
    assert cloud.status("my-vm") == "TERMINATED" and not kept.backend.all()[0].billed
    before = cloud.meter.seconds("my-vm")
    name = kept.create(attempt=2)
    assert cloud.status("my-vm") == "RUNNING" and len(cloud.inserts()) == 1
    end = ended(kept, name)
    assert cloud.status("my-vm") == "TERMINATED"
    assert (
        end.parked == "my-vm is parked, its disk costs about 10.00 USD a month" and "is stopped" in end.proof
    )
    assert abs((end.ended - end.started) - (cloud.meter.seconds("my-vm") - before)) < 1.0


def test_a_kept_machine_was_taken_away_in_the_life_that_was_taken(cloud: Cloud, kept: GcpRig) -> None:
    name = kept.create(attempt=2)
    cloud.clock.advance(2)  # Google's times of a stop are told apart by the second
    cloud.preempt("my-vm")
    cloud.wait("my-vm", "TERMINATED")
    assert kept.backend.taken_away(name) and kept.client().taken_away(name)
    name = kept.create(attempt=3)
    ended(kept, name)
    assert not kept.backend.taken_away(name)


def test_of_two_who_take_it_at_once_one_has_it(cloud: Cloud, kept: GcpRig) -> None:
    other = kept.client()
    offers = kept.backend.offers()
    found = other._kept()
    name = kept.create(attempt=2)
    assert found
    with pytest.raises(Held, match=f"last used by the run {RUNS[0]}"):
        other._take(*found, kept.boot(RUNS[1], 1, 60.0))
    with pytest.raises(Held, match=f"last used by the run {RUNS[0]}"):
        other.create(f"{RUNS[1]}-1", offers[0], kept.boot(RUNS[1], 1, 60.0))
    other.stop(f"{RUNS[1]}-1")
    assert cloud.meter.running() == ["my-vm"]
    ended(kept, name)


def test_who_has_taken_it_and_not_started_it_yet_has_it(cloud: Cloud, kept: GcpRig) -> None:
    """Between the labels and the start it is still parked."""
    other, boot = kept.client(), kept.boot(RUNS[1], 1, 60.0)
    seen: list[BaseException] = []

    class TakenMeanwhile:
        def around(self, faults: Any, request: Any, perform: Callable[[], Any]) -> Any:
            try:
                other._take(*other._kept(), boot)  # type: ignore[misc]
            except CloudrunError as error:
                seen.append(error)
            return perform()

    cloud.faults.on("instances.setMetadata", TakenMeanwhile())
    name = kept.create(attempt=2)
    assert isinstance(seen[0], Held) and "being started" in str(seen[0])
    assert kept.backend.find(name) and cloud.meter.running() == ["my-vm"]
    ended(kept, name)


def test_a_start_whose_reply_is_lost_is_not_taken_for_an_end(cloud: Cloud, kept: GcpRig) -> None:
    """The parked machine is seen, and starts a moment later."""
    cloud.faults.on("instances.start", Slow(0.4, late=True), nth=1)
    starting = threading.Thread(target=lambda: kept.client().create(f"{RUNS[0]}-2", *start), daemon=True)
    start = (kept.backend.offers()[0], kept.boot(RUNS[0], 2, 60.0))
    starting.start()
    until(lambda: any(each.method == "instances.start" for each in cloud.requests))
    end = ended(kept, f"{RUNS[0]}-2")
    starting.join()
    assert cloud.status("my-vm") == "TERMINATED" and cloud.meter.running() == [] and end.layer == "lease"


@pytest.mark.parametrize(("said", "seen"), [("6", 6.0), ("0", 0.0)])
def test_a_machine_has_the_price_that_its_run_was_told(cloud: Cloud, said: str, seen: float) -> None:
    rig = GcpRig(cloud, CLOUDRUN_PRICE=said)
    name = rig.create()
    other = rig.client(CLOUDRUN_PRICE="0.5")
    found = other.find(name)
    assert found and found.price == seen and other.all()[0].price == seen
    ended(rig, name)


def test_a_price_that_is_no_number_is_what_is_known(cloud: Cloud) -> None:
    rig = GcpRig(cloud)
    name = rig.create()
    known = rig.backend.offers()[0].price
    with cloud.clock.changed:
        for item in cloud.instance(gce_name(name)).body["metadata"]["items"]:
            item["value"] = "nan" if item["key"] == "cloudrun-price" else item["value"]
    found = rig.backend.find(name)
    assert found and found.price == known
    ended(rig, name)


class Unreachable:
    """A list that has nothing of one zone, and says so at the end only."""

    def around(self, faults: Any, request: Any, perform: Callable[[], Any]) -> Any:
        found = json.loads(perform().body)
        found["items"]["zones/us-central1-a"] = {}
        return json_reply({**found, "unreachables": ["zones/us-central1-a"]})


def test_a_list_that_is_not_whole_is_no_list(cloud: Cloud) -> None:
    rig = GcpRig(cloud)
    name = rig.create()
    cloud.faults.on("instances.aggregatedList", Unreachable(), times=2)
    for ask in (rig.client().all, lambda: rig.client().find(name)):
        with pytest.raises(CloudrunError, match="zones/us-central1-a cannot be listed now"):
            ask()
    assert [found.name for found in rig.client().all()] == [name]
    ended(rig, name)


@pytest.mark.parametrize("effect", [Empty(), Stale()])
def test_a_list_that_is_late_hides_no_machine_and_invents_none(cloud: Cloud, effect: Any) -> None:
    rig = GcpRig(cloud)
    name = rig.create()
    assert rig.client().find(name)
    cloud.faults.on("instances.aggregatedList", effect, times=None)
    end = see_ended(rig.client(), name, Patience(0, 20), layer="sweep")
    assert cloud.meter.running() == cloud.meter.disks() == []
    assert end.started is not None
    end = see_ended(rig.client(), name, Patience(0, 20), layer="sweep")
    assert f"no {name}" in end.proof


def test_labels_of_somebody_else_authorise_nothing(cloud: Cloud) -> None:
    rig = GcpRig(cloud)
    name = rig.create()
    with cloud.clock.changed:
        cloud.instance(gce_name(name)).body["labels"].pop("cloudrun-ends")
    assert rig.client().all() == []
    ended(rig, name)


def test_the_machine_of_a_colleague_is_named_as_what_it_is(cloud: Cloud) -> None:
    theirs = GcpRig(cloud, VM_ZONE="us-central1-b")
    name = theirs.create()
    ours = GcpRig(cloud, VM_INSTANCE="my-vm")
    assert [found.name for found in ours.backend.all()] == [name]
    assert f"instances delete {gce_name(name)} --zone=us-central1-b" in ours.backend.by_hand(name)
    ended(theirs, name)


def test_a_kept_machine_has_the_gpus_that_it_has(cloud: Cloud, kept: GcpRig) -> None:
    """Settings that name none mean one L4, and this machine has none."""
    other = kept.client(VM_GPU="")
    other.create(f"{RUNS[0]}-2", other.offers()[0], kept.boot(RUNS[0], 2, 60.0))
    script = cloud.instance("my-vm").metadata["startup-script"]
    assert '"gpus": 0' in script
    ended(kept, f"{RUNS[0]}-2")


def test_what_cloudrun_did_not_make_is_never_touched(cloud: Cloud, kept: GcpRig) -> None:
    with cloud.clock.changed:
        cloud.instance("my-vm").body["labels"] = {"mine": "yes"}
    count = len([each for each in cloud.requests if each.verb != "GET"])
    with pytest.raises(CloudrunError, match="was not made by cloudrun"):
        kept.create(attempt=2)
    kept.backend.stop(f"{RUNS[0]}-1")
    assert len([each for each in cloud.requests if each.verb != "GET"]) == count


@pytest.mark.parametrize("settings", [{"VM_TYPE": "e2-standard-8"}, {"VM_GPU": "L4"}, {"VM_DISK": "200"}])
def test_another_machine_than_the_one_that_is_kept_is_refused(
    cloud: Cloud, kept: GcpRig, settings: dict[str, str]
) -> None:
    with pytest.raises(CloudrunError, match="gcloud compute instances delete my-vm --zone=us-central1-a"):
        kept.client(**settings).offers()


def test_a_kept_machine_whose_zone_is_sold_out_says_what_else_can_be_done(cloud: Cloud) -> None:
    rig = GcpRig(cloud, VM_INSTANCE="my-vm", VM_GPU="L4")
    ended(rig, rig.create())
    cloud.quotas.stock_out("us-central1-a", "g2-standard-4")
    with pytest.raises(NoCapacity, match="without VM_INSTANCE"):
        rig.create(attempt=2)
    end = see_ended(rig.backend, f"{RUNS[0]}-2", Patience(0, 20), layer="lease")
    assert end.started == end.ended and cloud.meter.running() == []


# --- whose credentials, which permissions


def test_what_is_not_allowed_is_said(cloud: Cloud) -> None:
    cloud.faults.denied.add(("*", "compute.instances.create"))
    with pytest.raises(CloudrunError, match="permission for"):
        GcpRig(cloud).create()


def test_the_command_by_hand_names_the_machine(cloud: Cloud) -> None:
    rig = GcpRig(cloud)
    name = rig.create()
    by_hand = rig.backend.by_hand(name)
    assert f"gcloud compute instances delete {gce_name(name)} --zone=us-central1-a --project=" in by_hand
    assert "https://console.cloud.google.com/compute/instancesDetail/zones/us-central1-a/" in by_hand
    ended(rig, name)


# --- disks that machines left


def leave(cloud: Cloud, vm: str) -> str:
    """Delete a machine as somebody does who keeps its disk, an hour ago."""
    with cloud.clock.changed:
        instance = cloud.instance(vm)
        instance.plan = instance.plan._replace(auto_delete=False)
        instance.disk.created -= 3600
        instance._remove()
    return vm


def test_a_disk_that_a_run_left_is_seen_with_its_price_and_can_be_ended(cloud: Cloud) -> None:
    rig = GcpRig(cloud)
    name = rig.create()
    ended(rig, rig.create(attempt=2))
    disk, client = leave(cloud, gce_name(name)), rig.client()
    assert client.all() == []
    found = client.survey()
    ((left,),) = (found.disks,)
    assert (left.name, left.run, left.leftover, left.kept) == (name, RUNS[0], True, False)
    assert disk in left.parked and "about 10.00 USD a month" in left.parked
    assert client.by_hand(name).startswith(f"gcloud compute disks delete {disk} --zone=us-central1-a")
    with cloud.clock.changed:
        cloud.meter.ended(disk)
    end = see_ended(client, name, Patience(0, 20), layer="sweep")
    assert end.name == name and cloud.meter.disks() == []
    assert client.survey().disks == []


def test_a_disk_in_use_or_just_made_or_somebody_elses_is_no_left_one(cloud: Cloud) -> None:
    rig = GcpRig(cloud)
    name = rig.create()
    with cloud.clock.changed:
        cloud.project.make_disk("us-central1-a", "theirs", "pd-balanced", 100, "", {"cloudrun-run": "x"})
        ours = {f"cloudrun-{word}": "1" for word in ("run", "attempt", "ends")}
        cloud.project.make_disk("us-central1-a", "new", "pd-balanced", 100, "", ours)
    assert rig.client().survey().disks == []
    ended(rig, name)


def test_a_disk_that_is_used_again_meanwhile_is_left_alone(cloud: Cloud) -> None:
    rig = GcpRig(cloud)
    disk, client = leave(cloud, gce_name(rig.create())), rig.client()
    ((left,),) = (client.survey().disks,)
    with cloud.clock.changed:
        cloud.project.disks["us-central1-a", disk].user = "somebody"
    assert client.find(left.name) is None
    client.stop(left.name)
    assert disk in cloud.meter.disks()
    with cloud.clock.changed:
        cloud.meter.ended(disk)


def test_a_kept_disk_is_named_and_never_deleted(cloud: Cloud, kept: GcpRig) -> None:
    leave(cloud, "my-vm")
    ((left,),) = (kept.client().survey().disks,)
    assert left.kept and not left.leftover and "my-vm" in left.parked
    kept.backend.survey()
    kept.backend.stop(left.name)
    assert cloud.meter.disks() == ["my-vm"]


def test_disks_that_may_not_be_listed_hide_no_machine(cloud: Cloud) -> None:
    rig = GcpRig(cloud)
    name = rig.create()
    cloud.faults.denied.add(("*", "compute.disks.list"))
    found = rig.client().survey()
    assert [each.name for each in found.ours] == [name] and "permission for" in found.unseen
    ended(rig, name)


# --- one machine of a name


@pytest.mark.parametrize("where", ["us-central1-a", "us-central1-b"])
@pytest.mark.parametrize("effect", [Empty(), Stale()])
def test_a_list_that_does_not_know_the_kept_machine_leads_to_no_second_one(
    cloud: Cloud, effect: Any, where: str
) -> None:
    rig = GcpRig(cloud, VM_INSTANCE="my-vm")
    offer = next(each for each in rig.backend.offers() if each.where == where)
    rig.backend.create(f"{RUNS[0]}-1", offer, rig.boot(RUNS[0], 1, 60.0))
    ended(rig, f"{RUNS[0]}-1")
    cloud.faults.on("instances.aggregatedList", effect, times=None)
    other = GcpRig(cloud, VM_INSTANCE="my-vm")
    name = other.create(run=RUNS[1])
    assert cloud.meter.running() == cloud.meter.disks() == ["my-vm"] and len(cloud.inserts()) == 1
    ended(other, name)
    assert len(cloud.meter.intervals("my-vm")) == 2


# --- when Google ended a machine


def agree(cloud: Cloud, end: Any, name: str) -> bool:
    return abs((end.ended - end.started) - cloud.meter.seconds(gce_name(name))) < 0.2


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("how", ["preempted", "limit", "deleted", "off"])
def test_the_bill_of_a_machine_that_is_gone_ends_when_google_ended_it(
    cloud: Cloud, how: str, seen: bool
) -> None:
    rig = GcpRig(cloud, VM_SPOT="1")
    name = rig.create()
    client = rig.backend if seen else rig.client()
    assert not seen or client.find(name)
    with cloud.clock.changed:
        instance = cloud.instance(gce_name(name))
        acts = {"preempted": instance.preempt, "limit": instance._reach_limit, "off": rig.power_off}
        acts.get(how, lambda: None)()
    if how == "off":
        cloud.wait(gce_name(name), "TERMINATED")
        time.sleep(0.5)
    if how in ("off", "deleted"):
        rig.client().stop(name)
    cloud.wait(gce_name(name), "GONE")
    time.sleep(0.5)
    end = see_ended(client, name, Patience(0, 20), layer="sweep")
    assert agree(cloud, end, name) and f"no {name}" in end.proof
    assert cloud.meter.running() == cloud.meter.disks() == []
