"""Sending to and fetching from a bucket far away, beside the other programs that do so.

    make bench ARGS="small"                  one of the tables: small large
    make bench ARGS="large megabytes=1000"    four large files of so many megabytes in all; 400 otherwise

All of them talk to the same emulated Cloud Storage, in memory, in a process of its own, over bench/link.py.
Whole programs are timed, their imports included. gsutil speaks only TLS, which its own link takes off.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from link import Link

from bench import SEND, TOP, environment, project, row

PATIENCE = 120  # seconds that each of them gets
SERVE = """
import json, sys
from cloud.storage import Storage
with Storage() as storage:
    storage.create_bucket("b")
    print(storage.url, flush=True)
    for line in sys.stdin:
        print(json.dumps(storage.counts()), flush=True)
        storage.log.clear()
        for name in storage.objects("b") if line == "empty\\n" else ():
            storage.store.delete("b", name, {})
"""
UPLOAD = """
import sys
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from google.cloud.storage import transfer_manager as manager
bucket = storage.Client("p", credentials=AnonymousCredentials()).bucket("b")
names = [line.rstrip("\\n") for line in sys.stdin]
how = dict(worker_type=manager.THREAD, max_workers=16, raise_exception=True)
if sys.argv[1] == "up":
    manager.upload_many_from_filenames(bucket, names, source_directory=".", blob_name_prefix="x/", **how)
else:
    names = ["x/" + name for name in names]
    manager.download_many_to_path(bucket, names, destination_directory=sys.argv[2], **how)
"""
FETCH = """
import json, os, sys
from types import SimpleNamespace
from cloudrun.agent.fetch import Fetch
from cloudrun.storage import open_bucket
bucket = open_bucket(os.environ["GCS_DIR"], agent=True)
prefix = next(name for name in bucket.names("") if name.endswith("/order.json")).rpartition("/")[0]
order = json.loads(bucket.get(prefix + "/order.json")[0])
os.makedirs(sys.argv[1] + "/work")
os.chdir(sys.argv[1] + "/work")
fetch = Fetch(SimpleNamespace(bucket=bucket, prefix=prefix, order=order))
fetch.inputs()
assert fetch.progress["files"] == fetch.progress["of_files"]
"""


class Place:
    """A bucket at the other end of a link, what lies in a project, and who carries it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "project" / "data"
        env = dict(os.environ, PYTHONPATH=str(TOP / "tests"))
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVE], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._server.stdout
        self.address = self._server.stdout.readline().strip().removeprefix("http://")
        self._link, self._tls = Link(self.address), Link(self.address, certificate=certificate(folder))
        env = {**environment(folder), "STORAGE_EMULATOR_HOST": self._link.url, "GCS_DIR": "gs://b/runs"}
        self.env = {**env, "CLOUDRUN_BACKEND": "local", "PYTHONPATH": f"{TOP}"}
        project(folder, "")

    def close(self) -> None:
        self._server.kill()
        self._server.wait()
        for link in (self._link, self._tls):
            link.__exit__()

    def asked(self, *, empty: bool = False) -> dict[str, int]:
        """Requests and bytes since the last time."""
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write("empty\n" if empty else "\n")
        self._server.stdin.flush()
        counts: dict[str, int] = json.loads(self._server.stdout.readline())
        return counts

    def names(self) -> str:
        return "".join(f"{path.relative_to(self.data)}\n" for path in self.data.rglob("*") if path.is_file())

    # --- each returns its seconds, or says why it has none

    def cloudrun(self) -> float | str:
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        return self.again()

    def again(self) -> float | str:
        return took([sys.executable, "-c", SEND], cwd=self.folder / "project", env=self.env)

    def manager(self) -> float | str:
        command = [sys.executable, "-c", UPLOAD, "up"]
        return took(command, cwd=self.data, env=self.env, input=self.names())

    def gsutil(self) -> float | str:
        if not shutil.which("gsutil"):
            return "gsutil: not installed"
        options = {"Credentials:gs_json_host": "127.0.0.1", "Credentials:gs_json_port": str(self._tls.port)}
        options |= {"Boto:https_validate_certificates": "False", "GSUtil:state_dir": f"{self.folder}/state"}
        # The emulator's sessions have http:// addresses; one request for each file needs none.
        options["GSUtil:resumable_threshold"] = str(1 << 40)
        words = [word for item in options.items() for word in ("-o", "=".join(item))]
        env = {**self.env, "BOTO_CONFIG": os.devnull, "CLOUDSDK_CONFIG": str(self.folder / "sdk")}
        env |= {"CLOUDSDK_CORE_PASS_CREDENTIALS_TO_GSUTIL": "0", "CLOUDSDK_CORE_CHECK_GCE_METADATA": "0"}
        env.pop("PYTHONPATH")
        return took(["gsutil", "-q", *words, "-m", "cp", "-r", str(self.data), "gs://b/x/"], env=env)

    def rclone(self) -> float | str:
        if not shutil.which("rclone"):
            return "rclone: not installed"
        flags = ["--gcs-anonymous", f"--gcs-endpoint={self._link.url}/storage/v1/", "--transfers=16"]
        command = ["rclone", "copy", "--config=", "--gcs-no-check-bucket", *flags]
        return took([*command, str(self.data), ":gcs:b/x"], env=self.env)

    def fetch(self) -> float | str:
        with tempfile.TemporaryDirectory(dir=self.folder) as target:
            return took([sys.executable, "-c", FETCH, target], cwd=self.folder, env=self.env)

    def download(self) -> float | str:
        with tempfile.TemporaryDirectory(dir=self.folder) as target:
            command = [sys.executable, "-c", UPLOAD, "down", target]
            return took(command, cwd=self.data, env=self.env, input=self.names())


