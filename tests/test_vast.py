"""The vast backend through vast.ai's own client, against the emulated service; no container boots here.

After each test nothing costs money: the meter is the judge.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cloud import vast_errors
from cloud.faults import Answer, LostReply, LostRequest, Slow
from cloud.server import json_reply
from cloud.vast import Vast
from cloud.vast_account import NOTHING_RUNS, Instead, VastTiming
from cloud.vast_offers import offer
from contracts.backend import RUNS, BackendContract, Rig
from vast_client import need_client

from cloudrun.backends import Boot, Need
from cloudrun.backends.vast import VastBackend
from cloudrun.backends.vast_api import ApiError
from cloudrun.bill import Patience, see_ended
from cloudrun.config import from_env
from cloudrun.errors import CloudrunError, Interrupted, NoCapacity, Refused, StillRunning, UsageError
from cloudrun.formats import timestamp
from cloudrun.signals import Signals

LIMITS = "look=0.05,appears=1,stop=5,provisioning=0.5,pull=0.5,away=0.3"
NEED = Need(1_000_000, 1_000_000, 1.0, 600.0)


class VastRig:
    """`settings` are variables of the environment."""

    def __init__(self, vast: Vast, **settings: str) -> None:
        self.vast = vast
        vast.offers = [offer(7_000_000 + n, "RTX 4090", 0.30 + n / 100) for n in range(1, 9)]
        self.environ = {**vast.environ(), "GCS_DIR": "gs://b/runs", "CLOUDRUN_LIMITS": LIMITS, **settings}
        self.backend = self.client()

    def client(self, **settings: str) -> VastBackend:
        return VastBackend(from_env({**self.environ, **settings}, "/toy", backend="vast"))

    def boot(self, run: str, attempt: int, seconds: float) -> Boot:
        payload = {"instance": f"{run}-{attempt}", "run": run, "left": seconds, "backend": "vast"}
        if seconds < 1:
            self.vast.clock.after(0.5, self.end_all)
        return Boot(run, attempt, timestamp(time.time() + seconds), payload, seconds + 60)

    def end_all(self) -> None:
        """As the guards in them would."""
        for contract in self.vast.instances.values():
            contract.destroy()

    def create(self, number: int = 0, run: str = RUNS[0], attempt: int = 1) -> str:
        found = self.backend.offers(NEED)[number]
        self.backend.create(f"{run}-{attempt}", found, self.boot(run, attempt, 600.0))
        return f"{run}-{attempt}"

    def rented_by_others(self, number: int, label: str) -> None:
        with self.vast.clock.changed:
            order = {"image": "a:b", "disk": 20.0, "label": label}
            self.vast.market.rent(self.vast.offers[number], order)

    def made(self) -> list[int]:
        return list(self.vast.instances)

    def up(self) -> str:
        name = self.create()
        self.vast.wait(self.made()[-1], "running")
        return name


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VastRig]:
    need_client()
    with Vast(tmp_path, machines=False) as vast:
        for name, value in vast.environ().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("NETRC", raising=False)
        yield VastRig(vast)
        assert vast.violations == []
        vast.meter.check()


@pytest.fixture
def judged(rig: VastRig) -> Iterator[VastRig]:
    """At whose end nothing may cost money."""
    yield rig
    assert rig.vast.meter.running() == []
    assert rig.vast.jobs == {}, "and no job of the scheduler is left"


class TestVastBackend(BackendContract):
    @pytest.fixture
    def rig(self, rig: VastRig) -> Rig:
        return rig


def until(check: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while not (value := check()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def ended(rig: VastRig, name: str, *, doubtful: bool = False, backend: VastBackend | None = None) -> Any:
    return see_ended(
        backend or rig.backend, name, Patience(0, 5, doubtful=doubtful), layer="lease", clock=time.time
    )


# --- offers


def test_offers_are_the_fitting_ones_best_first(rig: VastRig) -> None:
    found = rig.backend.offers(NEED)
    assert [each.expected for each in found] == sorted(each.expected or 0 for each in found)
    first = found[0]
    assert first.what == "1 x RTX 4090, host 50001 (California, US)" and first.place == "California, US"
    assert first.reliability == 0.9931 and (first.down, first.up) == (870.0, 620.0)
    assert first.price == pytest.approx(0.31 + 0.15 * 20 / 720, abs=1e-5) and first.once > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reliability2", 0.5),
        ("disk_space", 9.0),
        ("cuda_max_good", 11.8),
        ("duration", 60.0),
        ("inet_down", 1.0),
    ],
)
def test_a_filter_that_the_service_ignores_is_checked_here(rig: VastRig, field: str, value: float) -> None:
    bad = offer(7_900_000, "RTX 4090", 0.01, **{field: value})
    rig.vast.offers = [bad, *rig.vast.offers]
    rig.vast.faults.unfiltered = {"reliability2", "disk_space", "cuda_max_good", "duration", "inet_down"}
    assert "7900000" not in [each.where for each in rig.backend.offers(NEED)]


def test_a_gpu_that_nobody_lets_is_a_usage_error(rig: VastRig) -> None:
    with pytest.raises(UsageError, match="it has RTX 4090"):
        rig.client(VM_GPU="L4").offers(NEED)


def test_a_credit_that_does_not_pay_for_the_worst_case_is_said(rig: VastRig) -> None:
    rig.vast.credit = 1.0
    with pytest.raises(Refused, match=r"1\.00 USD does not pay for the 7\.\d\d USD.*--max-hours"):
        rig.backend.offers(NEED._replace(seconds=24 * 3600.0))
    assert rig.backend.offers(NEED)
    assert rig.backend.offers(NEED._replace(seconds=24 * 3600.0, most=0.9)), "what is capped is paid for"


def test_a_host_that_the_credit_does_not_pay_for_is_not_the_next_one_either(rig: VastRig) -> None:
    rig.vast.offers = [offer(7_000_001, price=0.30), offer(7_000_002, price=3.0)]
    rig.vast.credit = 10.0
    (found,) = rig.backend.offers(NEED._replace(seconds=24 * 3600.0))
    assert found.where == "7000001"
    assert len(rig.backend.offers(NEED)) == 2


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_key_is_said_whatever_its_status(rig: VastRig, status: int) -> None:
    rig.vast.faults.bad_key = status
    with pytest.raises(UsageError, match="VAST_API_KEY: Invalid user key"):
        rig.client(VAST_API_KEY="wrong").offers(NEED)


def test_without_a_network_it_is_one_sentence(rig: VastRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAST_URL", "http://127.0.0.1:9")
    with pytest.raises(CloudrunError) as raised:
        rig.client()._api.ask("/users/current", patience=0)
    words = "vast.ai: http://127.0.0.1:9 cannot be reached (no connection): is this computer online?"
    assert str(raised.value) == words


def test_a_netrc_does_not_replace_our_key(rig: VastRig, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("default login me password mine\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert rig.client().offers(NEED)
    assert all(
        request.key == "account" for request in rig.vast.requests if request.method != "gpu_names.unique"
    )


def test_without_the_extra_it_is_one_sentence(rig: VastRig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "vastai"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vastai", None)  # as the import system marks what is not there
    with pytest.raises(UsageError) as found:
        rig.client().offers(NEED)
    assert str(found.value) == "the vast backend needs its client: pip install 'cloudrun[vast]'"


def test_the_client_says_nothing_on_its_own(rig: VastRig, capfd: pytest.CaptureFixture[str]) -> None:
    rig.backend.offers(NEED)
    assert capfd.readouterr() == ("", "")


class Parked:
    """`success: false`, and a machine all the same."""

    def around(self, faults: Any, request: Any, perform: Callable[[], Any]) -> Any:
        refused = vast_errors.resources_unavailable().body()
        return json_reply({**json.loads(perform().body), **refused})


# --- renting: each outcome of the create call


def test_a_create_call_has_all_that_it_needs(judged: VastRig) -> None:
    name = judged.create()
    (request,) = [each for each in judged.vast.requests if each.method == "asks.create"]
    assert request.body["cancel_unavail"] is True and "price" not in request.body
    assert request.body["label"].startswith(f"cloudrun/{RUNS[0]}/1/") and len(request.body["onstart"]) <= 4096
    assert set(request.body["env"]) == {"CLOUDRUN_PAYLOAD", "VAST_URL"}
    assert judged.vast.key not in str(request.body), "a stranger's machine never gets the account's key"
    ended(judged, name)


@pytest.mark.parametrize("status", [400, 404, 410])
def test_an_offer_that_was_taken_is_followed_by_the_next_one(judged: VastRig, status: int) -> None:
    judged.vast.faults.taken_status = status
    first, second, *_ = judged.backend.offers(NEED)
    judged.vast.offers = [each for each in judged.vast.offers if str(each["id"]) != first.where]
    with pytest.raises(NoCapacity, match="taken by somebody else"):
        judged.backend.create("toy-1", first, judged.boot("toy", 1, 600.0))
    judged.backend.create("toy-1", second, judged.boot("toy", 1, 600.0))
    ended(judged, "toy-1")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (vast_errors.insufficient_credit(), "billing"),
        (vast_errors.spend_rate_limit(), "a new account"),
        (vast_errors.bad_key(401), "VAST_API_KEY"),
        (vast_errors.bad_key(404), "VAST_API_KEY"),
        (vast_errors.forbidden("asks"), "no permission"),
        (vast_errors.Refusal(400, "invalid_args", "what is that"), "what is that"),
    ],
)
def test_what_no_other_offer_can_help_against(judged: VastRig, error: Any, words: str) -> None:
    judged.vast.faults.on("asks.create", Answer(error))
    with pytest.raises(Refused, match=words):
        judged.create()
    assert judged.made() == []


def test_too_many_requests_are_sent_again_and_rent_once(judged: VastRig) -> None:
    judged.vast.faults.on("asks.create", Answer(vast_errors.too_many_requests(0.1)), times=2)
    name = judged.create()
    assert len(judged.made()) == 1
    ended(judged, name)


@pytest.mark.parametrize(
    "effect",
    [
        LostReply(),
        Answer(vast_errors.bad_gateway(502), done=True),
        Answer(vast_errors.bad_gateway(500), done=True),
        Answer(vast_errors.Plain(200, "<html>"), done=True),
    ],
)
def test_a_machine_whose_create_call_got_no_answer_is_found_by_its_label(
    judged: VastRig, effect: Any
) -> None:
    judged.vast.faults.on("asks.create", effect)
    name = judged.create()
    assert len(judged.made()) == 1
    found = judged.backend.find(name)
    assert found and found.alive
    ended(judged, name)


def test_a_machine_that_shows_up_late_is_found(judged: VastRig) -> None:
    judged.vast.faults.appear_after["cloudrun/*"] = 0.3
    judged.vast.faults.on("asks.create", LostReply())
    ended(judged, judged.create())
    assert len(judged.made()) == 1


@pytest.mark.parametrize("effect", [LostRequest(), Answer(vast_errors.bad_gateway(503))])
def test_a_call_that_did_nothing_is_followed_by_the_next_offer(judged: VastRig, effect: Any) -> None:
    judged.vast.faults.on("asks.create", effect)
    first, second, *_ = judged.backend.offers(NEED)
    with pytest.raises(NoCapacity, match="no machine has appeared"):
        judged.backend.create("toy-1", first, judged.boot("toy", 1, 600.0))
    judged.backend.create("toy-1", second, judged.boot("toy", 1, 600.0))
    assert len(judged.made()) == 1
    ended(judged, "toy-1")


def test_one_that_appears_when_nobody_expects_it_any_more_is_ended_as_well(judged: VastRig) -> None:
    judged.vast.faults.appear_after["cloudrun/*"] = 2.0
    judged.vast.faults.on("asks.create", LostReply())
    first, second, *_ = judged.backend.offers(NEED)
    with pytest.raises(NoCapacity):
        judged.backend.create("toy-1", first, judged.boot("toy", 1, 600.0))
    judged.backend.create("toy-1", second, judged.boot("toy", 1, 600.0))
    assert len(judged.made()) == 2
    time.sleep(2.0)
    ended(judged, "toy-1", doubtful=True)


def test_a_call_that_a_signal_breaks_off_after_one_that_was_undone_leaves_nothing(
    judged: VastRig,
) -> None:
    """The name has had a machine that is gone, and nobody knows the number of the second one."""
    first, second, *_ = judged.backend.offers(NEED)
    judged.vast.faults.on("asks.create", Parked())
    with pytest.raises(NoCapacity):
        judged.backend.create("toy-1", first, judged.boot("toy", 1, 600.0))

    class Breaks(Slow):
        def around(self, faults: Any, request: Any, perform: Callable[[], Any]) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return super().around(faults, request, perform)

    judged.vast.faults.on("asks.create", Breaks(0.5))
    with Signals(), pytest.raises(Interrupted):
        judged.backend.create("toy-1", second, judged.boot("toy", 1, 600.0))
    until(lambda: len(judged.made()) == 2)
    ended(judged, "toy-1", doubtful=True)


def test_a_failure_that_leaves_a_machine_is_undone(judged: VastRig) -> None:
    """`success: false` with a contract: it would be parked, and its disk billed."""
    first = judged.backend.offers(NEED)[0]
    judged.vast.faults.on("asks.create", Parked())
    with pytest.raises(NoCapacity, match="could not start"):
        judged.backend.create("toy-1", first, judged.boot("toy", 1, 600.0))
    assert len(judged.made()) == 1 and judged.vast.meter.running() == []


def test_a_host_is_rented_once(judged: VastRig) -> None:
    name = judged.create()
    ended(judged, name)
    machine = judged.vast.instances[judged.made()[0]].offer["machine_id"]
    assert all(f"host {machine} " not in each.what for each in judged.backend.offers(NEED))


# --- the provider's own limit


def test_a_job_destroys_it_after_the_deadline_and_goes_when_it_is_gone(judged: VastRig) -> None:
    name = judged.create()
    (job,) = judged.vast.jobs.values()
    assert job["instance_id"] == judged.made()[0] and job["request_method"] == "DELETE"
    limit = time.time() + 600 + 60
    assert job["start_time"] % 3600 == 1 and limit < job["start_time"] <= limit + 3601
    ended(judged, name)


def test_the_job_of_a_client_that_is_gone_goes_with_the_bill_that_another_one_closes(judged: VastRig) -> None:
    name = judged.up()
    ended(judged, name, backend=judged.client())
    assert judged.vast.jobs == {}
    name = judged.create(1, RUNS[1])
    judged.end_all()
    until(lambda: judged.vast.meter.running() == [])
    assert judged.vast.jobs
    ended(judged, name, backend=judged.client())
    assert judged.vast.jobs == {}


def test_the_job_ends_what_nobody_else_ends(judged: VastRig) -> None:
    judged.up()
    judged.vast.clock.advance(2 * 3600 + 120)
    until(lambda: judged.vast.meter.running() == [])
    judged.vast.jobs.clear()


@pytest.mark.parametrize("effect", [Answer(vast_errors.forbidden("schedule")), Instead({"success": True})])
def test_a_job_that_is_refused_is_said_and_costs_nothing(judged: VastRig, effect: Any) -> None:
    judged.vast.faults.on("schedule.create", effect)
    found = judged.backend.offers(NEED)[0]
    note = judged.backend.create("toy-1", found, judged.boot("toy", 1, 600.0))
    assert note and "would not end" in note and "\n" not in note
    ended(judged, "toy-1")


# --- looking


def test_it_is_coming_then_up_then_gone(judged: VastRig) -> None:
    name = judged.create()
    seen = judged.backend.find(name)
    assert seen and seen.alive and seen.coming and not seen.lost
    judged.vast.wait(judged.made()[0], "running")
    seen = judged.backend.find(name)
    assert seen and seen.alive and not seen.coming
    assert seen.price == pytest.approx(0.31 + 0.15 * 20 / 720, abs=1e-5)
    end = ended(judged, name)
    assert end.layer == "lease" and judged.vast.meter.seconds(judged.made()[0]) == pytest.approx(
        end.ended - end.started, abs=1.0
    )


def loses(rig: VastRig, name: str, words: str) -> None:
    found = until(lambda: (found := rig.backend.find(name)) and found.lost and found)
    assert words in found.lost and not found.alive


def test_a_host_that_never_begins_or_loads_too_long_is_given_up(judged: VastRig) -> None:
    judged.vast.faults.stuck_loading = {each["machine_id"] for each in judged.vast.offers}
    name = judged.create()
    loses(judged, name, "did not load the image in time")
    ended(judged, name)


def test_a_host_that_cannot_start_containers_is_given_up_at_once(judged: VastRig) -> None:
    error = "Error response from daemon: failed: OCI runtime create failed: nvidia-container-cli"
    judged.vast.faults.broken = {each["machine_id"]: error for each in judged.vast.offers}
    name = judged.create()
    loses(judged, name, "OCI runtime create failed")
    ended(judged, name)


def test_outbid_offline_frozen_and_without_credit_are_ended(judged: VastRig) -> None:
    for number, harm in enumerate(("outbid", "offline", "freeze"), 1):
        name = judged.create(attempt=number)
        made = judged.made()[-1]
        judged.vast.wait(made, "running")
        getattr(judged.vast, harm)(made)
        loses(judged, name, {"outbid": "stopped", "offline": "out of reach", "freeze": "frozen"}[harm])
        ended(judged, name)
    name = judged.create(attempt=4)
    judged.vast.wait(judged.made()[-1], "running")
    judged.vast.credit = 0.0
    loses(judged, name, "out of credit")
    ended(judged, name)


def test_a_host_that_is_back_soon_is_not_given_up(judged: VastRig) -> None:
    name = judged.up()
    judged.vast.offline(judged.made()[0])
    judged.vast.wait(judged.made()[0], "offline")
    found = judged.backend.find(name)
    assert found and found.alive
    judged.vast.back(judged.made()[0])
    time.sleep(0.4)
    found = judged.backend.find(name)
    assert found and found.alive and not found.lost
    ended(judged, name)


@pytest.mark.parametrize("field", ["label", "start_date", "status_msg", "dph_total", "intended_status"])
def test_fields_that_are_null_hide_nothing(judged: VastRig, field: str) -> None:
    name = judged.up()
    judged.vast.faults.nulls = {field}
    found = judged.backend.find(name)
    assert found and (found.name, found.alive) == (name, True)
    judged.vast.faults.nulls = set()
    assert [each.name for each in judged.client().all()] == [name]
    ended(judged, name)


def test_more_than_a_page_is_seen(judged: VastRig) -> None:
    judged.vast.offers = [offer(6_000_000 + n, "RTX 4090", 0.3) for n in range(30)]
    for n in range(30):
        judged.rented_by_others(n, f"cloudrun/toy-{n}/1/1800000000")
    assert len(judged.backend.all()) == 30
    for n in range(30):
        judged.backend.stop(f"toy-{n}-1")
    until(lambda: judged.vast.meter.running() == [])


def test_machines_of_others_are_left_alone(rig: VastRig) -> None:
    rig.rented_by_others(-1, "somebody else's")
    assert rig.backend.all() == [] and rig.backend.find("somebody else's-1") is None
    rig.backend.stop("somebody-1")
    assert len(rig.vast.meter.running()) == 1


# --- ending


def test_an_empty_list_is_no_proof(judged: VastRig) -> None:
    name = judged.up()
    other = judged.client()
    judged.vast.faults.on("instances.list", NOTHING_RUNS, times=None)
    found = other.find(name)
    assert found and found.alive, "it is found by what it costs"
    judged.vast.faults.clear()
    ended(judged, name)


@pytest.mark.parametrize(
    "value", [{}, {"success": True}, {"success": True, "instances": None}, {"instances": []}]
)
def test_a_list_that_cannot_be_read_is_no_list(judged: VastRig, value: object) -> None:
    judged.vast.faults.on("instances.list", Instead(value), times=None)
    with pytest.raises(CloudrunError, match="not known"):
        judged.client().all()
    with pytest.raises(CloudrunError, match="not known"):
        judged.client().find("toy-1")


@pytest.mark.parametrize("status", [401, 404])
def test_a_key_that_is_not_accepted_any_more_is_no_proof(rig: VastRig, status: int) -> None:
    name = rig.up()
    rig.vast.faults.on("instances.*", Answer(vast_errors.bad_key(status)), times=None)
    with pytest.raises(StillRunning, match="vastai destroy instance"):
        see_ended(rig.backend, name, Patience(0, 0.3), layer="lease")
    assert rig.vast.meter.running() == rig.made()
    rig.vast.faults.clear()
    ended(rig, name)


@pytest.mark.parametrize(
    "effect",
    [
        Instead({"success": True}),
        LostReply(),
        LostRequest(),
        Answer(vast_errors.bad_gateway(502)),
        Answer(vast_errors.too_many_requests(3.0)),
        Answer(vast_errors.Refusal(404, "not_found", "not found")),
    ],
)
def test_a_destroy_that_is_ignored_or_lost_is_sent_again(judged: VastRig, effect: Any) -> None:
    name = judged.up()
    judged.vast.faults.on("instances.delete", effect, times=2)
    ended(judged, name)


def test_what_cannot_be_looked_at_is_destroyed_all_the_same(judged: VastRig) -> None:
    """And seen gone: who asks once more hears that there is no such instance."""
    name = judged.up()
    judged.vast.faults.on("instances.get", Answer(vast_errors.bad_gateway(503)), times=None)
    assert ended(judged, name).layer == "lease"


def test_a_list_that_is_broken_keeps_nobody_from_destroying_what_is_known(rig: VastRig) -> None:
    """Of the first call nobody knows what it did, so that the list would have to be asked as well."""
    rig.vast.faults.on("asks.create", LostRequest())
    first, second, *_ = rig.backend.offers(NEED)
    with pytest.raises(NoCapacity):
        rig.backend.create("toy-1", first, rig.boot("toy", 1, 600.0))
    rig.backend.create("toy-1", second, rig.boot("toy", 1, 600.0))
    rig.vast.faults.on("instances.list", Answer(vast_errors.deprecated()), times=None)
    with pytest.raises(StillRunning):
        see_ended(rig.backend, "toy-1", Patience(0, 0.3), layer="lease")
    until(lambda: rig.vast.meter.running() == [])
    rig.vast.faults.clear()
    ended(rig, "toy-1")


def test_one_that_the_service_does_not_know_yet_is_not_gone(judged: VastRig) -> None:
    judged.vast.faults.appear_after["cloudrun/*"] = 0.5
    judged.vast.faults.on("instances.delete", Answer(vast_errors.no_such_instance(1)), times=3)
    ended(judged, judged.create())
    assert len(judged.made()) == 1


@pytest.mark.parametrize("value", [[], [{"id": 1}], {}, "none"])
def test_an_answer_about_one_that_does_not_name_it_is_no_proof(judged: VastRig, value: object) -> None:
    name = judged.up()
    assert judged.backend.find(name)
    judged.vast.faults.on("instances.get", Instead({"instances": value}), times=None)
    with pytest.raises(CloudrunError, match="cannot be read"):
        judged.backend.find(name)
    judged.vast.faults.clear()
    ended(judged, name)


def test_one_that_goes_between_the_list_and_the_first_look_is_gone(judged: VastRig) -> None:
    name = judged.up()
    other = judged.client()
    assert [each.name for each in other.all()] == [name]
    with judged.vast.clock.changed:
        judged.end_all()
    judged.vast.wait(judged.made()[0], "destroyed")
    found = other.find(name)
    assert found is None or found.ended
    ended(judged, name)


def test_a_machine_that_cannot_be_destroyed_is_said_with_what_to_do(rig: VastRig) -> None:
    name = rig.up()
    rig.vast.faults.on("instances.delete", Instead({"success": True}), times=None)
    with pytest.raises(StillRunning, match=r"vastai destroy instance .*\n.*cloud\.vast\.ai"):
        see_ended(rig.backend, name, Patience(0, 0.3), layer="lease")
    rig.vast.faults.clear()
    ended(rig, name)


def test_one_destroyed_by_hand_is_gone(judged: VastRig) -> None:
    name = judged.up()
    with judged.vast.clock.changed:
        judged.end_all()
    judged.vast.wait(judged.made()[0], "destroyed")
    end = ended(judged, name)
    assert end.layer in ("guard", "lease")


def test_the_services_own_pace_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the throttles of the real service a machine is ended, and few requests are refused."""
    need_client()
    timing = VastTiming(0.05, 0.05, 0.05, 0.2, 0.5, throttle_scale=1.0)
    with Vast(tmp_path, machines=False, timing=timing) as vast:
        for key, value in vast.environ().items():
            monkeypatch.setenv(key, value)
        rig = VastRig(vast, CLOUDRUN_LIMITS="appears=2")
        name = rig.create()
        for _ in range(3):
            time.sleep(rig.backend.pace)
            assert rig.backend.find(name)
        see_ended(rig.backend, name, Patience(0, 30), layer="lease")
        assert vast.meter.running() == [] and vast.violations == []
        refused = [request for request in vast.requests if request.status == 429]
        assert len(refused) <= 2, refused


