"""The emulated vast.ai as the real client sees it. Its containers are tested in test_cloud_containers."""

import json
import urllib.error
import urllib.request

import pytest
from cloud import vast_errors, vast_offers
from cloud.faults import Answer, Stale
from cloud.vast import Vast
from cloud.vast_account import NOTHING_RUNS, VastTiming
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


# --- the life of an instance


def test_an_instance_comes_up_is_destroyed_and_gone(vast, client):
    number = client.run()
    assert [status for _, status in vast.instances[number].history] == [None, "created", "loading", "running"]
    assert vast.meter.running() == [number] and client.get(number)["actual_status"] == "running"
    assert client.delete(number) == (200, {"success": True})
    vast.wait(number, "destroyed")
    assert client.get(number) is None and vast.meter.running() == []
    assert slug(client.delete(number)) == (404, "no_such_instance")
    assert slug(client.put(number, state="stopped")) == (404, "no_such_instance")


def test_ssh_and_its_port_appear_late(tmp_path):
    need_client()
    slow = VastTiming(provisioning=60.0, pull=60.0, boot=60.0)
    with Vast(tmp_path, machines=False, timing=slow) as vast:
        client = Client(vast)
        number, seen = client.rent(), []
        for _ in range(7):
            shown = client.get(number)
            seen.append((shown["actual_status"], bool(shown["ports"]), bool(shown["ssh_host"])))
            vast.clock.advance(30.0)
        assert seen == [
            (None, False, False),
            ("created", False, False),
            ("loading", False, False),
            ("loading", False, False),
            ("running", False, False),
            ("running", False, False),
            ("running", True, True),
        ]
        assert shown["ports"]["22/tcp"][0]["HostPort"] == str(vast.instances[number].port)
        assert shown["public_ipaddr"].strip() != shown["public_ipaddr"]


def test_stop_parks_and_only_destroy_ends_the_bill(vast, client):
    number = client.run()
    assert client.put(number, state="stopped") == (200, {"success": True})
    vast.wait(number, "exited")
    shown = client.get(number)
    assert {shown[name] for name in ("cur_state", "next_state", "intended_status")} == {"stopped"}
    gpu = vast.meter.gpu_seconds(number)
    vast.clock.advance(HOUR)
    assert vast.meter.gpu_seconds(number) == gpu and vast.meter.disk_seconds(number) > HOUR
    assert vast.meter.running() == [number]
    client.put(number, state="running")
    vast.wait(number, "running")
    assert vast.meter.accounts[number].down == vast.market.image_bytes  # pulled once


def test_a_start_during_a_stop_comes_after_it(vast, client):
    number = client.run()
    client.put(number, state="stopped")
    client.put(number, state="running")
    assert vast.clock.wait_for(lambda: len(vast.instances[number].history) == 7, 5)
    statuses = [status for _, status in vast.instances[number].history]
    assert statuses[3:] == ["running", "exited", "loading", "running"]
    assert client.get(number)["intended_status"] == "running"


def test_an_id_is_never_used_again_and_the_machine_is_offered_anew(vast, client):
    first = client.run()
    offer = vast.instances[first].offer
    client.delete(first)
    vast.wait(first, "destroyed")
    again = client.offers(machine_id={"eq": offer["machine_id"]}, disk_space={"gte": 20})
    assert again and offer["id"] not in [each["id"] for each in again]
    assert client.run() != first


def test_many_are_destroyed_at_once(vast, sdk, client):
    numbers = [client.run(), client.run()]
    assert sdk.destroy_instances(numbers)["success"]
    for number in numbers:
        vast.wait(number, "destroyed")
    assert vast.meter.running() == []


def test_a_label_can_be_changed(vast, client, sdk):
    number = client.rent()
    sdk.label_instance(number, "other")
    assert client.get(number)["label"] == "other"
    assert slug(client.put(number, label="x" * 1025)) == (400, "label_too_long")


def test_the_rental_ends_at_its_date_and_is_removed_two_days_later(vast, client):
    number = client.run(label="short")
    contract = vast.instances[number]
    vast.credit = 10_000.0
    vast.clock.advance(contract.end_date - vast.clock.now() + 1)
    vast.wait(number, "exited")
    assert client.put(number, state="running")[1]["success"] is False
    vast.clock.advance(49 * HOUR)
    vast.wait(number, "destroyed")


