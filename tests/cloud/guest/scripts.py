"""Runs the startup and the shutdown script of an emulated machine, as Google's guest agent does.

As root, in `/`, without HOME, at every boot; each line of output goes to the serial console behind the
name of this program (D:instances/startup-scripts/linux). Its unit is of KillMode=process: nobody signals
the script's orphans before the machine ends.
"""

import contextlib
import http.client
import os
import signal
import subprocess
import tempfile
import time

"".encode("idna")  # what http.client imports only on use, and then from a disk that is no longer there

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NAME = "google_metadata_script_runner"


def start(kind, config, console):
    """Run it in a process of its own; returns the pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # SIGTERM keeps a handler that does nothing: the script's last words are wanted on the console.
        Runner(kind, config, console).run()
    finally:
        os._exit(0)


class Runner:
    def __init__(self, kind, config, console):
        self.kind, self.config, self.console = kind, config, console

    def say(self, line):
        stamp = time.strftime("%b %d %H:%M:%S").encode()
        head = b"%s %s %s[%d]: " % (stamp, self.config["hostname"].encode(), NAME.encode(), os.getpid())
        os.write(self.console, head + line + b"\r\n")

    def run(self):
        self.say(b"Starting %s scripts (version 20260401.00)." % self.kind.encode())
        text = self.fetch()
        if not text:
            self.say(b"No %s scripts to run." % self.kind.encode())
            return
        self.say(b"Found %s-script in metadata." % self.kind.encode())
        folder = tempfile.mkdtemp(prefix="metadata-scripts")
        path = os.path.join(folder, f"{self.kind}-script")
        with open(path, "wb") as file:
            file.write(text)
        os.chmod(path, 0o755)
        self.say(b"%s-script %s" % (self.kind.encode(), self.outcome(path)))
        self.say(b"Finished running %s scripts." % self.kind.encode())

    def outcome(self, path):
        environ = {"PATH": self.config["path"], "LANG": "C.UTF-8", **self.config["environ"]}
        try:
            script = subprocess.Popen(
                [path],
                cwd="/",
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            return f"failed with error: fork/exec {path}: {error.strerror.lower()}".encode()
        for line in script.stdout:  # until the last process that holds it has ended
            self.say(b"%s-script: %s" % (self.kind.encode(), line.rstrip(b"\r\n")))
        status = script.wait()
        return f"exit status {status}".encode() if status >= 0 else f"signal: {-status}".encode()

    def fetch(self):
        """The script's bytes, or none; a boot tries for long, a shutdown does not."""
        deadline = time.monotonic() + (60 if self.kind == "startup" else 1)
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, body = self.get(f"instance/attributes/{self.kind}-script")
                if status in (200, 404):
                    return body if status == 200 else b""
            time.sleep(0.1)
        return b""

    def get(self, name):
        host = self.config["environ"]["GCE_METADATA_HOST"]
        connection = http.client.HTTPConnection(host, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", f"/computeMetadata/v1/{name}", headers={"Metadata-Flavor": "Google"})
            answer = connection.getresponse()
            return answer.status, answer.read()
