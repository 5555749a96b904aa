"""Which processes a service keeps from the first SIGTERM of a shutdown: KillMode of systemd.kill(5).

`mixed`: only the main process is asked to end, and what it leaves is killed.
"""

import os

UNITS = "/run/units"


def mixed():
    """{main process: all below it} of the services that are of KillMode=mixed."""
    mains = set()
    for name in os.listdir(UNITS) if os.path.isdir(UNITS) else ():
        with open(os.path.join(UNITS, name)) as file:
            pid, _, mode = file.read().partition(" ")
        if mode == "mixed" and pid.isdigit():
            mains.add(int(pid))
    parents = {pid: parent_of(pid) for pid in pids()}
    return {main: below(main, parents) for main in mains & set(parents)}


def pids():
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def parent_of(pid):
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:  # it has just ended
        return 0


def below(main, parents):
    found, size = {main}, 0
    while size < len(found):
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found - {main}
