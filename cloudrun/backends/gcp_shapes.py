"""Which Compute Engine machine VM_GPU, VM_TYPE and VM_SPOT mean. Pure; everything comes from one table.

What is nonsense, or cannot be had, is a UsageError before any request. Machine types without a GPU are
not listed: Google knows best which of them exist.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

from cloudrun.errors import UsageError

IMAGES = "projects/{}/global/images/family/{}"
WITH_GPU = IMAGES.format("deeplearning-platform-release", "pytorch-2-9-cu129-ubuntu-2404-nvidia-580")
WITHOUT_GPU = IMAGES.format("ubuntu-os-cloud", "ubuntu-2404-lts-amd64")  # Deep Learning VMs need a GPU now

CPU_TYPE = "e2-standard-4"  # no GPU, and no quota that a new project lacks


class Row(NamedTuple):
    """GPUs of one kind in machines of one series, or, with `most_cpus`, attached to any n1 machine.

    `sizes`: what stands for {} in the type, and how many GPUs it has (attached: the host that so many get).
    Without VM_TYPE the first row and size that fit are taken; `also` are other spellings, and rows may
    share one. `ssds` come with each GPU. `most_cpus` a machine may have, for each of `sizes`.
    """

    gpu: str
    also: str
    types: str
    sizes: dict[int, int]
    ssds: int
    on_demand: bool
    most_cpus: tuple[int, ...] = ()


EACH = {1: 1, 2: 2, 4: 4, 8: 8}
L4S = {4: 1, 8: 1, 12: 1, 16: 1, 32: 1, 24: 2, 48: 4, 96: 8}
RTX = {48: 1, 96: 2, 192: 4, 384: 8}

# fmt: off
TABLE = (
    #   GPU               also                      machine types      GPUs in each            SSDs, on demand
    Row("L4",             "",                       "g2-standard-{}",  L4S,                       0, True),
    Row("RTX-PRO-6000",   "rtx6000pro",             "g4-standard-{}",  RTX,                       0, True),
    Row("RTX-PRO-6000/2", "",                       "g4-standard-{}",  {24: 1},                   0, True),
    Row("RTX-PRO-6000/4", "",                       "g4-standard-{}",  {12: 1},                   0, True),
    Row("RTX-PRO-6000/8", "",                       "g4-standard-{}",  {6: 1},                    0, True),
    Row("A100-40GB",      "a100",                   "a2-highgpu-{}g",  EACH,                      0, True),
    Row("A100-40GB",      "a100",                   "a2-megagpu-{}g",  {16: 16},                  0, True),
    Row("A100-80GB",      "a100",                   "a2-ultragpu-{}g", EACH,                      1, True),
    Row("H100",           "h10080",                 "a3-highgpu-{}g",  {8: 8},                    2, True),
    Row("H100",           "h10080",                 "a3-highgpu-{}g",  {1: 1, 2: 2, 4: 4},        2, False),
    Row("H100",           "h10080",                 "a3-edgegpu-{}g",  {8: 8},                    2, True),
    Row("H100-MEGA",      "h100mega80 h100 h10080", "a3-megagpu-{}g",  {8: 8},                    2, True),
    Row("H200",           "h200141",                "a3-ultragpu-{}g", {8: 8},                    4, False),
    Row("B200",           "",                       "a4-highgpu-{}g",  {8: 8},                    4, False),
    Row("T4",   "", "n1-standard-{}", {4: 1, 8: 2, 16: 4},         0, True, (48, 48, 96)),
    Row("P4",   "", "n1-standard-{}", {4: 1, 8: 2, 16: 4},         0, True, (24, 48, 96)),
    Row("V100", "", "n1-standard-{}", {8: 1, 16: 2, 32: 4, 64: 8}, 0, True, (12, 24, 48, 96)),
    # 64 vCPUs beside two of them in a few zones; the zone is not known here.
    Row("P100", "", "n1-standard-{}", {8: 1, 16: 2, 32: 4},        0, True, (16, 32, 96)),
)
# fmt: on

GB_PER_CPU = 6.5  # of n1 at most, and so are Google's limits on memory beside GPUs
N1_SIZES = (1, 2, 4, 8, 16, 32, 64, 96)

# No public image is known to drive these. Cards before Turing need NVIDIA's proprietary kernel modules, and
# Google's images have the open ones; parts of a card need a vGPU guest driver of the release on the host.
OWN_IMAGE = {
    **dict.fromkeys(("P4", "P100", "V100"), "NVIDIA's proprietary kernel modules"),
    **dict.fromkeys(("RTX-PRO-6000/2", "RTX-PRO-6000/4", "RTX-PRO-6000/8"), "a vGPU guest driver"),
}
SPECIAL = {
    "a4x-": "has Arm processors and can only be had by reservation",
    **dict.fromkeys(("t2a-", "c4a-", "n4a-"), "has Arm processors, for which cloudrun has no image"),
    "tpu": "has TPUs, not GPUs",
    **dict.fromkeys(("z3-", "-lssd"), "has local disks, which cloudrun takes only with GPUs"),
}


class Shape(NamedTuple):
    """A machine. `accelerator` is for guestAccelerators: empty where the GPUs are part of the type."""

    machine_type: str
    gpu: str = ""
    gpus: int = 0  # a tuple already has a method called count
    accelerator: str = ""
    disk_type: str = "pd-balanced"
    local_ssds: int = 0

    @property
    def words(self) -> str:
        return f"{f'{self.gpus} x {self.gpu}' if self.gpu else 'no GPU'} ({self.machine_type})"


def resolve(gpu: str, machine_type: str, spot: bool) -> Shape:
    """The machine for VM_GPU, VM_TYPE (each may be empty) and VM_SPOT. Raises UsageError."""
    name, count = _wanted(gpu)
    machine_type = machine_type.strip().lower()
    if not machine_type:
        machine_type = CPU_TYPE if name == "none" else _default(gpu, name or "l4", count or 1)
    for row in TABLE:
        if not row.most_cpus and machine_type in _machines(row):
            _check_agreed(gpu, machine_type, row)
            return _bundled(machine_type, row, spot)
    _check_type(machine_type)
    if name in ("", "none"):
        return Shape(machine_type, disk_type=_disk(machine_type))
    return _attached(gpu, machine_type)


def image_family(shape: Shape) -> str:
    """The image for this machine where VM_IMAGE is not set. Raises UsageError if Google has none."""
    if shape.gpu in OWN_IMAGE:
        raise UsageError(
            f"{shape.gpu} needs {OWN_IMAGE[shape.gpu]}, which no public image is known to have:"
            " set VM_IMAGE to one of your own that does"
        )
    return WITH_GPU if shape.gpu else WITHOUT_GPU


def _wanted(gpu: str) -> tuple[str, int | None]:
    """`T4:2` as a plain name and a number; None if there is no number."""
    name, colon, number = gpu.partition(":")
    number = number.strip()
    right = number.isascii() and number.isdigit() and len(number) < 4 and int(number)
    if (colon and not right) or (gpu.strip() and not _plain(name)) or (colon and _plain(name) == "none"):
        raise UsageError(f"VM_GPU={gpu}: not a GPU and how many of it, such as L4 or T4:2")
    return _plain(name), int(number) if colon else None


def _plain(name: str) -> str:
    """A name as people mean it: `NVIDIA Tesla T4`, `nvidia-tesla-t4` and `t4` are one."""
    letters = "".join(letter for letter in name.lower() if letter.isalnum() or letter == "/")
    return letters.removeprefix("nvidia").removeprefix("tesla").removesuffix("gb")


def _called(row: Row, name: str) -> bool:
    return name in (_plain(row.gpu), *row.also.split())


def _machines(row: Row) -> dict[str, int]:
    return {row.types.format(size): count for size, count in row.sizes.items()}


def _bundled(machine_type: str, row: Row, spot: bool) -> Shape:
    gpus = _machines(row)[machine_type]
    shape = Shape(machine_type, row.gpu, gpus, "", _disk(machine_type), gpus * row.ssds)
    if not row.on_demand and not spot:
        raise UsageError(f"{shape.words} can only be had as a spot VM: set VM_SPOT=1")
    return shape


def _check_agreed(gpu: str, machine_type: str, row: Row) -> None:
    (name, count), has = _wanted(gpu), _machines(row)[machine_type]
    if name and (not _called(row, name) or count not in (None, has)):
        raise UsageError(
            f"VM_TYPE={machine_type} has {has} x {row.gpu}, and VM_GPU={gpu} asks for something else:"
            " set only one of them, or both alike"
        )


def _default(gpu: str, name: str, count: int) -> str:
    rows = _rows(gpu, name)
    fitting = (kind for row in rows for kind, has in _machines(row).items() if has == count)
    return next(fitting, "") or _no_such_number(gpu, rows)


def _rows(gpu: str, name: str) -> list[Row]:
    rows = [row for row in TABLE if _called(row, name)]
    if not rows:
        known = ", ".join(dict.fromkeys(row.gpu for row in TABLE))
        raise UsageError(f"VM_GPU={gpu}: Google has no such GPU; it has {known}, and none is a choice, too")
    return rows


def _no_such_number(gpu: str, rows: list[Row]) -> NoReturn:
    counts = sorted({has for row in rows for has in row.sizes.values()})
    raise UsageError(f"VM_GPU={gpu}: a machine has {_or(counts)} x {rows[0].gpu}")


def _check_type(machine_type: str) -> None:
    """Refuses what is no name of a type, and types with a GPU that are not in the table."""
    family, *rest = machine_type.split("-")
    if not (machine_type.isascii() and rest and all(part.isalnum() for part in (family, *rest))):
        raise UsageError(f"VM_TYPE={machine_type}: not the name of a machine type, such as g2-standard-4")
    for part, why in SPECIAL.items():
        if part in machine_type:
            raise UsageError(f"VM_TYPE={machine_type} {why}: take another type, or set only VM_GPU")
    if family[0] in "ag" and family != "g1":
        kinds = [kind for row in TABLE for kind in _machines(row) if not row.most_cpus]
        same = [kind for kind in kinds if kind.startswith(family + "-")]
        known = ", ".join(same or dict.fromkeys(kind.partition("-")[0] for kind in kinds))
        raise UsageError(f"VM_TYPE={machine_type}: not a known type with GPUs; known are {known}")


def _attached(gpu: str, machine_type: str) -> Shape:
    name, count = _wanted(gpu)
    rows, count = _rows(gpu, name), count or 1
    row = rows[0]
    if not row.most_cpus or not machine_type.startswith(("n1-", "custom-")):
        kinds = ", ".join(kind for found in rows for kind in _machines(found))
        others = f"an n1 type such as {kinds}" if row.most_cpus else kinds
        raise UsageError(f"VM_TYPE={machine_type} cannot have VM_GPU={gpu}: unset VM_TYPE, or take {others}")
    if count not in row.sizes.values():
        _no_such_number(gpu, rows)
    most = dict(zip(row.sizes.values(), row.most_cpus, strict=True))[count]
    cpus, memory = _n1(machine_type)
    if cpus > most or memory > most * GB_PER_CPU:
        raise UsageError(
            f"VM_TYPE={machine_type} is too large for {count} x {row.gpu}, which can have"
            f" {most} vCPUs and {most * GB_PER_CPU:g} GB of memory at most"
        )
    return Shape(machine_type, row.gpu, count, f"nvidia-tesla-{row.gpu.lower()}")


def _n1(machine_type: str) -> tuple[int, float]:
    """vCPUs of an n1 type, and its GB of memory if it says them."""
    kind, *numbers = machine_type.removeprefix("n1-").removesuffix("-ext").split("-")
    if all(number.isdigit() and len(number) < 8 for number in numbers):
        values = [int(number) for number in numbers]
        if kind == "custom" and len(values) == 2 and all(values):
            return values[0], values[1] / 1024
        if len(values) == 1 and kind in ("standard", "highmem", "highcpu") and values[0] in N1_SIZES:
            return values[0], 0.0
    raise UsageError(
        f"VM_TYPE={machine_type}: not an n1 type, such as n1-standard-8, n1-highmem-8 or n1-custom-8-32768"
    )


def _disk(machine_type: str) -> str:
    """Persistent disks ended with the third generation of machines; A3 Ultra is the first without."""
    newer = "4" <= machine_type[1:2] <= "9" or machine_type.startswith(("a3-ultragpu-", "h3-"))
    return "hyperdisk-balanced" if newer else "pd-balanced"


def _or(numbers: list[int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, numbers[:-1])), str(numbers[-1]))))
