"""Boots one emulated machine: makes its namespaces, tells whoever started it how it ended.

A program of its own (`python -I -S boot.py`). It stays outside of the machine; its child becomes pid 1
inside. The first line of its input is the configuration; then the input is the machine's power button:
`off` (ACPI), `cut` (no power). End of input cuts too, so that no machine outlives the emulator. It prints
`pid N`, then `end HOW`.
"""

import ctypes
import json
import os
import select
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import container
import disk
import init

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000
NEWNET = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)

# How the kernel reports reboot(2) inside a pid namespace: reboot(2), "Behavior inside PID namespaces".
ENDS = {signal.SIGINT: "poweroff", signal.SIGHUP: "reboot", signal.SIGKILL: "cut"}


def unshare(flags):
    if LIBC.unshare(flags):
        number = ctypes.get_errno()
        raise OSError(number, f"unshare: {os.strerror(number)}")


def separate(config):
    """Enter new namespaces; an ordinary user becomes root of a user namespace first."""
    if os.geteuid() != 0:
        user, group = os.geteuid(), os.getegid()
        unshare(NEWUSER)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    unshare(NEWPID | NEWUTS | NEWIPC | (NEWNET if config["no_network"] else 0))


def machine(config, alive):
    """The child: pid 1. `alive` closes with the parent, which could have died before prctl."""
    try:
        LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if select.select([alive], [], [], 0)[0]:
            os._exit(1)
        unshare(NEWNS)
        disk.mount_all(config)
        (container if config["container"] else init).run(config)
    except BaseException as error:
        os.write(2, f"the machine cannot boot: {error!r}\n".encode())
    os._exit(1)


def listen(pid):
    """Obey the power button until the machine has ended."""
    handle = os.pidfd_open(pid)
    waiting = select.poll()
    for fd in (0, handle):
        waiting.register(fd, select.POLLIN | select.POLLHUP)
    while True:
        ready = [fd for fd, _ in waiting.poll()]
        if handle in ready:
            return
        words = os.read(0, 4096)
        cut = not words or b"cut" in words
        signal.pidfd_send_signal(handle, signal.SIGKILL if cut else signal.SIGTERM)
        if not words:
            waiting.unregister(0)


def main():
    config = json.loads(b"".join(iter(lambda: os.read(0, 1), b"\n")))  # not a byte of what follows
    separate(config)
    # Pid 1 loses a signal that it has no handler for yet, unless it is blocked.
    signal.pthread_sigmask(signal.SIG_BLOCK, init.ASKED)
    alive, held = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(held)
        machine(config, alive)
    os.close(alive)
    print("pid", pid, flush=True)
    listen(pid)
    status = os.waitpid(pid, 0)[1]
    # The kernel lets a pid namespace's init be collected only when all its processes are gone.
    how = ENDS.get(os.WTERMSIG(status), "crash") if os.WIFSIGNALED(status) else "crash"
    print("end", how, flush=True)


if __name__ == "__main__":
    main()
