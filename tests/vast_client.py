"""The real vastai client, pointed at an emulated vast.ai."""

import importlib.util

import pytest

IMAGE = "vastai/pytorch:cuda-12.8.1-auto"


def need_client():
    if importlib.util.find_spec("vastai") is None:
        pytest.skip("vastai is not installed")


class Client:
    """Short names for what a backend does. Nothing is retried, nothing waits for long."""

    def __init__(self, vast, key=None):
        from vastai.api.client import VastClient

        self.vast = vast
        self.rest = VastClient(key or vast.key, vast.url, retry=1, timeout=20)

    def call(self, verb, path, body=None, **query):
        """Status and body: what is JSON read, else as text."""
        options = {"query_args": query}
        if verb != "get":
            options["json_data"] = body or {}
        answer = getattr(self.rest, verb)(path, **options)
        try:
            return answer.status_code, answer.json()
        except ValueError:
            return answer.status_code, answer.text

    def offers(self, **filters):
        body = {"rentable": {"eq": True}, "order": [["dph_total", "asc"]], **filters}
        status, found = self.call("post", "/bundles/", body)
        assert status == 200, found
        return found["offers"]

    def order(self, onstart="", **fields):
        """The body of a create call as a careful client writes it."""
        return {
            "client_id": "me",
            "image": IMAGE,
            "disk": 20.0,
            "runtype": "ssh_direc ssh_proxy",
            "env": {"VAST_URL": self.vast.url},
            "onstart": onstart,
            "label": "toy",
            "cancel_unavail": True,
            **fields,
        }

    def create(self, offer, onstart="", **fields):
        return self.call("put", f"/asks/{offer}/", self.order(onstart, **fields))

    def rent(self, onstart="", **fields):
        """The id of a container on the cheapest offer."""
        status, found = self.create(self.offers(disk_space={"gte": 20.0})[0]["id"], onstart, **fields)
        assert status == 200 and found["success"], found
        return found["new_contract"]

    def run(self, onstart="", **fields):
        """The id of one that runs."""
        number = self.rent(onstart, **fields)
        self.vast.wait(number, "running")
        return number

    def get(self, number):
        status, found = self.call("get", f"/instances/{number}/")
        assert status == 200, found
        return found["instances"]

    def put(self, number, **body):
        return self.call("put", f"/instances/{number}/", body)

    def delete(self, number):
        return self.call("delete", f"/instances/{number}/")

    def list(self, **query):
        status, found = self.call("get", "/api/v1/instances/", **query)
        assert status == 200, found
        return found
