"""Turns pid 1 of an emulated machine into that of a container: its environment, and no power at all."""

import ctypes
import json
import os
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
CAPBSET_DROP = 24  # prctl(2)
# Docker's default set: CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW
# SYS_CHROOT MKNOD AUDIT_WRITE SETFCAP. No SYS_BOOT: a container cannot power anything off. No SYS_RESOURCE
# and no IPC_LOCK either: a lower oom_score_adj and locked memory are refused.
KEPT = {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31}
LAST = 40
PYTHON = os.path.realpath(sys.executable)  # now: a virtual environment may be where the machine has nothing


def run(config):
    """Replace this process, so that /proc/1/environ shows the container's variables."""
    name = config["hostname"].encode()
    LIBC.sethostname(name, len(name))
    order = {**config["container"], "console": config["console"]}
    for number in set(range(LAST + 1)) - KEPT:
        LIBC.prctl(CAPBSET_DROP, number, 0, 0, 0)
    os.chdir("/root")
    environ = {"PATH": config["path"], "HOME": "/root", **config["environ"]}
    os.execve(PYTHON, [PYTHON, "-I", "-S", "/sbin/docker-init", json.dumps(order)], environ)
