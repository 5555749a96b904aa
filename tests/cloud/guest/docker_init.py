"""Process 1 of an emulated container: keeps its log, starts its program, collects orphans.

Its argument is JSON: `console`, the descriptor of the log; `onstart`, a shell text; `args`, a command or
null. With `args` the command is the container, and its end is the container's. Without, sshd keeps the
container up whatever becomes of `onstart` (docs.vast.ai, "Docker Execution Environment").
"""

import json
import os
import select
import signal
import subprocess
import sys

LOG = "/var/log/onstart.log"
SCRIPT = "/root/onstart.sh"
ASKED = (signal.SIGTERM, signal.SIGINT)


def start(order):
    """The process of `args`, or that of `onstart`; none where there is nothing to run."""
    if order["args"]:
        return subprocess.Popen(order["args"], stdin=subprocess.DEVNULL, start_new_session=True)
    with open(SCRIPT, "w") as file:
        file.write(order["onstart"])
    with open(LOG, "ab") as log:
        shell = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
        return subprocess.Popen(
            [shell, SCRIPT], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def reap():
    """{pid: status} of all that have ended."""
    ended = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = status


def serve(order, program, log, wakeup):
    while True:
        ready = select.select([log, wakeup], [], [])[0]
        if log in ready:
            os.write(order["console"], os.read(log, 65536))
        if wakeup not in ready:
            continue
        for number in os.read(wakeup, 4096):
            if number in ASKED and order["args"]:
                program.send_signal(number)
        status = reap().get(program.pid)
        if order["args"] and status is not None:
            drain(order, log)
            os._exit(os.waitstatus_to_exitcode(status) & 255)


def drain(order, log):
    while select.select([log], [], [], 0)[0]:
        os.write(order["console"], os.read(log, 65536))


def main():
    order = json.loads(sys.argv[1])
    reading, writing = os.pipe()
    for fd in (reading, writing):
        os.set_blocking(fd, False)
    for number in (*ASKED, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.setsid()
    os.umask(0o022)
    # /proc/1/fd/1 is a pipe, as under Docker: who opens it for writing truncates nothing.
    log, output = os.pipe()
    for fd in (1, 2):
        os.dup2(output, fd)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    # Nobody reads the fifo in the place of /proc/sysrq-trigger, and nobody may wait for a reader.
    os.open("/dev/sysrq", os.O_RDWR | os.O_NONBLOCK)
    serve(order, start(order), log, reading)


main()
