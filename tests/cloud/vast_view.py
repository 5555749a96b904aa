"""A contract as the API shows it, and as its container sees it.

Sources: docs.vast.ai, "Show Instance", "Show Instances" and "Docker Execution Environment".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .vast_offers import MONTH

if TYPE_CHECKING:
    from .vast_contract import Contract


def variables(order: dict[str, Any]) -> dict[str, str]:
    """The variables of the create call; what begins with a dash is an option of docker."""
    env = order.get("env") or {}
    # As text it is accepted and does nothing (field reports).
    return {k: v for k, v in env.items() if not k.startswith("-")} if isinstance(env, dict) else {}


def hostname(contract: Contract) -> str:
    env = contract.order.get("env") or {}
    named = (key.split() for key in env if key.startswith("-h ")) if isinstance(env, dict) else ()
    return next((words[1] for words in named), f"{contract.id:012x}")


def arguments(order: dict[str, Any]) -> list[str] | None:
    """The command of runtype `args`."""
    if order.get("runtype") != "args":
        return None
    return list(order.get("args") or str(order.get("args_str") or "").split())


def environ(contract: Contract) -> dict[str, str]:
    """Of process 1. Over ssh none of it is there."""
    offer = contract.offer
    found = {
        "CONTAINER_ID": str(contract.id),
        "CONTAINER_API_KEY": contract.key,
        "VAST_CONTAINERLABEL": f"C.{contract.id}",
        "PUBLIC_IPADDR": offer["public_ipaddr"],
        "SSH_PUBLIC_KEY": "\n".join(key["public_key"] for key in contract.ssh_keys),
        "GPU_COUNT": str(offer["num_gpus"]),
        "DATA_DIRECTORY": "/workspace/",
        "JUPYTER_TOKEN": contract.key[:16],
        "VAST_TCP_PORT_22": str(contract.port),
        **variables(contract.order),
    }
    if offer["machine_id"] in contract.market.faults.keyless:
        del found["CONTAINER_API_KEY"]
    return found


def instance(contract: Contract, *, by_id: bool = False) -> dict[str, Any]:
    offer, order, now = contract.offer, contract.order, contract.market.clock.now()
    disk = offer["storage_cost"] * float(order["disk"]) / MONTH
    gpu = contract.price if contract.paid else 0.0
    up = contract.actual == "running" and contract.port
    env = order.get("env") or {}
    found = {
        **{name: offer[name] for name in COPIED},
        "id": contract.id,
        "label": contract.label,
        "actual_status": contract.actual,
        "intended_status": contract.intended,
        "cur_state": contract.current,
        "next_state": contract.next,
        "status_msg": contract.message,
        "image_uuid": order.get("image"),
        "image_runtype": order.get("runtype") or "ssh",
        "image_args": arguments(order) or [],
        "extra_env": [[name, value] for name, value in env.items()] if isinstance(env, dict) else [],
        "onstart": order.get("onstart"),
        "ssh_host": "ssh5.vast.ai" if up else None,
        "ssh_port": 10_000 + contract.id % 1000 if up else None,
        "ssh_idx": "5",
        # A newline at its end was seen (field report).
        "public_ipaddr": offer["public_ipaddr"] + "\n",
        "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(contract.port)}]} if up else None,
        "direct_port_start": contract.port if up else -1,
        "direct_port_end": contract.port if up else -1,
        "machine_dir_ssh_port": contract.port if up else None,
        "local_ipaddrs": "192.168.1.10",
        "start_date": contract.created,
        "end_date": contract.end_date,
        "uptime_mins": (now - contract.started) / 60 if contract.started and up else None,
        "duration": contract.end_date - now,
        "dph_base": contract.price,
        "dph_total": contract.price + disk,
        "storage_total_cost": disk,
        "instance": {"gpuCostPerHour": gpu, "diskHour": disk, "totalHour": gpu + disk},
        "search": {
            "gpuCostPerHour": contract.price,
            "diskHour": disk,
            "totalHour": contract.price + disk,
        },
        "is_bid": contract.bid,
        "gpu_util": 0.0 if up else None,
        "gpu_temp": 41.0 if up else None,
        "disk_space": float(order["disk"]),
        "disk_util": 1.2 if up else -1.0,
        "disk_usage": 1.2 if up else -1.0,
        "jupyter_token": contract.key[:16],
        "template_hash_id": order.get("template_hash_id"),
        "credit_balance": None,
    }
    hidden = contract.market.faults.absent if by_id else set()
    nulls = dict.fromkeys(contract.market.faults.nulls)
    return {name: value for name, value in (found | nulls).items() if name not in hidden}


COPIED = (
    "machine_id",
    "host_id",
    "hosting_type",
    "gpu_name",
    "num_gpus",
    "gpu_ram",
    "gpu_frac",
    "cpu_arch",
    "cpu_cores",
    "cpu_cores_effective",
    "cpu_ram",
    "cuda_max_good",
    "driver_version",
    "geolocation",
    "inet_up",
    "inet_down",
    "inet_up_cost",
    "inet_down_cost",
    "storage_cost",
    "min_bid",
    "reliability2",
    "verification",
    "direct_port_count",
)