# --- keys and addresses


def test_a_wrong_key_is_refused_as_401_or_404(vast, client):
    for status in (401, 404):
        vast.faults.bad_key = status
        assert slug(Client(vast, "wrong").call("get", "/users/current/")) == (status, "auth_error")
    assert vast.requests[-1].key == "unknown 'wrong'"


def test_no_key_is_no_access(vast):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{vast.url}/api/v1/instances/")
    with urllib.request.urlopen(f"{vast.url}/api/v0/gpu_names/unique/") as answer:
        assert "RTX 4090" in json.load(answer)["gpu_names"]


def test_a_containers_key_is_good_for_itself_only(vast, client):
    first, second = client.run(), client.run()
    inside = Client(vast, vast.instances[first].key)
    assert inside.get(first)["id"] == first
    assert inside.put(first, label="mine")[0] == 200
    for answer in (
        inside.delete(second),
        inside.call("get", f"/instances/{second}/"),
        inside.call("get", "/api/v1/instances/"),
        inside.call("get", "/users/current/"),
        inside.call("post", "/bundles/"),
        inside.create(vast.offers[-1]["id"]),
    ):
        assert slug(answer) == (403, "forbidden")
    assert inside.delete(first)[0] == 200
    vast.wait(first, "destroyed")
    assert slug(inside.delete(first)) == (401, "auth_error")
    assert vast.meter.running() == [second]


def test_what_the_service_would_not_take_is_kept(tmp_path):
    need_client()
    with Vast(tmp_path, machines=False) as vast:
        client = Client(vast)
        offer = client.offers()[-1]["id"]
        wrong = (
            {"lable": "x"},
            {"image": "vastai/pytorch"},
            {"disk": 7},
            {"disk": "20"},
            {"cancel_unavail": "yes"},
            {"env": {"A": 1}},
            {"env": "-e A=b"},
            {"onstart": "x" * 4097},
            {"label": "x" * 257},
            {"runtype": "direct"},
            {"price": 200},
        )
        for fields in wrong:
            assert slug(client.create(offer, **fields)) == (400, "invalid_args"), fields
        assert slug(client.call("post", "/bundles/", {"gpu": {"eq": "T4"}})) == (400, "invalid_args")
        assert slug(client.call("post", "/bundles/", {"gpu_name": "T4"})) == (400, "invalid_args")
        assert len(vast.violations) == len(wrong) + 2 and vast.meter.names() == []
        assert client.call("get", "/instances/1") == (200, {"instances": None})
        assert "no slash" in vast.violations[-1]
        assert client.call("get", "/nothing/")[0] == 404
        assert Client(vast, "wrong").call("get", "/users/current/", api_key=vast.key)[0] == 401
        assert "a key in the address" in vast.violations[-1]
        assert client.call("put", "/instances/command/1/", {})[0] == 400
        assert "command is missing" in vast.violations[-1]


def test_calls_that_come_too_often_are_refused_in_plain_text(tmp_path):
    need_client()
    with Vast(tmp_path, machines=False, timing=VastTiming(throttle_scale=1.0)) as vast:
        client = Client(vast)
        number = client.rent()
        assert client.delete(number + 7)[0] == 404
        status, text = client.delete(number)
        assert status == 429 and "threshold=3.0" in text and vast.meter.running() == [number]
        assert Client(vast, vast.instances[number].key).delete(number)[0] == 200  # another identity
        vast.clock.advance(3.0)
        assert client.delete(number)[0] in (200, 404)
        codes = [client.call("post", "/bundles/", {})[0] for _ in range(11)]
        assert 429 in codes and codes.count(200) == 9  # with the one of `rent`, ten a minute
        vast.clock.advance(60.0)
        assert client.call("post", "/bundles/", {})[0] == 200


# --- offers


