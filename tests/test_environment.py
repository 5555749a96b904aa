"""A rented machine before main.py starts: its user, his login, the project's packages, what is still here.

Real processes of real users: the agent runs in mount and pid namespaces of its own, over a disk that
outlives it, as that of a machine that is kept.
"""

import base64
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import zipfile
from functools import lru_cache
from pathlib import Path

import pytest
from machine import Run, interpreter, wait_until

from cloudrun.receipt import outcome_of

PYTHON = "/usr/bin/python3"  # one that every user of the machine can start
TOPS = ("etc", "home", "root", "var")
ENTER = """
set -e
disk=$1; shift
for top in etc home root var; do
    mkdir -p "$disk/$top/upper" "$disk/$top/work"
    chmod --reference=/$top "$disk/$top/upper"
    mount -t overlay -o "lowerdir=/$top,upperdir=$disk/$top/upper,workdir=$disk/$top/work" machine /$top
done
exec "$@"
"""


@lru_cache
def unavailable():
    if os.geteuid() != 0:
        return "an ordinary user can be no other one"
    for program in ("useradd", "setpriv", "su", "unshare"):
        if not shutil.which(program):
            return f"there is no {program} here"
    return ""


@pytest.fixture(autouse=True)
def _possible():
    if reason := unavailable():
        pytest.skip(reason)
    if subprocess.run([PYTHON, "-c", "import sys, venv; assert sys.version_info >= (3, 8)"]).returncode:
        pytest.skip(f"{PYTHON} is missing or too old")


class Metadata(http.server.BaseHTTPRequestHandler):
    """Knows only what the agent asks for when it claims an attempt."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"4711")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def metadata():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class Rented(Run):
    """A run on a machine that is kept: the same `disk` is the same machine."""

    def __init__(self, top, main="", files=(), *, disk, user="lena", **order):
        super().__init__(top, main, files, **order)
        self.disk, self.user = disk, user
        self.environ.pop("HOME")
        self.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"

    def boot(self):
        return {**super().boot(), "backend": "gcp", "kept": True, "gpus": 0, "user": self.user}

    def command(self, python):
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return [*namespaces, "sh", "-c", ENTER, "sh", str(self.disk), *super().command(python)]

    def work(self):
        return self.on_disk(f"/home/{self.user}/cloudrun/p")

    def on_disk(self, path):
        top, _, rest = path[1:].partition("/")
        return self.disk / top / "upper" / rest

    def notes(self):
        return self.output("note").decode()


class Disk:
    """A machine that is kept; each `run` is one boot of it, with a project of its own in the bucket."""

    def __init__(self, top, metadata):
        self.top, self.path, self.metadata, self.runs = top, top / "disk", metadata, 0

    def write(self, path, text, mode=0o644):
        """A file of the machine's image."""
        top, _, rest = path[1:].partition("/")
        file = self.path / top / "upper" / rest
        for folder in [*reversed(file.parents)][len(self.path.parents) + 3 :]:
            if not folder.exists():
                folder.mkdir(parents=True)
                folder.chmod(0o755)
        file.write_text(text)
        file.chmod(mode)

    def start(self, main="", files=(), **order):
        self.runs += 1
        top = self.top / str(self.runs)
        top.mkdir()
        run = Rented(top, textwrap.dedent(main), files, disk=self.path, **order)
        (self.path / "var" / "upper").mkdir(parents=True, exist_ok=True)
        if run.order.get("env"):
            run.bucket.put(run.prefix + "/env.json", json.dumps({"TOKEN": "secret"}).encode())
        return run.start(PYTHON, GCE_METADATA_HOST=self.metadata)

    def run(self, main="", files=(), **order):
        return self.start(main, files, **order).finish()


@pytest.fixture
def disk(tmp_path, metadata):
    return Disk(tmp_path, metadata)


FACTS = """
import grp, json, os, sys
json.dump({
    "ids": [os.getresuid(), os.getresgid()], "groups": sorted(grp.getgrgid(n).gr_name for n in os.getgroups()),
    "env": dict(os.environ), "cwd": os.getcwd(), "python": sys.executable, "prefix": sys.prefix,
    "group": os.getpgrp() == os.getpid(), "argv": sys.argv,
    "owner": [os.stat(".").st_uid, os.stat("main.py").st_uid, os.stat("data").st_uid],
    "caps": [line for line in open("/proc/self/status") if line.startswith("CapEff")],
}, open("model/facts", "w"))
"""


