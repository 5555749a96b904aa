"""The folder bucket keeps the contract of all buckets."""

import pytest
from contracts.bucket import BucketContract

from cloudrun.storage.folder import FolderBucket


@pytest.fixture
def bucket(tmp_path):
    return FolderBucket(str(tmp_path / "a bucket"))


class TestFolderBucket(BucketContract):
    pass
