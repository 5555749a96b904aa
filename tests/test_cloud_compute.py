"""The emulated Compute Engine as the real client sees it. Its machines are tested in test_cloud_machines."""

import json
import urllib.error
import urllib.request
import uuid
from contextlib import suppress
from dataclasses import replace

import pytest
from cloud import discovery, errors, filters
from cloud.clock import seconds_of
from cloud.compute import Cloud
from cloud.faults import Answer, Empty, LostReply, LostRequest, Slow, Stale
from cloud.project import Timing
from gce import SCOPE, ZONE, Gce, key_file, need_client, user_credentials

HOUR = 3600.0


@pytest.fixture
def cloud(tmp_path):
    need_client()
    with Cloud(tmp_path, machines=False) as cloud:
        yield cloud
        cloud.meter.check()
        assert cloud.violations == []


@pytest.fixture
def gce(cloud):
    return Gce(cloud)


@pytest.fixture
def api():
    """The client library's own errors."""
    need_client()
    from google.api_core import exceptions

    return exceptions


def error_of(operation):
    return operation.http_error_status_code, operation.error.errors[0].code


# --- the life of an instance


def test_an_instance_runs_is_parked_runs_again_and_is_deleted(cloud, gce, api):
    operation = gce.insert("toy")
    assert operation.status == gce.v1.Operation.Status.RUNNING and operation.operation_type == "insert"
    assert gce.get("toy").status in ("PROVISIONING", "STAGING")
    assert gce.wait(operation).target_id == gce.get("toy").id
    assert gce.get("toy").status == "RUNNING" and cloud.meter.running() == ["toy"]
    first = gce.address("toy")
    assert first and gce.get("toy").last_start_timestamp

    gce.stop("toy")
    assert gce.get("toy").status == "TERMINATED" and cloud.meter.running() == []
    assert not gce.address("toy") and not gce.limit("toy") and gce.get("toy").last_stop_timestamp

    gce.start("toy")
    assert gce.get("toy").status == "RUNNING" and gce.address("toy") not in ("", first)
    assert cloud.meter.disks() == ["toy"]
    gce.delete("toy")
    with pytest.raises(api.NotFound):
        gce.get("toy")
    assert len(cloud.meter.intervals("toy")) == 2 and cloud.meter.disks() == []
    assert cloud.operations.kinds("toy") == ["insert", "stop", "start", "delete"]


def test_a_name_that_is_used_again_has_another_id(gce):
    first = gce.run("toy").id
    gce.delete("toy")
    assert gce.run("toy").id != first


def test_what_is_being_created_can_be_deleted(tmp_path, api):
    need_client()
    with Cloud(tmp_path, machines=False, timing=Timing(provisioning=60.0)) as cloud:
        gce = Gce(cloud)
        insert = gce.insert("toy")
        gce.delete("toy")
        assert error_of(gce.wait(insert)) == (404, "RESOURCE_NOT_FOUND")
        assert cloud.meter.intervals("toy") == [] and cloud.meter.disks() == []


def test_stop_and_start_are_repeatable_but_not_while_it_stops(cloud, gce, api):
    gce.run("toy")
    assert not gce.start("toy").error.errors  # it runs: nothing to do
    cloud.faults.stuck.add("toy")
    gce.vm("stop_unary", "toy")
    assert gce.get("toy").status == "STOPPING" and cloud.meter.running() == ["toy"]
    for method in ("start_unary", "stop_unary"):
        with pytest.raises(api.BadRequest) as caught:
            gce.vm(method, "toy")
        assert caught.value.errors[0]["reason"] == "resourceNotReady"
    cloud.faults.stuck.clear()
    cloud.wait("toy", "TERMINATED")
    assert not gce.stop("toy").error.errors


def test_delete_during_stop_deletes(cloud, gce):
    gce.run("toy")
    cloud.faults.stuck.add("toy")
    gce.vm("stop_unary", "toy")
    operation = gce.vm("delete_unary", "toy")
    cloud.faults.stuck.clear()
    gce.wait(operation)
    assert cloud.status("toy") == "GONE"


def test_deletion_protection(gce, api):
    gce.run("toy", deletion_protection=True)
    with pytest.raises(api.BadRequest, match="protected against deletion"):
        gce.vm("delete_unary", "toy")


