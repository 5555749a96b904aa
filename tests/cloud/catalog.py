"""What the emulated Compute Engine rents: zones, machine types, GPUs, disk types, images.

Sources: D:gpus, D:disks/local-ssd, D:disks/hyperdisks, and the images page of the Deep Learning VM. Which
zone outside of us-central1 holds which GPU is made up, so that regions differ.
"""

from __future__ import annotations

import re
from typing import NamedTuple

ZONES = {
    "us-central1-a": {"t4", "l4", "a100", "a100-80", "h100", "p4", "rtx"},
    "us-central1-b": {"t4", "l4", "a100", "h100", "h200", "b200", "rtx"},
    "us-central1-c": {"t4", "l4", "a100", "a100-80", "h100", "p4", "p100"},
    "us-central1-f": {"t4", "a100", "p100"},
    "us-east1-b": {"l4", "a100", "b200"},
    "us-east1-c": {"t4", "l4", "p100"},
    "us-east1-d": {"t4", "l4"},
    "us-east4-a": {"t4", "l4", "p4"},
    "us-east4-c": {"l4", "a100-80", "h100"},
    "us-west1-a": {"t4", "l4", "v100", "h100"},
    "us-west1-b": {"t4", "l4", "v100", "a100", "h100"},
    "us-west4-a": {"l4", "h100"},
    "europe-west1-b": {"t4", "l4", "p100", "h100", "h200"},
    "europe-west4-a": {"l4", "v100", "a100", "a100-80"},
    "europe-west4-b": {"t4", "l4", "a100", "h100"},
    "europe-west4-c": {"t4", "l4", "h100"},
    "europe-north1-c": {"h100"},
    "asia-southeast1-b": {"t4", "l4", "a100", "h100"},
    "asia-southeast1-c": {"t4", "l4", "a100", "a100-80", "h100"},
}


class GpuType(NamedTuple):
    """`short` as in ZONES; `card` and `memory` (MiB) as nvidia-smi says; `metric` "" where none is listed."""

    short: str
    card: str
    memory: int
    most: int
    metric: str


