"""`cloudrun doctor` for vast.ai, against the emulated one: one thing broken, one line wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cloud import vast_errors
from cloud.compute import Cloud
from cloud.faults import Answer
from cloud.storage import Storage
from cloud.vast import Vast
from gce import need_client
from test_doctor import GRANT, USER, Clinic, states
from vast_client import need_client as need_vastai

BILLING_READ = "give the key the permission billing_read: https://cloud.vast.ai/manage-keys/"
KEY = "export VAST_API_KEY=KEY  # https://cloud.vast.ai/manage-keys/"
STS = "gcloud services enable sts.googleapis.com"
MINE = GRANT.format(f"user:{USER}")


class VastClinic(Clinic):
    """An account of vast.ai with some credit, and one of Google for the bucket."""

    def __init__(self, folder: Path, cloud: Cloud, storage: Storage, vast: Vast) -> None:
        super().__init__(folder, cloud, storage)
        self.vast = vast
        here = {"CLOUDRUN_BACKEND": "vast", "VM_GPU": "RTX 4090", "GCP_ACCOUNT": ""}
        self.env = {
            **self.env,
            **vast.environ(),
            **here,
            "VM_INSTANCE": "",
            "VM_USER": "",
            "GCLOUD_PROJECT": "",
        }


@pytest.fixture
def clinic(tmp_path: Path) -> Iterator[VastClinic]:
    need_client()
    need_vastai()
    there = Cloud(tmp_path, machines=False), Storage(), Vast(tmp_path / "vast", machines=False)
    with there[0] as cloud, there[1] as storage, there[2] as vast:
        yield VastClinic(tmp_path, cloud, storage, vast)
        assert {request.method for request in vast.requests} <= {"users.current", "charges.list"}
    assert storage.objects("b") == {}


def test_where_everything_is_right_every_line_is_ok(clinic: VastClinic) -> None:
    found = clinic.findings()
    assert {each["state"] for each in found if each["check"] != "account"} == {"ok"}, found
    assert set(states(found)) >= {
        *(
            "settings",
            "SDK",
            "credentials",
            "VAST_API_KEY",
            "vast.ai credit",
            "vast.ai charges",
            "storage permissions",
            "bucket",
        ),
        *("bucket write", "bucket soft delete", "machine's token", "machine's token, allowed"),
        *("machine's token, forbidden", "clock"),
    }
    assert "bucket location" not in states(found), "a stranger's machine can be anywhere"
    assert {each["words"] for each in found if each["check"] == "vast.ai credit"} == {"25.00 USD"}


def test_no_key_and_no_token_is_ever_shown(clinic: VastClinic) -> None:
    done = clinic.run("doctor", "--json")
    assert done.returncode == 0
    secrets = [clinic.vast.key, "refresh-token", *clinic.cloud.tokens]
    assert len(secrets) > 2 and not [each for each in secrets if each in done.stdout + done.stderr]


def wrong_key(clinic: VastClinic) -> None:
    clinic.env["VAST_API_KEY"] = "not-the-key"


def wrong_key_as_404(clinic: VastClinic) -> None:
    wrong_key(clinic)
    clinic.vast.faults.bad_key = 404


def no_credit(clinic: VastClinic) -> None:
    clinic.vast.credit = 0.0


def no_charges(clinic: VastClinic) -> None:
    clinic.vast.faults.on("charges.list", Answer(vast_errors.forbidden("billing_read")), times=None)


def no_exchange(clinic: VastClinic) -> None:
    clinic.env["CLOUDSDK_API_ENDPOINT_OVERRIDES_STS"] = clinic.storage.url


def no_boundary(clinic: VastClinic) -> None:
    """A token that may do all that its source may: what must never reach a stranger."""
    clinic.cloud.logins.boundless = True


def no_writing(clinic: VastClinic) -> None:
    clinic.storage.denied.add(("*", "storage.objects.create"))


BROKEN: dict[str, tuple[Callable[[VastClinic], None], dict[str, str]]] = {
    "key": (wrong_key, {"VAST_API_KEY": KEY}),
    "key, as it is said elsewhere": (wrong_key_as_404, {"VAST_API_KEY": KEY}),
    "credit": (no_credit, {"vast.ai credit": "add some: https://cloud.vast.ai/billing/"}),
    "charges": (no_charges, {"vast.ai charges": BILLING_READ}),
    "exchange": (no_exchange, {"machine's token": STS}),
    "boundary": (no_boundary, {"machine's token, forbidden": "export CLOUDRUN_BACKEND=gcp"}),
    "writing": (
        no_writing,
        {"storage.objects.create": MINE, "bucket write": MINE, "machine's token, allowed": MINE},
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_one_thing_broken_is_one_line_wrong(clinic: VastClinic, name: str) -> None:
    act, wrong = BROKEN[name]
    act(clinic)
    assert clinic.wrong() == wrong


def test_vast_ai_that_does_not_answer_is_unknown(clinic: VastClinic) -> None:
    clinic.env["VAST_URL"] = "http://127.0.0.1:9"
    found = states(clinic.findings())
    assert found["VAST_API_KEY"] == "unknown" and found["machine's token"] == "ok"


def test_without_a_key_it_is_asked_for(clinic: VastClinic) -> None:
    clinic.env["VAST_API_KEY"] = ""
    assert clinic.wrong() == {"settings": "export VAST_API_KEY=my-key"}