def test_without_an_access_config_there_is_no_address(gce):
    network = gce.v1.NetworkInterface(network="global/networks/default")
    assert not gce.run("toy", network_interfaces=[network]).network_interfaces[0].access_configs


# --- what insert refuses


def scheduling(**fields):
    return lambda gce: {"scheduling": gce.v1.Scheduling(on_host_maintenance="TERMINATE", **fields)}


def disk(**fields):
    return lambda gce: {
        "disks": [
            gce.v1.AttachedDisk(
                boot=True,
                initialize_params=gce.v1.AttachedDiskInitializeParams(
                    **{"source_image": "projects/debian-cloud/global/images/family/debian-12", **fields}
                ),
            )
        ]
    }


REFUSED = {
    "bare type": (lambda gce: {"machine_type": "g2-standard-4"}, 400, "malformed"),
    "unknown type": (lambda gce: {"kind": "x9-standard-4"}, 400, "does not exist in zone"),
    "type of another zone": (lambda gce: {"kind": "a4-highgpu-8g"}, 400, "does not exist in zone"),
    "label": (lambda gce: {"labels": {"Key": "x"}}, 400, "Label key"),
    "label value": (lambda gce: {"labels": {"key": "X.Y"}}, 400, "Label value"),
    "no disk": (lambda gce: {"disks": []}, 400, "boot disk"),
    "small disk": (disk(disk_size_gb=5), 400, "smaller than the image"),
    "old family": (disk(source_image="projects/debian-cloud/global/images/family/debian-9"), 404, "debian-9"),
    "disk type": (disk(disk_type=f"zones/{ZONE}/diskTypes/pd-standard"), 400, "not compatible"),
    "no network": (lambda gce: {"network_interfaces": []}, 400, "network interface"),
    "network": (lambda gce: {"network_interfaces": [{"network": "global/networks/x"}]}, 404, "networks/x"),
    "migrating GPU": (lambda gce: {"scheduling": gce.v1.Scheduling()}, 400, "live migration"),
    "bare accelerator": (
        lambda gce: {
            "kind": "n1-standard-4",
            "guest_accelerators": [{"accelerator_type": "nvidia-tesla-t4", "accelerator_count": 1}],
        },
        400,
        "malformed",
    ),
    "accelerator of another count": (
        lambda gce: {
            "kind": "n1-standard-96",
            "guest_accelerators": [
                {"accelerator_type": f"zones/{ZONE}/acceleratorTypes/nvidia-tesla-t4", "accelerator_count": 1}
            ],
        },
        400,
        "not compatible",
    ),
    "on demand": (lambda gce: {"kind": "a3-highgpu-1g"}, 400, "provisioning model SPOT"),
    "limit without action": (
        scheduling(max_run_duration={"seconds": 600}),
        400,
        "instanceTerminationAction is required",
    ),
    "short limit": (
        scheduling(max_run_duration={"seconds": 29}, instance_termination_action="STOP"),
        400,
        "between 30",
    ),
    "long limit": (
        scheduling(max_run_duration={"seconds": 121 * 86400}, instance_termination_action="STOP"),
        400,
        "between 30",
    ),
    "two limits": (
        scheduling(
            max_run_duration={"seconds": 600},
            termination_time="2030-01-01T00:00:00Z",
            instance_termination_action="STOP",
        ),
        400,
        "Only one of",
    ),
    "action without limit": (scheduling(instance_termination_action="STOP"), 400, "only for SPOT"),
    "spot that restarts": (
        scheduling(provisioning_model="SPOT", automatic_restart=True),
        400,
        "AutomaticRestart",
    ),
    "discard without an SSD": (
        scheduling(
            max_run_duration={"seconds": 600},
            instance_termination_action="STOP",
            on_instance_stop_action={"discard_local_ssd": True},
        ),
        400,
        "with local SSD",
    ),
    "large metadata": (
        lambda gce: {"metadata": gce.metadata(startup_script="x" * 262145)},
        413,
        "maximum size 262144",
    ),
    "twice the same key": (
        lambda gce: {"metadata": {"items": [{"key": "a", "value": "1"}, {"key": "a", "value": "2"}]}},
        400,
        "duplicate",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_refused_leaves_nothing(cloud, gce, api, why):
    fields, code, words = REFUSED[why]
    with pytest.raises(api.GoogleAPICallError) as caught:
        gce.insert("toy", **fields(gce))
    assert caught.value.code == code and words in caught.value.message
    assert cloud.status("toy") == "GONE" and cloud.meter.disks() == []


def test_a_name_that_is_no_name_is_refused(cloud, gce, api):
    with pytest.raises(api.BadRequest, match=r"resource\.name"):
        gce.insert("Toy_1")
    assert "does not match" in cloud.violations.pop()


@pytest.mark.parametrize(
    ("kind", "gpu", "count"),
    [("g2-standard-24", "nvidia-l4", 2), ("n1-standard-4", "nvidia-tesla-t4", 2), ("n1-standard-4", "", 0)],
)
def test_gpus_come_with_the_type_or_beside_it(gce, kind, gpu, count):
    url = f"zones/{ZONE}/acceleratorTypes/{gpu}"
    beside = [{"accelerator_type": url, "accelerator_count": count}] if count and kind[0] == "n" else []
    found = gce.run("toy", kind=kind, guest_accelerators=beside).guest_accelerators
    assert [(each.accelerator_type.rpartition("/")[2], each.accelerator_count) for each in found] == (
        [(gpu, count)] if count else []
    )


def test_bundled_ssds_have_to_be_given_up_by_name(cloud, gce, api):
    given_up = gce.v1.SchedulingOnInstanceStopAction(discard_local_ssd=True)
    order = {"kind": "a3-highgpu-1g", "disks": disk(disk_size_gb=100)(gce)["disks"]}
    with pytest.raises(api.BadRequest, match="local SSD"):
        gce.insert("toy", scheduling=gce.scheduling(model="SPOT"), **order)
    gce.run("toy", scheduling=gce.scheduling(model="SPOT", on_instance_stop_action=given_up), **order)
    with pytest.raises(api.BadRequest, match="discard-local-ssd"):
        gce.vm("stop_unary", "toy")
    assert cloud.meter.running() == ["toy"]
    gce.stop("toy")
    assert cloud.meter.running() == []


def test_a_disk_of_the_same_name_is_attached_and_not_made_anew(cloud, gce, api):
    kept = gce.order("toy").disks
    kept[0].auto_delete = False
    gce.run("toy", disks=kept)
    gce.delete("toy")
    assert cloud.meter.disks() == ["toy"]
    disks = gce.client("Disks")
    assert gce.call(disks.get, zone=ZONE, disk="toy").size_gb == 100
    gce.run("toy")
    assert cloud.meter.disks() == ["toy"]
    with pytest.raises(api.BadRequest, match="already being used"):
        gce.call(disks.delete_unary, zone=ZONE, disk="toy")
    gce.delete("toy")
    assert [each.name for each in gce.call(disks.list, zone=ZONE)] == []


# --- the provider's own limit


@pytest.mark.parametrize(("action", "end"), [("STOP", "TERMINATED"), ("DELETE", "GONE")])
def test_the_limit_ends_it_without_anybody(cloud, gce, action, end):
    gce.run("toy", scheduling=gce.scheduling(HOUR, action))
    started = seconds_of(gce.get("toy").last_start_timestamp)
    assert seconds_of(gce.limit("toy")) == pytest.approx(started + HOUR, abs=0.01)
    cloud.clock.advance(HOUR - 60)
    assert cloud.status("toy") == "RUNNING"
    cloud.clock.advance(61)
    cloud.wait("toy", end)
    assert HOUR <= cloud.meter.seconds("toy") < HOUR + 60
    assert cloud.operations.kinds("toy") == ["insert", action.lower()]


def test_the_limit_counts_anew_from_each_start(cloud, gce):
    gce.run("toy", scheduling=gce.scheduling(HOUR))
    first = seconds_of(gce.limit("toy"))
    cloud.clock.advance(HOUR / 2)
    gce.stop("toy")
    cloud.clock.advance(HOUR)
    gce.start("toy")
    assert seconds_of(gce.limit("toy")) > first + HOUR
    cloud.clock.advance(HOUR / 2 + 60)
    assert cloud.status("toy") == "RUNNING"  # the first limit is over and does not count


def test_a_limit_can_be_a_time(cloud, gce):
    when = "2099-01-01T00:00:00+00:00"
    fields = {"termination_time": when, "instance_termination_action": "STOP"}
    gce.run("toy", **scheduling(**fields)(gce))
    assert seconds_of(gce.limit("toy")) == seconds_of(when)


def test_scheduling_is_set_only_while_terminated(cloud, gce, api):
    gce.run("toy")
    wanted = gce.scheduling(600)
    with pytest.raises(api.BadRequest, match="must be TERMINATED"):
        gce.vm("set_scheduling_unary", "toy", scheduling_resource=wanted)
    gce.stop("toy")
    gce.wait(gce.vm("set_scheduling_unary", "toy", scheduling_resource=wanted))
    gce.start("toy")
    left = seconds_of(gce.limit("toy")) - seconds_of(gce.get("toy").last_start_timestamp)
    assert left == pytest.approx(600, abs=0.01)


def test_a_minute_is_billed_per_start_and_nothing_for_an_early_preemption(cloud, gce):
    gce.run("toy", scheduling=gce.scheduling(model="SPOT"))
    gce.stop("toy")
    gce.start("toy")
    cloud.clock.advance(100)
    gce.stop("toy")
    assert cloud.meter.seconds("toy") == pytest.approx(100, abs=20)
    assert cloud.meter.billed("toy") == pytest.approx(160, abs=20)
    gce.run("early", scheduling=gce.scheduling(model="SPOT"))
    cloud.preempt("early")
    cloud.wait("early", "TERMINATED")
    assert cloud.meter.billed("early") == 0
    assert cloud.meter.disk_seconds("toy") >= 100 * 100


# --- capacity and quotas


def test_a_zone_without_stock_fails_in_the_operation_and_leaves_nothing(cloud, gce):
    cloud.quotas.stock_out(ZONE, "g2-*")
    done = gce.wait(gce.insert("toy"))
    assert error_of(done) == (503, "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS")
    details = done.error.errors[0].error_details
    assert details[0].error_info.metadatas["zone"] == ZONE
    assert "nvidia-l4" in details[1].localized_message.message
    assert cloud.status("toy") == "GONE" and cloud.meter.disks() == []
    Gce(cloud, zone="us-central1-b").run("toy")


def test_a_parked_instance_can_lack_stock_too_and_stays_parked(cloud, gce):
    gce.run("toy")
    gce.stop("toy")
    cloud.quotas.stock_out()
    assert error_of(gce.start("toy"))[0] == 503
    assert gce.get("toy").status == "TERMINATED" and "resources" in gce.get("toy").status_message
    assert cloud.meter.running() == [] and len(cloud.meter.intervals("toy")) == 1
    cloud.quotas.restock()
    assert not gce.start("toy").error.errors


def test_quotas_are_counted_over_what_runs(cloud, gce):
    cloud.quotas.limits = {("us-central1", "NVIDIA_L4_GPUS"): 1}
    gce.run("one")
    done = gce.wait(gce.insert("two"))
    assert error_of(done) == (403, "QUOTA_EXCEEDED")
    assert "'NVIDIA_L4_GPUS' exceeded.  Limit: 1.0 in region us-central1" in done.error.errors[0].message
    gce.run("spot", scheduling=gce.scheduling(model="SPOT"))  # has a quota of its own
    shown = {each.metric: each for each in gce.call(gce.client("Regions").get, region="us-central1").quotas}
    assert (shown["NVIDIA_L4_GPUS"].usage, shown["NVIDIA_L4_GPUS"].limit) == (1, 1)
    gce.stop("one")
    gce.run("two")


def test_a_new_project_has_no_gpus_anywhere(cloud, gce):
    cloud.quotas.limits = {"GPUS_ALL_REGIONS": 0}
    done = gce.wait(gce.insert("toy"))
    assert "'GPUS_ALL_REGIONS' exceeded.  Limit: 0.0 globally." in done.error.errors[0].message
    assert done.error.errors[0].error_details[0].quota_info.limit_name == "GPUS_ALL_REGIONS"
    project = gce.call(gce.client("Projects").get)
    assert [(each.metric, each.limit) for each in project.quotas] == [("GPUS_ALL_REGIONS", 0)]
    gce.run("cpu", kind="n1-standard-4")


# --- fingerprints, request ids


def test_labels_change_only_for_who_has_seen_the_last_ones(gce, api):
    seen = gce.run("toy").label_fingerprint

    def relabel(fingerprint, **labels):
        body = gce.v1.InstancesSetLabelsRequest(label_fingerprint=fingerprint, labels=labels)
        return gce.vm("set_labels_unary", "toy", instances_set_labels_request_resource=body)

    gce.wait(relabel(seen, mine="yes"))
    assert dict(gce.get("toy").labels) == {"mine": "yes"}
    for stale in (seen, ""):
        with pytest.raises(api.PreconditionFailed) as caught:
            relabel(stale, mine="no")
        assert caught.value.errors[0]["reason"] == "conditionNotMet"
    assert dict(gce.get("toy").labels) == {"mine": "yes"}


def test_metadata_is_replaced_only_by_who_has_seen_the_last(gce, api):
    seen = gce.run("toy").metadata.fingerprint
    new = gce.metadata(one="1")
    new.fingerprint = seen
    gce.wait(gce.vm("set_metadata_unary", "toy", metadata_resource=new))
    assert [item.key for item in gce.get("toy").metadata.items] == ["one"]
    with pytest.raises(api.PreconditionFailed):
        gce.vm("set_metadata_unary", "toy", metadata_resource=new)


def test_the_same_request_id_is_the_same_request(cloud, gce, api):
    mark = str(uuid.uuid4())
    first = gce.insert("toy", request_id=mark)
    assert gce.insert("toy", request_id=mark).name == first.name
    assert gce.wait(first).client_operation_id == mark
    with pytest.raises(api.Conflict) as caught:
        gce.insert("toy")
    assert caught.value.errors[0]["reason"] == "alreadyExists"
    with pytest.raises(api.BadRequest, match="requestId"):
        gce.insert("other", request_id=str(uuid.UUID(int=0)))
    assert cloud.operations.kinds() == ["insert"]


# --- lists, filters, pages


def test_lists_are_filtered_and_paged(gce):
    for name, run in (("a1", "x"), ("a2", "x"), ("b1", "y")):
        gce.run(name, kind="n1-standard-4", labels={"cloudrun-run": run, "attempt": name[1]})
    gce.stop("a2")
    found = {
        "labels.cloudrun-run=x": ["a1", "a2"],
        "labels.cloudrun-run=x AND status=RUNNING": ["a1"],
        "(labels.cloudrun-run=x) (status != TERMINATED)": ["a1"],
        "labels.attempt:* AND NOT name=a1": ["a2", "b1"],
        'status = "TERMINATED" OR labels.cloudrun-run = y': ["a2", "b1"],
        "name=a*": ["a1", "a2"],
        "name eq a.*": ["a1", "a2"],
        "name ne a.*": ["b1"],
        "labels.nothing=1": [],
    }
    assert {text: gce.list(text) for text in found} == found
    assert gce.list(max_results=1) == ["a1", "a2", "b1"]
    sizes = [len(page.items) for page in gce.call(gce.instances.list, zone=ZONE, max_results=2).pages]
    assert sizes == [2, 1]


def test_a_filter_that_is_none_is_refused(gce, api):
    with pytest.raises(api.BadRequest, match="Invalid list filter expression"):
        gce.list("labels.cloudrun-run=")


def test_all_zones_at_once(cloud, gce):
    gce.run("here", kind="n1-standard-4")
    Gce(cloud, zone="europe-west4-a").run("there", kind="n1-standard-4")
    pager = gce.call(gce.instances.aggregated_list, filter="labels.cloudrun-run:*", max_results=1)
    found = {zone: [each.name for each in scoped.instances] for zone, scoped in pager if scoped.instances}
    assert found == {"zones/us-central1-a": ["here"], "zones/europe-west4-a": ["there"]}


def test_filters_by_themselves():
    item = {"n": 5, "on": True, "labels": {"a.b": "x"}, "list": [{"k": "v"}, {"k": "w"}], "at": "2026-01-02"}
    for text in (
        *(
            "n>4",
            "n<=5",
            "on=true",
            "list.k=w",
            "at>2026-01-01",
            "NOT n<5",
            "n:5",
            "(n=1 OR n=5) AND on=true",
        ),
        *("n=1 OR n=5", 'at="2026-01-02"', "n!=4", "(n>4) AND (n<6)"),
    ):
        assert filters.compile_filter(text)(item), text
    for text in ("n=4", "missing=1", "list.k=z", "n=5 AND on=false", "missing:*"):
        assert not filters.compile_filter(text)(item), text
    for text in ("n", "(n=5", "n=5)", "=5", "n=5 AND", "OR n=5"):
        with pytest.raises(ValueError):
            filters.compile_filter(text)


def test_operations_are_found_by_kind_and_target(cloud, gce, api):
    mine = gce.run("toy", scheduling=gce.scheduling(model="SPOT")).id
    gce.run("other", scheduling=gce.scheduling(model="SPOT"))
    gce.vm("simulate_maintenance_event_unary", "toy")
    cloud.wait("toy", "TERMINATED")
    text = f'operationType="compute.instances.preempted" AND targetId={mine}'
    found = list(gce.call(gce.operations.list, zone=ZONE, filter=text))
    assert [each.status_message for each in found] == ["Instance was preempted."]
    with pytest.raises(api.NotFound):
        gce.call(gce.operations.get, zone=ZONE, operation="operation-1")
    for name, place in (("GlobalOperations", {}), ("RegionOperations", {"region": "us-central1"})):
        with pytest.raises(api.NotFound):
            gce.call(gce.client(name).get, operation=found[0].name, **place)


def test_wait_blocks_only_for_a_while(tmp_path):
    need_client()
    with Cloud(tmp_path, machines=False, timing=Timing(provisioning=60.0, wait=0.05)) as cloud:
        gce = Gce(cloud)
        operation = gce.insert("toy")
        seen = gce.call(gce.operations.wait, zone=ZONE, operation=operation.name)
        assert seen.status == gce.v1.Operation.Status.RUNNING
        cloud.clock.advance(61)
        assert gce.wait(operation).name == operation.name


def test_the_catalogue(gce, api):
    kind = gce.call(gce.client("MachineTypes").get, zone=ZONE, machine_type="g2-standard-24")
    assert (kind.guest_cpus, kind.accelerators[0].guest_accelerator_count) == (24, 2)
    gpus = {each.name for each in gce.call(gce.client("AcceleratorTypes").list, zone=ZONE)}
    assert {"nvidia-l4", "nvidia-tesla-t4"} <= gpus and "nvidia-b200" not in gpus
    images = gce.client("Images")
    owner = "deeplearning-platform-release"
    family = "common-cu129-ubuntu-2204-nvidia-580"
    found = images.get_from_family({"project": owner, "family": family}, timeout=20, retry=None)
    assert found.name.startswith(family) and found.disk_size_gb == 50
    assert images.get({"project": owner, "image": found.name}, timeout=20, retry=None).family == family
    with pytest.raises(api.NotFound):
        images.get_from_family({"project": owner, "family": "common-gpu"}, timeout=20, retry=None)
    assert ZONE in [each.name for each in gce.call(gce.client("Zones").list)]
    assert gce.call(gce.client("Regions").get, region="us-central1").status == "UP"
    assert gce.call(gce.client("Networks").get, network="default").name == "default"
    assert gce.call(gce.client("DiskTypes").get, zone=ZONE, disk_type="pd-balanced").name == "pd-balanced"
    subnet = gce.call(gce.client("Subnetworks").get, region="us-central1", subnetwork="default")
    assert subnet.region.endswith("us-central1")
    with pytest.raises(api.NotFound):
        gce.call(gce.client("Zones").get, zone="mars-north1-a")


# --- faults


def test_a_lost_reply_leaves_a_machine_and_a_lost_request_none(cloud, gce, api):
    from requests.exceptions import ConnectionError

    for name, fault, left in (("lost", LostRequest(), "GONE"), ("made", LostReply(), "RUNNING")):
        rule = cloud.faults.on("instances.insert", fault)
        with pytest.raises(ConnectionError):
            gce.insert(name)
        assert rule.fired == 1
        cloud.wait(name, left)
    assert cloud.meter.running() == ["made"]


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (errors.backend_error(), "ServiceUnavailable", "backendError"),
        (errors.backend_error(502), "BadGateway", None),
        (errors.backend_error(500), "InternalServerError", "internalError"),
        (errors.rate_limited(429), "TooManyRequests", "RATE_LIMIT_EXCEEDED"),
        (errors.rate_limited(), "Forbidden", "rateLimitExceeded"),
        (errors.quota_exceeded("CPUS", 8, "in region us-central1"), "Forbidden", "quotaExceeded"),
        (errors.api_disabled("test-project"), "Forbidden", "accessNotConfigured"),
    ],
)
def test_errors_are_what_the_client_makes_of_the_real_ones(cloud, gce, api, error, kind, reason):
    cloud.faults.on("instances.*", Answer(error), nth=2)
    gce.list()
    with pytest.raises(getattr(api, kind)) as caught:
        gce.list()
    assert reason is None or caught.value.errors[0]["reason"] == reason
    assert (caught.value.reason == "SERVICE_DISABLED") == (reason == "accessNotConfigured")
    gce.list()


