"""Containers of the emulated vast.ai: real processes, which only a destroy ends for good."""

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
from cloud import machines
from cloud.vast import Vast
from machine import wait_until
from vast_client import Client, need_client

# As docs.vast.ai has it, "Docker Execution Environment".
DELETE = (
    'curl -sS --max-time 30 -X DELETE -H "Authorization: Bearer $CONTAINER_API_KEY" '
    "-H 'Content-Type: application/json' -d '{}' $VAST_URL/api/v0/instances/%s/"
)
TOP = Path(__file__).resolve().parents[1]
SAY = "> /proc/1/fd/1"
LASTING = f"echo up {SAY}; sleep 1000"


@pytest.fixture
def client():
    need_client()
    if reason := machines.unavailable():
        pytest.skip(reason)
    with (
        tempfile.TemporaryDirectory(dir=machines.disk_root(), ignore_cleanup_errors=True) as folder,
        Vast(Path(folder)) as vast,
    ):
        yield Client(vast)
        vast.meter.check()
        assert vast.violations == []


def said(client, number, text, count=1):
    """What the container has written, once this is in it so many times."""
    contract = client.vast.instances[number]
    return wait_until(lambda: contract.log.count(text) >= count and contract.log, 20, text)


def test_a_container_destroys_itself_and_nothing_else(client):
    other = client.run()
    number = client.run(f"{DELETE % other} {SAY}; {DELETE % '$CONTAINER_ID'}; sleep 1000")
    contract = client.vast.wait(number, "destroyed")
    assert '"error": "forbidden"' in contract.log
    assert client.get(number) is None and client.vast.meter.running() == [other]
    assert client.vast.meter.processes(number) == set() != client.vast.meter.processes(other)
    assert {request.key for request in client.vast.requests} == {"account", str(number)}


def test_process_1_has_the_environment(client):
    number = client.run(
        f"tr '\\0' '\\n' < /proc/1/environ {SAY}; echo end {SAY}", env={"A": "b c", "-p 8080:8080": "1"}
    )
    contract = client.vast.instances[number]
    lines = said(client, number, "end").splitlines()
    for name, value in {
        "A": "b c",
        "CONTAINER_ID": str(number),
        "CONTAINER_API_KEY": contract.key,
        "VAST_CONTAINERLABEL": f"C.{number}",
        "GPU_COUNT": "1",
        "VAST_TCP_PORT_22": str(contract.port),
    }.items():
        assert f"{name}={value}" in lines
    assert not [line for line in lines if "8080" in line]


def test_a_container_may_lack_its_key(client):
    client.vast.faults.keyless = {each["machine_id"] for each in client.vast.offers}
    number = client.run(f'echo "key=$CONTAINER_API_KEY." {SAY}')
    said(client, number, "key=.")


def test_nothing_inside_has_power_over_the_machine(client):
    """Neither systemd nor reboot(2), neither a lower oom_score_adj nor an end of process 1."""
    number = client.run(
        f"""{{ command -v poweroff systemctl systemd-run; ls -d /run/systemd
        python3 -c 'import ctypes; l = ctypes.CDLL(None, use_errno=True)
print("reboot", l.reboot(0x4321FEDC), ctypes.get_errno())'
        echo -500 > /proc/self/oom_score_adj; echo "oom $(cat /proc/self/oom_score_adj)"
        kill -9 1; kill -TERM 1; sleep 0.1; echo still here; }} > /root/seen 2>&1; cat /root/seen {SAY}"""
    )
    text = said(client, number, "still here")
    assert "poweroff" not in text and "systemctl" not in text
    assert "reboot -1 1\n" in text  # EPERM
    assert os.geteuid() or "oom 0\n" in text
    assert client.vast.meter.running() == [number] and client.vast.all_machines[0].alive


def test_the_end_of_onstart_is_not_the_end_of_the_container(client):
    number = client.run(f"echo up {SAY}; exit 3")
    said(client, number, "up")
    time.sleep(0.2)
    assert client.get(number)["actual_status"] == "running"
    assert client.vast.meter.processes(number)


