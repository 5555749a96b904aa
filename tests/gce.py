"""The real google-cloud-compute client, pointed at an emulated cloud."""

import importlib.util
import json
import uuid

import pytest
from cloud.compute import REFRESH

ZONE = "us-central1-a"
IMAGE = "projects/deeplearning-platform-release/global/images/family/common-cu129-ubuntu-2204-nvidia-580"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"


def missing():
    """What is not installed here, in words; empty if everything is."""
    for name, package in (
        ("google.cloud.compute_v1", "google-cloud-compute"),
        ("googleapiclient", "google-api-python-client"),
    ):
        try:
            if importlib.util.find_spec(name) is None:
                return f"{package} is not installed"
        except ModuleNotFoundError:
            return f"{package} is not installed"
    return ""


def need_client():
    if reason := missing():
        pytest.skip(reason)


def user_credentials(cloud):
    """Of a person. A file of such credentials cannot name its token server: google-auth ignores that."""
    from google.oauth2.credentials import Credentials

    return Credentials(
        None,
        refresh_token=REFRESH,
        token_uri=f"{cloud.token_url}/token",
        client_id="id",
        client_secret="secret",
        scopes=[SCOPE],
    )


def key_file(cloud, path, email):
    """The key of a service account, for GOOGLE_APPLICATION_CREDENTIALS."""
    rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa", reason="needs cryptography")
    from cryptography.hazmat.primitives import serialization as form

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    text = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()).decode()
    known = {"type": "service_account", "project_id": cloud.project.name, "client_email": email}
    path.write_text(json.dumps({**known, "token_uri": f"{cloud.token_url}/token", "private_key": text}))
    return path


class Gce:
    """Short names for what a backend does. Nothing is retried, nothing waits for long."""

    def __init__(self, cloud, credentials=None, zone=ZONE):
        from google.auth.credentials import AnonymousCredentials
        from google.cloud import compute_v1

        self.v1, self.cloud, self.zone = compute_v1, cloud, zone
        self._options = {
            "credentials": credentials or AnonymousCredentials(),
            "client_options": {"api_endpoint": cloud.endpoint},
        }
        self.instances = compute_v1.InstancesClient(**self._options)
        self.operations = compute_v1.ZoneOperationsClient(**self._options)
        self.project = cloud.project.name

    def client(self, name):
        return getattr(self.v1, f"{name}Client")(**self._options)

    def call(self, method, **fields):
        """Call a method of a client for the project with these fields."""
        return method({"project": self.project, **fields}, timeout=20, retry=None)

    def vm(self, method, name, **fields):
        """Call a method about one instance."""
        return self.call(getattr(self.instances, method), zone=self.zone, instance=name, **fields)

    def order(self, name, script="", *, kind="g2-standard-4", **fields):
        """The body of an insert as a careful client writes it."""
        v1, zone = self.v1, self.zone
        disk = v1.AttachedDiskInitializeParams(
            source_image=IMAGE, disk_size_gb=100, disk_type=f"zones/{zone}/diskTypes/pd-balanced"
        )
        network = v1.NetworkInterface(
            network="global/networks/default",
            access_configs=[v1.AccessConfig(name="External NAT", type_="ONE_TO_ONE_NAT")],
        )
        ordered = {
            "machine_type": f"zones/{zone}/machineTypes/{kind}",
            "disks": [v1.AttachedDisk(boot=True, auto_delete=True, initialize_params=disk)],
            "network_interfaces": [network],
            "service_accounts": [v1.ServiceAccount(email="default", scopes=[SCOPE])],
            "scheduling": self.scheduling(),
            "metadata": v1.Metadata(items=[v1.Items(key="startup-script", value=script)] if script else []),
            "labels": {"cloudrun-run": "toy"},
        }
        return v1.Instance(name=name, **{**ordered, **fields})

    def scheduling(self, seconds=3600, action="STOP", model="STANDARD", **fields):
        return self.v1.Scheduling(
            on_host_maintenance="TERMINATE",
            automatic_restart=False,
            provisioning_model=model,
            instance_termination_action=action,
            max_run_duration=self.v1.Duration(seconds=seconds),
            **fields,
        )

    def metadata(self, **items):
        pairs = ((key.replace("_", "-"), value) for key, value in items.items())
        return self.v1.Metadata(items=[self.v1.Items(key=key, value=value) for key, value in pairs])

    def insert(self, name, script="", *, request_id=None, **fields):
        return self.call(
            self.instances.insert_unary,
            zone=self.zone,
            instance_resource=self.order(name, script, **fields),
            request_id=request_id or str(uuid.uuid4()),
        )

    def wait(self, operation):
        """The operation when it is done."""
        for _ in range(20):
            operation = self.call(self.operations.wait, zone=self.zone, operation=operation.name)
            if operation.status == self.v1.Operation.Status.DONE:
                return operation
        raise AssertionError(f"{operation.operation_type} is not done")

    def run(self, name, script="", **fields):
        """A running instance."""
        done = self.wait(self.insert(name, script, **fields))
        assert not done.error.errors, done.error
        return self.get(name)

    def get(self, name):
        return self.vm("get", name)

    def list(self, text="", **fields):
        pager = self.call(self.instances.list, zone=self.zone, **({"filter": text} if text else {}), **fields)
        return [each.name for each in pager]

    def stop(self, name, **fields):
        return self.wait(self.vm("stop_unary", name, discard_local_ssd=True, **fields))

    def start(self, name):
        return self.wait(self.vm("start_unary", name))

    def delete(self, name):
        return self.wait(self.vm("delete_unary", name))

    def limit(self, name):
        return self.get(name).resource_status.scheduling.termination_timestamp

    def address(self, name):
        return self.get(name).network_interfaces[0].access_configs[0].nat_i_p
