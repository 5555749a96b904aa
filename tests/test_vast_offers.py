"""Which vast.ai offer a run takes: pure, on rows as the search answers them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from cloud.vast_offers import offer, search, shown

from cloudrun.backends.vast_offers import (
    DEFAULT_IMAGE,
    EGRESS,
    IMAGE_GB,
    Host,
    Load,
    Wanted,
    disk_for,
    expected,
    names_of,
    query,
    ranked,
    wanted,
    worst,
)
from cloudrun.errors import UsageError

KNOWN = ("A100 PCIE", "A100 SXM4", "H100 NVL", "H100 SXM", "L4", "L40S", "RTX 4090", "RTX 4090D", "Tesla T4")
HOUR = Load(1.0, 1.0, 3600.0)
ORDINARY = Wanted("RTX 4090", 1, 0, DEFAULT_IMAGE, 0)


def row(number: int = 7, **fields: Any) -> dict[str, Any]:
    return shown(offer(number, **fields), 20, 0.0)


@pytest.mark.parametrize(
    ("text", "gpu", "count", "memory"),
    [
        ("", "RTX 4090", 1, 0),
        ("L4", "L4", 1, 0),
        ("RTX_4090", "RTX_4090", 1, 0),
        ("T4:2", "T4", 2, 0),
        ("A100-80GB", "A100", 1, 80),
        ("A100-40GB:8", "A100", 8, 40),
    ],
)
def test_vm_gpu_holds_for_both_clouds(text: str, gpu: str, count: int, memory: int) -> None:
    found = wanted({"VM_GPU": text})
    assert (found.gpu, found.gpus, found.memory) == (gpu, count, memory)


@pytest.mark.parametrize(
    ("vm", "words"),
    [
        ({"VM_GPU": "none"}, "vast.ai lets machines with a GPU"),
        ({"VM_GPU": "T4:none"}, "how many of it"),
        ({"VM_GPU": "T4:0"}, "how many of it"),
        ({"VM_DISK": "7"}, "from 8 on"),
        ({"VM_DISK": "much"}, "from 8 on"),
        ({"VAST_IMAGE": "vastai/pytorch"}, "with its tag"),
        ({"VAST_IMAGE": "host:5000/image"}, "with its tag"),
    ],
)
def test_what_is_wrong_is_said_before_any_request(vm: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        wanted(vm)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(UsageError) as found:
        wanted({"VM_GPU": "none", "VM_DISK": "x", "VAST_IMAGE": "x"})
    assert len(str(found.value).split("\n")) == 3


@pytest.mark.parametrize(
    ("gpu", "names"),
    [
        ("RTX_4090", ["RTX 4090"]),
        ("rtx4090", ["RTX 4090"]),
        ("4090", ["RTX 4090"]),
        ("NVIDIA GeForce RTX 4090", ["RTX 4090"]),
        ("T4", ["Tesla T4"]),
        ("A100", ["A100 PCIE", "A100 SXM4"]),
        ("A100 SXM4", ["A100 SXM4"]),
        ("H100", ["H100 NVL", "H100 SXM"]),
        ("L4", ["L4"]),
    ],
)
def test_our_names_are_vasts_names(gpu: str, names: list[str]) -> None:
    assert names_of(gpu, KNOWN) == names


def test_a_gpu_that_is_not_let_is_named_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"TPU.*it has A100 PCIE, .*Tesla T4"):
        names_of("TPU", KNOWN)


@pytest.mark.parametrize(
    ("image", "cuda"),
    [
        (DEFAULT_IMAGE, 12.8),
        ("vastai/pytorch:cuda-12.8.1-auto", 12.8),
        ("vastai/pytorch:2.9.1-cu128-cuda-12.9-mini-py311", 12.8),
        ("nvidia/cuda:11.8.0-base", 11.8),
        ("me/image:latest", 0.0),
    ],
)
def test_name_and_tag_say_which_cuda_an_image_needs(image: str, cuda: float) -> None:
    assert Wanted("x", 1, 0, image, 0).cuda == cuda


def test_the_disk_has_room_for_the_image_and_the_data() -> None:
    assert disk_for(ORDINARY, Load(0.0, 0.0, 1.0)) == 20
    assert disk_for(ORDINARY, Load(100.0, 10.0, 1.0)) >= 100 + 10 + IMAGE_GB
    assert disk_for(ORDINARY._replace(disk=300), Load(100.0, 10.0, 1.0)) == 300
    with pytest.raises(UsageError, match="VM_DISK=50"):
        disk_for(ORDINARY._replace(disk=50), Load(100.0, 10.0, 1.0))


BAD = {
    "gpu": {"gpu_name": "RTX 3090"},
    "memory": {},
    "rented": {"rentable": False},
    "verified": {"verification": "unverified"},
    "cpu": {"cpu_arch": "arm64"},
    "reliability": {"reliability2": 0.7},
    "network": {"inet_up": 3.0},
    "cuda": {"cuda_max_good": 12.4},
    "disk": {"disk_space": 15.0},
    "duration": {"duration": 3000.0},
    "price": {"dph_base": 0.0, "storage_cost": 0.0},
}


@pytest.mark.parametrize("bound", BAD)
def test_every_bound_is_checked_here_too(bound: str) -> None:
    wish = ORDINARY._replace(memory=80) if bound == "memory" else ORDINARY
    names = ["RTX 4090"]
    assert Host(row(), 20).misfit(ORDINARY, names, HOUR, 60.0) == ""
    assert Host({**row(), **BAD[bound]}, 20).misfit(wish, names, HOUR, 60.0) == bound


@pytest.mark.parametrize("value", [None, "0.35", math.nan, True, [], -1.0])
@pytest.mark.parametrize("field", ["dph_base", "inet_down_cost", "reliability2", "disk_space", "duration"])
def test_what_is_missing_or_nonsense_does_not_fit(field: str, value: object) -> None:
    host = Host({**row(), "storage_cost": 0.0, "inet_up_cost": 0.0, field: value}, 20)
    assert host.misfit(ORDINARY, ["RTX 4090"], HOUR, 60.0)


def test_what_the_service_filters_is_what_is_checked() -> None:
    """Of one catalogue both leave the same."""
    from cloud.vast_offers import catalogue

    body, names = query(ORDINARY, ["RTX 4090"], 20, HOUR), ["RTX 4090"]
    filtered = search(catalogue(), body, 0.0, set())
    everything = [shown(each, 20, 0.0) for each in catalogue()]
    fitting = [each for each in everything if not Host(each, 20).misfit(ORDINARY, names, HOUR, 60.0)]
    assert sorted(each["id"] for each in filtered) == sorted(each["id"] for each in fitting) != []


def test_the_price_is_that_of_our_disk() -> None:
    """The docs' own rule: storage_cost is for a GB and a month of 720 hours."""
    assert Host(row(dph_base=0.35, storage_cost=0.15), 72).price == pytest.approx(0.365)


