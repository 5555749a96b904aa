"""Virtual machines of Google Compute Engine: one that is kept between runs, or one for each attempt.

Labels say whose machine it is: the run, the attempt, when it has to be gone. A machine is ours if it has
them, and nothing else is ever changed. The provider's own limit is part of each insert and each start.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from typing import Any

from cloudrun.account import SCOPES
from cloudrun.backends import ANYTHING, Boot, Cost, Instance, Need, Offer, Survey
from cloudrun.backends.gcp_api import Compute
from cloudrun.backends.gcp_boot import startup_script
from cloudrun.backends.gcp_left import Left
from cloudrun.backends.gcp_prices import price as known_price
from cloudrun.backends.gcp_shapes import Shape
from cloudrun.backends.gcp_vm import (
    ATTEMPT,
    BEFORE,
    PRICE,
    RUN,
    TAKEN,
    amount,
    described,
    gce_name,
    is_being_taken,
    is_kept,
    is_ours,
    is_spot,
    labels_of,
    metadata_of,
    seconds_of_google,
    shape_of,
)
from cloudrun.backends.gcp_wanted import wanted
from cloudrun.backends.gcp_wire import ApiError, QuotaExceeded, View
from cloudrun.config import Settings, place
from cloudrun.errors import CloudrunError, Held, NoCapacity, UsageError

LEAST_SECONDS = 30  # of maxRunDuration (https://cloud.google.com/compute/docs/instances/limit-vm-runtime)
UNBILLED = ("TERMINATED", "SUSPENDED")
ASK_AGAIN_SECONDS = 30.0  # when a stop that was accepted has had no effect


class GcpBackend:
    """See cloudrun.backends.Backend."""

    name = "gcp"
    stranger = False
    least_billed = 60.0  # https://cloud.google.com/compute/vm-instance-pricing
    slowness = 8.0  # a stop takes 90 s, and is not stuck before 8 minutes have passed

    def __init__(self, settings: Settings) -> None:
        self._vm, self._price = settings.vm, settings.price
        self._wanted = wanted(settings.vm)
        self.place = place(self.name, settings.vm)
        self.pace, self.appears_within = settings.limits["look"], settings.limits["appears"]
        self._compute = Compute(settings.vm["GCLOUD_PROJECT"], os.environ)
        self.warm_up = self._compute.warm_up
        self._boot_seconds = settings.limits["boot_least"]
        self._full: set[str] = set()  # regions without quota
        self._zones: dict[str, str] = {}  # of the machines that were made or started here
        self._seen: dict[str, tuple[str, str, bool]] = {}  # zone, name and whether it is kept
        self._asked: dict[str, float] = {}
        self._last: dict[str, Instance] = {}
        self._left = Left(self._compute)

    # --- what could be had

    def offers(self, need: Need = ANYTHING) -> list[Offer]:
        wanted = self._wanted
        found = self._kept()
        if found:
            zone, vm = found
            self._check_kept(zone, vm)
            return [self._offer(shape_of(vm), zone, is_spot(vm), need.hours)]
        self._compute.ready()
        if wanted.image.startswith("projects/") and "/family/" in wanted.image:
            self._check_image(wanted.image)
        return [self._offer(wanted.shape, zone, wanted.spot, need.hours) for zone in wanted.zones]

    def _offer(self, shape: Shape, zone: str, spot: bool, hours: float) -> Offer:
        price = known_price(shape, zone, spot) if self._price is None else self._price
        expected = None if price is None else price * hours
        what = f"{shape.words}{', spot' * spot} in {zone}"
        return Offer(what, price, self._boot_seconds, zone, expected=expected, place=zone)

    def _check_image(self, image: str) -> None:
        try:
            self._compute.read(image)
        except ApiError as error:
            if error.code != 404:
                raise
            raise UsageError(f"there is no image {image}: set VM_IMAGE") from None

    def _kept(self) -> tuple[str, Any] | None:
        """(zone, instance) of the machine that VM_INSTANCE names; a list alone may not know of it yet."""
        vm = self._wanted.vm
        found = vm and (self._compute.named(self._wanted.zones, vm) or self._compute.listed(f"name={vm}"))
        return found[0] if found else None

    def _check_kept(self, zone: str, vm: Any) -> None:
        """Raises CloudrunError for a machine that is not ours, is in use, or is not what was asked for."""
        if not is_kept(vm):
            raise CloudrunError(
                f"{vm.name} in {zone} was not made by cloudrun, which will not touch it: "
                "choose another name with VM_INSTANCE"
            )
        wanted, differs = self._wanted, ""
        self._check_free(vm)
        shape = shape_of(vm)
        if {"VM_TYPE", "VM_GPU"} & set(self._vm) and wanted.shape != shape:
            differs = f"it has {shape.words}, and {wanted.shape.words} is wanted"
        elif "VM_DISK" in self._vm and vm.disks[0].disk_size_gb != wanted.disk:
            differs = f"its disk has {vm.disks[0].disk_size_gb} GB, and {wanted.disk} are wanted"
        elif "VM_IMAGE" in self._vm and wanted.image != metadata_of(vm).get("cloudrun-image"):
            differs = f"its image is {metadata_of(vm).get('cloudrun-image')}, and {wanted.image} is wanted"
        if differs:
            delete = self._gcloud("delete", vm.name, zone)
            raise CloudrunError(
                f"{vm.name}: {differs}; this deletes it, the next run makes a new one:\n{delete}"
            )

    # --- a machine's life

    def create(self, name: str, offer: Offer, boot: Boot) -> None:
        region = offer.where.rpartition("-")[0]
        if region in self._full:
            raise NoCapacity(f"{region} has no quota left")
        found = self._kept()
        try:
            if found:
                self._zones[name] = found[0]
                self._take(*found, boot, offer.price)
            else:
                self._insert(name, offer.where, boot, offer.price)
        except QuotaExceeded as error:
            if not error.region:
                raise
            self._full.add(error.region)
            raise NoCapacity(str(error)) from None

    def _insert(self, name: str, zone: str, boot: Boot, price: float | None) -> None:
        wanted, vm, sdk = self._wanted, self._vm, self._compute
        kept = bool(wanted.vm)
        disk = sdk.AttachedDiskInitializeParams(
            source_image=wanted.image,
            disk_size_gb=wanted.disk,
            disk_type=f"zones/{zone}/diskTypes/{wanted.shape.disk_type}",
            labels=labels_of(boot, kept=kept),
        )
        network = sdk.NetworkInterface(network=vm.get("VM_NETWORK") or "global/networks/default")
        if "VM_SUBNET" in vm:
            network = sdk.NetworkInterface(subnetwork=vm["VM_SUBNET"])
        if vm.get("VM_EXTERNAL_IP", "1").lower() not in ("0", "no", "none", "false"):
            network.access_configs = [sdk.AccessConfig(name="External NAT", type_="ONE_TO_ONE_NAT")]
        script = self._script(boot, wanted.shape, kept=kept)
        metadata = {"startup-script": script, "cloudrun-image": wanted.image, PRICE: amount(price)}
        instance = sdk.Instance(
            name=wanted.vm or gce_name(name),
            machine_type=f"zones/{zone}/machineTypes/{wanted.shape.machine_type}",
            disks=[sdk.AttachedDisk(boot=True, auto_delete=True, type_="PERSISTENT", initialize_params=disk)],
            network_interfaces=[network],
            service_accounts=[
                sdk.ServiceAccount(email=vm.get("VM_SERVICE_ACCOUNT") or "default", scopes=SCOPES)
            ],
            scheduling=self._scheduling(boot, wanted.shape, wanted.spot, kept=kept),
            labels=labels_of(boot, kept=kept),
            metadata=sdk.Metadata(items=self._items(metadata)),
        )
        if wanted.shape.accelerator:
            kind = f"zones/{zone}/acceleratorTypes/{wanted.shape.accelerator}"
            gpus = sdk.AcceleratorConfig(accelerator_type=kind, accelerator_count=wanted.shape.gpus)
            instance.guest_accelerators = [gpus]
        self._zones[name] = zone
        try:
            self._compute.change("insert_unary", zone, instance_resource=instance)
        except NoCapacity:
            if self._found(name):  # what failed has made a machine all the same: our caller ends it
                raise ApiError(f"{zone} said that it has no such machine, and made one") from None
            raise
        self._check_limit(instance.name, zone)

    def _take(self, zone: str, vm: Any, boot: Boot, price: float | None = None) -> None:
        """Start the machine that is kept. Who changes its labels first, while it is parked, has it."""
        sdk, where = self._compute, {"instance": vm.name}
        self._check_kept(zone, vm)
        stopped = seconds_of_google(vm.last_stop_timestamp)
        labels = sdk.InstancesSetLabelsRequest(
            label_fingerprint=vm.label_fingerprint,
            labels={
                **vm.labels,
                **labels_of(boot, kept=True),
                BEFORE: str(int(stopped or 0)),
                TAKEN: str(int(time.time())),
            },
        )
        try:
            sdk.change("set_labels_unary", zone, instances_set_labels_request_resource=labels, **where)
        except ApiError as error:
            if error.code != 412:
                raise
            now = sdk.vm(zone, vm.name)
            self._check_free(now)
            raise Held(f"{vm.name} was changed by somebody else a moment ago; run again") from None
        shape = shape_of(vm)
        ours = {"startup-script": self._script(boot, shape, kept=True), PRICE: amount(price)}
        items = self._items({**metadata_of(vm), **ours})
        metadata = sdk.Metadata(fingerprint=vm.metadata.fingerprint, items=items)
        sdk.change("set_metadata_unary", zone, metadata_resource=metadata, **where)
        scheduling = self._scheduling(boot, shape, is_spot(vm), kept=True)
        sdk.change("set_scheduling_unary", zone, scheduling_resource=scheduling, **where)
        now = sdk.vm(zone, vm.name)
        if (now.labels.get(RUN), now.labels.get(ATTEMPT)) != (boot.run, str(boot.attempt)):
            raise Held(f"{vm.name} was taken by the run {now.labels.get(RUN)} a moment ago")
        try:
            sdk.change("start_unary", zone, **where)
        except NoCapacity:
            raise NoCapacity(
                f"{zone}, where the disk of {vm.name} is, has no such machine now; "
                "without VM_INSTANCE and with --backend gcp any zone will do"
            ) from None
        self._check_limit(vm.name, zone)

    def _check_free(self, vm: Any) -> None:
        """Raises Held for a machine that is not parked."""
        run = vm.labels.get(RUN)
        if vm.status != "TERMINATED" or is_being_taken(vm):
            status = "being started" if vm.status == "TERMINATED" else vm.status.lower()
            raise Held(
                f"{vm.name} is {status}, and was last used by the run {run}: --wait queues, "
                f"`cloudrun stop {run}` ends that run; if a person started it, stop it in the console"
            )

    def _scheduling(self, boot: Boot, shape: Shape, spot: bool, *, kept: bool) -> Any:
        sdk = self._compute
        scheduling = sdk.Scheduling(
            on_host_maintenance="TERMINATE",
            automatic_restart=False,
            provisioning_model="SPOT" if spot else "STANDARD",
            instance_termination_action="STOP" if kept else "DELETE",
            max_run_duration=sdk.Duration(seconds=max(math.ceil(boot.seconds), LEAST_SECONDS)),
        )
        if shape.local_ssds and kept:
            scheduling.on_instance_stop_action = sdk.SchedulingOnInstanceStopAction(discard_local_ssd=True)
        return scheduling

    def _script(self, boot: Boot, shape: Shape, *, kept: bool) -> str:
        more = {"kept": kept, "gpus": shape.gpus, "user": self._vm.get("VM_USER", "")}
        return startup_script({**boot.payload, **more}, os.environ)

    def _items(self, metadata: dict[str, str]) -> list[Any]:
        return [self._compute.Items(key=key, value=value) for key, value in metadata.items()]

    def _check_limit(self, vm: str, zone: str) -> None:
        """Raises CloudrunError for a machine that the provider would not end: our caller does."""
        found = self._compute.vm(zone, vm)
        if found.status == "RUNNING" and not found.resource_status.scheduling.termination_timestamp:
            raise CloudrunError(f"{vm} was started, but Google did not set a limit to its life")

    # --- looking and ending

    def find(self, name: str) -> Instance | None:
        found = self._found(name)
        if found:
            self._last[name] = described(*found)
            return self._last[name]
        return self._left.disk(name) or self._gone(name)

    def _gone(self, name: str) -> Instance | None:
        """A machine of one attempt that is not there any more, if Google tells when it ended."""
        zone, vm, kept = self._made(name)
        if kept or not name.rpartition("-")[2].isdecimal():
            return None
        with suppress(ApiError):  # then it has ended when that is seen
            return self._left.ended([zone] if zone else self._wanted.zones, vm, name, self._last.get(name))
        return None

    def _made(self, name: str) -> tuple[str, str, bool]:
        """Zone (empty: not known), name and whether it is kept, of what was made or seen under this name."""
        made = self._zones.get(name, ""), self._wanted.vm or gce_name(name), bool(self._wanted.vm)
        return self._seen.get(name, made)

    def all(self) -> list[Instance]:
        return self._ours(self._compute.listed(f"labels.{RUN}:*"))

    def survey(self) -> Survey:
        listed, disks, unseen = self._compute.listed(), [], ""
        others = [(zone, vm.name) for zone, vm in listed if not is_ours(vm) and vm.status not in UNBILLED]
        try:
            disks = self._left.disks()
        except ApiError as error:  # which must hide no machine
            unseen = f"the disks of {self.place} cannot be seen: {error}"
        return Survey(self._ours(listed), [f"{name} in {zone}" for zone, name in others], disks, unseen)

    def _ours(self, listed: list[tuple[str, View]]) -> list[Instance]:
        found = []
        for zone, vm in listed:
            if is_ours(vm):
                found.append(described(zone, vm))
                self._seen[found[-1].name] = zone, vm.name, found[-1].kept
        return found

    def stop(self, name: str) -> None:
        found = self._found(name)
        if not found:
            self._left.delete(name)
            return
        zone, vm = found
        # What has another name than we would give it was made by somebody else, whatever its labels say.
        kept, now = is_kept(vm) or vm.name != gce_name(name), time.monotonic()
        nothing_left = vm.status == "TERMINATED" and kept
        if nothing_left or now - self._asked.get(name, -ASK_AGAIN_SECONDS) < ASK_AGAIN_SECONDS:
            return
        self._asked[name] = now
        try:
            if kept:
                self._compute.begin("stop_unary", zone, instance=vm.name, discard_local_ssd=True)
            else:
                self._compute.begin("delete_unary", zone, instance=vm.name)
        except CloudrunError as error:
            del self._asked[name]
            if getattr(error, "code", None) != 404:
                raise

    def taken_away(self, name: str) -> bool:
        """By the operation that this leaves: a machine of one attempt is gone with it."""
        found, (zone, vm, _), since = self._found(name), self._made(name), 0.0
        if found:
            since = seconds_of_google(found[1].last_start_timestamp) or 0.0
        return self._left.taken_away([zone] if zone else self._wanted.zones, vm, since)

    def cost(self, name: str) -> Cost | None:
        return None

    def console(self, name: str) -> str:
        found = self._found(name)
        if not found:
            return ""
        zone, vm = found
        output = self._compute.read(f"zones/{zone}/instances/{vm.name}/serialPort", start=-8192)
        return str(output.contents).replace("\r\n", "\n")[-4000:]

    def by_hand(self, name: str) -> str:
        zone, vm, kept = self._made(name)
        zone, project = zone or self._wanted.zones[0], self._compute.project
        page = f"https://console.cloud.google.com/compute/instancesDetail/zones/{zone}/instances/{vm}?project={project}"
        machine = f"{self._gcloud('stop' if kept else 'delete', vm, zone)}\nor there: {page}"
        return self._left.by_hand(name) or machine

    def _gcloud(self, verb: str, vm: str, zone: str) -> str:
        return f"gcloud compute instances {verb} {vm} --zone={zone} --project={self._compute.project}"

    def _found(self, name: str) -> tuple[str, Any] | None:
        """The machine of an attempt, by its labels: its name may be that of another run's by now."""
        run, _, attempt = name.rpartition("-")
        made = self._wanted.vm or gce_name(name)
        if name in self._zones:
            found = self._compute.named([self._zones[name]], made)
        elif name in self._seen:
            found = self._compute.named([self._seen[name][0]], self._seen[name][1])
        else:  # a list may not have it yet, or not have it once: what has no such name is not there
            found = self._compute.listed(f"labels.{RUN}={run} AND labels.{ATTEMPT}={attempt}")
            found = found or self._compute.named(self._wanted.zones, made)
        mine = [
            (zone, vm) for zone, vm in found if (vm.labels.get(RUN), vm.labels.get(ATTEMPT)) == (run, attempt)
        ]
        for zone, vm in mine:
            self._seen[name] = zone, vm.name, is_kept(vm)
        return mine[0] if mine else None