# --- money


def test_the_bill_is_that_of_the_meter(judged: VastRig) -> None:
    name = judged.up()
    judged.vast.clock.advance(3600.0)
    ended(judged, name)
    (made,) = judged.made()
    cost, split = judged.backend.cost(name), judged.vast.meter.cost_split(made)
    assert cost and cost.total == pytest.approx(judged.vast.meter.cost(made), rel=0.01)
    assert (cost.gpu, cost.disk, cost.traffic) == (
        pytest.approx(split["gpu"], rel=0.01),
        pytest.approx(split["disk"], rel=0.01),
        pytest.approx(split["traffic"], rel=0.01),
    )


def test_a_machine_that_another_client_ended_is_found_by_its_label(judged: VastRig) -> None:
    name = judged.up()
    ended(judged, name)
    other = judged.client()
    found = other.find(name)
    assert found and found.ended and not found.alive
    cost = other.cost(name)
    assert cost and cost.total == pytest.approx(judged.vast.meter.total(), rel=0.01)


@pytest.mark.parametrize(
    "effect", [Answer(vast_errors.bad_gateway(502)), Instead({"success": True, "results": []})]
)
def test_without_charges_it_is_rates_and_time_and_traffic_is_unknown(judged: VastRig, effect: Any) -> None:
    monotonic = time.monotonic()
    name = judged.up()
    while time.monotonic() < monotonic + 3.0:
        judged.backend.find(name)
        time.sleep(0.02)
    judged.vast.faults.on("charges.list", effect, times=None)
    ended(judged, name)
    (made,) = judged.made()
    cost, split = judged.backend.cost(name), judged.vast.meter.cost_split(made)
    assert cost and cost.traffic is None and cost.total is None
    assert cost.gpu == pytest.approx(split["gpu"], rel=0.05)
    assert cost.disk == pytest.approx(split["disk"], rel=0.05)


