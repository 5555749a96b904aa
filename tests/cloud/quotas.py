"""Quotas per region and over all of them, and zones that have nothing left.

Sources: D:troubleshooting/troubleshooting-resource-availability; that both are errors of the operation and
not of the call, and the texts: public issues of tools that met them.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from . import catalog, errors

if TYPE_CHECKING:
    from .instances import Instance

EVERYWHERE = "GPUS_ALL_REGIONS"
DEFAULT = 16.0
OFF = ("TERMINATED", "STOPPED", "SUSPENDED")


class Want(NamedTuple):
    """What one instance takes of the quotas. `metric` is "" for GPUs that are not listed there."""

    region: str
    metric: str
    gpus: int


def wants(instance: Instance) -> Want:
    gpu = catalog.GPUS.get(instance.plan.gpu)
    metric = gpu.metric if gpu else ""
    if metric and instance.spot:
        metric = f"PREEMPTIBLE_{metric}"
    return Want(catalog.region_of(instance.zone), metric, instance.plan.gpus)


class Quotas:
    """`limits`: {metric or (region, metric): limit}; what is not named has a limit of DEFAULT."""

    def __init__(self) -> None:
        self.limits: dict[str | tuple[str, str], float] = {}
        self._out: list[tuple[str, str]] = []

    def stock_out(self, zone: str = "*", machine_type: str = "*") -> None:
        """Nothing of this kind is to be had there any more; both may be patterns."""
        self._out.append((zone, machine_type))

    def restock(self) -> None:
        self._out.clear()

    def limit(self, metric: str, region: str = "") -> float:
        return float(self.limits.get((region, metric), self.limits.get(metric, DEFAULT)))

    def problem(self, instance: Instance, others: Iterable[Instance]) -> errors.Failure | None:
        """Why this one cannot run now, beside the others that do."""
        want, running = wants(instance), [wants(each) for each in others if each.status not in OFF]
        everywhere = sum(each.gpus for each in running) + want.gpus
        if want.gpus and everywhere > self.limit(EVERYWHERE):
            return errors.over_quota(EVERYWHERE, self.limit(EVERYWHERE), "globally")
        here = sum(each.gpus for each in running if each[:2] == want[:2]) + want.gpus
        if want.metric and here > self.limit(want.metric, want.region):
            limit = self.limit(want.metric, want.region)
            return errors.over_quota(want.metric, limit, f"in region {want.region}")
        return self._stock(instance)

    def _stock(self, instance: Instance) -> errors.Failure | None:
        zone, kind = instance.zone, instance.plan.kind.name
        if not any(fnmatchcase(zone, z) and fnmatchcase(kind, k) for z, k in self._out):
            return None
        gpus = instance.plan.gpus
        attachment = f"{gpus} {instance.plan.gpu} accelerator(s)" if gpus else ""
        return errors.stock_out(zone, kind, attachment)

    def region_view(self, region: str, running: Iterable[Instance]) -> list[dict[str, Any]]:
        taken = [wants(each) for each in running if each.status not in OFF]
        metrics = sorted(gpu.metric for gpu in catalog.GPUS.values() if gpu.metric)
        shown = [("CPUS", 500.0, 0.0)]
        for metric in (*metrics, *(f"PREEMPTIBLE_{name}" for name in metrics)):
            usage = sum(each.gpus for each in taken if each[:2] == (region, metric))
            shown.append((metric, self.limit(metric, region), float(usage)))
        return [{"metric": metric, "limit": limit, "usage": usage} for metric, limit, usage in shown]

    def project_view(self, running: Iterable[Instance]) -> list[dict[str, Any]]:
        usage = sum(wants(each).gpus for each in running if each.status not in OFF)
        return [{"metric": EVERYWHERE, "limit": self.limit(EVERYWHERE), "usage": float(usage)}]
