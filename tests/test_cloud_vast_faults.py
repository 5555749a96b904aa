"""What goes wrong at the emulated vast.ai, what it costs, and what it does by itself."""

import json
import time
from dataclasses import replace

import pytest
from cloud import vast_errors
from cloud.faults import Answer, LostReply, LostRequest, Slow
from cloud.vast import Vast
from cloud.vast_account import Instead, VastTiming
from vast_client import Client, need_client

HOUR, DAY = 3600.0, 86400.0


@pytest.fixture
def vast(tmp_path):
    need_client()
    with Vast(tmp_path, machines=False) as vast:
        yield vast
        vast.meter.check()
        assert vast.violations == []


@pytest.fixture
def client(vast):
    return Client(vast)


@pytest.fixture
def sdk(vast):
    from vastai import VastAI

    return VastAI(api_key=vast.key, server_url=vast.url, retry=1)


def slug(answer):
    status, body = answer
    return status, body["error"]


# --- faults


def test_a_lost_reply_leaves_an_instance_that_a_retry_does_not_find(vast, client):
    from requests.exceptions import ConnectionError as Lost

    offer = client.offers(disk_space={"gte": 20})[0]["id"]
    vast.faults.on("asks.create", LostRequest())
    with pytest.raises(Lost):
        client.create(offer)
    assert vast.meter.names() == []
    vast.faults.on("asks.create", LostReply())
    client.rest.retry = 3  # what the SDK does by default
    status, answer = client.create(offer)
    assert (status, answer["error"]) == (410, "no_such_ask")
    assert vast.meter.running() == vast.meter.names() != []


@pytest.mark.parametrize("done", [False, True])
def test_a_bad_gateway_before_or_after_the_effect(vast, client, done):
    vast.faults.on("asks.create", Answer(vast_errors.bad_gateway(), done=done))
    assert client.create(client.offers(disk_space={"gte": 20})[0]["id"])[0] == 502
    assert len(vast.meter.running()) == done


def test_a_destroy_that_is_answered_and_ignored(vast, client):
    number = client.run()
    vast.faults.on("instances.delete", Instead({"success": True}))
    assert client.delete(number) == (200, {"success": True})
    assert vast.meter.running() == [number] and client.get(number)["actual_status"] == "running"
    client.delete(number)
    vast.wait(number, "destroyed")


def test_a_destroy_that_hangs(vast, client):
    number = client.run()
    vast.faults.stuck.add(vast.instances[number].offer["machine_id"])
    client.delete(number)
    assert not vast.clock.wait_for(lambda: vast.instances[number].gone, 0.3)
    assert vast.meter.running() == [number]
    vast.faults.clear()
    vast.wait(number, "destroyed")


def test_a_burst_of_429(vast, client):
    number = client.run()
    vast.faults.on("instances.delete", Answer(vast_errors.too_many_requests(3.0)), times=2)
    assert [client.delete(number)[0] for _ in range(3)] == [429, 429, 200]
    vast.wait(number, "destroyed")


def test_a_slow_answer(vast, client):
    from requests.exceptions import Timeout

    vast.faults.on("users.current", Slow(5.0))
    client.rest.timeout = 0.2
    with pytest.raises(Timeout):
        client.call("get", "/users/current/")


def test_a_broken_host_and_one_that_loads_for_ever(vast, client):
    first, second = client.offers(disk_space={"gte": 20})[:2]
    vast.faults.broken[first["machine_id"]] = "Error response from daemon: OCI runtime create failed: x"
    vast.faults.stuck_loading.add(second["machine_id"])
    broken = client.create(first["id"])[1]["new_contract"]
    loading = client.create(second["id"])[1]["new_contract"]
    assert vast.clock.wait_for(lambda: "OCI" in (vast.instances[broken].message or ""), 5)
    vast.wait(loading, "loading")
    assert client.get(broken)["actual_status"] == "created"
    vast.clock.advance(HOUR)
    assert client.get(loading)["actual_status"] == "loading"
    assert vast.meter.gpu_seconds(loading) == vast.meter.gpu_seconds(broken) == 0
    assert vast.meter.running() == [broken, loading]