def test_what_is_booked_late_is_on_the_bill_all_the_same(judged: VastRig) -> None:
    name, until = judged.up(), time.monotonic() + 3.0
    while time.monotonic() < until:
        judged.backend.find(name)
        time.sleep(0.02)
    judged.vast.faults.booked_late = 2.0
    ended(judged, name)
    (made,) = judged.made()
    cost, split = judged.backend.cost(name), judged.vast.meter.cost_split(made)
    assert cost and cost.gpu == pytest.approx(split["gpu"], rel=0.05), cost
    assert cost.total == pytest.approx(judged.vast.meter.cost(made), rel=0.05), "traffic is what was booked"
    assert "vast.ai has booked 0.0" in cost.note
    judged.vast.faults.booked_late = 0.0
    exact = judged.backend.cost(name)
    assert exact and exact.gpu == pytest.approx(split["gpu"], rel=1e-6) and not exact.note


def test_what_nobody_looked_at_is_not_held_against_the_charges(judged: VastRig) -> None:
    """A client's computer that slept: the container was up when it went to sleep, and is long gone."""
    name = judged.up()
    assert judged.backend.find(name)
    judged.end_all()
    judged.vast.clock.advance(3600.0)
    ended(judged, name)
    cost = judged.backend.cost(name)
    assert cost and cost.gpu == pytest.approx(judged.vast.meter.cost_split(judged.made()[0])["gpu"], rel=0.01)
    assert not cost.note


def test_hosts_that_failed_are_on_the_bill(judged: VastRig) -> None:
    judged.vast.faults.on("asks.create", Parked())
    first, second, *_ = judged.backend.offers(NEED)
    with pytest.raises(NoCapacity):
        judged.backend.create("toy-1", first, judged.boot("toy", 1, 600.0))
    judged.backend.create("toy-1", second, judged.boot("toy", 1, 600.0))
    judged.vast.wait(judged.made()[-1], "running")
    ended(judged, "toy-1")
    cost = judged.backend.cost("toy-1")
    assert len(judged.made()) == 2
    assert cost and cost.total == pytest.approx(judged.vast.meter.total(), rel=0.01)


def test_api_errors_name_the_service() -> None:
    assert str(ApiError("no")) == "vast.ai: no"
