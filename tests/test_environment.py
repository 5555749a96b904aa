"""A rented machine before main.py starts: its user, his login, the project's packages, what is still here.

Real processes of real users: the agent runs in mount and pid namespaces of its own, over a disk that
outlives it, as that of a machine that is kept.
"""

import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import zipfile
from functools import lru_cache
from pathlib import Path

import pytest
from machine import Run, interpreter, wait_until

from cloudrun.agent.fetch import Stretch, make_parent
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
        self.work = disk / "home/upper" / user / "cloudrun/p"
        self.environ.pop("HOME")
        self.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"

    def boot(self):
        return {**super().boot(), "backend": "gcp", "kept": True, "gpus": 0, "user": self.user}

    def command(self, python):
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return [*namespaces, "sh", "-c", ENTER, "sh", str(self.disk), *super().command(python)]

    def notes(self):
        return self.output("note").decode()


class Disk:
    """A machine that is kept; each `run` is one boot of it, with a project of its own in the bucket."""

    def __init__(self, top, path, metadata):
        self.top, self.path, self.metadata, self.runs = top, path, metadata, 0

    def write(self, path, text, mode=0o644):
        """A file of the machine's image."""
        top, _, rest = path[1:].partition("/")
        file = self.path / top / "upper" / rest
        for folder in reversed(file.parents):
            if not folder.exists():
                folder.mkdir(parents=True)
                folder.chmod(0o755)
        file.write_text(text)
        file.chmod(mode)

    def start(self, main="", files=(), *, without=(), python=PYTHON, **order):
        """`without`: the bucket has lost the content of these, so that fetching them fails."""
        self.runs += 1
        top = self.top / str(self.runs)
        top.mkdir()
        run = Rented(top, textwrap.dedent(main), files, disk=self.path, **order)
        (self.path / "var" / "upper").mkdir(parents=True, exist_ok=True)
        if run.order.get("env"):
            run.bucket.put(run.prefix + "/env.json", json.dumps({"TOKEN": "secret"}).encode())
        for path in without:
            sha256 = run.input(path, {**dict(files), "main.py": textwrap.dedent(main)}[path]).sha256
            Path(run.bucket.root, "p/blobs", sha256).unlink()
        return run.start(python, GCE_METADATA_HOST=self.metadata)

    def run(self, main="", files=(), **order):
        return self.start(main, files, **order).finish()


