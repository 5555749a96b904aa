"""What the bodies of vast.ai's calls may hold (docs.vast.ai, api-reference; "seen": what vastai 1.9.1 sends).

A problem is kept as a violation and answered with 400, so that no test passes by what the service may refuse.
"""

from __future__ import annotations

from typing import Any

TEXT, NUMBER, FLAG, NOTHING = str, (int, float), bool, type(None)
OBJECT, LIST = dict, list

# What has null beside its type was seen sent as null.
CREATE = {
    "client_id": (TEXT,),
    "image": (TEXT, NOTHING),
    "disk": NUMBER,
    "runtype": (TEXT,),
    "env": (OBJECT, TEXT, NOTHING),
    "onstart": (TEXT, NOTHING),
    "args": (LIST, NOTHING),
    "args_str": (TEXT, NOTHING),
    "label": (TEXT, NOTHING),
    "price": (*NUMBER, NOTHING),
    "cancel_unavail": (FLAG,),
    "target_state": (TEXT,),
    "template_hash_id": (TEXT, NOTHING),
    "image_login": (TEXT, NOTHING),
    "user": (TEXT, NOTHING),
    "force": (FLAG,),
    "python_utf8": (FLAG,),
    "lang_utf8": (FLAG,),
    "use_jupyter_lab": (FLAG,),
    "jupyter_dir": (TEXT, NOTHING),
    "extra": (TEXT, NOTHING),
    "vm": (FLAG,),
    "volume_info": (OBJECT, NOTHING),
}
JOB = {
    "start_time": NUMBER,
    "end_time": (*NUMBER, NOTHING),
    "api_endpoint": (TEXT,),
    "request_method": (TEXT,),
    "request_body": (OBJECT,),
    "frequency": (TEXT,),
    "day_of_the_week": (int, NOTHING),
    "hour_of_the_day": (int, NOTHING),
    "instance_id": (int,),
}
BODIES: dict[str, dict[str, Any]] = {
    "asks.create": CREATE,
    "instances.put": {"state": (TEXT,), "label": (TEXT,)},
    "instances.delete": {},
    "instances.delete_many": {"instance_ids": (LIST,)},
    "instances.reboot": {},
    "instances.recycle": {},
    "instances.bid_price": {"client_id": (TEXT,), "price": NUMBER},
    "instances.request_logs": {"tail": (TEXT,), "filter": (TEXT,), "daemon_logs": (TEXT,)},
    "instances.command": {"command": (TEXT,)},
    "instances.attach_ssh": {"ssh_key": (TEXT,)},
    "ssh.create": {"ssh_key": (TEXT,)},
    "schedule.create": JOB,
    "schedule.update": JOB,
}
# What cannot be null has to be there, but for these.
OPTIONAL = {"asks.create", "instances.put", "instances.request_logs", "schedule.update"}
RUNTYPES = {
    "ssh",
    "ssh_direct",
    "ssh_proxy",
    "ssh_direc ssh_proxy",
    "jupyter_direct",
    "jupyter_proxy",
    "jupyter_direc ssh_direc ssh_proxy",
    "jupyter_proxy ssh_proxy",
    "args",
}
LEAST_DISK = 8  # GB
ONSTART = 4096  # characters of onstart and args
ENV = 32768
LABEL, NEW_LABEL = 256, 1024


def problems(method: str, body: Any) -> list[str]:
    """In words; empty if nothing speaks against it."""
    known = BODIES.get(method)
    if known is None:
        return []
    body = {} if body is None else body
    if not isinstance(body, dict):
        return [f"{method}: the body is no object"]
    found = [f"{method}: no field {name!r}" for name in body if name not in known]
    if method not in OPTIONAL:
        needed = (name for name, types in known.items() if NOTHING not in types)
        found += [f"{method}: {name} is missing" for name in needed if name not in body]
    for name, value in body.items():
        types = known.get(name, (object,))
        # A bool is an int to Python and not to JSON.
        if not isinstance(value, types) or (
            isinstance(value, bool) and FLAG not in types and object not in types
        ):
            found.append(f"{method}: {name} is of the wrong type: {value!r}")
    if not found and method == "asks.create":
        found = order_problems(body)
    return found


def order_problems(body: dict[str, Any]) -> list[str]:
    env = body.get("env") or {}
    text = len(body.get("onstart") or "") + len(body.get("args_str") or "")
    text += sum(len(str(word)) for word in body.get("args") or ())
    checks = {
        "env as text does nothing": isinstance(env, str),
        "a value in env is no text": isinstance(env, dict)
        and not all(isinstance(value, str) for value in env.values()),
        f"env has more than {ENV} characters": len(str(env)) > ENV,
        f"onstart and args have {text} characters, more than {ONSTART}": text > ONSTART,
        "no image": not body.get("image") and not body.get("template_hash_id"),
        "an image without a tag": bool(body.get("image")) and ":" not in body["image"].rpartition("/")[2],
        "no disk": "disk" not in body,
        f"less than {LEAST_DISK} GB of disk": body.get("disk", LEAST_DISK) < LEAST_DISK,
        f"a label of more than {LABEL} characters": len(body.get("label") or "") > LABEL,
        "an unknown runtype": body.get("runtype", "ssh") not in RUNTYPES,
        "a price out of bounds": not 0.001 <= (body.get("price") or 1) <= 128,
    }
    return [f"asks.create: {text}" for text, wrong in checks.items() if wrong]