def test_outbid_and_back(vast, client):
    number = client.run(price=0.4)
    assert vast.clock.wait_for(lambda: vast.instances[number].starts == 1, 5)
    vast.outbid(number)
    vast.wait(number, "stopped")
    shown = client.get(number)
    assert {shown[name] for name in ("cur_state", "next_state", "intended_status")} == {"stopped"}
    gpu = vast.meter.gpu_seconds(number)
    vast.clock.advance(60)
    assert vast.meter.gpu_seconds(number) == gpu and vast.meter.running() == [number]
    vast.resume(number)
    vast.wait(number, "running")
    assert vast.clock.wait_for(lambda: vast.instances[number].starts == 2, 5)


def test_a_lost_host_costs_nothing_until_it_is_back(vast, client):
    number = client.run()
    vast.offline(number)
    vast.wait(number, "offline")
    assert vast.meter.running() == []
    before = vast.meter.cost(number)
    vast.clock.advance(HOUR)
    assert vast.meter.cost(number) == before
    vast.back(number)
    vast.wait(number, "running")
    assert vast.meter.running() == [number]
    vast.offline(number)
    client.delete(number)
    vast.wait(number, "destroyed")


# --- money


def test_the_meter_splits_what_was_used(vast, client):
    number = client.run(disk=100.0)
    offer = vast.instances[number].offer
    vast.clock.advance(10 * HOUR)
    vast.meter.traffic(number, up=2e9)
    client.delete(number)
    vast.wait(number, "destroyed")
    split = vast.meter.cost_split(number)
    assert split["gpu"] == pytest.approx(10 * offer["dph_base"], rel=1e-3)
    assert split["disk"] == pytest.approx(10 * offer["storage_cost"] * 100 / 720, rel=1e-3)
    assert split["traffic"] == pytest.approx(3 * offer["inet_down_cost"] + 2 * offer["inet_up_cost"])
    assert vast.meter.cost(number) == pytest.approx(sum(split.values()))
    assert vast.meter.seconds(number) == pytest.approx(10 * HOUR, abs=5)
    assert vast.credit == pytest.approx(25.0 - vast.meter.cost(number))


def test_charges_and_credit_say_what_the_meter_says(vast, client, sdk):
    number = client.run()
    vast.clock.advance(2 * HOUR)
    client.delete(number)
    vast.wait(number, "destroyed")
    now = int(vast.clock.now())
    found = sdk.show_invoices_v1(charges=True, start_date=now - 86400, end_date=now + 1)
    (row,) = found["results"]
    assert row["source"] == f"instance-{number}" and row["metadata"]["label"] == "toy"
    assert row["amount"] == pytest.approx(vast.meter.cost(number))
    assert {item["type"] for item in row["items"]} == {"gpu", "disk", "bwd", "bwu"}
    assert sdk.show_user()["credit"] == pytest.approx(25.0 - row["amount"])
    old = sdk.show_invoices_v1(charges=True, start_date=now - 200_000, end_date=now - 90_000)
    assert old["results"] == []
    assert client.call("get", "/charges/", select_filters="{}")[0] == 400


def test_without_credit_everything_stops_and_the_disks_go_on(vast, client):
    number = client.run()
    vast.credit = vast.market.rate() * HOUR
    vast.clock.advance(HOUR + 1)
    vast.wait(number, "exited")
    assert vast.meter.gpu_seconds(number) == pytest.approx(HOUR, abs=5)
    assert slug(client.put(number, state="running")) == (400, "missing_billing")
    vast.clock.advance(HOUR)
    assert vast.credit < 0 and vast.meter.running() == [number]


# --- what else there is


