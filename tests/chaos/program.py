"""main.py of the fault campaign: each content that it writes says what it is, and a witness hears of it.

The witness listens outside of everything that cloudrun knows of. Sent as it is, and read by the judges.
"""

import hashlib
import json
import os
import random
import signal
import socket
import sys
import time

LINE = "checkpoint/line"  # who wrote it, and how far that was: the next one goes on from there
DIGEST = 64


def content(name, number, life, size):
    """A header, filler that follows from it, and the sha256 of both."""
    head = json.dumps({"name": name, "number": number, "life": life, "size": size})
    body = head.encode() + b"\n" + random.Random(head).randbytes(size)
    return body + hashlib.sha256(body).hexdigest().encode()


def read(data):
    """The header of a content; None if it is not whole."""
    body, digest = data[:-DIGEST], data[-DIGEST:]
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    return json.loads(body.partition(b"\n")[0])


class Program:
    def __init__(self, plan):
        self.plan, self.life, self.number = plan, os.urandom(4).hex(), 0
        self.asked = False
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        parent = None
        if os.path.exists(LINE):
            with open(LINE, "rb") as file:
                parent = read(file.read())
            if parent is None:
                self.tell("torn", name=LINE)
        self.number = parent["number"] if parent else 0
        self.tell("start", parent=parent["life"] if parent else None, number=self.number)

    def tell(self, what, **more):
        """The clock is the kernel's own: everybody on this computer has the same."""
        said = {"what": what, "life": self.life, "at": time.monotonic(), **more}
        self.socket.sendto(json.dumps(said).encode(), ("127.0.0.1", self.plan["port"]))

    def write(self, name, *, slowly=False):
        """Under a temporary name that is renamed; or slowly and in place, as a program should not."""
        data = content(name, self.number, self.life, random.Random(self.number).choice((500, 20_000, 90_000)))
        half, path = len(data) // 2, name if slowly else name + ".tmp"
        if slowly:
            self.tell("opening", name=name, number=self.number)
        try:
            with open(path, "wb") as file:
                file.write(data[:half])
                file.flush()
                time.sleep(self.plan["slow"] if slowly else 0)
                file.write(data[half:])
        except OSError:  # the disk is full: what stands there now is our own doing
            self.tell("spoiled", name=name)
            raise
        if not slowly:
            self.tell("opening", name=name, number=self.number)
            os.rename(path, name)
        self.tell("closed", name=name, number=self.number)

    def step(self):
        self.number += 1
        self.write(LINE)
        if self.number % 2:
            self.write("model/weights", slowly=True)
        if self.number % 3 == 0:
            self.write(f"model/part-{self.number}")
        print("step", self.number, self.life, flush=True)
        self.tell("step", number=self.number)
        time.sleep(self.plan["pace"])

    def run(self):
        while self.number < self.plan["steps"] and not self.asked:
            self.step()
        if self.asked:
            self.number += 1
            self.write("model/last")
        return 5 if self.asked else self.plan["status"]


def main():
    for folder in ("model", "checkpoint"):
        os.makedirs(folder, exist_ok=True)
    program = Program(json.loads(os.environ["CHAOS"]))

    def ask(*_):
        program.asked = True

    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, ask if program.plan["polite"] else signal.SIG_IGN)
    try:
        status = program.run()
    except OSError as error:
        print(error, file=sys.stderr)
        status = 9
    program.tell("end", status=status)
    sys.exit(status)


if __name__ == "__main__":
    main()
