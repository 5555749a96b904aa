"""Process 1 of an emulated machine: starts the startup script, collects orphans, powers off.

Signals are systemd's (systemd(1)): SIGTERM from outside is the ACPI power button.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

import scripts
import services

LIBC = ctypes.CDLL(None, use_errno=True)
RTMIN = 34  # of every program; the C library keeps 32 and 33 for itself
ASKED = {RTMIN + 3: "halt", RTMIN + 4: "poweroff", RTMIN + 5: "reboot", signal.SIGTERM: "poweroff"}
FORCED = {RTMIN + 13: "halt", RTMIN + 14: "poweroff", RTMIN + 15: "reboot"}
SYSRQ = {b"o": "poweroff", b"b": "reboot"}
COMMANDS = {"poweroff": 0x4321FEDC, "reboot": 0x01234567}


class Machine:
    def __init__(self, config):
        self.config = config
        self.console = 1  # this program's output is the serial console
        self.end = ""  # how the machine will end, once that is asked for
        self.hook = 0  # pid of the shutdown script
        self.kill_at = None
        self.spared = {}  # services whose main process alone was asked to end, and what is below it

    def say(self, text):
        os.write(self.console, f"[{time.clock_gettime(time.CLOCK_BOOTTIME):12.6f}] {text}\r\n".encode())

    def ask(self, how):
        """An orderly end: shutdown script, SIGTERM for all, SIGKILL for who stays. The first wish counts."""
        if self.end:
            return
        self.end = how
        self.say(f"systemd[1]: Reached target {how}")
        self.kill_at = time.monotonic() + self.config["guest_stop"]
        self.hook = scripts.start("shutdown", self.config, self.console)

    def terminate(self):
        self.hook = 0
        self.spared = services.mixed()
        # All at once where that is possible: who has just been forked must not be missed.
        spared = set().union(*self.spared.values())
        for pid in services.pids() - spared - {1} if spared else (-1,):
            for number in (signal.SIGTERM, signal.SIGCONT):
                kill(pid, number)

    def reap(self):
        """Collect what has ended; True when nothing is left but us."""
        while True:
            try:
                pid = os.waitpid(-1, os.WNOHANG)[0]
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            for left in self.spared.pop(pid, ()):
                kill(left, signal.SIGKILL)
            if pid == self.hook:
                self.terminate()

    def force(self, how):
        """At once: no process gets a chance to say anything."""
        kill(-1, signal.SIGKILL)
        if how == "halt":  # the processor stops, the machine stays and is billed
            self.say("reboot: System halted")
            while True:
                signal.pause()
        self.say("reboot: Power down" if how == "poweroff" else "reboot: Restarting system")
        LIBC.reboot(ctypes.c_int(ctypes.c_uint(COMMANDS[how]).value))
        os._exit(1)

    def serve(self, wakeup, tty, sysrq):
        while True:
            empty = self.reap()
            late = self.kill_at is not None and time.monotonic() >= self.kill_at
            if self.end and not self.hook and (empty or late):
                self.force(self.end)
            if late:
                self.terminate()
            left = max(0.0, self.kill_at - time.monotonic()) if self.kill_at else None
            ready = select.select([wakeup, tty, sysrq], [], [], left)[0]
            if tty in ready:
                os.write(self.console, os.read(tty, 65536))
            if sysrq in ready and (how := SYSRQ.get(os.read(sysrq, 1))):
                self.force(how)
            if wakeup in ready:
                for number in os.read(wakeup, 4096):
                    if number in FORCED:
                        self.force(FORCED[number])
                    if number in ASKED:
                        self.ask(ASKED[number])


def kill(pid, number):
    """-1: everybody but ourselves (kill(2))."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def run(config):
    LIBC.prctl(15, b"systemd", 0, 0, 0)  # PR_SET_NAME
    LIBC.sethostname(config["hostname"].encode(), len(config["hostname"]))
    with open("/run/environment", "w") as file:  # what every service has: DefaultEnvironment of systemd
        file.writelines(f"{name}={value}\n" for name, value in config["environ"].items())
    reading, writing = os.pipe()
    for fd in (reading, writing):
        os.set_blocking(fd, False)
    for number in (*ASKED, *FORCED, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKED)  # see boot.py
    os.setsid()
    os.umask(0o022)
    # Open for writing too, so that they never are at their end.
    tty, sysrq = (os.open(f"/dev/{name}", os.O_RDWR | os.O_NONBLOCK) for name in ("ttyS0", "sysrq"))
    devnull = os.open("/dev/null", os.O_RDWR)
    os.dup2(config["console"], 1)
    for fd in (0, 2):
        os.dup2(devnull, fd)
    machine = Machine(config)
    sys.excepthook = lambda kind, error, _: machine.say(f"Kernel panic: {kind.__name__}: {error}")
    machine.say(f"Linux version {os.uname().release} (emulated machine {config['hostname']})")
    machine.say("systemd[1]: Reached target multi-user.target")
    scripts.start("startup", config, machine.console)
    machine.serve(reading, tty, sysrq)
