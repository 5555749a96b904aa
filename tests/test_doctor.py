"""`cloudrun doctor` as its users type it, against the emulated cloud: one thing broken, one line wrong."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from client import COMMAND
from cloud import iam, storage_http
from cloud.compute import REFRESH, Cloud
from cloud.storage import Storage
from cloud.tokens import Granted
from gce import key_file, need_client

USER = "user@example.com"
ROBOT = "robot@test-project.iam.gserviceaccount.com"
MACHINE = "123456789012-compute@developer.gserviceaccount.com"
GRANT = "gcloud storage buckets add-iam-policy-binding gs://b --member={} --role=roles/storage.objectAdmin"
UPDATE = "gcloud storage buckets update gs://b --"
PAGE = "https://console.cloud.google.com/iam-admin/quotas?project=test-project"
NEW = (
    "gcloud storage buckets create gs://{} --project=test-project --location=us-central1 "
    "--uniform-bucket-level-access --soft-delete-duration=0"
)


class Clinic:
    """A cloud in which everything is right, and the account of a person who uses it."""

    def __init__(self, folder: Path, cloud: Cloud, storage: Storage) -> None:
        self.folder, self.cloud, self.storage = folder, cloud, storage
        cloud.faults.anonymous = False
        storage.tokens = Granted(cloud.tokens)  # type: ignore[assignment]
        storage.create_bucket("b", softDeletePolicy={"retentionDurationSeconds": "0"})
        member = f"serviceAccount:{MACHINE}"
        storage.policies["b"] = [{"role": "roles/storage.objectAdmin", "members": [member]}]
        login = folder / "application_default_credentials.json"
        known = {"type": "authorized_user", "client_id": "id", "client_secret": "secret"}
        login.write_text(json.dumps({**known, "refresh_token": REFRESH}))
        self.env = {
            **cloud.environ(),
            "STORAGE_EMULATOR_HOST": storage.url,
            "GOOGLE_APPLICATION_CREDENTIALS": str(login),
            "GCP_ACCOUNT": USER,
            "GCS_DIR": "gs://b/runs",
            "VM_INSTANCE": "my-vm",
            "VM_USER": "student",
            "HOME": str(folder),
            "XDG_DATA_HOME": str(folder / "data"),
            "PATH": os.environ["PATH"],
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def run(self, *arguments: str, cwd: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """A variable that is set to nothing here is not set there."""
        merged = {name: value for name, value in {**self.env, **env}.items() if value}
        whole, where = [*COMMAND, *arguments], cwd or self.folder
        return subprocess.run(whole, cwd=where, env=merged, capture_output=True, text=True, timeout=60)

    def findings(self, *arguments: str, code: int = 0, **env: str) -> list[dict[str, str]]:
        done = self.run(*arguments, "doctor", "--json", **env)
        assert done.returncode == code, done.stdout + done.stderr
        found: list[dict[str, str]] = json.loads(done.stdout)
        assert all(set(each) == {"check", "state", "words", "mend"} for each in found)
        return found

    def wrong(self, **env: str) -> dict[str, str]:
        """{check: mend} of all that is wrong."""
        found = self.findings(code=2, **env)
        return {each["check"]: each["mend"] for each in found if each["state"] == "wrong"}


@pytest.fixture
def clinic(tmp_path: Path) -> Iterator[Clinic]:
    need_client()
    with Cloud(tmp_path, machines=False) as cloud, Storage() as storage:
        clinic = Clinic(tmp_path, cloud, storage)
        yield clinic
        assert cloud.violations == [] and not cloud.inserts()
        assert {each.verb for each in cloud.requests} <= {"GET"}
        assert {each.kind for each in storage.requests if each.method != "GET"} <= {"insert", "delete"}


def states(found: list[dict[str, str]]) -> dict[str, str]:
    return {each["check"]: each["state"] for each in found}


def test_where_everything_is_right_every_line_is_ok(clinic: Clinic) -> None:
    found = clinic.findings()
    assert {each["state"] for each in found} == {"ok"}, found
    assert {each["mend"] for each in found} == {""}
    assert clinic.storage.objects("b") == {}
    assert [each.kind for each in clinic.storage.requests if each.method != "GET"] == ["insert", "delete"]
    assert set(states(found)) >= {
        *("settings", "SDK", "credentials", "account", "compute API", "storage API", "compute permissions"),
        *(
            "iam.serviceAccounts.actAs",
            "machine's account",
            "storage permissions",
            "bucket",
            "bucket location",
        ),
        *("bucket uniform access", "bucket soft delete", "bucket versioning", "bucket retention"),
        *("bucket requester pays", "bucket write", "network", "external address", "image"),
        *("type in us-central1-a", "GPUS_ALL_REGIONS", "NVIDIA_L4_GPUS", "clock"),
    }


def test_people_get_a_line_for_each_and_no_colours_through_a_pipe(clinic: Clinic) -> None:
    clinic.storage.change_bucket("b", versioning={"enabled": True})
    done = clinic.run("doctor")
    assert done.returncode == 2 and "\x1b" not in done.stdout and done.stderr == ""
    lines = done.stdout.splitlines()
    at = next(
        number for number, line in enumerate(lines) if line.startswith("wrong    bucket versioning: on")
    )
    assert lines[at + 1].strip() == UPDATE + "no-versioning"
    assert sum(line.startswith("ok ") for line in lines) > 20
    quiet = clinic.run("doctor", "--quiet").stdout.splitlines()
    assert quiet == lines[at : at + 2]


@pytest.mark.parametrize(
    ("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colours_are_for_terminals(tmp_path: Path, env: dict[str, str], coloured: bool) -> None:
    ours, theirs = pty.openpty()
    known = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "TERM": "xterm", "CLOUDRUN_BACKEND": "local"}
    process = subprocess.Popen([*COMMAND, "doctor"], cwd=tmp_path, env={**known, **env}, stdout=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # a terminal's way to say that nobody writes any more
        pass
    os.close(ours)
    assert process.wait(20) == 0
    assert (b"\x1b[32mok" in shown) is coloured and b"bucket: " in shown


# --- one thing broken


def deny(*permissions: str) -> Callable[[Clinic], None]:
    def act(clinic: Clinic) -> None:
        for permission in permissions:
            clinic.cloud.faults.denied.add(("*", permission))
            clinic.storage.denied.add(("*", permission))

    return act


def disable(name: str) -> Callable[[Clinic], None]:
    return lambda clinic: clinic.cloud.faults.disabled.add(name)


def change(**fields: Any) -> Callable[[Clinic], None]:
    return lambda clinic: clinic.storage.change_bucket("b", **fields)


def limit(metric: Any, number: float) -> Callable[[Clinic], None]:
    return lambda clinic: clinic.cloud.quotas.limits.update({metric: number})


def no_storage(clinic: Clinic) -> None:
    clinic.storage.faults.add(times=99, status=403, reason="accessNotConfigured", message="has not been used")


def no_policy(clinic: Clinic) -> None:
    clinic.storage.policies["b"] = []


def no_account(clinic: Clinic) -> None:
    clinic.cloud.iam.accounts.clear()


def no_addresses(clinic: Clinic) -> None:
    clinic.cloud.iam.constraints[iam.EXTERNAL_ADDRESSES] = {"allValues": "DENY"}


ADMIN = (
    f"gcloud projects add-iam-policy-binding test-project --member=user:{USER} "
    "--role=roles/compute.instanceAdmin.v1"
)
ACT = (
    f"gcloud iam service-accounts add-iam-policy-binding {MACHINE} --member=user:{USER} "
    "--role=roles/iam.serviceAccountUser --project=test-project"
)
MINE = GRANT.format(f"user:{USER}")
ELSEWHERE = NEW.format("b-us-central1") + "\nexport GCS_DIR=gs://b-us-central1/runs"
BROKEN: dict[str, tuple[Callable[[Clinic], object], dict[str, str]]] = {
    "compute off": (
        disable("compute.googleapis.com"),
        {"compute API": "gcloud services enable compute.googleapis.com --project=test-project"},
    ),
    "storage off": (
        no_storage,
        {"storage API": "gcloud services enable storage.googleapis.com --project=test-project"},
    ),
    "may not create": (deny("compute.instances.create"), {"compute.instances.create": ADMIN}),
    "may not do two": (
        deny("compute.disks.create", "compute.subnetworks.useExternalIp"),
        {"compute.disks.create": ADMIN, "compute.subnetworks.useExternalIp": ADMIN},
    ),
    "may not act": (deny("iam.serviceAccounts.actAs"), {"iam.serviceAccounts.actAs": ACT}),
    "no such account": (
        no_account,
        {"iam.serviceAccounts.actAs": "gcloud iam service-accounts list --project=test-project"},
    ),
    "machine may not": (no_policy, {"machine's account": GRANT.format(f"serviceAccount:{MACHINE}")}),
    "may not list": (deny("storage.objects.list"), {"storage.objects.list": MINE}),
    "may not write": (
        deny("storage.objects.create"),
        {"storage.objects.create": MINE, "bucket write": MINE},
    ),
    "multi-region": (change(location="US", locationType="multi-region"), {"bucket location": ELSEWHERE}),
    "far away": (change(location="EUROPE-WEST4"), {"bucket location": ELSEWHERE}),
    "access": (
        change(iamConfiguration={"uniformBucketLevelAccess": {"enabled": False}}),
        {"bucket uniform access": UPDATE + "uniform-bucket-level-access"},
    ),
    "soft delete": (
        change(softDeletePolicy={"retentionDurationSeconds": "604800"}),
        {"bucket soft delete": UPDATE + "clear-soft-delete"},
    ),
    "versions": (change(versioning={"enabled": True}), {"bucket versioning": UPDATE + "no-versioning"}),
    "retention": (
        change(retentionPolicy={"retentionPeriod": "3600"}),
        {"bucket retention": UPDATE + "clear-retention-period"},
    ),
    "who pays": (
        change(billing={"requesterPays": True}),
        {"bucket requester pays": UPDATE + "no-requester-pays"},
    ),
    "addresses": (no_addresses, {"external address": "export VM_EXTERNAL_IP=0"}),
    "quota everywhere": (limit("GPUS_ALL_REGIONS", 0), {"GPUS_ALL_REGIONS": PAGE}),
    "quota here": (limit(("us-central1", "NVIDIA_L4_GPUS"), 0), {"NVIDIA_L4_GPUS": PAGE}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_one_thing_broken_is_one_line_wrong(clinic: Clinic, name: str) -> None:
    act, wrong = BROKEN[name]
    act(clinic)
    assert clinic.wrong() == wrong
    assert clinic.storage.objects("b") == {}


def test_a_probe_that_cannot_be_deleted_is_named(clinic: Clinic) -> None:
    deny("storage.objects.delete")(clinic)
    wrong = clinic.wrong()
    (left,) = clinic.storage.objects("b")
    assert wrong == {
        "storage.objects.delete": MINE,
        "bucket write": f"{MINE}\ngcloud storage rm gs://b/{left}",
    }


SETTINGS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "no project": (
        {"GCLOUD_PROJECT": ""},
        {"settings": "export GCLOUD_PROJECT=my-project-id"},
    ),
    "no bucket": ({"GCS_DIR": ""}, {"settings": "export GCS_DIR=gs://my-bucket/runs"}),
    "another bucket": ({"GCS_DIR": "gs://c"}, {"bucket": NEW.format("c")}),
    "moon": ({"VM_ZONE": "moon"}, {"settings": "export VM_ZONE='us-central1-a us-central1-b'"}),
    "no such zone": (
        {"VM_ZONE": "us-central1-a us-central1-x"},
        {
            "type in us-central1-x": 'gcloud compute machine-types list --filter="name=g2-standard-4" '
            '--format="value(zone)" --project=test-project\nexport VM_ZONE=ZONE'
        },
    ),
    "no such network": (
        {"VM_NETWORK": "global/networks/mine"},
        {
            "network": "gcloud compute networks list --project=test-project\n"
            "export VM_NETWORK=global/networks/NAME"
        },
    ),
    "no such subnet": (
        {"VM_SUBNET": "regions/us-central1/subnetworks/mine"},
        {
            "subnet": "gcloud compute networks subnets list --project=test-project\n"
            "export VM_SUBNET=regions/REGION/subnetworks/NAME"
        },
    ),
    "no such image": (
        {"VM_IMAGE": "projects/deeplearning-platform-release/global/images/family/common-gpu"},
        {
            "image": "gcloud compute images list --project=deeplearning-platform-release "
            "--no-standard-images\nexport VM_IMAGE=projects/PROJECT/global/images/family/FAMILY"
        },
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_one_wrong_setting_is_one_line_wrong(clinic: Clinic, name: str) -> None:
    env, wrong = SETTINGS[name]
    assert clinic.wrong(**env) == wrong


def test_every_wrong_setting_has_its_line(clinic: Clinic) -> None:
    found = clinic.findings(code=2, VM_SPOT="perhaps", VM_DISK="much", CLOUDRUN_MAX_HOURS="x")
    wrong = {each["mend"] for each in found if each["state"] == "wrong"}
    assert wrong == {"export VM_SPOT=1", "export VM_DISK=100", "export CLOUDRUN_MAX_HOURS=2"}


def test_spot_machines_have_quotas_of_their_own(clinic: Clinic) -> None:
    limit(("us-central1", "PREEMPTIBLE_NVIDIA_L4_GPUS"), 0)(clinic)
    assert clinic.wrong(VM_SPOT="1") == {"PREEMPTIBLE_NVIDIA_L4_GPUS": PAGE}
    assert states(clinic.findings())["NVIDIA_L4_GPUS"] == "ok"
    assert states(clinic.findings(VM_GPU="none"))["GPU quota"] == "-"
    assert (
        states(clinic.findings(VM_GPU="H200:8", VM_SPOT="1", VM_ZONE="us-central1-b"))["GPU quota"]
        == "unknown"
    )


def test_what_may_not_be_seen_is_unknown_and_nothing_is_wrong(clinic: Clinic) -> None:
    """roles/storage.objectAdmin has neither of the first two, and few people have the others."""
    deny("storage.buckets.get", "storage.buckets.getIamPolicy")(clinic)
    deny("orgpolicy.policy.get", "resourcemanager.projects.getIamPolicy")(clinic)
    found = clinic.findings()
    unknown = {each["check"]: each["mend"] for each in found if each["state"] == "unknown"}
    grant = GRANT.format(f"serviceAccount:{MACHINE}")
    assert unknown == {"bucket": "", "external address": "", "machine's account": grant}


def test_an_editor_of_the_project_may_write_to_its_buckets(clinic: Clinic) -> None:
    clinic.cloud.iam.bindings = [{"role": "roles/editor", "members": [f"serviceAccount:{MACHINE}"]}]
    roles = ("roles/storage.legacyBucketOwner", "roles/storage.legacyObjectOwner")
    editors = ["projectEditor:test-project"]
    clinic.storage.policies["b"] = [{"role": role, "members": editors} for role in roles]
    assert states(clinic.findings())["machine's account"] == "ok"


def test_the_policies_apis_are_not_needed_by_a_run(clinic: Clinic) -> None:
    clinic.cloud.faults.disabled |= {iam.RESOURCES, iam.IAM}
    found = {each["check"]: each["mend"] for each in clinic.findings() if each["state"] == "unknown"}
    enable = f"gcloud services enable {iam.RESOURCES} --project=test-project"
    assert found["permissions"] == enable and iam.IAM in found["iam.serviceAccounts.actAs"]


# --- whose credentials


def test_another_account_is_one_line_wrong_and_no_run_begins(clinic: Clinic) -> None:
    login = (
        "unset GOOGLE_APPLICATION_CREDENTIALS\ngcloud auth application-default login --account=me@example.com"
    )
    assert clinic.wrong(GCP_ACCOUNT="me@example.com") == {"account": login}
    project = clinic.folder / "toy"
    project.mkdir()
    (project / "main.py").write_text("")
    for arguments in (["main.py"], ["ps"]):
        done = clinic.run(*arguments, GCP_ACCOUNT="me@example.com", cwd=str(project))
        assert done.returncode == 2, done.stderr
        assert f"those of {USER}" in done.stderr and "login --account=me@example.com" in done.stderr
    assert clinic.storage.objects("b") == {}


def test_the_backend_refuses_another_account_by_itself(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cloudrun.backends.gcp_api import Compute
    from cloudrun.errors import UsageError

    for name, value in {**clinic.env, "GCP_ACCOUNT": "me@example.com"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"credentials in use are those of {USER}"):
        Compute("test-project", os.environ).listed("name=x")


def test_without_credentials_or_with_dead_ones_the_login_is_told(clinic: Clinic) -> None:
    login = f"gcloud auth application-default login --account={USER}"
    clinic.cloud.logins.dead.add(USER)
    dead = clinic.wrong()
    assert dead == {"credentials": f"unset GOOGLE_APPLICATION_CREDENTIALS\n{login}"}
    none = {"GOOGLE_APPLICATION_CREDENTIALS": "", "STORAGE_EMULATOR_HOST": ""}
    none["CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE"] = ""
    assert clinic.wrong(**none, CLOUDSDK_CONFIG=str(clinic.folder / "no"))["credentials"] == login


def test_a_service_account_is_impersonated(clinic: Clinic) -> None:
    found = clinic.findings(GCP_ACCOUNT=ROBOT)
    assert {each["state"] for each in found} == {"ok"}
    assert {each.user for each in clinic.cloud.requests} == {ROBOT}
    done = clinic.run("ps", "--json", GCP_ACCOUNT=ROBOT)
    assert (done.returncode, json.loads(done.stdout)) == (0, []), done.stderr
    assert {each.user for each in clinic.cloud.requests} == {ROBOT}
    asked = {clinic.cloud.tokens[each.token].principal for each in clinic.storage.requests if each.token}
    assert asked == {ROBOT}
    clinic.cloud.logins.dead.add(ROBOT)
    mend = clinic.wrong(GCP_ACCOUNT=ROBOT)["credentials"]
    assert f"add-iam-policy-binding {ROBOT}" in mend and "roles/iam.serviceAccountTokenCreator" in mend


def test_the_key_of_a_service_account_is_used_as_it_is(clinic: Clinic) -> None:
    key = key_file(clinic.cloud, clinic.folder / "key.json", ROBOT)
    found = clinic.findings(GCP_ACCOUNT=ROBOT, GOOGLE_APPLICATION_CREDENTIALS=str(key))
    assert states(found)["account"] == "ok"
    assert not [call for call in clinic.cloud.logins.calls if "generateAccessToken" in call.path]


# --- no network, another clock, another backend


def test_without_a_network_it_says_so_and_ends(clinic: Clinic) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        env = {name: nowhere for name in clinic.env if name.startswith("CLOUDSDK")}
        began = time.monotonic()
        found = clinic.findings(code=2, **env, STORAGE_EMULATOR_HOST=nowhere)
        assert time.monotonic() - began < 20
    assert states(found)["settings"] == states(found)["SDK"] == "ok"
    assert {each["state"] for each in found[2:]} == {"unknown", "wrong"}
    assert any("cannot be reached" in each["words"] for each in found if each["state"] == "wrong")


def test_a_server_that_never_answers_holds_up_nobody_for_long(clinic: Clinic) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        began = time.monotonic()
        found = clinic.findings(CLOUDSDK_API_ENDPOINT_OVERRIDES_CLOUDRESOURCEMANAGER=url)
        assert time.monotonic() - began < 25
    seen = states(found)
    assert seen["permissions"] == seen["external address"] == "unknown" and seen["bucket write"] == "ok"


@pytest.mark.parametrize(("off", "words"), [(90.0, "behind"), (-90.0, "ahead of"), (9.0, "within")])
def test_a_wrong_clock_is_told(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch, off: float, words: str
) -> None:
    def date(handler: Any, timestamp: float | None = None) -> str:
        return formatdate(time.time() + off, usegmt=True)

    monkeypatch.setattr(storage_http.Handler, "date_time_string", date)
    if words == "within":
        assert states(clinic.findings())["clock"] == "ok"
    else:
        assert clinic.wrong() == {"clock": "sudo timedatectl set-ntp true"}
        assert words in clinic.run("doctor", "-q").stdout


def test_the_local_backend_has_less_to_look_at(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [*COMMAND, "doctor", "--json"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert [each["check"] for each in found] == ["settings", "python", "bucket", "clock"]
    assert done.returncode == 0 and {each["state"] for each in found} == {"ok"}
    assert sys.executable in found[1]["words"]
    bad = {**env, "GCS_DIR": "file:///proc/no"}
    done = subprocess.run([*COMMAND, "doctor"], cwd=tmp_path, env=bad, capture_output=True, text=True)
    assert done.returncode == 2 and "export GCS_DIR=file://" in done.stdout


def test_settings_that_vast_cannot_have_are_found(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "VAST_API_KEY": "k", "GCS_DIR": "gs://b"}
    env.update({"VM_GPU": "none", "VAST_IMAGE": "image"})
    done = subprocess.run([*COMMAND, "doctor"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "export VM_GPU=" in done.stdout and "export VAST_IMAGE=" in done.stdout


def test_options_that_only_a_run_obeys_are_refused(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "--detach", "doctor"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "only starting a run takes this option" in done.stderr