def test_an_insert_can_answer_an_error_and_leave_a_machine(cloud, gce, api):
    cloud.faults.on("instances.insert", Answer(errors.backend_error(), done=True))
    with pytest.raises(api.ServiceUnavailable):
        gce.insert("toy")
    cloud.wait("toy", "RUNNING")
    assert cloud.meter.running() == ["toy"]


def test_an_instance_can_appear_late(cloud, gce, api):
    cloud.faults.appear_after["toy"] = 60.0
    gce.wait(gce.insert("toy"))
    assert gce.list() == [] and cloud.meter.running() == ["toy"]
    with pytest.raises(api.NotFound):
        gce.get("toy")
    cloud.clock.advance(61)
    assert gce.list() == ["toy"] and gce.get("toy").status == "RUNNING"


def test_reads_can_be_stale_empty_and_slow(cloud, gce):
    gce.run("toy")
    assert gce.get("toy").status == "RUNNING"
    gce.stop("toy")
    cloud.faults.on("instances.get", Stale(), times=2)
    assert [gce.get("toy").status for _ in range(3)] == ["RUNNING", "RUNNING", "TERMINATED"]
    cloud.faults.on("instances.list", Empty())
    assert (gce.list(), gce.list()) == ([], ["toy"])
    cloud.faults.on("instances.get", Slow(0.01), when=lambda request: request.path["instance"] == "toy")
    assert gce.get("toy").status == "TERMINATED"


