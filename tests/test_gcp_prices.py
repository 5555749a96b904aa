"""Prices on Google Cloud: what is known is right, what is not known is None and never 0."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudrun.backends.gcp_prices import ADDRESS_PER_HOUR, DATE, ROWS, Row, disk_per_month, price, table
from cloudrun.backends.gcp_shapes import TABLE, resolve

HERE = "us-central1-a"


@pytest.mark.parametrize(
    ("gpu", "kind", "zone", "on_demand", "spot"),
    [
        ("", "", HERE, 0.707, None),  # the host's spot price is not known
        ("L4", "", "us-central1-b", 0.707, None),
        ("", "g4-standard-48", HERE, 4.5, None),
        ("A100", "", HERE, 3.673, 1.928),
        ("A100:8", "", HERE, 29.39, 15.42),
        ("A100-80GB", "", HERE, 5.07, 2.74),
        ("H100", "", HERE, None, 5.98),
        ("H100", "", "us-east4-c", None, 4.27),
        ("H100", "", "europe-north1-c", None, 1.29),
        ("H100", "", "europe-north1-a", None, None),
        ("H100:8", "", HERE, 88.0, 47.9),
        ("B200:8", "", HERE, None, 37.7),
        ("T4", "", HERE, 0.54, None),
        ("T4:2", "n1-standard-4", HERE, 0.89, None),
        ("P4", "", HERE, 0.79, None),
        ("V100", "n1-standard-4", HERE, 2.67, None),
        ("none", "n1-standard-4", HERE, 0.19, None),
        # Nobody said what these take: hosts, sizes, machines, regions.
        ("T4:2", "", HERE, None, None),
        ("P100", "n1-standard-4", HERE, None, None),
        ("", "g2-standard-8", HERE, None, None),
        ("", "a2-highgpu-2g", HERE, None, None),
        ("", "a3-megagpu-8g", HERE, None, None),
        ("H200:8", "", HERE, None, None),
        ("none", "", HERE, None, None),
        ("L4", "", "europe-west4-a", None, None),
        ("L4", "", "us-central2-b", None, None),
        ("L4", "", "", None, None),
    ],
)
def test_prices(gpu: str, kind: str, zone: str, on_demand: float | None, spot: float | None) -> None:
    shape = resolve(gpu, kind, True)
    assert (price(shape, zone, False), price(shape, zone, True)) == (on_demand, spot)


def test_every_row_can_be_true() -> None:
    assert len(table()) == len(ROWS), "a row is there twice, or was dropped"
    names = {name for row in TABLE for name in (row.gpu, *map(row.types.format, row.sizes))}
    for row in ROWS:
        assert row.part in names
        assert re.fullmatch(r"[a-z]+-[a-z]+\d(-[a-f])?", row.place)
        assert row.on_demand or row.spot
        assert all(value is None or 0 < value < 100 for value in (row.on_demand, row.spot))
        assert row.on_demand is None or row.spot is None or row.spot < row.on_demand
    assert re.fullmatch(r"20\d\d-[01]\d", DATE)


numbers = st.none() | st.floats(0.001, 200)


@given(st.lists(st.builds(Row, st.text(max_size=3), st.just("us-central1"), numbers, numbers)))
def test_spot_that_is_not_cheaper_is_not_believed(rows: list[Row]) -> None:
    kept = set(table(rows).values())
    assert kept <= set(rows)
    for row in rows:
        wrong = row.on_demand is not None and row.spot is not None and row.spot >= row.on_demand
        assert not (wrong and row in kept)
        assert wrong or (row.part, row.place) in table(rows)


@pytest.mark.parametrize("zone", [*sorted({row.place for row in ROWS}), HERE, "us-east4-a", "asia-east1-a"])
def test_never_for_nothing(zone: str) -> None:
    for known in TABLE:
        for gpus in known.sizes.values():
            shape = resolve(f"{known.gpu}:{gpus}", "", True)
            full, spot = price(shape, zone, False), price(shape, zone, True)
            assert all(value is None or value > 0 for value in (full, spot))
            assert full is None or spot is None or spot < full


def test_disks_and_addresses() -> None:
    assert disk_per_month("pd-balanced", 100) == pytest.approx(10.0)
    assert disk_per_month("hyperdisk-balanced", 100) is None
    assert ADDRESS_PER_HOUR == 0.005