def facts(run):
    assert run.receipt["reason"] == "exited" and run.receipt["status"] == 0, (run.receipt, run.output("err"))
    return json.loads(run.outputs()["model/facts"])


# --- the user


def test_main_py_is_a_program_of_the_user_who_is_made_for_it(disk):
    run = disk.run(FACTS, argv=["main.py", "--x", "a b"])
    found = facts(run)
    uid = found["ids"][0][0]
    assert uid >= 1000 and found["ids"][0] == [uid] * 3 and found["ids"][1][0] >= 1000
    assert {"lena", "video"} <= set(found["groups"]) and found["caps"] == ["CapEff:\t0000000000000000\n"]
    assert found["owner"] == [uid] * 3 and found["group"] and found["argv"] == ["main.py", "--x", "a b"]
    env = found["env"]
    assert env["HOME"] == "/home/lena" and env["USER"] == env["LOGNAME"] == "lena"
    assert env["SHELL"] == "/bin/bash" and env["PYTHONUNBUFFERED"] == "1" and "LOGIN" not in env
    assert found["cwd"] == "/home/lena/cloudrun/p"
    assert not [name for name in env if name in ("CLOUDRUN_BOOT", "CLOUDRUN_GUARD", "GCE_METADATA_HOST", "_")]
    assert run.words.endswith(b"R") and run.console == ""
    again = facts(disk.run(FACTS))
    assert again["ids"] == found["ids"] and again["env"]["PATH"] == env["PATH"]


def test_without_a_user_it_is_roots(disk):
    found = facts(disk.run(FACTS, user=""))
    assert found["ids"][0] == [0, 0, 0] and found["env"]["HOME"] == "/root"
    assert found["cwd"] == "/root/cloudrun/p"


@pytest.mark.parametrize("name", ["Lena", "-r", "a b", "x" * 33, "../x"])
def test_a_name_that_is_none(disk, name):
    run = disk.run(FACTS, user=name)
    outcome = outcome_of(run.receipt)
    assert outcome.exit_code == 125 and f"VM_USER={name}" in outcome.words


def test_a_user_who_cannot_be_made(disk):
    disk.write("/etc/passwd.lock", "1")
    disk.write("/etc/group", "lena:x:4000:\n" + Path("/etc/group").read_text())
    outcome = outcome_of(disk.run(FACTS).receipt)
    assert outcome.exit_code == 125 and "the user lena cannot be made" in outcome.words


def test_nothing_of_the_agent_is_the_users(disk):
    main = """
    import glob, os
    for path in ("/proc/1/environ", "/proc/%d/environ" % os.getppid(), "/var/cache/cloudrun", "/root"):
        try:
            open(path).read() if path.endswith("environ") else os.listdir(path)
            print("read", path)
        except PermissionError:
            print("no")
    print(os.environ["TOKEN"])
    """
    run = disk.run(main, env=["TOKEN"])
    assert run.output() == b"no\nno\nno\nno\nsecret\n", run.output("err")


def test_a_home_that_is_another_users(disk):
    disk.run(FACTS)
    shutil.rmtree(disk.path / "home/upper/lena/cloudrun")
    os.symlink("/etc", disk.path / "home/upper/lena/cloudrun")
    outcome = outcome_of(disk.run(FACTS).receipt)
    assert outcome.exit_code == 125 and "does not belong to lena" in outcome.words


# --- the login


def test_the_python_of_the_login_is_taken(disk):
    disk.write("/etc/profile.d/image.sh", "export PATH=/var/image:$PATH CUDA_HOME='a b\nc'; echo Welcome\n")
    disk.write("/var/image/python", f'#!/bin/sh\nVIA=image exec {PYTHON} "$@"\n', 0o755)
    run = disk.run(FACTS)
    env = facts(run)["env"]
    assert env["VIA"] == "image" and env["CUDA_HOME"] == "a b\nc"
    assert env["PATH"].startswith("/var/image:") and run.output() == b"" and run.notes() == ""


@pytest.mark.parametrize(
    "profile", ["exit 3", "exec true", "if then", "kill -9 $$", "sleep 1000 & exec sleep 1000"]
)
def test_a_broken_profile_does_not_break_the_run(disk, profile):
    disk.write("/etc/profile.d/broken.sh", profile + "\n")
    run = disk.run(FACTS, limits={"login": 1.0} if "sleep" in profile else {})
    env = facts(run)["env"]
    assert env["HOME"] == "/home/lena" and "/usr/bin" in env["PATH"]
    assert "the login shell does not work" in run.notes() or profile == "if then"
