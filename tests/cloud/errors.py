"""Errors of the Compute Engine API: what an HTTP answer says, and what a finished operation says."""

from __future__ import annotations

from typing import Any

from .server import Reply, json_reply


class ApiError(Exception):
    """An HTTP error answer, in the shape the real service uses."""

    def __init__(
        self, code: int, reason: str, message: str, *, domain: str = "global", details: tuple[Any, ...] = ()
    ) -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.domain, self.details = (
            code,
            reason,
            message,
            domain,
            details,
        )

    def reply(self) -> Reply:
        if self.reason == "html":
            return Reply(self.code, self.message.encode(), "text/html; charset=UTF-8")
        error: dict[str, Any] = {
            "code": self.code,
            "message": self.message,
            "errors": [{"message": self.message, "domain": self.domain, "reason": self.reason}],
        }
        if self.details:
            error["details"] = list(self.details)
        return json_reply({"error": error}, self.code)


def invalid(field: str, value: Any, why: str) -> ApiError:
    return ApiError(400, "invalid", f"Invalid value for field '{field}': '{value}'. {why}")


def bad_request(message: str) -> ApiError:
    return ApiError(400, "badRequest", message)


def not_ready(resource: str) -> ApiError:
    return ApiError(400, "resourceNotReady", f"The resource '{resource}' is not ready")


def discard_undefined() -> ApiError:
    """What stop answers for bundled local SSDs (SkyPilot issue 2586)."""
    return bad_request(
        "VM has a Local SSD attached but an undefined value for `discard-local-ssd`. If using gcloud, please "
        "add `--discard-local-ssd=false` or `--discard-local-ssd=true` to your command."
    )


def unauthorized() -> ApiError:
    return ApiError(
        401,
        "authError",
        "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or "
        "other valid authentication credential.",
    )


def forbidden(permission: str, resource: str) -> ApiError:
    return ApiError(403, "forbidden", f"Required '{permission}' permission for '{resource}'")


def api_disabled(project: str, service: str = "compute.googleapis.com") -> ApiError:
    info = {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": "SERVICE_DISABLED",
        "domain": "googleapis.com",
        "metadata": {"service": service, "consumer": f"projects/{project}"},
    }
    message = (
        f"{service} has not been used in project {project} before or it is disabled. Enable it by "
        "visiting the console, then retry."
    )
    return ApiError(403, "accessNotConfigured", message, domain="usageLimits", details=(info,))


def quota_exceeded(metric: str, limit: float, where: str) -> ApiError:
    """`where`: `globally`, or `in region us-central1`."""
    message = f"Quota '{metric}' exceeded.  Limit: {limit} {where}."
    return ApiError(403, "quotaExceeded", message, domain="usageLimits")


def rate_limited(code: int = 403) -> ApiError:
    reason = "rateLimitExceeded" if code == 403 else "RATE_LIMIT_EXCEEDED"
    message = "Quota exceeded for quota metric 'Read requests' and limit 'Read requests per minute'."
    return ApiError(code, reason, message, domain="usageLimits")


def not_found(resource: str) -> ApiError:
    return ApiError(404, "notFound", f"The resource '{resource}' was not found")


def already_exists(resource: str) -> ApiError:
    return ApiError(409, "alreadyExists", f"The resource '{resource}' already exists")


def stale_fingerprint(what: str) -> ApiError:
    return ApiError(
        412, "conditionNotMet", f"{what} fingerprint either invalid or resource {what} have changed"
    )


def too_large(field: str, most: int) -> ApiError:
    message = f"Value for field '{field}' is too large: maximum size {most} character(s)"
    return ApiError(413, "uploadTooLarge", message)


def backend_error(code: int = 503) -> ApiError:
    reasons = {500: "internalError", 503: "backendError"}
    if code not in reasons:
        page = f"<!DOCTYPE html><html lang=en><title>Error {code} (Server Error)!!1</title></html>"
        return ApiError(code, "html", page)
    return ApiError(code, reasons[code], "Internal error. Please try again or contact Google Support.")


# --- errors inside a finished operation: (HTTP status, HTTP message, one entry of error.errors)

Failure = tuple[int, str, dict[str, Any]]


def stock_out(zone: str, machine_type: str, attachment: str, elsewhere: tuple[str, ...] = ()) -> Failure:
    """D:troubleshooting/troubleshooting-resource-availability."""
    vm = f"A {machine_type} VM instance" + (f" with {attachment}" if attachment else "")
    metadatas = {"vmType": machine_type, "attachment": attachment, "zone": zone}
    info = {
        "reason": "resource_availability",
        "domain": "compute.googleapis.com",
        "metadatas": {**metadatas, "zonesAvailable": ",".join(elsewhere)},
    }
    message = {"locale": "en-US", "message": f"{vm} is currently unavailable in the {zone} zone."}
    entry = {
        "code": "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS",
        "message": f"The zone 'projects/p/zones/{zone}' does not have enough resources available to fulfill "
        "the request.  '(resource type:compute)'.",
        "errorDetails": [{"errorInfo": info}, {"localizedMessage": message}],
    }
    return 503, "SERVICE UNAVAILABLE", entry


def over_quota(metric: str, limit: float, where: str) -> Failure:
    scope = {"globally": {}}.get(where, {"region": where.rpartition(" ")[2]})
    quota = {"metricName": f"compute.googleapis.com/{metric.lower()}", "limitName": metric, "limit": limit}
    entry = {
        "code": "QUOTA_EXCEEDED",
        "message": quota_exceeded(metric, limit, where).message,
        "errorDetails": [{"quotaInfo": {**quota, "dimensions": scope}}],
    }
    return 403, "FORBIDDEN", entry


def failed(code: str, status: int, phrase: str, message: str) -> Failure:
    return status, phrase, {"code": code, "message": message}