def test_onstart_runs_at_every_start_on_the_same_disk(client):
    number = client.run(f"echo x >> /root/starts; echo start $(wc -l < /root/starts) {SAY}; sleep 1000")
    said(client, number, "start 1")
    client.vast.restart(number)
    said(client, number, "start 2")
    client.put(number, state="stopped")
    client.vast.wait(number, "exited")
    assert client.vast.meter.processes(number) == set()
    client.put(number, state="running")
    said(client, number, "start 3")
    client.vast.outbid(number)
    client.vast.wait(number, "stopped")
    client.vast.resume(number)
    said(client, number, "start 4")
    client.vast.offline(number)
    client.vast.wait(number, "offline")
    client.vast.back(number)
    said(client, number, "start 5")
    client.call("put", f"/instances/reboot/{number}/")
    said(client, number, "start 6")
    client.call("put", f"/instances/recycle/{number}/")
    said(client, number, "start 1", 2)


@pytest.mark.parametrize("end", ["stop", "outbid", "offline", "destroy"])
def test_every_process_is_killed_whatever_it_does(client, end):
    script = "import os, signal, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"
    script += "os.fork(); os.setsid() if os.fork() else None; print('up', flush=True); time.sleep(1000)"
    number = client.run(f'python3 -c "{script}" {SAY}')
    said(client, number, "up", 4)
    vast = client.vast
    {
        "stop": lambda: client.put(number, state="stopped"),
        "outbid": lambda: vast.outbid(number),
        "offline": lambda: vast.offline(number),
        "destroy": lambda: client.delete(number),
    }[end]()
    after = {"stop": "exited", "outbid": "stopped", "offline": "offline", "destroy": "destroyed"}
    vast.wait(number, after[end])
    assert vast.meter.processes(number) == set()
    vast.meter.check()


def test_a_leak_would_be_seen(client):
    """The meter looks at processes: what lives although nobody pays for it fails the test."""
    number = client.run(LASTING)
    said(client, number, "up")
    client.vast.meter.accounts[number].gpu.turn(False, client.vast.clock.now())
    with pytest.raises(AssertionError, match="still alive"):
        client.vast.meter.check()
    client.vast.meter.accounts[number].gpu.turn(True, client.vast.clock.now())


def test_a_frozen_container_is_billed_and_does_nothing(client):
    number = client.run(f"while true; do echo tick {SAY}; sleep 0.01; done")
    said(client, number, "tick", 3)
    client.vast.freeze(number)
    text = client.vast.instances[number].log
    before = client.vast.meter.gpu_seconds(number)
    time.sleep(0.2)
    assert client.vast.instances[number].log == text
    assert client.get(number)["actual_status"] == "frozen"
    assert client.vast.meter.gpu_seconds(number) > before
    client.vast.thaw(number)
    said(client, number, "tick", text.count("tick") + 3)


def test_a_crash_of_process_1_is_billed_on(client):
    number = client.run(LASTING)
    said(client, number, "up")
    client.vast.crash(number)
    client.vast.wait(number, "exited")
    shown = client.get(number)
    assert shown["cur_state"] == shown["intended_status"] == "running"
    assert client.vast.meter.accounts[number].gpu.since is not None


def test_the_command_of_args_is_started_again_whenever_it_ends(client):
    number = client.rent(runtype="args", args=["sh", "-c", "echo up; sleep 0.1"])
    said(client, number, "up", 3)