def test_the_expected_total_has_gpu_disk_image_data_and_egress() -> None:
    host = Host(row(dph_base=0.36, storage_cost=0.0, inet_down_cost=0.01, inet_up_cost=0.02), 20)
    load = Load(10.0, 5.0, 3600.0)
    traffic = (IMAGE_GB + 10.0) * 0.01 + 5.0 * 0.02
    assert expected(host, load, 2.0) == pytest.approx(2 * 0.36 + traffic + 10.0 * EGRESS)
    assert worst(host, load, 60.0) == pytest.approx(0.36 * 3660 / 3600 + traffic), "vast.ai takes no egress"


def test_the_dearest_traffic_loses_against_a_dearer_gpu() -> None:
    dear = Host(row(1, price=0.10, inet_down_cost=0.09), 20)
    cheap = Host(row(2, price=0.30, inet_down_cost=0.001), 20)
    much, little = Load(50.0, 1.0, 3600.0), Load(0.0, 0.0, 3600.0)
    assert ranked([dear, cheap], much, 1.0) == [cheap, dear]
    assert ranked([dear, cheap], little, 24.0) == [dear, cheap]


def test_of_a_machine_only_the_best_offer_is_tried_and_of_hosts_only_some() -> None:
    hosts = [Host(row(number, price=0.3 + number / 100, machine_id=number // 2), 20) for number in range(40)]
    found = ranked(hosts, HOUR, 1.0)
    assert [host.row["id"] for host in found] == [0, 2, 4, 6, 8]


def test_equal_totals_are_ordered_by_reliability() -> None:
    hosts = [Host(row(number, reliability2=0.95 + number / 100), 20) for number in (1, 3, 2)]
    assert [host.row["id"] for host in ranked(hosts, HOUR, 1.0)] == [3, 2, 1]


def test_a_cap_shortens_what_a_host_has_to_offer() -> None:
    host = Host(row(price=0.5, storage_cost=0.0, inet_down_cost=0.0, inet_up_cost=0.0, duration=7300.0), 20)
    long = Load(0.0, 0.0, 86400.0)
    assert host.misfit(ORDINARY, ["RTX 4090"], long, 60.0) == "duration"
    assert host.misfit(ORDINARY, ["RTX 4090"], long._replace(most=1.0), 60.0) == ""
    assert worst(host, long._replace(most=1.0), 60.0) == pytest.approx(1.0)
