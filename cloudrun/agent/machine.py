"""What a rented machine says of itself, and how it ends itself where no guard is left to do it.

On Compute Engine its metadata server answers; a container of vast.ai has an environment.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress

from cloudrun.processes import stat_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

METADATA_SECONDS = 3.0
CONSOLE_SECONDS = {"gcp": 5.0, "vast": 20.0}  # two looks of a client
DRIVER_SECONDS = 60.0  # the first call of nvidia-smi loads the driver


def metadata(path: str) -> str:
    """A value below computeMetadata/v1/. Raises OSError."""
    from urllib.request import ProxyHandler, Request, build_opener  # 30 ms that a local run does not pay

    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    request = Request(f"http://{host}/computeMetadata/v1/{path}", headers={"Metadata-Flavor": "Google"})
    with build_opener(ProxyHandler({})).open(request, timeout=METADATA_SECONDS) as answer:
        return str(answer.read(65536).decode("utf-8", "replace"))


def identity(boot: Mapping[str, Any]) -> str:
    """The same for this machine as long as it exists, in a cloud after a restart as well."""
    if boot["backend"] == "vast":
        return "vast " + os.environ["CONTAINER_ID"]
    return metadata("instance/id") if boot["backend"] == "gcp" else os.urandom(8).hex()


def why_it_ends(boot: Mapping[str, Any]) -> str:
    """`preempted`: taken away by the provider; `shutdown`: somebody shut it down. Raises OSError."""
    taken = boot["backend"] != "gcp" or metadata("instance/preempted").strip() == "TRUE"
    return "preempted" if taken else "shutdown"


def driver_trouble(boot: Mapping[str, Any]) -> str:
    """Why no GPU can be used though some were ordered; empty if they can."""
    wanted = boot.get("gpus", 0)
    if not wanted:
        return ""
    import subprocess  # 15 ms that a local run does not pay

    advice = "choose another image (VM_IMAGE)" if boot["backend"] == "gcp" else "run again, on another host"
    try:
        command = ["nvidia-smi", "-L"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DRIVER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no GPU can be used: {error}; {advice}"
    found = sum(line.startswith("GPU ") for line in done.stdout.splitlines())
    if done.returncode or found < wanted:
        said = (done.stdout + done.stderr).strip()[-300:]
        return f"{found} of {wanted} GPUs can be used: nvidia-smi says {said!r}; {advice}"
    return ""


def let_read(boot: Mapping[str, Any]) -> None:
    """Of a machine that is off, or a container that is gone, nobody can read the console."""
    time.sleep(CONSOLE_SECONDS.get(boot["backend"], 0.0))


def power_off(boot: Mapping[str, Any]) -> None:
    """End the machine without its guard. On the user's own computer only a guard that hangs can be left."""
    if boot["backend"] == "local":
        born = int(stat_of(os.getpid())[19]) / os.sysconf("SC_CLK_TCK")  # since boot
        with suppress(OSError), open(os.environ["CLOUDRUN_INSTANCE"] + "/ended", "w") as file:
            file.write(f"{time.clock_gettime(time.CLOCK_BOOTTIME) - born:.3f} the run is finished")
        if os.getppid() == os.getpgrp():  # not who adopts orphans
            os.kill(os.getppid(), signal.SIGKILL)
    if boot["backend"] == "gcp":
        os.system("poweroff -f")
    pause = 4.0
    while boot["backend"] == "vast":  # nobody else is there to do it
        with suppress(OSError, ValueError):
            destroy()
        time.sleep(pause)
        pause = min(2 * pause, 60.0)


def destroy() -> None:
    """Ask vast.ai for the end of this container. Raises OSError; success is no proof."""
    from urllib.request import Request, urlopen

    server = os.environ.get("VAST_URL") or "https://console.vast.ai"
    url = f"{server}/api/v0/instances/{os.environ['CONTAINER_ID']}/"
    key = os.environ["CONTAINER_API_KEY"]
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    urlopen(Request(url, b"{}", headers, method="DELETE"), timeout=30).close()
