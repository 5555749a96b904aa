"""OAuth: who a token belongs to and until when, and the servers that hand tokens out.

Covers what google-auth really calls: the token URI of service account keys and of user credentials,
`generateAccessToken` of the IAM credentials API, and token info.
"""

from __future__ import annotations

import base64
import json
import secrets
from typing import Any, NamedTuple

from . import sts
from .clock import Clock
from .server import Call, Reply, json_reply
from .storage import Rule, Token

LIFETIME = 3599
EMAIL = "https://www.googleapis.com/auth/userinfo.email"
# What `gcloud auth application-default login` asks for, unless it is told otherwise.
LOGIN = ("openid", EMAIL, "https://www.googleapis.com/auth/cloud-platform")
JWT = "urn:ietf:params:oauth:grant-type:jwt-bearer"


class Grant(NamedTuple):
    """`instance`: the machine whose metadata server gave it out, if one did. `rules`: None, or all it may."""

    principal: str
    expires: float
    instance: str = ""
    scopes: tuple[str, ...] = ()
    rules: list[Rule] | None = None


class Tokens(dict[str, Grant]):
    """{token: Grant} of all tokens ever given out."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self.lifetime: float = LIFETIME

    def issue(
        self,
        principal: str,
        *,
        seconds: float | None = None,
        instance: str = "",
        scopes: tuple[str, ...] = (),
    ) -> str:
        token = f"ya29.{secrets.token_urlsafe(24)}"
        expires = self._clock.now() + (self.lifetime if seconds is None else seconds)
        self[token] = Grant(principal, expires, instance, scopes)
        return token

    def valid(self, token: str) -> Grant | None:
        """The grant of a token that is good now; one that a service account signed itself is good too."""
        grant = self.get(token) or self_signed(token)
        return grant if grant and grant.expires > self._clock.now() else None

    def expire(self, principal: str = "") -> None:
        """End the tokens of this principal, or all."""
        for token, grant in self.items():
            if principal in ("", grant.principal):
                self[token] = grant._replace(expires=self._clock.now())

    def left(self, token: str) -> int:
        return int(self[token].expires - self._clock.now())


class TokenServer:
    """Answers as oauth2.googleapis.com and iamcredentials.googleapis.com do."""

    def __init__(self, tokens: Tokens, refresh: dict[str, str]) -> None:
        self.tokens = tokens
        self.refresh = refresh  # {refresh token: principal}
        self.dead: set[str] = set()  # principals that are refused
        self.narrow_seconds: float | None = None  # the life of a downscoped token, if it is to be shorter
        self.boundless = False  # downscoped tokens may do all that their source may
        self.calls: list[Call] = []

    def answer(self, call: Call) -> Reply:
        self.calls.append(call)
        if call.path == "/token" and call.verb == "POST":
            return self.exchange(form(call))
        if call.path == "/v1/token" and call.verb == "POST":
            return self.narrow(form(call))
        if call.path.endswith(":generateAccessToken"):
            return self.impersonate(call)
        if call.path in ("/tokeninfo", "/oauth2/v3/userinfo", "/userinfo"):
            return self.info(call)
        return Reply(404)

    def exchange(self, fields: dict[str, str]) -> Reply:
        kind = fields.get("grant_type")
        if kind == "refresh_token":
            principal = self.refresh.get(fields.get("refresh_token", ""), "")
        elif kind == JWT:
            principal = claims(fields.get("assertion", "")).get("iss", "")
        else:
            return refused("unsupported_grant_type", "Invalid grant_type")
        if not principal or principal in self.dead:
            return refused("invalid_grant", "Token has been expired or revoked.")
        # A refresh that names no scopes gets all that the login was for.
        scopes = tuple(fields.get("scope", "").split()) or (LOGIN if kind == "refresh_token" else ())
        token = self.tokens.issue(principal, scopes=scopes)
        answer = {"access_token": token, "expires_in": self.tokens.left(token), "token_type": "Bearer"}
        return json_reply(answer)

    def impersonate(self, call: Call) -> Reply:
        """POST /v1/projects/-/serviceAccounts/EMAIL:generateAccessToken"""
        source = self.tokens.valid(bearer(call))
        principal = call.segments[-1].rpartition(":")[0]
        if source is None:
            return json_reply({"error": {"code": 401, "message": "Invalid credentials"}}, 401)
        if principal in self.dead:
            message = (
                "Permission 'iam.serviceAccounts.getAccessToken' denied on resource (or it may not exist)."
            )
            return json_reply(
                {"error": {"code": 403, "message": message, "status": "PERMISSION_DENIED"}}, 403
            )
        wanted = json.loads(call.body or b"{}")
        seconds = float(str(wanted.get("lifetime", "3600s")).rstrip("s"))
        token = self.tokens.issue(principal, seconds=seconds, scopes=tuple(wanted.get("scope", ())))
        return json_reply({"accessToken": token, "expireTime": utc(self.tokens[token].expires)})

    def narrow(self, fields: dict[str, str]) -> Reply:
        """A token that may do less, for no longer: https://cloud.google.com/iam/docs/reference/sts/rest"""
        source = self.tokens.valid(fields.get("subject_token", ""))
        asked = [fields.get(name) for name in ("grant_type", "subject_token_type", "requested_token_type")]
        if asked != [sts.GRANT, sts.ACCESS, sts.ACCESS]:
            return refused("invalid_request", f"Invalid request: {asked}")
        if source is None or source.rules is not None:
            return refused("invalid_grant", "The subject token is invalid or has expired.")
        try:
            rules = sts.boundary(fields.get("options", ""))
        except (ValueError, LookupError, TypeError) as error:
            return refused("invalid_request", f"Invalid access boundary: {error!r}")
        left = self.tokens.left(fields["subject_token"])
        seconds = left if self.narrow_seconds is None else self.narrow_seconds
        token = self.tokens.issue(source.principal, seconds=seconds, scopes=source.scopes)
        self.tokens[token] = self.tokens[token]._replace(rules=None if self.boundless else rules)
        answer = {"access_token": token, "issued_token_type": sts.ACCESS, "token_type": "Bearer"}
        if source.principal.endswith(".gserviceaccount.com") or self.narrow_seconds is not None:
            answer["expires_in"] = seconds  # of a person's token it is not said: that of the source holds
        return json_reply(answer)

    def info(self, call: Call) -> Reply:
        token = call.query.get("access_token") or bearer(call)
        grant = self.tokens.valid(token)
        if grant is None:
            return refused("invalid_token", "Invalid Value")
        left, expires = str(self.tokens.left(token)), str(int(grant.expires))
        shown = {"azp": "id", "aud": "id", "sub": "1", "exp": expires, "access_type": "offline"}
        shown.update(expires_in=left, scope=" ".join(grant.scopes))
        # https://developers.google.com/identity/protocols/oauth2: whose it is belongs to a scope of its own.
        if EMAIL in grant.scopes or grant.principal.endswith(".gserviceaccount.com"):
            shown.update(email=grant.principal, email_verified="true")
        return json_reply(shown)


