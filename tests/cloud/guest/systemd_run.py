#!/usr/bin/env python3
"""systemd-run of an emulated machine: starts a service beside its caller, whose output goes to the console.

The service has an environment, a session and a name of its own, as systemd-run(1) says. Of the properties
KillMode (services.py) and ExecStopPost mean something here; an option that is not known is an error.
"""

import argparse
import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid

UNITS = "/run/units"
FLAGS = (("--collect", "-G"), ("--quiet", "-q"), ("--no-block",), ("--no-ask-password",), ("--system",))


def parse(arguments):
    parser = argparse.ArgumentParser(prog="systemd-run", allow_abbrev=False)
    for names in FLAGS:
        parser.add_argument(*names, action="store_true")
    parser.add_argument("--unit", "-u", default=f"run-u{os.getpid()}")
    parser.add_argument("--property", "-p", action="append", default=[])
    parser.add_argument("--setenv", "-E", action="append", default=[])
    for name in ("--description", "--service-type", "--slice", "--working-directory"):
        parser.add_argument(name, default="")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser.parse_args(arguments)


def alive(path):
    try:
        with open(path) as file:
            os.kill(int(file.read().split()[0]), 0)
    except (OSError, ValueError, IndexError):
        return False
    return True


def log(reading, unit, pid):
    """The journal, as the console shows it; it outlives the service's last word."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    console = os.open("/dev/ttyS0", os.O_WRONLY)
    with os.fdopen(reading, "rb") as lines:
        for line in lines:
            os.write(
                console, f"{os.uname().nodename} {unit}[{pid}]: ".encode() + line.rstrip(b"\r\n") + b"\r\n"
            )


def manage(options, reading, writing, started):
    """What systemd is to one service: starts it, keeps its processes together, cleans up after it."""
    for each in (reading, writing, started):
        os.set_inheritable(each, False)
    os.setsid()
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: nobody below leaves its control group
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        service(options, writing, started)
    os.close(writing)
    os.close(started)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):  # the caller's output must not wait for the service's end
        os.dup2(null, number)
    logger = os.fork()
    if logger == 0:
        log(reading, options.unit, pid)
        os._exit(0)
    os.close(reading)
    result = result_of(os.waitpid(pid, 0)[1])
    while left := below(os.getpid()) - {logger}:  # systemd.kill(5): SIGKILL once the main process is gone
        for each in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        time.sleep(0.01)
    for command in properties(options, "ExecStopPost"):
        words = [word.replace("$$", "$") for word in shlex.split(command)]
        environ = dict(os.environ, **environ_of(options), SERVICE_RESULT=result)
        subprocess.run(words, env=environ, check=False)


def result_of(status):
    """SERVICE_RESULT of systemd.exec(5); these signals are as good as an exit."""
    if os.WIFSIGNALED(status):
        clean = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
        return "success" if os.WTERMSIG(status) in clean else "signal"
    return "exit-code" if os.WEXITSTATUS(status) else "success"


def below(top):
    """Living processes that descend from this one."""
    parents, found, size = {}, {top}, 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except OSError:  # it has just ended
            continue
        if state not in b"ZX":
            parents[int(name)] = int(parent)
    while size < len(found):
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found - {top}


def properties(options, name):
    return [each.partition("=")[2] for each in options.property if each.startswith(name + "=")]


def environ_of(options):
    pairs = (each.partition("=") for each in options.setenv)
    return {name: value if equals else os.environ.get(name, "") for name, equals, value in pairs}


def service(options, writing, started):
    os.setsid()
    environ = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "INVOCATION_ID": uuid.uuid4().hex}
    with open("/run/environment") as file:  # where the metadata server is; on a real VM it has a fixed name
        environ.update(line.rstrip("\n").split("=", 1) for line in file)
    environ.update(environ_of(options))
    modes = properties(options, "KillMode")
    with open(os.path.join(UNITS, options.unit), "w") as file:
        file.write(f"{os.getpid()} {(modes or ['control-group'])[-1]}")
    os.chdir(options.working_directory or "/")
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(writing, number)
    os.close(started)
    try:
        os.execvpe(options.command[0], options.command, environ)
    except OSError as error:
        os.write(2, f"Failed to execute {options.command[0]}: {error.strerror}\n".encode())
    os._exit(203)  # EXIT_EXEC of systemd.exec(5)


def main():
    if "MANAGED" in os.environ:
        options, ends = json.loads(os.environ.pop("MANAGED"))
        manage(argparse.Namespace(**options), *ends)
        os._exit(0)
    options = parse(sys.argv[1:])
    if options.command[:1] == ["--"]:
        del options.command[0]
    options.unit = options.unit.replace(".service", "")
    os.makedirs(UNITS, exist_ok=True)
    if alive(os.path.join(UNITS, options.unit)):
        why = f"Unit {options.unit}.service was already loaded or has a fragment file."
        sys.exit(f"Failed to start transient service unit: {why}")
    reading, writing = os.pipe()
    waiting, started = os.pipe()  # at its end when the service is about to run
    if os.fork() == 0:
        os.close(waiting)
        ends = reading, writing, started
        for each in ends:
            os.set_inheritable(each, True)
        options.setenv = [f"{name}={value}" for name, value in environ_of(options).items()]
        # As a program of its own, in whose environment nothing of the caller's is left, as in systemd's.
        environ = {"PATH": os.environ["PATH"], "MANAGED": json.dumps([vars(options), ends])}
        os.execve(sys.executable, [sys.executable, "-I", "-S", __file__], environ)
    for each in (reading, writing, started):
        os.close(each)
    os.read(waiting, 1)
    if not options.quiet:
        print(f"Running as unit: {options.unit}.service", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
