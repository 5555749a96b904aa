"""The fault campaign, a few runs of it; and its judges, each of which has to be able to find something."""

import argparse
from dataclasses import replace

import gce
import pytest
import vast_client
from chaos.catalogue import CATALOGUE
from chaos.judges import Client, Fault, Record, judge
from chaos.program import content, read
from chaos.table import page
from cloud import machines


def started(life, at, parent=None):
    return {"what": "start", "life": life, "at": at, "parent": parent}


def closed(life, at, number, name="model/a"):
    return {"what": "closed", "life": life, "at": at, "name": name, "number": number}


def head(life, number, name="model/a"):
    return {"name": name, "number": number, "life": life}


def good(**changes):
    """What was recorded of a run in which all went well: main.py wrote one file twice, and ended with 0."""
    told = [
        started("L", 10.0),
        closed("L", 11.0, 1),
        closed("L", 15.0, 2),
        {"what": "end", "life": "L", "at": 16.0, "status": 0},
    ]
    record = Record(
        told=told,
        contents={("outputs.json", "model/a"): head("L", 2), ("the project", "model/a"): head("L", 2)},
        versions=[(12.0, 1, 1, [("model/a", head("L", 1))]), (16.1, 1, 2, [("model/a", head("L", 2))])],
        clients=[Client("cloudrun main.py", "main", 0)],
        receipt={"save": "", "status": 0},
        bill={"seconds": 6.5, "cost": 0.01},
        metered=6.6,
        known_cost=0.01,
        longest=6.6,
        over=16.2,
        billed_until=17.0,
    )
    return replace(record, **changes)


def fault(*excuses, at=11.0):
    return Fault("one", "one", excuses, at)


def test_a_run_in_which_all_went_well_has_nothing_against_it():
    assert judge(good()) == []
    last = [*good().told[:-1], {"what": "end", "life": "L", "at": 16.0, "status": 3}]
    assert judge(good(told=last, clients=[Client("cloudrun main.py", "main", 3)])) == []


MIXED = [("model/a", head("L", 1)), ("model/b", head("M", 1, "model/b"))]
WRONG = {
    "meter: a is billed": good(left=["a"]),
    "meter: billed for 9.0 s after": good(over=16.5, billed_until=25.5),
    "meter: b outlived": good(left_by_provider=["b"]),
    "meter: billed for": good(longest=100.0),
    "meter: a machine was billed": good(late=True),
    "outputs: model/a in outputs.json is torn": good(
        contents={**good().contents, ("outputs.json", "model/a"): None}
    ),
    "outputs: main.py found": good(
        told=[*good().told, {"what": "torn", "life": "L", "at": 11.5, "name": "model/a"}]
    ),
    "outputs: model/a of save 1.1 is torn": good(versions=[(12.0, 1, 1, [("model/a", None)])]),
    "outputs: outputs.json names": good(missing=["model/a"]),
    "outputs: model/a 2 of L": good(contents={("outputs.json", "model/a"): head("L", 1)}),
    "bill: the bill says 9.0 s": good(bill={"seconds": 9.0, "cost": 0.01}),
    "bill: the bill says 5.0 s": good(bill={"seconds": 5.0, "cost": 0.01}, backend="vast"),
    "bill: the bill says 0.5 USD": good(bill={"seconds": 6.5, "cost": 0.5}),
    "attempts: save 1.1 mixes": good(
        told=[*good().told, started("M", 17.0)], versions=[(12.0, 1, 1, MIXED)], receipt=None
    ),
    "attempts: save (1, 3) replaced": good(versions=[(12.0, 2, 1, []), (13.0, 1, 3, [])]),
    "exits: cloudrun main.py exited with 121, and its": good(
        clients=[Client("cloudrun main.py", "main", 121, billed=True)]
    ),
    "exits: cloudrun main.py exited with 122": good(clients=[Client("cloudrun main.py", "main", 122)]),
    "exits: cloudrun wait exited with 0": good(
        told=good().told[:-1], receipt=None, clients=[Client("cloudrun wait", "wait", 0)]
    ),
    "exits: cloudrun main.py exited with 0, and these": good(unlike=["model/a"]),
    "exits: cloudrun main.py exited with 125": good(clients=[Client("cloudrun main.py", "main", 125)]),
    "exits: cloudrun main.py exited with 130": good(clients=[Client("cloudrun main.py", "main", 130)]),
    "exits: cloudrun main.py exited with 1,": good(clients=[Client("cloudrun main.py", "main", 1)]),
}


