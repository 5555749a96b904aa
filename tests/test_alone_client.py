"""The client of a machine that goes on alone: its silence is no death, and to stop it is to end it."""

import time

import pytest
from fakes import ActingReport, FakeBackend, receipt_of
from machine import wait_until
from stranger import Stranger, google_of
from test_lifecycle import OPTIONS, kill, make  # noqa: F401

from cloudrun import commands, launch
from cloudrun.backends import Instance
from cloudrun.follow import ALONE, _Follower, follow
from cloudrun.formats import canonical
from cloudrun.handover import ALONE_LATER
from cloudrun.run import Client
from cloudrun.signals import Signals
from cloudrun.start import Wanted, prepare, store

OFFER_PRICE = 3.6
QUICK = {"agent_silence": 0.2, "state": 0.05}  # who says nothing for 0.4 s is silent


def strange(make, *attempts, **limits):  # noqa: F811
    """A world of strangers' machines, and a run in it."""
    world = make(*attempts, **{**QUICK, **limits})
    world.backend.stranger, world.agent.obeys = True, False
    prepared = prepare(world.settings, world.bucket)
    there = (world.bucket, world.report)
    return world, store(prepared, world.settings, Wanted(["main.py"], {}), OFFER_PRICE, there, stranger=True)


def on_look(world, count, act):
    """Once a client has looked at the machine so often: looks are half a second apart."""
    looks = []

    def call(what):
        looks.append(what)
        if looks.count("find") == count and what == "find":
            act()

    world.backend.on_call = call


def brings(world, order):
    """The machine's late receipt, and its end: nobody has ended it before."""
    assert "stop" not in world.backend.calls
    world.bucket.create(f"{order.prefix}/attempts/1/late/receipt", canonical(receipt_of(status=5)))
    world.backend.ends(f"{order.run}-1", "the run is finished")


def test_its_silence_is_no_death_and_what_it_sends_at_its_end_is_its_word(make):  # noqa: F811
    world, order = strange(make, "state alone nothing")
    on_look(world, 4, lambda: brings(world, order))
    outcome = world.execute(order)
    assert (outcome.exit_code, outcome.reason) == (5, "exited")
    assert world.report.lines.count(ALONE) == 1
    world.assert_ended()


def test_a_machine_that_is_not_alone_and_says_nothing_is_ended(make):  # noqa: F811
    world, order = strange(make, "state nothing")
    assert world.execute(order).reason == "lost"
    world.assert_ended()


def test_ctrl_c_ends_it_at_once(make):  # noqa: F811
    world, order = strange(make, "alone nothing")
    on_look(world, 2, kill)
    outcome = world.execute(order)
    assert (outcome.exit_code, outcome.reason) == (130, "stopped")
    world.assert_ended()
    world.assert_closed()


def test_stop_ends_it_at_once_and_says_so(make):  # noqa: F811
    world, order = strange(make, "state alone nothing")
    world.execute(order, detach=True)
    with Signals() as signals:
        client = world.client(signals)
        seen = []
        on_look(world, 2, lambda: seen.append(commands.stop(client, world.settings, order.run, now=False)))
        follow(client, order, 1, mine=False)
    assert seen == [0] and ALONE in world.report.lines
    world.assert_ended()
    world.assert_closed()


def test_who_comes_to_a_silent_machine_of_a_stranger_leaves_it_alone(make):  # noqa: F811
    """Its token may have run out before it could say so: its own guard and its deadline end it."""
    world, order = strange(make, "state nothing")
    world.execute(order, detach=True)
    on_look(world, 4, lambda: brings(world, order))
    with Signals() as signals:
        seen = follow(world.client(signals), order, 1, mine=False, show=False)
    assert seen.how == "finished" and "stop" not in world.backend.calls


def test_who_detaches_reads_what_comes_later(make):  # noqa: F811
    world, _ = strange(make, "state nothing")
    with Signals() as signals:
        options = {**OPTIONS, "detach": True}
        words = Wanted(["main.py"], {})
        assert launch.start_and_follow(world.client(signals), world.settings, words, options) == 0
    assert world.report.lines[-1] == ALONE_LATER and len(world.backend.alive()) == 1


def test_the_next_command_collects_and_closes(make):  # noqa: F811
    world, order = strange(make, "alone")
    world.execute(order, detach=True)
    brings(world, order)
    with Signals() as signals:
        assert commands.wait(world.client(signals), world.settings, order.run, as_json=False) == 5
    world.assert_closed()


def test_a_client_that_is_there_hands_fresh_tokens_over(tmp_path, monkeypatch):
    pytest.importorskip("google.cloud.storage", reason="google-cloud-storage is not installed")
    with google_of(tmp_path, monkeypatch) as google:
        google.logins.narrow_seconds = 2.0
        run, backend = Stranger(tmp_path, google), FakeBackend()
        name = run.whole.run + "-1"
        backend.machines[name] = Instance(name, run.whole.run, 1, run.whole.deadline, time.time(), alive=True)
        with Signals() as signals:
            follower = _Follower(Client(run.gs, backend, ActingReport(), signals), run.whole, 1, mine=False)

            def tokens():
                follower.step(show=False, detach=False)
                return {grant.expires for grant in google.tokens.values() if grant.rules}

            wait_until(lambda: len(tokens()) > 2, 20)
        assert run.gs.size(run.whole.prefix + "/token.json")