def test_ssh_keys_of_the_account_and_of_an_instance(vast, client, sdk):
    text = "ssh-ed25519 AAAA c"
    key = sdk.create_ssh_key(text)["key"]
    assert [each["public_key"] for each in sdk.show_ssh_keys()] == [text]
    number = client.rent()
    sdk.attach_ssh(number, "ssh-ed25519 BBBB d")
    _, found = client.call("get", f"/instances/{number}/ssh/")
    keys = json.loads(found["ssh_keys"])
    assert [each["public_key"] for each in keys] == [text, "ssh-ed25519 BBBB d"]
    sdk.detach_ssh(number, keys[1]["id"])
    assert client.call("delete", f"/instances/{number}/ssh/{keys[1]['id']}/")[0] == 404
    assert client.call("delete", f"/ssh/{key['id']}/")[0] == 200 and sdk.show_ssh_keys() == []
    assert client.call("post", "/ssh/", {"ssh_key": "no key"})[0] == 400


def next_hour(vast):
    return vast.clock.now() // HOUR * HOUR + HOUR


def schedule(vast, sdk, number, start, **fields):
    job = {
        "start_time": start,
        "end_time": start + 30 * DAY,
        "api_endpoint": f"/api/v0/instances/{number}/",
        "request_method": "DELETE",
        "request_body": {},
        "frequency": "HOURLY",
        "instance_id": number,
        **fields,
    }
    return sdk.create_scheduled_job(**job)["scheduled_job_id"]


def test_a_scheduled_destroy_comes_at_the_hour_that_holds_its_start(vast, client, sdk):
    number = client.run()
    vast.credit = 1000.0
    hour = next_hour(vast)
    job = schedule(vast, sdk, number, hour + HOUR + 22 * 60)
    assert [each["id"] for each in sdk.show_scheduled_jobs()] == [job]
    vast.clock.advance(hour - vast.clock.now() + 1)
    assert vast.fired == [] and not vast.instances[number].ending
    vast.clock.advance(HOUR)
    vast.wait(number, "destroyed")
    (fired,) = vast.fired
    assert fired[0] == job and fired[2] == 200 and fired[1] == pytest.approx(hour + HOUR)
    assert vast.requests[-1].key == "job"
    vast.clock.advance(HOUR)
    assert [status for _, _, status in vast.fired] == [200, 404]  # it goes on, and does no harm


def test_a_job_can_be_refused_changed_deleted_and_fired(vast, client, sdk):
    number = client.run()
    hour = next_hour(vast) + HOUR
    job = schedule(vast, sdk, number, hour)
    assert client.call("post", "/commands/schedule_job/", {**vast.jobs[job], "frequency": "X"})[0] == 400
    body = {name: value for name, value in vast.jobs[job].items() if name not in ("id", "user_id")}
    status, answer = client.call("post", "/commands/schedule_job/", body)
    assert status == 422 and answer["scheduled_job_id"] == job
    sdk.update_scheduled_job(job, {}, start_time=hour + 2 * HOUR)
    vast.clock.advance(2 * HOUR)
    assert vast.fired == []
    sdk.delete_scheduled_job(job)
    assert client.call("delete", f"/commands/schedule_job/{job}/")[0] == 404
    schedule(vast, sdk, number, hour + 20 * HOUR, frequency="DAILY", hour_of_the_day=3)
    vast.fire_jobs()
    vast.wait(number, "destroyed")
    vast.violations.clear()  # id, user_id and X of the first body


def test_a_place_in_another_time_runs_at_that_pace(tmp_path):
    """The clock is real time that can be moved; nothing waits for a real hour."""
    need_client()
    with Vast(tmp_path, machines=False, timing=replace(VastTiming.real(), throttle_scale=0.0)) as vast:
        start = time.monotonic()
        number = Client(vast).rent()
        vast.clock.advance(120)
        vast.wait(number, "running")
        assert vast.meter.gpu_seconds(number) == pytest.approx(50, abs=3)
        assert time.monotonic() - start < 60