def test_signals_reach_the_command_of_args(client):
    number = client.rent(
        runtype="args", args=["sh", "-c", "trap 'echo bye; exit' TERM; echo up; sleep 9 & wait"]
    )
    said(client, number, "up")
    (first,) = (
        pid
        for pid in client.vast.all_machines[0].processes()
        if b"docker-init" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(first, signal.SIGTERM)
    said(client, number, "bye")


def test_logs_come_late_and_without_a_key(client):
    number = client.run(f"echo one {SAY}; echo two {SAY}; echo three")
    said(client, number, "two")
    from vastai import VastAI

    sdk = VastAI(api_key=client.vast.key, server_url=client.vast.url)
    assert sdk.logs(number) == "one\ntwo\n"
    assert sdk.logs(number, tail="1") == "two\n" and sdk.logs(number, filter="on") == "one\n"
    assert "running" in sdk.logs(number, daemon_logs=True)
    _, found = client.call("put", f"/instances/request_logs/{number}/", {"tail": "5"})
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(found["result_url"])
    assert "onstart.log" in sdk.execute(number, "ls /var/log")
    assert client.call("put", f"/instances/command/{number}/", {"command": "sh"})[0] == 400
    assert client.vast.requests[0].key == "account"


def test_a_container_without_a_network_reaches_nobody(client):
    offer = client.offers(disk_space={"gte": 20})[0]
    client.vast.faults.isolated.add(offer["machine_id"])
    number = client.run(f"{DELETE % '$CONTAINER_ID'} || echo failed {SAY}")
    said(client, number, "failed")
    assert client.vast.meter.running() == [number]


def test_the_api_can_break_for_containers_alone(client):
    offer = client.offers(disk_space={"gte": 20})[0]
    client.vast.faults.offline.add(offer["machine_id"])
    number = client.run(f"until {DELETE % '$CONTAINER_ID'}; do echo failed {SAY}; sleep 0.05; done")
    said(client, number, "failed", 2)
    assert client.get(number)["actual_status"] == "running"
    client.vast.faults.clear()
    client.vast.wait(number, "destroyed")


def test_nvidia_smi_shows_the_card_of_the_offer(client):
    number = client.run(f"nvidia-smi --query-gpu=name,memory.total --format=csv,noheader {SAY}")
    offer = client.vast.instances[number].offer
    said(client, number, f"{offer['gpu_ram']} MiB")
    assert offer["gpu_name"] in client.vast.instances[number].log


def test_it_starts_by_hand():
    need_client()
    command = [sys.executable, "-m", "tests.cloud", "vast", "pull=0.1"]
    with subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE, text=True) as served:
        lines = [served.stdout.readline().removeprefix("export ").strip() for _ in range(7)]
        exported = dict(line.split("=", 1) for line in lines)
        request = urllib.request.Request(f"{exported['VAST_URL']}/api/v0/users/current/")
        request.add_header("Authorization", f"Bearer {exported['VAST_API_KEY']}")
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["credit"] > 0
        assert exported["CLOUDRUN_BACKEND"] == "vast" and exported["GCS_DIR"].startswith("gs://")
        served.send_signal(signal.SIGINT)
        assert "violations: []" in served.stdout.read()
    assert served.returncode == 0


OF_NOBODY = """
import json, sys, tempfile, urllib.request
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from cloud import machines
from cloud.vast import Vast

if reason := machines.unavailable():
    sys.exit(f"skip: {reason}")
place = {"dir": machines.disk_root(), "ignore_cleanup_errors": True}
with tempfile.TemporaryDirectory(**place) as folder, Vast(Path(folder)) as vast:
    order = {"image": "a:b", "disk": 20, "env": {"VAST_URL": vast.url}, "onstart": sys.argv[2]}
    address, body = f"{vast.url}/api/v0/asks/7100013/", json.dumps(order).encode()
    request = urllib.request.Request(address, body, method="PUT")
    request.add_header("Authorization", f"Bearer {vast.key}")
    number = json.load(urllib.request.urlopen(request))["new_contract"]
    print(vast.wait(number, "destroyed", 20).log)
    vast.meter.check()
"""


def test_ordinary_users_have_containers_too_where_the_kernel_allows_it():
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv to become an ordinary user")
    nobody, python = pwd.getpwnam("nobody"), shutil.which("python3", path=machines.PATH)
    if not python:
        pytest.skip("needs a python3 that everybody can read")
    copy = Path("/var/tmp") / f"containers-{os.getpid()}"
    try:
        shutil.copytree(TOP / "tests/cloud", copy / "cloud", ignore=shutil.ignore_patterns("__pycache__"))
        switch = ["setpriv", "--reuid", str(nobody.pw_uid), "--regid", str(nobody.pw_gid), "--clear-groups"]
        onstart = f"{{ id -u; command -v systemctl; }} {SAY}; {DELETE % '$CONTAINER_ID'}"
        command = [*switch, python, "-c", OF_NOBODY, str(copy), onstart]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/")
        if done.stderr.startswith("skip: "):
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0 and done.stdout == "0\n\n", done.stderr
    finally:
        shutil.rmtree(copy, ignore_errors=True)