def test_a_stop_can_be_refused_once(cloud, gce, api):
    gce.run("toy")
    cloud.faults.on("instances.stop", Answer(errors.not_ready("toy")))
    with pytest.raises(api.BadRequest):
        gce.stop("toy")
    assert cloud.meter.running() == ["toy"]
    gce.stop("toy")
    assert cloud.meter.running() == []


def test_every_request_is_kept(cloud, gce):
    gce.run("one", scheduling=gce.scheduling(600))
    gce.run("two", scheduling=gce.scheduling(HOUR))
    limits = [each.body["scheduling"]["maxRunDuration"]["seconds"] for each in cloud.inserts()]
    assert limits == ["600", "3600"] and all(each.query["requestId"] for each in cloud.inserts())
    assert {each.method for each in cloud.requests} >= {"instances.insert", "zoneOperations.wait"}
    assert all(each.status == 200 for each in cloud.requests)


# --- who asks


ROBOT = "robot@test-project.iam.gserviceaccount.com"


def test_credentials_of_a_user_from_the_token_server(cloud):
    from google.auth.exceptions import InvalidOperation, RefreshError

    cloud.faults.anonymous = False
    gce = Gce(cloud, user_credentials(cloud))
    gce.run("toy")
    assert {each.user for each in cloud.requests} == {"user@example.com"}
    with pytest.raises(InvalidOperation):  # what the client makes of a 401 without credentials
        Gce(cloud).list()
    cloud.tokens.expire()
    assert gce.list() == ["toy"]  # google-auth asks for another token after a 401
    cloud.logins.dead.add("user@example.com")
    cloud.tokens.expire()
    with pytest.raises(RefreshError, match="expired or revoked"):
        gce.list()


