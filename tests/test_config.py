"""Settings: pure, precedence, every problem at once."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudrun.config import NEEDED, from_env, project_name
from cloudrun.errors import UsageError

HERE = "/home/me/My Project"
GCP = {"VM_INSTANCE": "box", "GCLOUD_PROJECT": "p", "GCS_DIR": "gs://bucket/runs/"}


def test_nothing_set_is_local_and_a_day() -> None:
    settings = from_env({}, HERE)
    assert (settings.backend, settings.project, settings.max_hours) == ("local", "my-project", 24.0)
    assert settings.bucket.startswith("file:///") and settings.bucket.endswith("/bucket")
    assert settings.max_cost is settings.price is None
    assert settings.chosen == "neither VM_INSTANCE nor VAST_API_KEY is set"


@pytest.mark.parametrize(
    ("environ", "flag", "backend", "chosen"),
    [
        (GCP, None, "gcp", "VM_INSTANCE is set"),
        ({"VAST_API_KEY": "k", "GCS_DIR": "gs://b"}, None, "vast", "VAST_API_KEY is set"),
        ({**GCP, "VAST_API_KEY": "k"}, None, "gcp", "VM_INSTANCE is set"),
        ({**GCP, "VAST_API_KEY": "k"}, "vast", "vast", ""),
        ({**GCP, "CLOUDRUN_BACKEND": "local", "GCS_DIR": "/tmp/b"}, None, "local", ""),
        ({**GCP, "CLOUDRUN_BACKEND": "vast"}, "gcp", "gcp", ""),
    ],
)
def test_which_backend(environ: dict[str, str], flag: str | None, backend: str, chosen: str) -> None:
    settings = from_env(environ, HERE, backend=flag)
    assert (settings.backend, settings.chosen) == (backend, chosen)


def test_flags_win_over_the_environment() -> None:
    environ = {"CLOUDRUN_MAX_HOURS": "5", "CLOUDRUN_MAX_COST": "7", "CLOUDRUN_PRICE": "0"}
    settings = from_env(environ, HERE, max_hours="0.5", max_cost=None)
    assert (settings.max_hours, settings.max_cost, settings.price) == (0.5, 7.0, 0.0)
    assert from_env({"CLOUDRUN_MAX_COST": "7"}, HERE).max_hours is None


def test_the_bucket() -> None:
    assert from_env(GCP, HERE).bucket == "gs://bucket/runs"
    assert from_env({"GCS_DIR": "/tmp/b/"}, HERE).bucket == "file:///tmp/b"


def test_the_project() -> None:
    assert from_env({"CLOUDRUN_PROJECT": "Other One"}, HERE).project == "other-one"


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e999", "two", "1,5", " "])
@pytest.mark.parametrize("name", ["CLOUDRUN_MAX_HOURS", "CLOUDRUN_MAX_COST", "CLOUDRUN_FETCH_GB"])
def test_numbers(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{name}={re.escape(value)}: not a number above 0"):
        from_env({name: value}, HERE)


def test_every_problem_at_once() -> None:
    environ = {
        "CLOUDRUN_BACKEND": "gcp",
        "CLOUDRUN_MAX_HOURS": "x",
        "CLOUDRUN_MAX_COST": "0",
        "CLOUDRUN_PRICE": "-2",
        "CLOUDRUN_LIMITS": "nothing=1",
        "GCS_DIR": "s3://b",
    }
    with pytest.raises(UsageError) as error:
        from_env(environ, HERE)
    problems = str(error.value).split("\n")
    assert len(problems) == 6 and error.value.exit_code == 2
    assert problems[0] == "the gcp backend also needs GCLOUD_PROJECT"


@pytest.mark.parametrize("backend", ["gcp", "vast"])
def test_a_half_set_backend_names_all_that_is_missing(backend: str) -> None:
    for given_ in NEEDED[backend]:
        with pytest.raises(UsageError) as error:
            from_env({"CLOUDRUN_BACKEND": backend, given_: "gs://x"}, HERE)
        for name in set(NEEDED[backend]) - {given_}:
            assert name in str(error.value)


@given(st.text(min_size=1))
def test_a_project_name_may_stand_in_a_label(name: str) -> None:
    slug = project_name(name)
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,40}", slug) and slug != "open"
    assert project_name(slug) == slug


def test_names_without_a_letter_stay_apart() -> None:
    assert project_name("日本") != project_name("中国")
    assert project_name("open") != "open"