@pytest.fixture
def disk(tmp_path, metadata):
    """In memory if that can be: waiting for a disk is waiting for all that this computer does."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as top:
        yield Disk(tmp_path, Path(top), metadata)


FACTS = """
import grp, json, os, sys
json.dump({
    "ids": [os.getresuid(), os.getresgid()],
    "groups": sorted(grp.getgrgid(number).gr_name for number in os.getgroups()),
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


def test_the_oldest_python_will_do(disk):
    files = {**WHEELS, "requirements.txt": OFFLINE + "tiny<2\n"}
    run = disk.run(PRINT, files, python=interpreter("3.8"))
    assert run.output().startswith(b"1.0 "), (run.console, run.receipt)


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


# --- packages


def wheel(name, version, body="", requires=()):
    """The bytes of a package that can be installed without any network."""
    import io

    folder, buffer = f"{name}-{version}.dist-info", io.BytesIO()
    meta = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    meta += "".join(f"Requires-Dist: {other}\n" for other in requires)
    files = {f"{name}.py": body or f"version = {version!r}\n", f"{folder}/METADATA": meta}
    files[f"{folder}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{folder}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{folder}/RECORD"])
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return buffer.getvalue()


WHEELS = {
    f"wheels/{name}-{version}-py3-none-any.whl": wheel(name, version)
    for name, version in (("tiny", "1.0"), ("tiny", "2.0"), ("other", "1.0"))
}
OFFLINE = "--no-index\n--find-links wheels\n"
PRINT = "import sys, tiny; print(tiny.version, sys.prefix)"


def built(run):
    return "installing what the project requires" in run.notes()


def test_what_the_project_requires_is_installed_once(disk):
    files = {**WHEELS, "requirements.txt": OFFLINE + "tiny<2\n", "src/a.py": "1"}
    first = disk.run(PRINT, files)
    version, prefix = first.output().split()
    assert version == b"1.0" and prefix.startswith(b"/home/lena/.cache/cloudrun/"), first.output("err")
    assert built(first) and b"Successfully installed tiny-1.0" in first.output("err")
    user = disk.path / "home/upper/lena"
    assert (user / ".cache/cloudrun").stat().st_uid == user.stat().st_uid > 0
    second = disk.run(PRINT + "\nprint('changed')", {**files, "data/more": "2"})
    assert second.output() == first.output() + b"changed\n" and not built(second) and not second.output("err")
    third = disk.run(PRINT, {**files, "requirements.txt": OFFLINE + "tiny\n"})
    assert third.output().split()[0] == b"2.0" and built(third)


def test_a_file_of_the_project_that_is_required_counts(disk):
    files = {**WHEELS, "requirements.txt": "-r more.txt\n", "more.txt": OFFLINE + "tiny<2\n"}
    assert built(disk.run(PRINT, files))
    assert not built(disk.run(PRINT, {**files, "model/weights": "new"}))
    changed = disk.run(PRINT, {**files, "more.txt": OFFLINE + "tiny\n"})
    assert changed.output().split()[0] == b"2.0"


def test_what_the_image_has_is_not_installed_again(disk):
    """Also if the image's Python is a virtual environment itself."""
    disk.write("/etc/profile.d/image.sh", "export PATH=/var/image/bin:$PATH\n")
    disk.write("/var/image/bin/python", "")
    image = disk.path / "var/upper/image"
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", "--clear", image], check=True)
    place = next(image.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(__import__("io").BytesIO(wheel("tiny", "1.5+cu129"))) as archive:
        archive.extractall(place)
    files = {**WHEELS, "requirements.txt": OFFLINE + "tiny==1.5\nother\n"}
    run = disk.run(PRINT + "\nimport other; print(other.version)", files)
    assert run.output().split()[::2] == [b"1.5+cu129", b"1.0"], run.output("err")
    assert b"already satisfied: tiny==1.5" in run.output("err")


def test_a_requirement_that_cannot_be_had(disk):
    run = disk.run(PRINT, {**WHEELS, "requirements.txt": OFFLINE + "nowhere\n"})
    outcome = outcome_of(run.receipt)
    assert outcome.exit_code == 125
    assert outcome.words == "main.py was not started: ERROR: No matching distribution found for nowhere"
    assert b"Could not find a version" in run.output("err")


BACKEND = """
import os, shutil, time
def build_wheel(folder, *_):
    open("/var/tmp/builds", "a").write("x")
    while os.path.exists("/var/tmp/slow"):
        time.sleep(0.05)
    return os.path.basename(shutil.copy("tiny-3.0-py3-none-any.whl", folder))
"""
SLOW = {
    "slow/backend.py": BACKEND,
    "slow/tiny-3.0-py3-none-any.whl": wheel("tiny", "3.0"),
    "slow/pyproject.toml": "[build-system]\nrequires=[]\nbuild-backend='backend'\nbackend-path=['.']\n",
    "requirements.txt": "--no-index\n./slow\n",
}


@pytest.fixture
def slow(disk):
    disk.write("/var/tmp/slow", "")
    disk.write("/var/tmp/builds", "", 0o666)
    return disk.path / "var/upper/tmp"


def test_the_deadline_ends_an_installation(disk, slow):
    run = disk.run(PRINT, SLOW, left=6.0)
    assert run.receipt["reason"] == "deadline" and run.receipt["status"] is None
    assert (slow / "builds").read_text() and built(run)


def test_it_has_a_limit_of_its_own(disk, slow):
    outcome = outcome_of(disk.run(PRINT, SLOW, limits={"environment": 3.0}).receipt)
    assert outcome.exit_code == 125 and outcome.words.endswith("took too long")


def test_an_installation_that_was_killed_is_made_anew(disk, slow):
    run = disk.start(PRINT, SLOW)
    wait_until(lambda: (slow / "builds").read_text(), what="the build")
    assert run.phase() == "environment"
    run.kill()
    os.close(run.reading)
    folders = list((disk.path / "home/upper/lena/.cache/cloudrun").iterdir())
    assert len(folders) == 1 and not (folders[0] / "complete").exists()
    (slow / "slow").unlink()
    again = disk.run(PRINT, SLOW)
    assert again.output().startswith(b"3.0") and built(again), again.output("err")
    assert list((disk.path / "home/upper/lena/.cache/cloudrun").iterdir()) == folders


def test_a_lock_of_uv(disk, tmp_path):
    beside = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    uv = shutil.which("uv", path=beside) or pytest.skip("there is no uv here")
    disk.write("/etc/profile.d/uv.sh", "export UV_OFFLINE=1 PATH=/var/uv:$PATH\n")
    disk.write("/var/uv/uv", "")
    shutil.copy(uv, disk.path / "var/upper/uv/uv")
    project = tmp_path / "project"
    (project / "wheels").mkdir(parents=True)
    for path, data in WHEELS.items():
        (project / path).write_bytes(data)
    (project / "pyproject.toml").write_text(
        '[project]\nname = "p"\nversion = "1"\nrequires-python = ">=3.8"\ndependencies = ["tiny", "other"]\n'
        '[[tool.uv.index]]\nurl = "wheels"\nformat = "flat"\ndefault = true\n'
    )
    subprocess.run([uv, "lock", "--offline", "--python", PYTHON], cwd=project, check=True)
    files = {**WHEELS, **{name: (project / name).read_text() for name in ("pyproject.toml", "uv.lock")}}
    run = disk.run(PRINT, files)
    assert run.output().split()[0] == b"2.0", (run.output("err"), run.receipt)
    assert not built(disk.run(PRINT, files))


# --- what is still here


LIST = """
import os, sys
print(sorted(os.path.join(at, name)[2:] for at, _, names in os.walk(".") for name in names))
print(open("data/in").read(), open("data/sub/big").read(8), oct(os.stat("data/in").st_mode))
"""
INPUTS = {"data/in": "one", "data/sub/big": "0" * 200_000, "src/lib.py": "code"}


def test_only_what_changed_is_fetched(disk):
    first = disk.run(LIST, INPUTS)
    changed = {**INPUTS, "src/lib.py": "other code"}
    second = disk.run(LIST, changed, without=["data/in", "data/sub/big", "main.py"])
    assert second.output() == first.output() != b"", (second.receipt, second.output("err"))
    assert (second.work / "src/lib.py").read_text() == "other code"
    outcome = outcome_of(disk.run(LIST, {**INPUTS, "data/in": "two"}, without=["data/in"]).receipt)
    assert outcome.exit_code == 125 and "there is no" in outcome.words  # so it would have been seen


CHANGES = {
    "written over": "open('data/in', 'r+').write('bad')",
    "replaced": "os.rename('data/in', 'x'); open('data/in', 'w').write('bad')",
    "same times": "old = os.stat('data/in'); open('data/in', 'w').write('bad')\n"
    "os.utime('data/in', ns=(old.st_atime_ns, old.st_mtime_ns))",
    "mapped": "import mmap; file = open('data/in', 'r+b'); mmap.mmap(file.fileno(), 0)[:] = b'bad'",
    "through a link": "os.link('data/in', 'other'); open('other', 'w').write('bad')",
    "removed": "os.unlink('data/in')",
    "a link": "os.unlink('data/in'); os.symlink('/etc/hostname', 'data/in')",
    "a directory": "os.unlink('data/in'); os.mkdir('data/in')",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_main_py_did_to_its_inputs_is_undone(disk, change):
    disk.run("import os, time\n" + CHANGES[change], INPUTS)
    second = disk.run(LIST, INPUTS, without=["data/sub/big", "src/lib.py"])
    files = "['data/in', 'data/sub/big', 'main.py', 'src/lib.py']"
    assert second.output().decode() == f"{files}\none 00000000 0o100644\n", second.receipt


def test_a_run_sees_its_inputs_and_nothing_else(disk):
    main = """
    import os
    os.makedirs("src/__pycache__"); open("src/__pycache__/x.pyc", "w").write("x")
    open("model/result", "w").write("r"); open("junk", "w").write("j"); os.mkdir("empty")
    os.chmod("data/in", 0o600); os.symlink("/etc", "data/etc"); os.rename("data/sub", "../moved")
    os.symlink("../../moved", "data/sub")
    """
    assert disk.run(main, INPUTS).outputs() == {"model/result": b"r"}
    second = disk.run(LIST, {name: text for name, text in INPUTS.items() if name != "src/lib.py"})
    assert second.output().decode().startswith("['data/in', 'data/sub/big', 'main.py']"), second.receipt
    assert second.output().endswith(b"0o100644\n")
    assert (second.work.parent / "moved/big").exists()  # it is the user's, where he put it
    assert sorted(path.name for path in second.work.parent.iterdir()) == ["moved", "p"]


def test_a_run_that_goes_on_here_has_the_outputs_of_the_attempt_before(disk):
    main = "import os; name = 'checkpoint/step'; n = int(open(name).read()); print(n)\n"
    main += "open(name, 'w').write(str(n + 1))"
    first = disk.run(main, {**INPUTS, "checkpoint/step": "0"})
    assert first.outputs() == {"checkpoint/step": b"1"}
    (Path(first.bucket.root) / first.prefix / "receipt.json").unlink()
    first.attempt = 2
    second = first.start(PYTHON, GCE_METADATA_HOST=disk.metadata).finish()
    assert second.output() == b"1\n" and second.outputs() == {"checkpoint/step": b"2"}


def test_files_without_an_index_are_not_believed(disk):
    """As after a power failure: what was not seen to be on the disk may be zeros."""
    disk.run(LIST, INPUTS)
    (disk.path / "var/upper/cache/cloudrun/lena.p").unlink()
    assert outcome_of(disk.run(LIST, INPUTS, without=["data/in"]).receipt).exit_code == 125


# --- root reads what a user made


def test_no_link_leads_a_save_outside(disk):
    """The agent is root, and main.py may change a path between the look at it and the reading."""
    disk.write("/root/secret", "secret", 0o600)
    main = """
    import os, time
    os.symlink("/root/secret", "model/link"); os.symlink("/root", "model/folder")
    open("model/mine", "w").write("mine"); os.mkdir("model/empty"); os.utime("model/mine", (1, 1))
    end = time.time() + 1
    while time.time() < end:
        os.mkdir("model/new"); open("model/new/secret", "w").write("mine")
        os.utime("model/new/secret", (1, 1))
        os.rename("model/new", "model/flips")
        time.sleep(0.001)
        os.rename("model/flips", f"../{time.time_ns()}"); os.symlink("/root", "model/flips")
        time.sleep(0.001)
        os.unlink("model/flips")
    """
    run = disk.run(main, limits={"save_interval": 0.02})
    assert run.receipt["status"] == 0, run.output("err")
    outputs = run.outputs()
    assert outputs["model/mine"] == b"mine" and not {"model/link", "model/folder"} & set(outputs)
    saved = Path(run.bucket.root, run.prefix, "saved")
    assert b"secret" not in [path.read_bytes() for path in saved.iterdir()]


def test_what_is_read_lies_inside_whatever_its_path_says(tmp_path, monkeypatch):
    inside = tmp_path / "project"
    inside.mkdir()
    monkeypatch.chdir(inside)
    (tmp_path / "secret").write_text("secret")
    os.symlink(tmp_path, "folder")
    os.symlink("main.py", "link")
    Path("main.py").write_text("main")
    with pytest.raises(PermissionError):
        list(Stretch("folder/secret", inside=f"{inside}/"))
    assert list(Stretch("link", inside=f"{inside}/")) == [b"main"]
    deep = "/".join(["d" * 250] * 16)  # with the project's own path it is longer than the kernel can say
    make_parent(deep)
    with open(deep, "w") as file:
        file.write("deep")
    assert list(Stretch(deep, inside=f"{inside}/")) == [b"deep"]
    subprocess.run(["rm", "-rf", inside], check=True)
