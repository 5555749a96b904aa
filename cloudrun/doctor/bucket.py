"""The bucket: what it costs and forbids, and whether we may use it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from cloudrun.doctor import OK, WRONG, Finding, allowed
from cloudrun.doctor.google import Google, Refused

OBJECTS = [f"storage.objects.{verb}" for verb in ("create", "delete", "get", "list")]
ELSEWHERE = "every GB that a machine reads from another region is charged, and takes longer"
DAY = 24 * 3600


def objects(google: Google) -> Iterator[Finding]:
    held = google.storage("/iam/testPermissions", permissions=OBJECTS).get("permissions", [])
    yield from allowed(OBJECTS, held, f"gs://{google.bucket}", google.grant(google.member))


def bucket(google: Google) -> Iterator[Finding]:
    try:
        found = google.storage(projection="noAcl")
    except Refused as error:
        if error.code != 404:
            raise
        yield Finding(
            "bucket", WRONG, f"there is no bucket gs://{google.bucket}", _new(google, google.bucket)
        )
        return
    yield Finding("bucket", OK, f"gs://{google.bucket}")
    if google.wanted:
        yield _location(google, found)
    yield from _options(google, found)


def _new(google: Google, name: str) -> str:
    region = google.regions[0] if google.wanted else "us-central1"
    return (
        f"gcloud storage buckets create gs://{name} --project={google.project} "
        f"--location={region} --uniform-bucket-level-access --soft-delete-duration=0"
    )


def _location(google: Google, found: dict[str, Any]) -> Finding:
    """Data of a dual-region bucket is in both; of a multi-region one nobody knows where."""
    places = found.get("customPlacementConfig", {}).get("dataLocations") or [found.get("location", "")]
    away = [region for region in google.regions if region.upper() not in places]
    where = " and ".join(places)
    if not away:
        return Finding("bucket location", OK, f"{where}, where the machines are")
    name = f"{google.bucket}-{google.regions[0]}"
    mend = f"{_new(google, name)}\nexport GCS_DIR=gs://{name}/{google.directory}".rstrip("/")
    words = f"{where}, and the zones are in {', '.join(google.regions)}: {ELSEWHERE}"
    return Finding("bucket location", WRONG, words, mend)


def _options(google: Google, found: dict[str, Any]) -> Iterator[Finding]:
    soft = int(found.get("softDeletePolicy", {}).get("retentionDurationSeconds", 0))
    held = int(found.get("retentionPolicy", {}).get("retentionPeriod", 0))
    uniform = found.get("iamConfiguration", {}).get("uniformBucketLevelAccess", {}).get("enabled", False)
    versions = found.get("versioning", {}).get("enabled", False)
    pays = found.get("billing", {}).get("requesterPays", False)
    replaced = "each replaced or deleted checkpoint is billed"
    table = (
        (
            "uniform access",
            uniform,
            "on",
            "off: objects may have rules of their own",
            "uniform-bucket-level-access",
        ),
        (
            "soft delete",
            not soft,
            "off",
            f"{soft / DAY:g} days: {replaced} for so much longer",
            "clear-soft-delete",
        ),
        ("versioning", not versions, "off", f"on: {replaced} until somebody removes it", "no-versioning"),
        (
            "retention",
            not held,
            "none",
            f"{held} s: nothing can be replaced, and a run must",
            "clear-retention-period",
        ),
        ("requester pays", not pays, "off", "on, and cloudrun names nobody who pays", "no-requester-pays"),
    )
    for option, right, good, bad, flag in table:
        mend = f"gcloud storage buckets update gs://{google.bucket} --{flag}"
        yield Finding(
            f"bucket {option}", OK if right else WRONG, good if right else bad, "" if right else mend
        )


def probe(google: Google) -> Iterator[Finding]:
    """Write, and delete again, one object of a name that nobody else has."""
    name = "/".join(filter(None, (google.directory, f"doctor-{os.urandom(8).hex()}")))
    whole, check = f"gs://{google.bucket}/{name}", "bucket write"
    upload = {"uploadType": "media", "name": name, "ifGenerationMatch": "0"}
    if not google.bucket:
        raise Refused("GCS_DIR names no bucket")
    try:
        google.ask("storage", f"upload/storage/v1/b/{google.bucket}/o", {}, **upload)
    except Refused as error:
        if error.code in (0, 404) or error.disabled:
            raise  # the bucket's own line says it
        yield Finding(check, WRONG, f"{whole} cannot be written: {error}", google.grant(google.member))
        return
    try:
        google.storage(f"/o/{quote(name, safe='')}", verb="DELETE")
    except Refused as error:
        mend = f"{google.grant(google.member)}\ngcloud storage rm {whole}"
        yield Finding(check, WRONG, f"{whole} was written, and cannot be deleted: {error}", mend)
        return
    yield Finding(check, OK, f"an object was written to gs://{google.bucket} and deleted again")
