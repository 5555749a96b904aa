"""Machines on Google Cloud: every row of Google's table, every way to write a GPU, and nonsense."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudrun.backends.gcp_shapes import OWN_IMAGE, TABLE, Shape, image_family, resolve
from cloudrun.backends.gcp_wanted import wanted
from cloudrun.errors import UsageError

# What Google documents, written down a second time: type, GPU, number, local SSDs, on demand, disk.
L4, RTX, A40, A80 = "L4", "RTX-PRO-6000", "A100-40GB", "A100-80GB"
PD, HYPER = "pd-balanced", "hyperdisk-balanced"
BUNDLED = [
    *((f"g2-standard-{size}", L4, 1, 0, True, PD) for size in (4, 8, 12, 16, 32)),
    ("g2-standard-24", L4, 2, 0, True, PD),
    ("g2-standard-48", L4, 4, 0, True, PD),
    ("g2-standard-96", L4, 8, 0, True, PD),
    *((f"g4-standard-{48 * gpus}", RTX, gpus, 0, True, HYPER) for gpus in (1, 2, 4, 8)),
    ("g4-standard-6", f"{RTX}/8", 1, 0, True, HYPER),
    ("g4-standard-12", f"{RTX}/4", 1, 0, True, HYPER),
    ("g4-standard-24", f"{RTX}/2", 1, 0, True, HYPER),
    *((f"a2-highgpu-{gpus}g", A40, gpus, 0, True, PD) for gpus in (1, 2, 4, 8)),
    ("a2-megagpu-16g", A40, 16, 0, True, PD),
    *((f"a2-ultragpu-{gpus}g", A80, gpus, gpus, True, PD) for gpus in (1, 2, 4, 8)),
    ("a3-highgpu-1g", "H100", 1, 2, False, PD),
    ("a3-highgpu-2g", "H100", 2, 4, False, PD),
    ("a3-highgpu-4g", "H100", 4, 8, False, PD),
    ("a3-highgpu-8g", "H100", 8, 16, True, PD),
    ("a3-megagpu-8g", "H100-MEGA", 8, 16, True, PD),
    ("a3-edgegpu-8g", "H100", 8, 16, True, PD),
    ("a3-ultragpu-8g", "H200", 8, 32, False, HYPER),
    ("a4-highgpu-8g", "B200", 8, 32, False, HYPER),
]
# GPU, number, most vCPUs and GB of memory beside so many.
ATTACHED = [
    *(("T4", 1, 48, 312), ("T4", 2, 48, 312), ("T4", 4, 96, 624)),
    *(("P4", 1, 24, 156), ("P4", 2, 48, 312), ("P4", 4, 96, 624)),
    *(("V100", 1, 12, 78), ("V100", 2, 24, 156), ("V100", 4, 48, 312), ("V100", 8, 96, 624)),
    *(("P100", 1, 16, 104), ("P100", 2, 32, 208), ("P100", 4, 96, 624)),
]


def refused(gpu: str, machine_type: str, spot: bool = False) -> str:
    with pytest.raises(UsageError) as error:
        resolve(gpu, machine_type, spot)
    assert "\n" not in str(error.value) or "\n" in gpu + machine_type
    return str(error.value)


@pytest.mark.parametrize(("kind", "gpu", "gpus", "ssds", "on_demand", "disk"), BUNDLED)
def test_a_type_that_has_gpus(kind: str, gpu: str, gpus: int, ssds: int, on_demand: bool, disk: str) -> None:
    wanted = Shape(kind, gpu, gpus, "", disk, ssds)
    assert resolve("", kind, True) == resolve(f"{gpu}:{gpus}", f" {kind.upper()} ", True) == wanted
    assert resolve(gpu, kind, True) == wanted, "a GPU without a number leaves the number to the type"
    assert wanted.words == f"{gpus} x {gpu} ({kind})"
    if on_demand:
        assert resolve("", kind, False) == wanted
    else:
        assert refused("", kind) == f"{wanted.words} can only be had as a spot VM: set VM_SPOT=1"


def test_the_table_has_no_other_types() -> None:
    rows = [row for row in TABLE if not row.most_cpus]
    assert sorted(row.types.format(size) for row in rows for size in row.sizes) == sorted(
        case[0] for case in BUNDLED
    )


@pytest.mark.parametrize(("gpu", "gpus", "cpus", "memory"), ATTACHED)
def test_gpus_that_are_attached(gpu: str, gpus: int, cpus: int, memory: int) -> None:
    wanted = f"{gpu}:{gpus}"
    shape = resolve(wanted, "", False)
    assert (shape.gpu, shape.gpus, shape.accelerator) == (gpu, gpus, f"nvidia-tesla-{gpu.lower()}")
    assert (shape.disk_type, shape.local_ssds) == ("pd-balanced", 0)
    assert resolve(wanted, shape.machine_type, False) == shape, "its own default is accepted"
    for kind in (f"n1-custom-{cpus}-{memory * 1024}", f"custom-{cpus}-{memory * 1024}", "n1-highmem-8"):
        assert resolve(wanted, kind, False) == shape._replace(machine_type=kind)
    for kind in (f"custom-{cpus + 2}-{memory * 1024}", f"n1-custom-{cpus}-{memory * 1024 + 256}-ext"):
        message = (
            f"VM_TYPE={kind} is too large for {gpus} x {gpu}, which can have {cpus} vCPUs and {memory} GB"
        )
        assert message in refused(wanted, kind)


def test_attached_gpus_come_in_the_documented_numbers_only() -> None:
    documented = {(gpu, gpus) for gpu, gpus, _, _ in ATTACHED}
    assert {(row.gpu, gpus) for row in TABLE if row.most_cpus for gpus in row.sizes.values()} == documented
    assert all(len(row.most_cpus) == len(row.sizes) for row in TABLE if row.most_cpus)


@pytest.mark.parametrize(
    ("gpu", "spot", "kind"),
    [
        ("", False, "g2-standard-4"),
        ("L4", False, "g2-standard-4"),
        ("L4:8", False, "g2-standard-96"),
        ("T4", False, "n1-standard-4"),
        ("T4:2", False, "n1-standard-8"),
        ("V100:8", False, "n1-standard-64"),
        ("A100", False, "a2-highgpu-1g"),
        ("A100:16", False, "a2-megagpu-16g"),
        ("A100-80GB:4", False, "a2-ultragpu-4g"),
        ("H100", True, "a3-highgpu-1g"),
        ("H100:8", False, "a3-highgpu-8g"),
        ("H100-MEGA:8", False, "a3-megagpu-8g"),
        ("H200:8", True, "a3-ultragpu-8g"),
        ("B200:8", True, "a4-highgpu-8g"),
        ("RTX-PRO-6000", False, "g4-standard-48"),
        ("RTX-PRO-6000/8", False, "g4-standard-6"),
        ("none", False, "e2-standard-4"),
    ],
)
def test_without_a_type(gpu: str, spot: bool, kind: str) -> None:
    assert resolve(gpu, "", spot).machine_type == kind


@pytest.mark.parametrize(
    ("gpu", "spellings"),
    [
        ("L4", "l4 nvidia-l4 NVIDIA_L4 L4:1"),
        ("T4", "t4 nvidia-tesla-t4 Tesla-T4"),
        ("P4", "nvidia-tesla-p4"),
        ("P100", "p100 nvidia-tesla-p100"),
        ("V100", "v100 nvidia-tesla-v100"),
        ("A100-40GB", "A100 a100-40gb A100-40 nvidia-tesla-a100 A100_40GB"),
        ("A100-80GB", "a100-80gb A100-80 nvidia-a100-80gb A100_80GB"),
        ("H100", "h100 H100-80GB nvidia-h100-80gb"),
        ("RTX-PRO-6000", "rtx-pro-6000 nvidia-rtx-pro-6000 RTXPRO6000 RTX_6000_PRO"),
        ("H100-MEGA", "h100-mega:8 nvidia-h100-mega-80gb:8"),
        ("H200", "H200:8 nvidia-h200-141gb:8 h200-141gb:8"),
        ("B200", "nvidia-b200:8"),
    ],
)
def test_spellings(gpu: str, spellings: str) -> None:
    for spelling in spellings.split():
        assert resolve(spelling, "", True).gpu == gpu
        assert resolve(f" {spelling.replace('-', ' ')} ", "", True).gpu == gpu


def test_a_name_that_means_several_gpus_is_decided_by_the_type() -> None:
    assert resolve("A100", "a2-ultragpu-2g", False).gpu == "A100-80GB"
    assert resolve("H100:8", "a3-megagpu-8g", False).gpu == "H100-MEGA"
    assert "has 1 x A100-80GB" in refused("A100-40GB", "a2-ultragpu-1g")


@pytest.mark.parametrize(
    "kind", ["e2-standard-8", "n1-standard-8", "custom-4-8192", "f1-micro", "c3-highcpu-4"]
)
def test_without_a_gpu(kind: str) -> None:
    wanted = Shape(kind)
    assert resolve("none", kind, False) == resolve("", kind, False) == resolve("None", kind, True) == wanted
    assert wanted.words == f"no GPU ({kind})"


@pytest.mark.parametrize("kind", ["n4-standard-8", "c4-highcpu-2", "m4-megamem-28", "h3-standard-88"])
def test_newer_machines_have_no_persistent_disk(kind: str) -> None:
    assert resolve("", kind, False).disk_type == "hyperdisk-balanced"


@pytest.mark.parametrize(
    ("gpu", "kind", "message"),
    [
        ("RTX4090", "", "VM_GPU=RTX4090: Google has no such GPU; it has L4, RTX-PRO-6000, "),
        ("RTX4090", "n1-standard-4", "it has L4, "),
        ("L4:3", "", "VM_GPU=L4:3: a machine has 1, 2, 4 or 8 x L4"),
        ("A100:32", "", "a machine has 1, 2, 4, 8 or 16 x A100-40GB"),
        ("A100-80GB:16", "", "a machine has 1, 2, 4 or 8 x A100-80GB"),
        ("B200", "", "a machine has 8 x B200"),
        ("P100:8", "n1-standard-16", "a machine has 1, 2 or 4 x P100"),
        *(
            (gpu, "", "such as L4 or T4:2")
            for gpu in ("T4:", "T4:0", "T4:-1", "T4:x", "T4:1.5", "T4:1:1", "T4:²")
        ),
        *(
            (gpu, "", "such as L4 or T4:2")
            for gpu in (":2", ":", "-", "nvidia", "none:1", "T4:" + "9" * 5000)
        ),
        ("T4", "g2-standard-4", "VM_TYPE=g2-standard-4 has 1 x L4, and VM_GPU=T4 asks for something else"),
        ("L4:2", "g2-standard-4", "set only one of them, or both alike"),
        ("none", "a2-highgpu-2g", "VM_TYPE=a2-highgpu-2g has 2 x A100-40GB, and VM_GPU=none"),
        ("RTX-PRO-6000", "g4-standard-6", "has 1 x RTX-PRO-6000/8"),
        ("RTX4090", "g2-standard-4", "VM_TYPE=g2-standard-4 has 1 x L4"),
        ("L4", "n1-standard-4", "cannot have VM_GPU=L4: unset VM_TYPE, or take g2-standard-4, g2-standard-8"),
        ("H100", "e2-standard-4", "VM_TYPE=e2-standard-4 cannot have VM_GPU=H100: unset VM_TYPE"),
        ("T4", "e2-standard-4", "or take an n1 type such as n1-standard-4, n1-standard-8"),
        *(("T4", kind, "or take an n1 type") for kind in ("f1-micro", "g1-small", "n2-custom-4-8192")),
        (
            "T4",
            "n1-standard-64",
            "is too large for 1 x T4, which can have 48 vCPUs and 312 GB of memory at most",
        ),
        *(
            ("T4", f"n1-{kind}", "not an n1 type")
            for kind in ("standard-5", "standard", "megamem-4", "highcpu-x")
        ),
        *(
            ("T4", kind, "not an n1 type")
            for kind in ("custom-4", "custom-0-1024", "custom-4-0", "n1-standard-4-8")
        ),
        ("", "g2-standard-5", "VM_TYPE=g2-standard-5: not a known type with GPUs; known are g2-standard-4, "),
        ("", "a5-highgpu-8g", "known are g2, g4, a2, a3, a4"),
        (
            "",
            "a4x-highgpu-4g",
            "VM_TYPE=a4x-highgpu-4g has Arm processors and can only be had by reservation",
        ),
        ("", "a4x-maxgpu-4g-metal", "Arm processors"),
        *(("none", kind, "Arm processors") for kind in ("t2a-standard-4", "c4a-highcpu-8", "n4a-standard-2")),
        *(("none", kind, "has local disks") for kind in ("c3-standard-8-lssd", "z3-highmem-88")),
        ("", "ct5lp-hightpu-4t", "has TPUs"),
        *(
            ("", kind, "not the name of a machine type")
            for kind in ("big", "n1-", "-4", "n1--4", "a/b-c", "n１-a")
        ),
        ("", "zones/z/machineTypes/n1-standard-4", "not the name of a machine type, such as g2-standard-4"),
    ],
)
def test_nonsense(gpu: str, kind: str, message: str) -> None:
    assert message in refused(gpu, kind)


words = st.text(max_size=20) | st.from_regex(r"[a-zA-Z0-9:/ -]{0,24}", fullmatch=True)
kinds = words | st.sampled_from([case[0] for case in BUNDLED]) | st.from_regex(r"n1-\w+-\d+", fullmatch=True)
gpus = words | st.sampled_from([f"{row.gpu}:{count}" for row in TABLE for count in row.sizes.values()])


@given(gpus, kinds, st.booleans())
def test_whatever_is_asked_ends_in_a_machine_or_a_sentence(gpu: str, kind: str, spot: bool) -> None:
    try:
        shape = resolve(gpu, kind, spot)
    except UsageError as error:
        assert re.search("VM_(GPU|TYPE|SPOT)", str(error))
        return
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", shape.machine_type), "it becomes part of a URL"
    assert (shape.gpus > 0) == bool(shape.gpu)
    again = f"{shape.gpu}:{shape.gpus}" if shape.gpu else "none"
    assert resolve(again, shape.machine_type, spot) == shape, "what was said to the user can be set"
    assert resolve(gpu, kind, True) == shape, "spot allows more and changes nothing"


def test_images() -> None:
    deep = (
        "projects/deeplearning-platform-release/global/images/family/pytorch-2-9-cu129-ubuntu-2404-nvidia-580"
    )
    assert image_family(resolve("", "", False)) == image_family(resolve("T4", "", False)) == deep
    ubuntu = "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-amd64"
    assert image_family(resolve("none", "", False)) == ubuntu


@pytest.mark.parametrize("gpu", ["V100", "P100", "P4", "RTX-PRO-6000/2", "RTX-PRO-6000/4", "RTX-PRO-6000/8"])
def test_gpus_that_no_public_image_can_drive(gpu: str) -> None:
    with pytest.raises(UsageError, match=f"{gpu} needs .* set VM_IMAGE"):
        image_family(resolve(gpu, "", False))
    assert gpu in OWN_IMAGE and set(OWN_IMAGE) <= {row.gpu for row in TABLE}


@pytest.mark.parametrize("name", ["Lena", "-r", "1st", "a b", "x" * 33, "lena\n"])
def test_a_user_that_no_machine_can_have_is_refused_before_anything_costs(name: str) -> None:
    assert wanted({"VM_USER": "lena_2-x"})
    with pytest.raises(UsageError, match="VM_USER="):
        wanted({"VM_USER": name})