def took(command: list[str], **options: Any) -> float | str:
    """Seconds, or what it said last when it failed."""
    name, began = Path(command[0]).name, time.perf_counter()
    pipe = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    given = options.pop("input", "")
    with subprocess.Popen(command, stdin=subprocess.PIPE, **pipe, **options) as process:
        try:
            _, errors = process.communicate(given, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            return f"{name}: not done in {PATIENCE} s"
    if process.returncode:
        return f"{name}: {(errors.strip() or 'it failed').splitlines()[-1][-80:]}"
    return time.perf_counter() - began


def certificate(folder: Path) -> str:
    """For whoever speaks only TLS, and believes any; empty where there is no openssl."""
    path = str(folder / "tls.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1"]
    if not shutil.which("openssl"):
        return ""
    subprocess.run([*command, "-keyout", path, "-out", path + ".crt"], check=True, capture_output=True)
    with open(path, "a") as file:
        file.write(Path(path + ".crt").read_text())
    return path


def compare(what: str, goals: dict[str, str], place: Place) -> None:
    """A row for each program; the ratio is what cloudrun is faster by in doing the same."""
    ours: dict[str, float] = {}
    for task, name, carry in (
        ("send", "cloudrun", place.cloudrun),
        ("again", "cloudrun, nothing changed", place.again),
        ("fetch", "cloudrun's agent", place.fetch),
        ("send", "transfer_manager, 16 threads", place.manager),
        ("fetch", "the same, download_many", place.download),
        ("send", "gsutil -m (over TLS)", place.gsutil),
        ("send", "rclone, 16 at once", place.rclone),
    ):
        place.asked(empty=task == "send")
        seconds, asked = carry(), place.asked()
        if isinstance(seconds, str):
            print(row(f"{what}: {task}", "-", f"{seconds}, {asked['all']} asked", "", ""), flush=True)
            continue
        goal = "" if task in ours else goals[task]
        ratio = f"{seconds / ours[task]:.1f}" if task in ours else ""
        ours.setdefault(task, seconds)
        size = f"{(asked['bytes_in'] + asked['bytes_out']) / 1e6:.0f} MB"
        print(
            row(f"{what}: {task}", f"{seconds:.2f} s", name, ratio, f"{goal:<9} {asked['all']:>6} {size:>8}")
        )
        sys.stdout.flush()


def make_small(count: int, folder: Path) -> None:
    """Files of 2 to 18 kB, five hundred in a directory."""
    for number in range(count):
        path = folder / f"{number // 500:02d}" / f"{number:05d}.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(2000 + number * 7919 % 16_000))


def make_large(megabytes: int, folder: Path) -> None:
    for name in "abcd":
        with open(folder / name, "wb") as file:
            for _ in range(megabytes // 4):
                file.write(os.urandom(1_000_000))


def ceiling(place: Place, many: int = 3000) -> tuple[str, str]:
    """Of the server alone, without a link: requests that are written down beforehand."""
    body = bytes(10_000)
    host, _, port = place.address.partition(":")

    def ask(connections: int, number: int) -> None:
        with socket.create_connection((host, int(port))) as connection:
            reader = connection.makefile("rb")
            for turn in range(many // connections):
                head = f"POST /upload/storage/v1/b/b/o?uploadType=media&name=n{number}-{turn} HTTP/1.1\r\n"
                head += f"Host: {host}\r\nContent-Type: a/b\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body)
                length = 0
                while (line := reader.readline()) != b"\r\n":
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                reader.read(length)

    threads = [threading.Thread(target=ask, args=(4, number)) for number in range(4)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return f"{many / (time.perf_counter() - began):.0f} / s", "4 connections, no link"


def main(words: list[str]) -> None:
    options = dict(word.split("=", 1) for word in words if "=" in word)
    tables = [word for word in words if "=" not in word] or ["small", "large"]
    megabytes, count = int(options.get("megabytes", 400)), int(options.get("files", 10_000))
    small = {"send": "best / 5", "again": "1 s", "fetch": "best / 5"}
    large = {"send": "the best", "again": "1 s", "fetch": "the best"}
    print(row("over 20 ms and 500 Mbit/s", "seconds", "who", "slower", "goal       asked    bytes"))
    for name, what, goals, fill in (
        ("small", f"{count} files of 2-18 kB", small, partial(make_small, count)),
        ("large", f"{megabytes} MB in 4 files", large, partial(make_large, megabytes)),
    ):
        if name not in tables:
            continue
        with tempfile.TemporaryDirectory(prefix="cloudrun-bench-") as folder:
            place = Place(Path(folder))
            try:
                fill(place.data)
                if name == tables[0]:
                    print(row("the server alone, inserts of 10 kB", *ceiling(place), "", ""), flush=True)
                compare(what, goals, place)
            finally:
                place.close()
    print(f"load of this machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")


if __name__ == "__main__":
    main(sys.argv[1:])