GPUS = {
    "nvidia-tesla-t4": GpuType("t4", "Tesla T4", 15360, 4, "NVIDIA_T4_GPUS"),
    "nvidia-tesla-p4": GpuType("p4", "Tesla P4", 7680, 4, "NVIDIA_P4_GPUS"),
    "nvidia-tesla-v100": GpuType("v100", "Tesla V100-SXM2-16GB", 16384, 8, "NVIDIA_V100_GPUS"),
    "nvidia-tesla-p100": GpuType("p100", "Tesla P100-PCIE-16GB", 16384, 4, "NVIDIA_P100_GPUS"),
    "nvidia-l4": GpuType("l4", "NVIDIA L4", 23034, 8, "NVIDIA_L4_GPUS"),
    "nvidia-tesla-a100": GpuType("a100", "NVIDIA A100-SXM4-40GB", 40960, 16, "NVIDIA_A100_GPUS"),
    "nvidia-a100-80gb": GpuType("a100-80", "NVIDIA A100-SXM4-80GB", 81920, 8, "NVIDIA_A100_80GB_GPUS"),
    "nvidia-h100-80gb": GpuType("h100", "NVIDIA H100 80GB HBM3", 81559, 8, ""),
    "nvidia-h100-mega-80gb": GpuType("h100", "NVIDIA H100 80GB HBM3", 81559, 8, ""),
    "nvidia-h200-141gb": GpuType("h200", "NVIDIA H200", 143771, 8, ""),
    "nvidia-b200": GpuType("b200", "NVIDIA B200", 183359, 8, ""),
    "nvidia-rtx-pro-6000": GpuType("rtx", "NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887, 8, ""),
}

# {GPU: {count: (most vCPUs, most GB)}} for n1, where the GPU is ordered beside the type.
N1_CAPS = {
    "nvidia-tesla-t4": {1: (48, 312), 2: (48, 312), 4: (96, 624)},
    "nvidia-tesla-p4": {1: (24, 156), 2: (48, 312), 4: (96, 624)},
    "nvidia-tesla-v100": {1: (12, 78), 2: (24, 156), 4: (48, 312), 8: (96, 624)},
    "nvidia-tesla-p100": {1: (16, 104), 2: (32, 208), 4: (96, 624)},
}


class MachineType(NamedTuple):
    name: str
    cpus: int
    memory: int  # MB
    gpu: str = ""  # a key of GPUS
    gpus: int = 0
    ssds: int = 0  # bundled local SSDs: whoever stops it has to say what becomes of them

    @property
    def family(self) -> str:
        return self.name.partition("-")[0]

    @property
    def spot_only(self) -> bool:
        """Not on demand: SPOT, FLEX_START or a reservation (D:gpus)."""
        return self.name in (
            *("a3-highgpu-1g", "a3-highgpu-2g", "a3-highgpu-4g"),
            *("a3-ultragpu-8g", "a4-highgpu-8g"),
        )

    @property
    def needs_hyperdisk(self) -> bool:
        return self.family in ("a4", "g4", "n4", "c4", "m4", "h3") or self.name.startswith("a3-ultragpu")

    @property
    def default_disk(self) -> str:
        if self.family in ("a3", "a4") or self.needs_hyperdisk:
            return "hyperdisk-balanced"
        return "pd-balanced" if self.family == "c3" else "pd-standard"

    def refuses(self, disk_type: str) -> bool:
        if self.needs_hyperdisk:
            return disk_type.startswith("pd-")
        refused = {"pd-standard": ("a3", "g2"), "pd-extreme": ("n1", "a2", "g2")}
        return self.family in refused.get(disk_type, ())


def _plain() -> list[MachineType]:
    sizes = (1, 2, 4, 8, 16, 32, 64, 96)
    found = [MachineType(f"n1-standard-{n}", n, n * 3840) for n in sizes]
    found += [MachineType(f"n1-highmem-{n}", n, n * 6656) for n in sizes[1:]]
    found += [MachineType(f"n1-highcpu-{n}", n, n * 922) for n in sizes[1:]]
    found += [MachineType("f1-micro", 1, 614), MachineType("g1-small", 1, 1740)]
    found += [
        MachineType("e2-micro", 2, 1024),
        MachineType("e2-small", 2, 2048),
        MachineType("e2-medium", 2, 4096),
    ]
    for family in ("e2", "n2", "c3", "c4", "n4"):
        found += [MachineType(f"{family}-standard-{n}", n, n * 4096) for n in (2, 4, 8, 16)]
    return found


def _with_gpus() -> list[MachineType]:
    g2 = {
        4: (16, 1),
        8: (32, 1),
        12: (48, 1),
        16: (64, 1),
        32: (128, 1),
        24: (96, 2),
        48: (192, 4),
        96: (384, 8),
    }
    found = [MachineType(f"g2-standard-{n}", n, gb * 1024, "nvidia-l4", gpus) for n, (gb, gpus) in g2.items()]
    for n, gpus in ((48, 1), (96, 2), (192, 4), (384, 8)):
        found.append(MachineType(f"g4-standard-{n}", n, n * 3840, "nvidia-rtx-pro-6000", gpus))
    for n in (1, 2, 4, 8):
        found += [
            MachineType(f"a2-highgpu-{n}g", 12 * n, 85 * 1024 * n, "nvidia-tesla-a100", n),
            MachineType(f"a2-ultragpu-{n}g", 12 * n, 170 * 1024 * n, "nvidia-a100-80gb", n, n),
            MachineType(f"a3-highgpu-{n}g", 26 * n, 234 * 1024 * n, "nvidia-h100-80gb", n, 2 * n),
        ]
    found += [
        MachineType("a2-megagpu-16g", 96, 1360 * 1024, "nvidia-tesla-a100", 16),
        MachineType("a3-megagpu-8g", 208, 1872 * 1024, "nvidia-h100-mega-80gb", 8, 16),
        MachineType("a3-edgegpu-8g", 208, 1872 * 1024, "nvidia-h100-80gb", 8, 16),
        MachineType("a3-ultragpu-8g", 224, 2952 * 1024, "nvidia-h200-141gb", 8, 32),
        MachineType("a4-highgpu-8g", 224, 3968 * 1024, "nvidia-b200", 8, 32),
    ]
    return found


TYPES = {each.name: each for each in (*_plain(), *_with_gpus())}
CUSTOM = re.compile(r"(?:n1-)?custom-(\d+)-(\d+)\Z")
DISK_TYPES = (
    *("pd-standard", "pd-balanced", "pd-ssd", "pd-extreme"),
    *("hyperdisk-balanced", "hyperdisk-extreme", "hyperdisk-throughput", "hyperdisk-ml", "local-ssd"),
)


def region_of(zone: str) -> str:
    return zone.rpartition("-")[0]


def machine_type(name: str, zone: str) -> MachineType | None:
    """The type of this name, if this zone has it."""
    if custom := CUSTOM.match(name):
        return MachineType(name.replace("n1-custom", "custom"), int(custom[1]), int(custom[2]))
    found = TYPES.get(name)
    if found is None or (found.gpu and GPUS[found.gpu].short not in ZONES[zone]):
        return None
    return found


def types_in(zone: str) -> list[MachineType]:
    return [each for each in TYPES.values() if machine_type(each.name, zone)]


def gpus_in(zone: str) -> list[str]:
    return [name for name, gpu in GPUS.items() if gpu.short in ZONES[zone]]


class Image(NamedTuple):
    project: str
    name: str
    family: str
    gigabytes: int


def _images() -> list[Image]:
    deep = (
        *("common-cu129-ubuntu-2204-nvidia-580", "common-cu129-ubuntu-2404-nvidia-580"),
        *("pytorch-2-9-cu129-ubuntu-2204-nvidia-580", "pytorch-2-9-cu129-ubuntu-2404-nvidia-580"),
        *("common-cu128-ubuntu-2204-nvidia-570", "pytorch-2-7-cu128-ubuntu-2204-nvidia-570"),
    )
    plain = ("ubuntu-2204-lts", "ubuntu-2404-lts-amd64")
    accelerated = [f"ubuntu-accelerator-{u}-amd64-with-nvidia-{d}" for u in (2204, 2404) for d in (570, 580)]
    return [
        *(Image("deeplearning-platform-release", f"{f}-v20260402", f, 50) for f in deep),
        *(Image("ubuntu-os-accelerator-images", f"{f}-v20260315", f, 20) for f in accelerated),
        *(Image("ubuntu-os-cloud", f"{f.replace('-lts', '-jammy')}-v20260320", f, 10) for f in plain),
        Image("debian-cloud", "debian-12-bookworm-v20260310", "debian-12", 10),
    ]


IMAGES = _images()


def image(project: str, name: str) -> Image | None:
    return next((each for each in IMAGES if (each.project, each.name) == (project, name)), None)


def family(project: str, name: str) -> Image | None:
    return next((each for each in IMAGES if (each.project, each.family) == (project, name)), None)
