"""The methods that only read what the cloud offers: zones, types, images, disks, networks, the project."""

from __future__ import annotations

from typing import Any

from . import catalog, errors
from .catalog import Image, MachineType
from .clock import rfc3339
from .lists import aggregated, page
from .operations import number
from .project import Disk, Project

MADE = rfc3339(1_700_000_000.0)


class CatalogMethods:
    """As InstanceMethods, for everything else."""

    def __init__(self, project: Project) -> None:
        self.project = project

    # --- places

    def zones_get(self, request: Any) -> Any:
        return self._zone(self.zone(request))

    def zones_list(self, request: Any) -> Any:
        return page(
            "zoneList", [self._zone(zone) for zone in catalog.ZONES], request.query, f"{self.root}/zones"
        )

    def regions_get(self, request: Any) -> Any:
        return self._region(self.region(request))

    def regions_list(self, request: Any) -> Any:
        regions = sorted({catalog.region_of(zone) for zone in catalog.ZONES})
        return page(
            "regionList", [self._region(name) for name in regions], request.query, f"{self.root}/regions"
        )

    def projects_get(self, request: Any) -> Any:
        return {
            **self._head("project", self.root, self.project.name),
            "defaultServiceAccount": self.project.service_account,
            "commonInstanceMetadata": {"kind": "compute#metadata", "fingerprint": "AAAAAAAAAAA="},
            "quotas": self.project.quotas.project_view(self.project.instances.values()),
        }

    def networks_get(self, request: Any) -> Any:
        self._only_default(request.path["network"], "global/networks")
        link = f"{self.root}/global/networks/default"
        return {**self._head("network", link, "default"), "autoCreateSubnetworks": True}

    def subnetworks_get(self, request: Any) -> Any:
        region = self.region(request)
        self._only_default(request.path["subnetwork"], f"regions/{region}/subnetworks")
        link = f"{self.root}/regions/{region}/subnetworks/default"
        network = f"{self.root}/global/networks/default"
        return {
            **self._head("subnetwork", link, "default"),
            "network": network,
            "region": f"{self.root}/regions/{region}",
        }

    # --- what can be rented

    def machineTypes_get(self, request: Any) -> Any:
        zone, name = self.zone(request), request.path["machineType"]
        if not (kind := catalog.machine_type(name, zone)):
            raise errors.not_found(f"projects/{self.project.name}/zones/{zone}/machineTypes/{name}")
        return self._machine_type(kind, zone)

    def machineTypes_list(self, request: Any) -> Any:
        zone = self.zone(request)
        found = [self._machine_type(each, zone) for each in catalog.types_in(zone)]
        return page("machineTypeList", found, request.query, f"{self.root}/zones/{zone}/machineTypes")

    def acceleratorTypes_get(self, request: Any) -> Any:
        zone, name = self.zone(request), request.path["acceleratorType"]
        if name not in catalog.gpus_in(zone):
            raise errors.not_found(f"projects/{self.project.name}/zones/{zone}/acceleratorTypes/{name}")
        return self._accelerator(name, zone)

    def acceleratorTypes_list(self, request: Any) -> Any:
        zone = self.zone(request)
        found = [self._accelerator(name, zone) for name in catalog.gpus_in(zone)]
        return page("acceleratorTypeList", found, request.query, f"{self.root}/zones/{zone}/acceleratorTypes")

    def diskTypes_get(self, request: Any) -> Any:
        zone, name = self.zone(request), request.path["diskType"]
        if name not in catalog.DISK_TYPES:
            raise errors.not_found(f"projects/{self.project.name}/zones/{zone}/diskTypes/{name}")
        place = f"{self.root}/zones/{zone}"
        head = self._head("diskType", f"{place}/diskTypes/{name}", name)
        return {**head, "zone": place, "validDiskSize": "10GB-65536GB", "defaultDiskSizeGb": "100"}

    def images_get(self, request: Any) -> Any:
        owner, name = request.path["project"], request.path["image"]
        if not (found := catalog.image(owner, name)):
            raise errors.not_found(f"projects/{owner}/global/images/{name}")
        return self._image(found)

    def images_getFromFamily(self, request: Any) -> Any:
        owner, name = request.path["project"], request.path["family"]
        if not (found := catalog.family(owner, name)):
            raise errors.not_found(f"projects/{owner}/global/images/family/{name}")
        return self._image(found)

    # --- disks

    def disks_get(self, request: Any) -> Any:
        return self._disk(request).view(self.root)

    def disks_list(self, request: Any) -> Any:
        zone = self.zone(request)
        found = [disk.view(self.root) for disk in self.project.disks.values() if disk.zone == zone]
        return page("diskList", found, request.query, f"{self.root}/zones/{zone}/disks")

    def disks_aggregatedList(self, request: Any) -> Any:
        found = [disk.view(self.root) for disk in self.project.disks.values()]
        return aggregated("disk", found, request.query, self.root)

    def disks_delete(self, request: Any) -> Any:
        disk = self._disk(request)
        if disk.user:
            message = f"The disk resource '{disk.name}' is already being used by '{disk.user}'"
            raise errors.ApiError(400, "resourceInUseByAnotherResource", message)
        self.project.remove_disk(disk)
        link = f"{self.root}/zones/{disk.zone}/disks/{disk.name}"
        operation = self.project.operations.start("delete", disk.zone, link, number(link), request.user)
        self.project.operations.finish(operation)
        return operation.view()

    # --- shared

    @property
    def root(self) -> str:
        return self.project.root

    def zone(self, request: Any) -> str:
        zone: str = request.path["zone"]
        if zone not in catalog.ZONES:
            raise errors.not_found(f"projects/{self.project.name}/zones/{zone}")
        return zone

    def region(self, request: Any) -> str:
        region: str = request.path["region"]
        if not any(catalog.region_of(zone) == region for zone in catalog.ZONES):
            raise errors.not_found(f"projects/{self.project.name}/regions/{region}")
        return region

    def _only_default(self, name: str, kind: str) -> None:
        if name != "default":
            raise errors.not_found(f"projects/{self.project.name}/{kind}/{name}")

    def _disk(self, request: Any) -> Disk:
        zone, name = self.zone(request), request.path["disk"]
        if not (disk := self.project.disks.get((zone, name))):
            raise errors.not_found(f"projects/{self.project.name}/zones/{zone}/disks/{name}")
        return disk

    def _head(self, kind: str, link: str, name: str) -> dict[str, Any]:
        shown = {"kind": f"compute#{kind}", "id": number(link), "name": name, "selfLink": link}
        return {**shown, "creationTimestamp": MADE}

    def _zone(self, zone: str) -> dict[str, Any]:
        link, region = f"{self.root}/zones/{zone}", f"{self.root}/regions/{catalog.region_of(zone)}"
        return {**self._head("zone", link, zone), "status": "UP", "region": region}

    def _region(self, region: str) -> dict[str, Any]:
        zones = [f"{self.root}/zones/{zone}" for zone in catalog.ZONES if catalog.region_of(zone) == region]
        quotas = self.project.quotas.region_view(region, self.project.instances.values())
        head = self._head("region", f"{self.root}/regions/{region}", region)
        return {**head, "status": "UP", "zones": zones, "quotas": quotas}

    def _machine_type(self, kind: MachineType, zone: str) -> dict[str, Any]:
        shown = {
            **self._head("machineType", f"{self.root}/zones/{zone}/machineTypes/{kind.name}", kind.name),
            "zone": zone,
            "guestCpus": kind.cpus,
            "memoryMb": kind.memory,
            "description": f"{kind.cpus} vCPUs, {kind.memory // 1024} GB RAM",
            "isSharedCpu": kind.name in ("e2-micro", "e2-small", "e2-medium", "f1-micro", "g1-small"),
            "maximumPersistentDisks": 128,
            "maximumPersistentDisksSizeGb": "263168",
        }
        if kind.gpu:
            shown["accelerators"] = [{"guestAcceleratorType": kind.gpu, "guestAcceleratorCount": kind.gpus}]
        if kind.ssds:
            shown["bundledLocalSsds"] = {"partitionCount": kind.ssds, "defaultInterface": "NVME"}
        return shown

    def _accelerator(self, name: str, zone: str) -> dict[str, Any]:
        place, gpu = f"{self.root}/zones/{zone}", catalog.GPUS[name]
        head = self._head("acceleratorType", f"{place}/acceleratorTypes/{name}", name)
        return {**head, "zone": place, "description": gpu.card, "maximumCardsPerInstance": gpu.most}

    def _image(self, image: Image) -> dict[str, Any]:
        link = f"{self.root.rpartition('/')[0]}/{image.project}/global/images/{image.name}"
        shown = {**self._head("image", link, image.name), "family": image.family, "status": "READY"}
        return {**shown, "diskSizeGb": str(image.gigabytes), "architecture": "X86_64", "sourceType": "RAW"}
