"""What a vast.ai container is created with: label, environment, and `onstart`, which is the guard. Pure.

onstart runs at every start of the container, before anything is downloaded. It holds 4,096 bytes, so that
of the guard only what a container needs is in it, and the order of its run is in the environment.
"""

from __future__ import annotations

import ast
import base64
import json
import math
import os
import re
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from cloudrun.backends import Boot
from cloudrun.formats import seconds_of
from cloudrun.zipapp import slim

PASSED_ON = ("STORAGE_EMULATOR_HOST", "VAST_URL")
GUARD = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "guard.py")
OF_OTHERS = ("end_local", "end_gcp", "descendants", "own_token")  # what a container has no use for
LABEL = re.compile(r"cloudrun/([a-z0-9_-]{1,63})/(\d{1,6})/(\d{1,11})\Z")

# Process 1's standard output is what the logs call shows; who may not write there is not heard. Where the
# container cannot run a guard, `f` says why and ends it, when the client has had time to read that. An agent
# whose guard was killed has the time to save before.
ONSTART = r"""
c=/proc/1/fd/1
(:>$c)||c=/dev/null
{{ I={instance}
f(){{
    echo "CLOUDRUN-FATAL $I $1"
    sleep 20
    s=4
    U=${{VAST_URL:-https://console.vast.ai}}/api/v0/instances/$CONTAINER_ID/
    A="Authorization: Bearer $CONTAINER_API_KEY"
    while :
    do curl -fsXDELETE -H "$A" -H Content-Type:application/json -d{{}} $U||
        wget -qO- --method=DELETE --header="$A" --body-data={{}} $U
        sleep $s
        [ $s -gt 50 ]||s=$((s*2))
    done
}}
[ "$CONTAINER_API_KEY" ]||
    eval "$(tr \\0 \\n</proc/1/environ|sed -n 's/^C\(ONTAINER_[AI]\|LOUDRUN\)/export &/p')"
[ "$CONTAINER_API_KEY" ]||f "there is no CONTAINER_API_KEY"
for p in /venv/main/bin/python /opt/conda/bin/python python3 python
do $p -c 'import sys;sys.exit(sys.version_info<(3,8))' 2>&-&&break
    p=
done
[ $p ]||f "the image has no Python 3.8 or newer: choose another one with VAST_IMAGE"
d=/var/lib/cloudrun/$I
rm -rf $d/[!t]*
mkdir -p $d&&cd $d||f "the disk cannot be written"
export CLOUDRUN_ROLE=guard CLOUDRUN_BOOT="$(echo $CLOUDRUN_PAYLOAD|base64 -d)"
unset CLOUDRUN_PAYLOAD
$p -ISc 'import base64,zlib;exec(zlib.decompress(base64.b85decode("{guard}"),-15))'
sleep 999
f "the guard is gone"
}}>$c 2>&1 </dev/null&
"""


class Label(NamedTuple):
    """Whose container it is, and when it has to be gone, in seconds since the epoch."""

    run: str
    attempt: int
    ends: int

    @property
    def name(self) -> str:
        return f"{self.run}-{self.attempt}"


def label_of(boot: Boot) -> str:
    return f"cloudrun/{boot.run}/{boot.attempt}/{math.ceil(seconds_of(boot.deadline))}"


def read_label(text: object) -> Label | None:
    """None for a container that is not ours; the service may not know a label yet."""
    found = LABEL.match(text) if isinstance(text, str) else None
    return Label(found[1], int(found[2]), int(found[3])) if found else None


def onstart(instance: str) -> str:
    with open(GUARD, encoding="utf-8") as file:
        source = slim(_needed(file.read()))
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = packed.compress(_narrow(source).encode()) + packed.flush()
    script = re.sub("\n +", "\n", ONSTART.lstrip())
    return script.format(instance=instance, guard=base64.b85encode(data).decode())


def environment(payload: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """`payload` is CLOUDRUN_BOOT of cloudrun.formats; of our own `environ` the endpoints are passed on."""
    boot = base64.b64encode(json.dumps(payload).encode()).decode()
    return {"CLOUDRUN_PAYLOAD": boot, **{name: environ[name] for name in PASSED_ON if environ.get(name)}}


def _needed(source: str) -> str:
    """The guard without the ends of other machines."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if getattr(node, "name", "") not in OF_OTHERS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            kept = [
                pair
                for pair in zip(node.keys, node.values, strict=True)
                if getattr(pair[1], "id", "") not in OF_OTHERS
            ]
            node.keys, node.values = [key for key, _ in kept], [value for _, value in kept]
    return ast.unparse(tree)


def _narrow(source: str) -> str:
    """Indented by one space, not by four. The guard has no string of several lines."""
    return re.sub("(?m)^ +", lambda found: " " * (len(found[0]) // 4), source)
