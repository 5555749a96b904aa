"""Who asks, and what they and the machine's account may do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cloudrun import account
from cloudrun.doctor import NONE, OK, UNKNOWN, WRONG, Finding, allowed
from cloudrun.doctor.google import Google, Refused

INSTANCES = "create delete get list start stop setLabels setMetadata setServiceAccount setTags setScheduling"
NEEDED = [
    *(f"compute.disks.{verb}" for verb in ("create", "delete", "get", "list")),
    "compute.images.useReadOnly",
    *(f"compute.instances.{verb}" for verb in f"{INSTANCES} getSerialPortOutput getGuestAttributes".split()),
    *("compute.machineTypes.get", "compute.networks.get", "compute.subnetworks.use"),
    *(
        "compute.zoneOperations.get",
        "compute.zoneOperations.list",
        "compute.projects.get",
        "compute.regions.get",
    ),
]
WRITERS = {f"roles/storage.{name}" for name in ("admin", "objectAdmin", "objectUser")}
# What a new bucket gives the owners and editors of its project.
LEGACY = {"roles/storage.legacyBucketOwner", "roles/storage.legacyObjectOwner"}


def credentials(google: Google, service: str = "compute") -> Iterator[Finding]:
    from google.auth.exceptions import GoogleAuthError, TransportError

    wanted, login = google.environ.get("GCP_ACCOUNT", ""), account.login(google.environ)
    try:
        google.login(service)
    except TransportError as error:
        yield Finding("credentials", UNKNOWN, f"Google cannot be reached to check them: {str(error)[:200]}")
        return
    except (GoogleAuthError, ValueError) as error:
        words, mend = str(error).partition("\n")[0], login
        if wanted.endswith(account.ROBOT) and "impersonated" in words:
            mend = (
                f"gcloud iam service-accounts add-iam-policy-binding {wanted} --member=user:YOU@example.com "
                f"--role=roles/iam.serviceAccountTokenCreator --project={google.project}"
            )
        yield Finding("credentials", WRONG, words, mend)
        return
    yield Finding("credentials", OK, google.email or "none, as for an emulator; Google does not say whose")
    if not wanted:
        yield Finding("account", NONE, "GCP_ACCOUNT is not set, any will do")
    elif google.email.lower() == wanted.lower():
        yield Finding("account", OK, f"GCP_ACCOUNT={wanted}")
    else:
        yield Finding("account", WRONG, account.differs(google.email, wanted), login)


def compute_api(google: Google) -> Iterator[Finding]:
    yield _enabled(google, "compute API", lambda: google.compute(""))


def storage_api(google: Google) -> Iterator[Finding]:
    yield _enabled(google, "storage API", lambda: google.storage(fields="name"))


def _enabled(google: Google, check: str, ask: Any) -> Finding:
    """Whatever it answers, but that it is not enabled, shows that it is."""
    try:
        ask()
    except Refused as error:
        if error.disabled or (error.mend and not error.code):
            return Finding(check, WRONG, str(error), error.mend)
        if check.startswith("compute") and error.code == 404:
            return Finding(check, WRONG, f"there is no project {google.project}", "gcloud projects list")
        if not error.code or error.code == 401:
            raise
    return Finding(check, OK, "enabled")


def permissions(google: Google) -> Iterator[Finding]:
    asked = NEEDED + ["compute.subnetworks.useExternalIp"] * google.external
    held = google.resources("testIamPermissions", {"permissions": asked}).get("permissions", [])
    mend = (
        f"gcloud projects add-iam-policy-binding {google.project} --member={google.member} "
        "--role=roles/compute.instanceAdmin.v1"
    )
    yield from allowed(asked, held, f"project {google.project}", mend)


def act_as(google: Google) -> Iterator[Finding]:
    email, permission = google.machine_account(), "iam.serviceAccounts.actAs"
    path = f"v1/projects/-/serviceAccounts/{email}:testIamPermissions"
    try:
        held = google.ask("iam", path, {"permissions": [permission]}).get("permissions", [])
    except Refused as error:
        if error.code != 404:
            raise
        mend = f"gcloud iam service-accounts list --project={google.project}"
        yield Finding(permission, WRONG, f"there is no service account {email} for machines", mend)
        return
    mend = (
        f"gcloud iam service-accounts add-iam-policy-binding {email} --member={google.member} "
        f"--role=roles/iam.serviceAccountUser --project={google.project}"
    )
    state, words = (OK, f"machines may get {email}") if held else (WRONG, f"not allowed on {email}")
    yield Finding(permission, state, words, "" if held else mend)


def machine(google: Google) -> Iterator[Finding]:
    """Whether the policies name the machine's account; what it has through groups or folders is not seen."""
    check, email = "machine's account", google.machine_account()
    member, mend = f"serviceAccount:{email}", google.grant(f"serviceAccount:{email}")
    ours, unseen = {member}, ""
    bindings: list[dict[str, Any]] = []
    try:
        bindings += google.resources("getIamPolicy", {}).get("bindings", [])
        basic = {
            each["role"].removeprefix("roles/") for each in bindings if member in each.get("members", ())
        }
        ours |= {f"project{name.title()}:{google.project}" for name in basic & {"owner", "editor"}}
    except Refused as error:
        unseen = f"the project's policy: {error}"
    try:
        bindings += google.storage("/iam").get("bindings", [])
    except Refused as error:
        unseen = f"the bucket's policy: {error}"
    roles = {each["role"] for each in bindings if ours & set(each.get("members", ()))}
    if roles & WRITERS or roles >= LEGACY:
        yield Finding(check, OK, f"{email} may read and write gs://{google.bucket}")
    elif unseen:
        yield Finding(
            check, UNKNOWN, f"whether {email} may write to the bucket: not to be seen, {unseen}", mend
        )
    else:
        yield Finding(check, WRONG, f"no policy lets {email} write to gs://{google.bucket}", mend)
