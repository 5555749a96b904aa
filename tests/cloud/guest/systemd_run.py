#!/usr/bin/env python3
"""systemd-run of an emulated machine: starts a service beside its caller, whose output goes to the console.

The service has an environment, a session and a name of its own, as systemd-run(1) says. Of the properties
only KillMode means anything here (services.py); an option that is not known is an error.
"""

import argparse
import os
import signal
import sys
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


def service(options, writing, started):
    os.setsid()
    environ = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "INVOCATION_ID": uuid.uuid4().hex}
    with open("/run/environment") as file:  # where the metadata server is; on a real VM it has a fixed name
        environ.update(line.rstrip("\n").split("=", 1) for line in file)
    for each in options.setenv:
        name, equals, value = each.partition("=")
        environ[name] = value if equals else os.environ.get(name, "")
    modes = [each.partition("=")[2] for each in options.property if each.startswith("KillMode=")]
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
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        service(options, writing, started)
    os.close(writing)
    os.close(started)
    os.read(waiting, 1)
    if not options.quiet:
        print(f"Running as unit: {options.unit}.service", file=sys.stderr, flush=True)
    if os.fork() == 0:
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        for number in (0, 1, 2):  # the caller's output must not wait for the service's end
            os.dup2(null, number)
        log(reading, options.unit, pid)


if __name__ == "__main__":
    main()