def test_a_service_account_is_impersonated(cloud, api):
    from google.auth import exceptions, impersonated_credentials

    endpoint = f"{cloud.token_url}/v1/projects/-/serviceAccounts/{ROBOT}:generateAccessToken"
    credentials = impersonated_credentials.Credentials(
        user_credentials(cloud), ROBOT, [SCOPE], iam_endpoint_override=endpoint
    )
    gce = Gce(cloud, credentials)
    gce.list()
    assert cloud.requests[-1].user == ROBOT
    with urllib.request.urlopen(f"{cloud.token_url}/tokeninfo?access_token={credentials.token}") as answer:
        assert json.load(answer)["email"] == ROBOT
    cloud.logins.dead.add(ROBOT)
    cloud.tokens.expire()
    with pytest.raises(exceptions.RefreshError):
        gce.list()


def test_a_service_account_with_a_key(cloud, tmp_path):
    from google.auth.transport.requests import Request
    from google.oauth2 import service_account

    path = key_file(cloud, tmp_path / "key.json", ROBOT)
    credentials = service_account.Credentials.from_service_account_file(str(path), scopes=[SCOPE])
    Gce(cloud, credentials).list()  # with a token that it signed itself
    assert cloud.requests[-1].user == ROBOT and cloud.logins.calls == []
    credentials.refresh(Request())  # what google-cloud-storage does
    assert cloud.tokens.valid(credentials.token).principal == ROBOT and len(cloud.logins.calls) == 1


