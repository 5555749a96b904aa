"""The methods of `instances` and of operations, by their names in the discovery document."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

from . import catalog, checks, errors
from .instances import Instance
from .lists import aggregated, page
from .operations import Operation
from .project import Disk, Project
from .view import label_fingerprint, metadata_fingerprint, view

SERIAL_MOST = 1 << 20  # the console's buffer (discovery)
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\Z")


class InstanceMethods:
    """Each takes a request (`path`, `query`, `body`, `user`) and returns the answer, or raises ApiError."""

    def __init__(self, project: Project) -> None:
        self.project = project

    # --- reading

    def instances_get(self, request: Any) -> Any:
        return view(self.find(request))

    def instances_list(self, request: Any) -> Any:
        zone = self.zone(request)
        found = [view(each) for each in self.project.instances.values() if each.zone == zone and each.visible]
        return page("instanceList", found, request.query, f"{self.project.root}/zones/{zone}/instances")

    def instances_aggregatedList(self, request: Any) -> Any:
        found = [view(each) for each in self.project.instances.values() if each.visible]
        return aggregated("instance", found, request.query, self.project.root)

    def instances_getSerialPortOutput(self, request: Any) -> Any:
        """Only while it runs (D:troubleshooting/viewing-serial-port-output)."""
        instance = self.find(request)
        if instance.status == "TERMINATED":
            raise errors.not_ready(instance.resource)
        path = instance.console
        data = path.read_bytes() if path.exists() and request.query.get("port", "1") == "1" else b""
        start, oldest = int(request.query.get("start", 0)), max(0, len(data) - SERIAL_MOST)
        start = max(oldest, len(data) + start if start < 0 else min(start, len(data)))
        contents = data[start:].decode(errors="replace")
        link = f"{instance.link}/serialPort"
        shown = {"kind": "compute#serialPortOutput", "selfLink": link, "contents": contents}
        return {**shown, "start": str(start), "next": str(len(data))}

    def instances_getGuestAttributes(self, request: Any) -> Any:
        instance = self.find(request)
        key, wanted = request.query.get("variableKey", ""), request.query.get("queryPath", "")
        namespace, _, name = (key or wanted).partition("/")
        items = [
            {"namespace": space, "key": each, "value": value}
            for space, values in instance.attributes.items()
            for each, value in values.items()
            if space == namespace and name in ("", each)
        ]
        if not items:
            raise errors.not_found(f"{instance.resource}/guestAttributes/{key or wanted}")
        shown = {
            "kind": "compute#guestAttributes",
            "selfLink": f"{instance.link}/guestAttributes/{namespace}",
        }
        if key:
            return {**shown, "variableKey": key, "variableValue": items[0]["value"]}
        return {**shown, "queryPath": wanted, "queryValue": {"items": items}}

    # --- changing

    def instances_insert(self, request: Any) -> Any:
        project, zone, body = self.project, self.zone(request), copy.deepcopy(request.body)
        return self.once(request, lambda: self._insert(project, zone, body, request.user))

    def _insert(self, project: Project, zone: str, body: dict[str, Any], user: str) -> Operation:
        resource = f"projects/{project.name}/zones/{zone}/instances/{body.get('name', '')}"
        if (zone, body.get("name")) in project.instances:
            raise errors.already_exists(resource)
        plan = checks.check_insert(body, project.name, zone, project.disks, project.timing.shortest_run)
        instance = Instance(project, zone, body, plan, self._disk(zone, plan, body))
        project.instances[zone, instance.name] = instance
        operation = project.operations.start("insert", zone, instance.link, instance.id, user)
        instance.provision(operation)
        return operation

    def _disk(self, zone: str, plan: checks.Plan, body: dict[str, Any]) -> Disk:
        if plan.image is None:
            return self.project.disks[zone, plan.disk]
        top = self.project.root.rpartition("/")[0]
        image = f"{top}/{plan.image.project}/global/images/{plan.image.name}"
        ordered = next(each for each in body["disks"] if each.get("boot"))
        labels = ordered.get("initializeParams", {}).get("labels", {})
        return self.project.make_disk(zone, plan.disk, plan.disk_type, plan.gigabytes, image, labels)

    def instances_start(self, request: Any) -> Any:
        return self.once(request, lambda: self._start(self.find(request), request.user))

    def _start(self, instance: Instance, user: str) -> Operation:
        if instance.status not in ("TERMINATED", "RUNNING"):
            raise errors.not_ready(instance.resource)
        operation = self.operation("start", instance, user)
        if instance.status == "RUNNING":
            self.project.operations.finish(operation)
        else:
            instance.provision(operation)
        return operation

    def instances_stop(self, request: Any) -> Any:
        return self.once(request, lambda: self._stop(self.find(request), request))

    def _stop(self, instance: Instance, request: Any) -> Operation:
        if instance.plan.kind.ssds and "discardLocalSsd" not in request.query:
            raise errors.discard_undefined()
        if instance.status not in ("TERMINATED", "RUNNING", "REPAIRING"):
            raise errors.not_ready(instance.resource)
        operation = self.operation("stop", instance, request.user)
        if instance.status == "TERMINATED":
            self.project.operations.finish(operation)
        else:
            instance.stop(operation)
        return operation

    def instances_reset(self, request: Any) -> Any:
        return self.once(request, lambda: self._reset(self.find(request), request.user))

    def _reset(self, instance: Instance, user: str) -> Operation:
        if instance.status != "RUNNING":
            raise errors.not_ready(instance.resource)
        operation = self.operation("reset", instance, user)
        instance.reset(operation)
        return operation

    def instances_delete(self, request: Any) -> Any:
        return self.once(request, lambda: self._delete(self.find(request), request.user))

    def _delete(self, instance: Instance, user: str) -> Operation:
        if instance.body.get("deletionProtection"):
            why = f"Resource cannot be deleted if it's protected against deletion. {instance.resource}"
            message = f"Invalid resource usage: '{why}'."
            raise errors.ApiError(400, "invalidResourceUsage", message)
        operation = self.operation("delete", instance, user)
        instance.delete(operation)
        return operation

    def instances_simulateMaintenanceEvent(self, request: Any) -> Any:
        return self.once(request, lambda: self._maintain(self.find(request), request.user))

    def _maintain(self, instance: Instance, user: str) -> Operation:
        if instance.status != "RUNNING":
            raise errors.not_ready(instance.resource)
        operation = self.operation("compute.instances.simulateMaintenanceEvent", instance, user)
        instance.maintain()
        self.project.operations.finish(operation)
        return operation

    def instances_setLabels(self, request: Any) -> Any:
        return self.once(request, lambda: self._set_labels(self.find(request), request))

    def _set_labels(self, instance: Instance, request: Any) -> Operation:
        if request.body.get("labelFingerprint") != label_fingerprint(instance):
            raise errors.stale_fingerprint("labels")
        labels = request.body.get("labels", {})
        checks.check_labels(labels, "labels")
        instance.body["labels"] = labels
        return self.change("setLabels", instance, request.user)

    def instances_setMetadata(self, request: Any) -> Any:
        return self.once(request, lambda: self._set_metadata(self.find(request), request))

    def _set_metadata(self, instance: Instance, request: Any) -> Operation:
        if request.body.get("fingerprint") != metadata_fingerprint(instance):
            raise errors.stale_fingerprint("metadata")
        items = request.body.get("items", [])
        checks.check_metadata(items)
        instance.body["metadata"] = {"items": items}
        return self.change("setMetadata", instance, request.user)

    def instances_setScheduling(self, request: Any) -> Any:
        return self.once(request, lambda: self._set_scheduling(self.find(request), request))

    def _set_scheduling(self, instance: Instance, request: Any) -> Operation:
        """Of a TERMINATED instance only: compute_v1, set_scheduling."""
        if instance.status != "TERMINATED":
            raise errors.bad_request(
                f"Instance must be TERMINATED to set its scheduling: '{instance.resource}'."
            )
        wanted = {**instance.scheduling, **request.body}
        plan = instance.plan
        checks.check_scheduling(wanted, plan.kind, plan.gpus, self.project.timing.shortest_run)
        instance.body["scheduling"] = wanted
        return self.change("setScheduling", instance, request.user)

    # --- operations

    def zoneOperations_get(self, request: Any) -> Any:
        return self._operation(request).view()

    def zoneOperations_wait(self, request: Any) -> Any:
        """Blocks for a while, and may return before the end (discovery)."""
        operation = self._operation(request)
        self.project.clock.wait_for(lambda: operation.done, self.project.timing.wait)
        return operation.view()

    def zoneOperations_list(self, request: Any) -> Any:
        zone = self.zone(request)
        found = [each.view() for each in self.project.operations.of_zone(zone)]
        return page("operationList", found, request.query, f"{self.project.root}/zones/{zone}/operations")

    def zoneOperations_delete(self, request: Any) -> Any:
        self._operation(request)
        self.project.operations.forget(request.path["zone"], request.path["operation"])
        return None

    def globalOperations_get(self, request: Any) -> Any:
        """All that happens here happens in a zone."""
        raise errors.not_found(f"projects/{self.project.name}/global/operations/{request.path['operation']}")

    def regionOperations_get(self, request: Any) -> Any:
        place = f"projects/{self.project.name}/regions/{request.path['region']}"
        raise errors.not_found(f"{place}/operations/{request.path['operation']}")

    # --- shared

    def zone(self, request: Any) -> str:
        zone: str = request.path["zone"]
        if zone not in catalog.ZONES:
            raise errors.not_found(f"projects/{self.project.name}/zones/{zone}")
        return zone

    def find(self, request: Any) -> Instance:
        zone, name = self.zone(request), request.path["instance"]
        for instance in self.project.instances.values():
            if instance.zone == zone and name in (instance.name, instance.id) and instance.visible:
                return instance
        raise errors.not_found(f"projects/{self.project.name}/zones/{zone}/instances/{name}")

    def operation(self, kind: str, instance: Instance, user: str) -> Operation:
        return self.project.operations.start(kind, instance.zone, instance.link, instance.id, user)

    def change(self, kind: str, instance: Instance, user: str) -> Operation:
        operation = self.operation(kind, instance, user)
        self.project.clock.after(self.project.timing.changing, self.project.operations.finish, operation)
        return operation

    def once(self, request: Any, act: Callable[[], Operation]) -> Any:
        """A request id that was seen before gets the operation it got then (discovery)."""
        request_id, operations = request.query.get("requestId", ""), self.project.operations
        if request_id and (not UUID.match(request_id) or not request_id.strip("0-")):
            raise errors.invalid("requestId", request_id, "Must be a non-zero UUID.")
        what = f"{request.verb} {request.address}"
        if request_id and (known := operations.replay(what, request_id)):
            return known.view()
        operation = act()
        if request_id:
            operations.remember(what, request_id, operation)
        self.project.clock.changed.notify_all()
        return operation.view()

    def _operation(self, request: Any) -> Operation:
        zone, name = self.zone(request), request.path["operation"]
        if not (operation := self.project.operations.get(zone, name)):
            raise errors.not_found(f"projects/{self.project.name}/zones/{zone}/operations/{name}")
        return operation