def test_offers_are_filtered_sorted_and_priced_with_their_disk(vast, sdk):
    found = sdk.search_offers(
        "gpu_name=RTX_4090 num_gpus=1 gpu_ram>=20 disk_space>=50 reliability>0.9",
        order="dph_total",
        limit=20,
        storage=50,
    )
    prices = [each["dph_total"] for each in found]
    assert len(found) > 4 and prices == sorted(prices)
    for each in found:
        assert each["dph_total"] == pytest.approx(each["dph_base"] + each["storage_cost"] * 50 / 720)
        assert each["verification"] == "verified" and each["rentable"] and each["num_gpus"] == 1
    assert vast.requests[-1].body["disk_space"] == {"gte": "50"}  # and it is coerced


@pytest.mark.parametrize(
    "field, bound",
    [
        ("verified", {"eq": True}),
        ("reliability2", {"gte": 0.9}),
        ("inet_down_cost", {"lte": 0.02}),
        ("duration", {"gte": DAY}),
        ("cuda_max_good", {"gte": "12.0"}),
        ("disk_space", {"gte": 50}),
        ("cpu_arch", {"in": ["amd64"]}),
        ("inet_down", {"gt": 100}),
        ("rentable", {"eq": True}),
        ("datacenter", {"eq": True}),
        ("geolocation", {"notin": ["VN"]}),
    ],
)
def test_each_filter_leaves_something_out_unless_it_is_ignored(vast, client, field, bound):
    everything = client.call("post", "/bundles/", {})[1]["offers"]
    assert len(everything) == len(vast.offers)
    assert 0 < len(client.call("post", "/bundles/", {field: bound})[1]["offers"]) < len(everything)
    vast.faults.unfiltered.add(field)
    assert len(client.call("post", "/bundles/", {field: bound})[1]["offers"]) == len(everything)


def test_a_search_answers_64_offers_at_most(vast, client):
    vast.offers = [vast_offers.offer(number) for number in range(1, 101)]
    assert len(client.offers(limit=500)) == 64 and len(client.offers(limit=3)) == 3


def test_a_bid_search_shows_the_least_bid(vast, client):
    (bid,) = client.offers(type="bid", id={"eq": 7_100_013})
    assert bid["is_bid"] and bid["dph_base"] == 0.31
    assert bid["search"]["gpuCostPerHour"] == bid["min_bid"]


def test_the_searches_of_a_day_can_be_used_up(vast, client):
    vast.faults.on("bundles.search", Answer(vast_errors.search_quota_exceeded(1_800_000_000)))
    assert slug(client.call("post", "/bundles/", {})) == (429, "search_quota_exceeded")


# --- renting


def test_an_offer_is_let_once(vast, client):
    offer = client.offers(disk_space={"gte": 20})[0]["id"]
    status, answer = client.create(offer)
    assert status == 200 and set(answer) == {"success", "new_contract", "ask_id", "instance_api_key"}
    for code in (410, 404, 400):
        vast.faults.taken_status = code
        assert slug(client.create(offer)) == (code, "no_such_ask")
    assert slug(client.create(1)) == (400, "no_such_ask")
    assert len(vast.instances) == 1


def test_the_sdk_itself_rents(vast, sdk):
    offer = sdk.search_offers("disk_space>=40", limit=1)[0]["id"]
    env = {"A": "b", "-h named": "1"}
    order = {"image": "a/b:c", "disk": 40, "label": "x", "env": env, "onstart_cmd": "true"}
    number = sdk.create_instance(offer, ssh=True, direct=True, cancel_unavail=True, **order)["new_contract"]
    shown = sdk.show_instance(number)
    assert shown["extra_env"] == env and shown["label"] == "x" and shown["onstart"] == "true"
    assert [row["id"] for row in sdk.show_instances()] == [number]
    assert sdk.stop_instance(number)["success"] and sdk.destroy_instance(number)["success"]
    vast.wait(number, "destroyed")
    assert sdk.show_instance(number) is None