class Granted:
    """The tokens of a token server, as the emulated storage asks for them: its `tokens`."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def get(self, token: str) -> Token | None:
        grant = self._tokens.valid(token)
        return grant and Token(grant.expires, grant.rules, grant.principal)


def bearer(call: Call) -> str:
    kind, _, token = (call.headers.get("Authorization") or "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def form(call: Call) -> dict[str, str]:
    from urllib.parse import parse_qsl

    return dict(parse_qsl(call.body.decode()))


def claims(assertion: str) -> dict[str, Any]:
    """What a signed JWT says; the signature is not looked at."""
    try:
        middle = assertion.split(".")[1]
        found = json.loads(base64.urlsafe_b64decode(middle + "=" * (-len(middle) % 4)))
    except (IndexError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def self_signed(token: str) -> Grant | None:
    """What compute_v1 sends with the key of a service account, instead of asking the token server."""
    said = claims(token)
    if not said.get("iss") or said.get("sub") != said["iss"]:
        return None
    return Grant(said["iss"], float(said.get("exp", 0)), scopes=tuple(said.get("scope", "").split()))


def refused(error: str, why: str) -> Reply:
    return json_reply({"error": error, "error_description": why}, 400)


def utc(seconds: float) -> str:
    from datetime import datetime, timezone

    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
