"""The startup script of a Compute Engine machine: it unpacks the guard and runs it, at every boot.

The guard becomes a systemd unit of its own where systemd runs: a child of the startup script would not hear
of a shutdown, and would lose the network first (google-startup-scripts.service has KillMode=process).
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from typing import Any

PASSED_ON = ("STORAGE_EMULATOR_HOST",)
GUARD = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "guard.py")
SCRIPT = """#!/bin/sh
# cloudrun: runs the guard of {instance}, which ends this machine.
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
end() {{ echo "CLOUDRUN-FATAL {instance} $1"; sleep {seconds}; poweroff; sleep 60; exit 1; }}
systemctl is-active --quiet cloudrun-guard 2>/dev/null && exit 0
command -v python3 >/dev/null || end "this image has no python3: choose another one (VM_IMAGE)"
rm -rf /var/lib/cloudrun && mkdir -p -m 700 {folder} && cd {folder} || end "the disk cannot be written"
cat >guard.py <<'END-OF-GUARD' || end "the disk cannot be written"
{guard}
END-OF-GUARD
export CLOUDRUN_BOOT={boot} CLOUDRUN_ROLE=guard {environ}
if [ -d /run/systemd/system ]; then
    systemd-run --quiet --unit=cloudrun-guard --collect --working-directory={folder} \\
        -p KillMode=mixed -p TimeoutStopSec=25 -p StandardOutput=journal+console \\
        -p OOMPolicy=continue -p {stop_post} {setenv} python3 -I -S guard.py && exit 0
fi
python3 -I -S guard.py && exit 0
# Its agent saves, and ends the machine. When that is gone as well, nobody else is left.
while grep -qsx cloudrun-agent /proc/[0-9]*/comm; do sleep 1; done
poweroff -f
"""
# Of a guard that was killed or has crashed: with it systemd has killed all that was below it. One that ends
# the machine itself never comes so far. $$ is a $ for the shell.
STOP_POST = "ExecStopPost=/bin/sh -c '[ $$SERVICE_RESULT = success ] || poweroff -f'"
CONSOLE_SECONDS = 5  # two looks of a client: of a machine that is off nobody can read the console


def startup_script(payload: Mapping[str, Any], environ: Mapping[str, str]) -> str:
    """`payload` is CLOUDRUN_BOOT of cloudrun.formats; of our own `environ` the endpoints are passed on."""
    with open(GUARD, encoding="utf-8") as file:
        guard = file.read()
    passed = {name: environ[name] for name in PASSED_ON if name in environ}
    return SCRIPT.format(
        instance=payload["instance"],
        folder=shlex.quote(f"/var/lib/cloudrun/{payload['instance']}"),
        guard=guard.rstrip(),
        seconds=CONSOLE_SECONDS,
        stop_post=shlex.quote(STOP_POST),
        boot=shlex.quote(json.dumps(payload)),
        environ=" ".join(f"{name}={shlex.quote(value)}" for name, value in passed.items()),
        setenv=" ".join(
            f'--setenv={name}="${name}"' for name in ("CLOUDRUN_BOOT", "CLOUDRUN_ROLE", "PATH", *passed)
        ),
    )