def test_a_permission_can_be_missing(cloud, gce, api):
    cloud.faults.denied.add(("*", "compute.instances.create"))
    with pytest.raises(api.Forbidden, match=r"Required 'compute\.instances\.create' permission"):
        gce.insert("toy")
    assert gce.list() == []


# --- the discovery document


def post(cloud, path, body):
    request = urllib.request.Request(
        cloud.compute_url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    with caught.value:
        return caught.value.code, caught.value.read().decode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lables": {}}, "lables: unknown field"),
        ({"scheduling": {"provisioningModel": "CHEAP"}}, "'CHEAP' is not one of"),
        ({"scheduling": {"maxRunDuration": {"seconds": 60}}}, "60 is no string"),
        ({"deletionProtection": "yes"}, "'yes' is no boolean"),
        ({"disks": {}}, "is no list"),
        ({"guestAccelerators": [{"acceleratorCount": "1"}]}, "'1' is no integer"),
        ({"metadata": {"fingerprint": "?"}}, "is not base64"),
    ],
)
def test_a_body_that_google_does_not_describe_is_a_violation(cloud, change, words):
    code, text = post(cloud, f"projects/test-project/zones/{ZONE}/instances", {"name": "toy", **change})
    assert code == 400 and words in text and words in cloud.violations.pop()