def test_a_machine_that_is_taken_refuses_or_parks(vast, client):
    """With cancel_unavail nothing is made; without, a stopped instance is, and its disk is billed."""
    offer = client.offers(disk_space={"gte": 20})[0]
    vast.faults.taken.add(offer["machine_id"])
    assert slug(client.create(offer["id"])) == (410, "no_such_ask") and vast.meter.names() == []
    status, answer = client.create(offer["id"], cancel_unavail=False)
    assert status == 200 and answer["success"] is False
    number = answer["new_contract"]
    shown = client.get(number)
    assert shown["actual_status"] == "created" and shown["intended_status"] == "stopped"
    assert vast.meter.running() == [number] and vast.meter.gpu_seconds(number) == 0
    vast.faults.taken.clear()
    vast.resume(number)
    vast.wait(number, "running")


def test_a_bid_below_the_least_one_waits(vast, client):
    offer = client.offers(type="bid", id={"eq": 7_100_013})[0]
    _, answer = client.create(offer["id"], price=0.01, cancel_unavail=False)
    assert answer["success"] is False and client.get(answer["new_contract"])["is_bid"]
    good = client.run(price=0.33)
    assert client.get(good)["dph_base"] == 0.33
    assert client.call("put", f"/instances/bid_price/{good}/", {"client_id": "me", "price": 0.4})[0] == 200
    assert client.get(good)["dph_base"] == 0.4


def test_a_start_whose_gpu_is_taken_is_queued(vast, client):
    number = client.run()
    client.put(number, state="stopped")
    contract = vast.wait(number, "exited")
    vast.faults.taken.add(contract.offer["machine_id"])
    assert slug(client.put(number, state="running")) == (200, "resources_unavailable")
    assert contract.queued
    client.put(number, state="stopped")
    assert not contract.queued


def test_an_account_without_credit_or_with_a_limit_rents_nothing(vast, client):
    offer = client.offers(disk_space={"gte": 20})[0]["id"]
    vast.faults.spend_limit = True
    assert slug(client.create(offer)) == (400, "spend_rate_limit")
    vast.credit = 0.0
    assert slug(client.create(offer)) == (400, "insufficient_credit")
    assert vast.meter.names() == []


# --- lists


def test_the_old_list_is_gone(client):
    assert slug(client.call("get", "/instances/")) == (410, "deprecated_endpoint")


def test_the_list_comes_in_pages_and_by_label(vast, client, sdk):
    vast.offers = [vast_offers.offer(number) for number in range(1, 61)]
    numbers = [client.rent(label="toy" if number % 2 else "other") for number in range(57)]
    first = client.list(limit=100)
    assert len(first["instances"]) == 25 and first["total_instances"] == 57
    assert first["label_counts"] == {"toy": 28, "other": 29}
    assert sorted(row["id"] for row in sdk.show_instances()) == numbers
    filters = json.dumps({"label": {"eq": "toy"}})
    assert client.list(select_filters=filters)["total_instances"] == 28
    assert client.list(select_filters=filters, select_cols='["id"]')["instances"][0].keys() == {"id"}
    assert len(client.list(limit=0)["instances"]) == 5
    for wrong in ({"select_filters": '{"dph_total":{"gt":1}}'}, {"after_token": "?"}, {"limit": "x"}):
        assert client.call("get", "/api/v1/instances/", **wrong)[0] == 400


def test_what_is_rented_can_appear_late(vast, client):
    vast.faults.appear_after["toy*"] = 5.0
    number = client.rent(label="toy-1")
    assert client.list()["instances"] == [] and client.get(number) is None
    vast.clock.advance(5.0)
    assert client.list()["instances"][0]["id"] == number == client.get(number)["id"]


def test_lists_can_be_empty_or_stale(vast, client):
    client.list()
    number = client.rent()
    vast.faults.on("instances.list", Stale())
    assert client.list()["instances"] == []
    vast.faults.on("instances.list", NOTHING_RUNS)
    assert client.list()["instances"] == []
    assert client.list()["instances"][0]["id"] == number


def test_fields_can_be_null_or_missing(vast, client, sdk):
    number = client.run()
    vast.faults.nulls |= {"label", "start_date"}
    vast.faults.absent.add("ports")
    shown = client.get(number)
    assert shown["label"] is None and "ports" not in shown and "ports" in client.list()["instances"][0]
    with pytest.raises(TypeError):  # so nobody should use it
        sdk.show_instance(number)
