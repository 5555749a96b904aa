"""Buckets of Cloud Storage keep the contract: through Google's library, and with the standard library alone.

They meet our own emulator, the `gcp-storage-emulator` package and, where STORAGE_TESTBENCH_HOST names one,
Google's storage testbench.
"""

from __future__ import annotations

import os
import uuid

import pytest
from contracts.bucket import BucketContract

from cloudrun.storage.rest import RestBucket

pytest.importorskip("google.cloud.storage", reason="google-cloud-storage is not installed")

from cloudrun.storage.gcs import GcsBucket

IGNORES = "gcp-storage-emulator ignores every generation precondition"
NEEDS_PRECONDITIONS = {
    "test_creating_the_same_content_again_is_our_own_lost_reply",
    "test_creating_another_content_is_a_conflict_and_changes_nothing",
    "test_of_eight_threads_that_create_one_name_one_wins",
    "test_eight_threads_that_create_the_same_content_all_succeed",
    "test_each_of_many_names_is_created_by_one_of_several_processes",
    "test_swap_creates_and_replaces_exactly_the_version_that_was_read",
    "test_swap_of_another_version_is_a_conflict_and_changes_nothing",
    "test_swap_of_what_was_deleted_is_a_conflict",
    "test_the_version_changes_with_put_too",
    "test_of_eight_threads_that_swap_one_version_one_wins",
    "test_no_swap_of_several_processes_is_lost",
}
OTHER_FLAWS = {
    "test_many_objects_are_all_listed": "gcp-storage-emulator gets slower with each object",
    "test_readers_see_the_old_or_the_new_content": "gcp-storage-emulator takes seconds for this",
}


class TestGcsBucket(BucketContract):
    @pytest.fixture
    def bucket(self, storage):
        return GcsBucket("gs://b")


class TestRestBucket(BucketContract):
    @pytest.fixture
    def bucket(self, storage):
        storage.store.put("b", "some/prefi", b"beside", {}, {})
        storage.store.put("b", "some/prefix/", b"what a console makes for a folder", {}, {})
        storage.store.put("b", "some/prefix-2/a", b"beside", {}, {})
        return RestBucket("gs://b/some/prefix")

    def test_a_name_of_1024_bytes(self, bucket):
        """The directory of the bucket takes its part of them."""
        name = "x" * (1024 - len("some/prefix/"))
        bucket.create(name, b"1")
        assert list(bucket.names("")) == [name]
        with pytest.raises(Exception, match="cannot hold an object called"):
            bucket.create(name + "x", b"1")


@pytest.fixture(scope="module")
def other_emulator():
    server = pytest.importorskip("gcp_storage_emulator.server", reason="gcp-storage-emulator is missing")
    found = server.create_server("127.0.0.1", 0, in_memory=True)
    found.start()
    yield f"http://127.0.0.1:{found._api._httpd.server_address[1]}"
    found.stop()


@pytest.mark.parametrize("kind", [GcsBucket, RestBucket])
class TestBesideAnotherEmulator(BucketContract):
    @pytest.fixture
    def bucket(self, kind, request, other_emulator, monkeypatch):
        name = request.function.__name__
        if name in NEEDS_PRECONDITIONS:
            pytest.skip(IGNORES)
        if name in OTHER_FLAWS:
            pytest.skip(OTHER_FLAWS[name])
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", other_emulator)
        return kind("gs://" + make_bucket())


if os.environ.get("STORAGE_TESTBENCH_HOST"):

    @pytest.mark.parametrize("kind", [GcsBucket, RestBucket])
    class TestBesideGooglesTestbench(BucketContract):
        @pytest.fixture
        def bucket(self, kind, monkeypatch):
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", os.environ["STORAGE_TESTBENCH_HOST"])
            return kind("gs://" + make_bucket())

else:

    @pytest.mark.skip(reason="STORAGE_TESTBENCH_HOST is not set")
    def test_beside_googles_testbench():
        """One line for all that it would be."""


def make_bucket():
    from google.cloud import storage

    name = "b" + uuid.uuid4().hex[:20]
    storage.Client(project="p").create_bucket(name)
    return name
