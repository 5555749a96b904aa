"""Whose credentials are used: those of this computer, which GCP_ACCOUNT must name, or a service account's.

What google.auth raises comes out as it is: each caller has words of its own for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cloudrun.errors import UsageError

SCOPES = ["https://www.googleapis.com/auth/cloud-platform"]
LOOPBACK = ("localhost", "127.0.0.1", "::1")
ROBOT = ".gserviceaccount.com"
KEY_FILE = "GOOGLE_APPLICATION_CREDENTIALS"
NAMED = {KEY_FILE, "GCE_METADATA_HOST"}
TIMEOUT = 10.0
# gcloud's own variables, for those who reach Google another way, and for emulators.
TOKEN_HOST = "CLOUDSDK_AUTH_TOKEN_HOST"
IAM_CREDENTIALS = "CLOUDSDK_API_ENDPOINT_OVERRIDES_IAMCREDENTIALS"


def credentials(environ: Mapping[str, str], endpoint: str) -> Any:
    """For the service at this endpoint (empty: Google's own), as GCP_ACCOUNT wants them.

    Raises UsageError if they are somebody else's.
    """
    found, wanted = acting(environ, endpoint), environ.get("GCP_ACCOUNT", "")
    if wanted and not anonymous(found):
        email = whose(found, environ)
        if email.lower() != wanted.lower():
            raise UsageError(
                f"{differs(email, wanted)}; log in as it, or correct GCP_ACCOUNT:\n{login(environ)}"
            )
    return found


def differs(email: str, wanted: str) -> str:
    return f"GCP_ACCOUNT={wanted}, and the credentials in use are those of {email or 'somebody unknown'}"


def login(environ: Mapping[str, str]) -> str:
    """What to type to have credentials; a variable that names a file would win over them."""
    wanted = environ.get("GCP_ACCOUNT", "")
    flag = f" --account={wanted}" if wanted and not wanted.endswith(ROBOT) else ""
    unset = f"unset {KEY_FILE}\n" if environ.get(KEY_FILE) else ""
    return f"{unset}gcloud auth application-default login{flag}"


def acting(environ: Mapping[str, str], endpoint: str) -> Any:
    """The credentials of this computer, or those of the service account that GCP_ACCOUNT names.

    An emulator on this computer gets real ones only if somebody named them.
    """
    from urllib.parse import urlsplit  # here, because a local run does not pay for it

    import google.auth
    from google.auth import impersonated_credentials
    from google.auth.credentials import AnonymousCredentials, with_scopes_if_required

    if urlsplit(endpoint).hostname in LOOPBACK and not NAMED & set(environ):
        return AnonymousCredentials()
    # No scopes for a person: only with those of the login does Google say whose a token is.
    found = with_scopes_if_required(google.auth.default()[0], SCOPES)
    if environ.get(TOKEN_HOST) and hasattr(found, "with_token_uri"):
        found = found.with_token_uri(environ[TOKEN_HOST])
    wanted = environ.get("GCP_ACCOUNT", "")
    if not wanted.endswith(ROBOT) or getattr(found, "service_account_email", "") == wanted:
        return found
    if getattr(found, "service_account_email", "") == "default" and whose(found, environ) == wanted:
        return found
    base = environ.get(IAM_CREDENTIALS, "https://iamcredentials.googleapis.com/").rstrip("/")
    return impersonated_credentials.Credentials(
        found,
        wanted,
        SCOPES,
        iam_endpoint_override=f"{base}/v1/projects/-/serviceAccounts/{wanted}:generateAccessToken",
    )


def anonymous(found: Any) -> bool:
    from google.auth.credentials import AnonymousCredentials

    return isinstance(found, AnonymousCredentials)


def whose(found: Any, environ: Mapping[str, str]) -> str:
    """The email of their account; empty if Google does not say.

    https://developers.google.com/identity/protocols/oauth2 has an endpoint that tells what a token is.
    """
    from urllib.parse import urlencode, urlsplit

    from google.auth.exceptions import TransportError
    from google.auth.transport.requests import Request

    email = getattr(found, "service_account_email", None)
    if email and email != "default":
        return str(email)
    request = Request()
    if not found.valid:
        found.refresh(request)
    if email:  # a machine's credentials know it once they have been used
        return str(found.service_account_email)
    host = environ.get(TOKEN_HOST, "https://oauth2.googleapis.com/token")
    url = f"{host.removesuffix('token')}tokeninfo?{urlencode({'access_token': found.token})}"
    answer = request(url=url, method="GET", timeout=TIMEOUT)
    if answer.status >= 500:
        raise TransportError(f"{urlsplit(url).hostname} answers {answer.status}")
    return str(json.loads(answer.data).get("email", "")) if answer.status == 200 else ""