@pytest.mark.parametrize("words", WRONG)
def test_each_judge_finds_what_is_wrong(words):
    found = judge(WRONG[words])
    assert len(found) == 1 and found[0].startswith(words), found


def test_only_a_fault_that_happened_explains_anything():
    late = good(late=True)
    assert judge(replace(late, faults=[fault("late")])) == []
    assert len(judge(replace(late, faults=[fault("late", at=None)]))) == 1
    interrupted = good(clients=[Client("cloudrun main.py", "main", 130)])
    assert judge(replace(interrupted, faults=[fault("ends")])) == []


def test_a_run_whose_agent_was_killed_is_over():
    killed = good(over=None, billed_until=25.5, receipt=None, clients=[], faults=[fault("over", at=15.0)])
    assert len(judge(killed)) == 1 and "after the run's end" in judge(killed)[0]


def test_what_was_closed_long_before_a_loss_is_required_and_what_came_last_is_not():
    """Without a receipt there was no last save."""
    told = good().told[:-1]
    lost = good(told=told, receipt=None, clients=[Client("cloudrun main.py", "main", 121)])
    assert judge(replace(lost, contents={("outputs.json", "model/a"): head("L", 1)})) == []
    assert len(judge(replace(lost, contents={}, versions=[]))) == 1
    hampered = replace(lost, contents={}, versions=[], faults=[fault("hampers")])
    assert judge(hampered) == []
    continued = [*told, started("M", 17.0, parent="L")]
    newer = {("outputs.json", "model/a"): head("M", 1)}
    assert judge(replace(lost, told=continued, contents=newer)) == []
    stranger = [*told, started("M", 17.0)]
    assert len(judge(replace(lost, told=stranger, contents=newer))) == 1


def test_a_content_says_what_it_is_and_whether_it_is_whole():
    data = content("model/a", 3, "L", 500)
    assert read(data) == {**head("L", 3), "size": 500}
    assert read(data[:-1]) is None and read(data[:200]) is None and read(b"") is None


def test_the_page_counts_faults_and_names_what_failed():
    result = {
        **{
            "seed": 7,
            "backend": "gcp",
            "took": 5.0,
            "lag": 0.1,
            "failures": [],
            "metered": 6.0,
            "late": True,
        },
        **{"bill": {"seconds": 6.4}, "faults": [{"name": "client: killed", "words": "", "at": 1.0}]},
        "clients": [{"kind": "main", "code": 0}],
    }
    text = page([result, {**result, "seed": 8, "failures": ["bill: wrong"]}], 7, "abc", "2026-11-25")
    assert "| client: killed | 2 | 2 |" in text and "seed 8: bill: wrong" in text and "2 runs" in text


def test_every_fault_has_a_name_of_its_own_on_each_backend():
    names = [(entry.name, backend) for entry in CATALOGUE for backend in entry.backends]
    assert len(names) == len(set(names))


# One after the other they take less than a minute.
SEEDS = [3014, 3061, 3079, 3117, 3230]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_campaign(seed):
    from chaos.__main__ import play_apart

    gce.need_client()
    vast_client.need_client()
    if reason := machines.unavailable():
        pytest.skip(reason)
    result = play_apart(seed, argparse.Namespace(backend=None, fault=[]), watchdog=100.0)
    assert not result["failures"], f"{result['failures']}\nmake chaos N=1 SEED={seed}\n{result['shown']}"
