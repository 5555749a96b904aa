"""What `cloudrun doctor` asks Google Cloud, and what the answers mean.

Through google.auth alone: to import the SDK takes longer than all of the questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from cloudrun import account
from cloudrun.backends.gcp_wanted import Wanted, wanted
from cloudrun.backends.gcp_wire import ENDPOINT, GOOGLE
from cloudrun.config import of_a_vm
from cloudrun.errors import CloudrunError, UsageError

TIMEOUT = (4.0, 8.0)  # seconds to connect, and for an answer
OVERRIDES = "CLOUDSDK_API_ENDPOINT_OVERRIDES_"
SERVICES = {
    "compute": (ENDPOINT, GOOGLE),
    "storage": ("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com/"),
    "cloudresourcemanager": (
        f"{OVERRIDES}CLOUDRESOURCEMANAGER",
        "https://cloudresourcemanager.googleapis.com/",
    ),
    "iam": (f"{OVERRIDES}IAM", "https://iam.googleapis.com/"),
}


class Refused(CloudrunError):
    """The service's answer, or that there is none (`code` 0). `mend`: see Finding."""

    def __init__(self, words: str, code: int = 0, mend: str = "", *, disabled: bool = False) -> None:
        super().__init__(words)
        self.code, self.mend, self.disabled = code, mend, disabled


class Google:
    """What is asked of which services, for whom; without credentials nothing can be."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ, self.vm = environ, of_a_vm(environ)
        self.project = environ.get("GCLOUD_PROJECT", "")
        _, scheme, path = environ.get("GCS_DIR", "").rpartition("gs://")
        self.bucket, _, self.directory = path.strip("/").partition("/") if scheme else ("", "", "")
        self.email = ""
        self.session: Any = None
        self.wanted: Wanted | None = None
        with suppress(UsageError):  # the settings' own lines say what is wrong
            self.wanted = wanted(self.vm)

    @property
    def member(self) -> str:
        kind = "serviceAccount" if self.email.endswith(account.ROBOT) else "user"
        return f"{kind}:{self.email or 'YOU@example.com'}"

    def grant(self, member: str) -> str:
        """What lets somebody use the bucket's objects."""
        return (
            f"gcloud storage buckets add-iam-policy-binding gs://{self.bucket} --member={member} "
            "--role=roles/storage.objectAdmin"
        )

    @property
    def external(self) -> bool:
        """Whether machines get an external address."""
        return self.vm.get("VM_EXTERNAL_IP", "1").lower() not in ("0", "no", "none", "false")

    @property
    def regions(self) -> list[str]:
        return sorted({zone.rpartition("-")[0] for zone in self.what_is_wanted().zones})

    def what_is_wanted(self) -> Wanted:
        if not self.wanted:
            raise Refused("the settings are wrong")
        return self.wanted

    def endpoint(self, service: str) -> str:
        variable, default = SERVICES[service]
        return self.environ.get(variable, default).rstrip("/") + "/"

    def login(self, service: str = "compute") -> None:
        """Raises what google.auth raises."""
        from google.auth.exceptions import RefreshError
        from google.auth.transport.requests import AuthorizedSession, Request

        found = account.acting(self.environ, self.environ.get(SERVICES[service][0], ""))
        self.session = AuthorizedSession(found)
        if account.anonymous(found):
            return
        try:
            self.email = account.whose(found, self.environ)
            if not found.valid:  # who says its name unasked has yet to show that it is still let in
                found.refresh(Request())
        except RefreshError:
            self.session = None
            raise

    def ask(self, service: str, path: str, body: Any = None, *, verb: str = "", **query: Any) -> Any:
        """The answer's JSON. Raises Refused."""
        if self.session is None:
            raise Refused("nothing can be asked without credentials")
        from google.auth.exceptions import GoogleAuthError
        from requests.exceptions import RequestException

        url, verb = self.endpoint(service) + path, verb or ("GET" if body is None else "POST")
        try:
            answer = self.session.request(verb, url, json=body, params=query, timeout=TIMEOUT)
        except (RequestException, GoogleAuthError) as error:
            host = urlsplit(url).netloc
            raise Refused(
                f"{host} cannot be reached: {type(error).__name__}", 0, f"curl -sSI {url}"
            ) from None
        if answer.status_code >= 300:
            raise self._refusal(service, answer)
        return answer.json() if answer.content else {}

    def _refusal(self, service: str, answer: Any) -> Refused:
        try:
            error = answer.json()["error"]
        except (ValueError, LookupError, TypeError):
            error = {"message": answer.text[:200]}
        reasons = {each.get("reason") for each in (*error.get("errors", ()), *error.get("details", ()))}
        if reasons & {"SERVICE_DISABLED", "accessNotConfigured"}:
            name = f"{service}.googleapis.com"
            mend = f"gcloud services enable {name} --project={self.project}"
            return Refused(f"{name} is not enabled", answer.status_code, mend, disabled=True)
        return Refused(f"{error.get('message')} (status {answer.status_code})", answer.status_code)

    def compute(self, path: str) -> Any:
        if not self.project:
            raise Refused("GCLOUD_PROJECT is not set")
        whole = path if path.startswith("projects/") else f"projects/{self.project}/{path}"
        return self.ask("compute", whole.rstrip("/"))

    def resources(self, method: str, body: Any) -> Any:
        """A method of Resource Manager on the project."""
        if not self.project:
            raise Refused("GCLOUD_PROJECT is not set")
        return self.ask("cloudresourcemanager", f"v1/projects/{self.project}:{method}", body)

    def storage(self, path: str = "", **query: Any) -> Any:
        if not self.bucket:
            raise Refused("GCS_DIR names no bucket")
        return self.ask("storage", f"storage/v1/b/{self.bucket}{path}", **query)

    def machine_account(self) -> str:
        named = self.vm.get("VM_SERVICE_ACCOUNT", "default")
        if named != "default":
            return named
        found = str(self.compute("").get("defaultServiceAccount", ""))
        if not found:
            raise Refused("this project has no default service account", 0, "export VM_SERVICE_ACCOUNT=EMAIL")
        return found