def test_parameters_are_held_against_the_document_too(cloud):
    for path, words in (
        (f"zones/{ZONE}/instances?paeg=1", "unknown parameter 'paeg'"),
        (f"zones/{ZONE}/instances?maxResults=x", "is no integer"),
        (f"zones/{ZONE}/instances/UPPER", "does not match"),
    ):
        with (
            pytest.raises(urllib.error.HTTPError),
            urllib.request.urlopen(f"{cloud.compute_url}projects/test-project/{path}"),
        ):
            pass
        assert words in cloud.violations.pop()
    with pytest.raises(urllib.error.HTTPError), urllib.request.urlopen(f"{cloud.compute_url}projects"):
        pass
    assert "no method" in cloud.violations.pop()


def test_answers_are_held_against_the_document():
    need_client()
    method, _ = discovery.route("GET", ["projects", "p", "zones", ZONE, "instances", "i"])
    assert method.name == "instances.get" and discovery.response_problems(method, {"name": "i"}) == []
    assert discovery.response_problems(method, {"id": 5, "status": "ASLEEP"}) != []


# --- the clock


def test_the_clock_fires_in_order_and_each_at_its_time(cloud):
    seen, start = [], cloud.clock.now()
    for seconds in (30, 10, 20, 99):
        cloud.clock.after(seconds, lambda name: seen.append((name, cloud.clock.now() - start)), seconds)
    cloud.clock.advance(60)
    assert [name for name, _ in seen] == [10, 20, 30]
    assert all(name <= when < name + 5 for name, when in seen)


def test_real_times_can_be_had(tmp_path):
    timing = replace(Timing.real(), boot=20.0)
    assert timing.guest_spot == 30.0 and timing.guest_standard == 120.0
    with Cloud(tmp_path, machines=False, timing=timing) as cloud, suppress(AssertionError):
        cloud.wait("nothing", "RUNNING", seconds=0.01)
