"""Emulated machines: real process trees that boot, end and are cut off; the meter and the kernel agree."""

import json
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from cloud import machines
from cloud.compute import Cloud
from cloud.machines import processes_of
from cloud.project import Timing
from gce import Gce, need_client
from machine import wait_until

TOP = Path(__file__).resolve().parents[1]
QUICK = Timing(0.02, 0.02, boot=0.05, stopping=0.02, guest_standard=1.5, guest_spot=1.0, guest_stop=1.0)
WAIT = "#!/bin/bash\necho up\nexec sleep 1000\n"


@pytest.fixture(scope="session")
def place():
    """Where disks can lie."""
    need_client()
    if reason := machines.unavailable():
        pytest.skip(reason)
    return machines.disk_root()


@pytest.fixture
def folder(place, tmp_path):
    if str(tmp_path).startswith(place):
        yield tmp_path
        return
    path = Path(place) / f"cloud-{os.getpid()}-{tmp_path.name}"
    path.mkdir()
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def cloud(folder):
    with Cloud(folder, timing=QUICK) as cloud:
        yield cloud
        cloud.meter.check()
        assert cloud.violations == []


@pytest.fixture
def gce(cloud):
    return Gce(cloud)


def until_said(cloud, name, text, times=1):
    """Until its console has this text, so often."""
    wait_until(lambda: cloud.console(name).count(text) >= times, 20)


def bash(*lines):
    return "\n".join(("#!/bin/bash", *lines, ""))


# --- booting


def test_the_startup_script_runs_as_on_the_real_thing(cloud, gce):
    script = bash(
        'echo "user $(id -u) home ${HOME-none} in $PWD pid1 $(cat /proc/1/comm) host $(hostname)"',
        "ls /sys/class >/dev/null && echo sysfs; echo $$ > /run/me; touch /tmp/me /root/me /new",
        'python3 -c "import sys; print(sys.version_info >= (3, 8))"; echo oops >&2; echo direct > /dev/ttyS0',
        "sleep 1000",
    )
    gce.run("toy", script)
    until_said(cloud, "toy", "direct")
    until_said(cloud, "toy", "oops")
    console = cloud.console("toy")
    assert "startup-script: user 0 home none in / pid1" in console and "host toy" in console
    assert all(f"startup-script: {word}\n" in console for word in ("True", "oops"))
    assert not os.path.exists("/new") and not os.path.exists("/root/me")
    assert len(cloud.machine("toy").processes()) >= 3 and cloud.meter.running() == ["toy"]


def test_without_a_script_it_boots_and_waits(cloud, gce):
    gce.run("toy", kind="n1-standard-4")
    until_said(cloud, "toy", "No startup scripts to run.")
    assert cloud.status("toy") == "RUNNING"


def test_a_script_that_cannot_run_says_so(cloud, gce):
    gce.run("toy", "no interpreter line\n")
    until_said(cloud, "toy", "exec format error")


def test_the_console_is_read_from_where_one_was(cloud, gce):
    gce.run("toy", bash("echo one", "exec sleep 1000"))
    until_said(cloud, "toy", "startup-script: one")
    first = gce.vm("get_serial_port_output", "toy", start=0)
    assert "startup-script: one\r\n" in first.contents and first.next_ == len(first.contents)
    assert gce.vm("get_serial_port_output", "toy", start=first.next_).contents == ""
    assert gce.vm("get_serial_port_output", "toy", start=-5).contents == first.contents[-5:]


@pytest.mark.parametrize(("kind", "gpus"), [("g2-standard-24", 2), ("n1-standard-4", 0)])
def test_nvidia_smi_shows_what_was_ordered(cloud, gce, kind, gpus):
    query = "nvidia-smi --query-gpu=name,memory.total --format=csv,noheader"
    gce.run(
        "toy", bash("nvidia-smi | head -2", "nvidia-smi -L", query, "echo status $?", "sleep 1000"), kind=kind
    )
    until_said(cloud, "toy", "startup-script: status")
    console = cloud.console("toy")
    assert console.count("startup-script: NVIDIA L4, 23034 MiB") == gpus
    assert console.count("(UUID: GPU-") == gpus
    assert ("status 0" in console) == bool(gpus) and ("status 127" in console) == (not gpus)


def test_nvidia_smi_can_hang_and_fail(cloud, gce):
    gce.run(
        "toy", bash("until [ -e /run/hardware/go ]; do sleep 0.02; done", "timeout 0.2 nvidia-smi", "echo $?")
    )
    machine = cloud.machine("toy")
    machine.set_gpu("hang")
    (machine.folder / "hardware" / "go").touch()
    until_said(cloud, "toy", "startup-script: 124")
    machine.set_gpu("fail")
    gce.vm("reset_unary", "toy")
    until_said(cloud, "toy", "couldn't communicate with the NVIDIA driver")


# --- ends that come from inside

ENDS = {
    "poweroff": "poweroff",
    "shutdown": "shutdown -h now",
    "systemctl": "systemctl poweroff",
    "forced": "poweroff -f",
    "signal to init": "kill -38 1",
    "sysrq": "echo o > /proc/sysrq-trigger",
    "reboot(2)": "python3 -c 'import ctypes; ctypes.CDLL(None).reboot(0x4321FEDC)'",
}


@pytest.mark.parametrize("how", ENDS)
def test_the_guest_ends_its_machine(cloud, gce, how):
    if how == "sysrq" and not os.path.exists("/proc/sysrq-trigger"):
        pytest.skip("this kernel has no magic system request")
    gce.run("toy", bash("(trap '' HUP TERM; sleep 1000) &", f"{ENDS[how]}", "sleep 1000"))
    cloud.wait("toy", "TERMINATED")
    assert cloud.operations.kinds("toy") == ["insert", "compute.instances.guestTerminate"]
    assert cloud.meter.running() == [] and cloud.meter.processes("toy") == set()
    assert not gce.address("toy") and not gce.limit("toy")
    cloud.meter.check()


@pytest.mark.parametrize(
    "how", ["reboot", "shutdown -r now", "python3 -c 'import ctypes; ctypes.CDLL(None).reboot(0x01234567)'"]
)
def test_a_reboot_keeps_it_running_and_runs_the_script_again(cloud, gce, how):
    script = bash(
        "[ -e /tmp/was-here ] && echo remembered",
        "touch /tmp/was-here; echo boot >> /boots; wc -l < /boots",
        f"[ $(wc -l < /boots) = 2 ] || {how}",
        "sleep 1000",
    )
    gce.run("toy", script)
    limit = gce.limit("toy")
    until_said(cloud, "toy", "startup-script: 2")
    assert "remembered" not in cloud.console("toy")  # /tmp is in memory
    assert cloud.status("toy") == "RUNNING" and gce.limit("toy") == limit
    assert len(cloud.meter.intervals("toy")) == 1 and cloud.operations.kinds("toy") == ["insert"]


def test_halt_leaves_it_running_and_billed(cloud, gce):
    gce.run("toy", bash("halt", "sleep 1000"))
    until_said(cloud, "toy", "System halted")
    assert cloud.status("toy") == "RUNNING" and cloud.meter.running() == ["toy"]
    gce.stop("toy")  # nobody hears the power button; the provider cuts
    assert cloud.meter.running() == []


def test_an_ordinary_user_of_the_machine_cannot_end_it(cloud, gce):
    if os.geteuid() != 0:
        pytest.skip("a user namespace of an ordinary user has no other users")
    gce.run("toy", bash("su -s /bin/sh nobody -c 'poweroff || echo refused'", "sleep 1000"))
    until_said(cloud, "toy", "startup-script: refused")
    assert cloud.status("toy") == "RUNNING"


def test_it_can_stop_itself_through_the_api(cloud, gce):
    script = bash(
        "python3 - <<'END'",
        "import json, os, urllib.request",
        "def ask(url, data=None, **headers):",
        "    return urllib.request.urlopen(urllib.request.Request(url, data, headers)).read().decode()",
        "def metadata(name):",
        "    root = f\"http://{os.environ['GCE_METADATA_HOST']}/computeMetadata/v1/\"",
        "    return ask(root + name, **{'Metadata-Flavor': 'Google'})",
        "token = json.loads(metadata('instance/service-accounts/default/token'))['access_token']",
        "zone, name = metadata('instance/zone').split('/')[-1], metadata('instance/name')",
        "project = f\"{metadata('instance/attributes/api')}projects/{metadata('project/project-id')}\"",
        "url = f'{project}/zones/{zone}/instances/{name}/stop'",
        "ask(url + '?discardLocalSsd=true', b'', Authorization=f'Bearer {token}')",
        "END",
        "sleep 1000",
    )
    gce.run("toy", metadata=gce.metadata(startup_script=script, api=cloud.compute_url))
    cloud.wait("toy", "TERMINATED")
    assert cloud.requests[-1].user == cloud.project.service_account


# --- ends that come from outside


def test_the_disk_is_kept_over_stop_and_start_and_goes_with_the_instance(cloud, gce):
    gce.run("toy", bash("echo boot >> /home/boots; wc -l < /home/boots", "exec sleep 1000"))
    until_said(cloud, "toy", "startup-script: 1")
    gce.stop("toy")
    disk = cloud.instance("toy").disk.folder
    gce.start("toy")
    until_said(cloud, "toy", "startup-script: 2")
    assert disk.is_dir() and len(cloud.meter.intervals("toy")) == 2
    gce.delete("toy")
    assert not disk.exists() and cloud.meter.disks() == []
    gce.run("toy", bash("ls /home/boots || echo fresh", "exec sleep 1000"))
    until_said(cloud, "toy", "startup-script: fresh")


def test_a_stop_asks_all_processes_first(cloud, gce):
    gce.run(
        "toy",
        bash("trap 'echo asked; sleep 0.1; echo bye; exit' TERM", "echo up", "while :; do sleep 0.02; done"),
    )
    until_said(cloud, "toy", "startup-script: up")
    gce.stop("toy")
    console = cloud.console("toy")
    assert console.index("asked") < console.index("bye") < console.index("Power down")


def test_a_service_hears_of_the_end_alone_if_it_wants_to(cloud, gce):
    """KillMode=mixed of systemd.kill(5): the main process is asked, its children are not."""
    forever = "while :; do sleep 0.02; done"
    child = f"(trap 'echo child asked' TERM; {forever}) &"
    main = (
        f"{child} trap 'echo main asked; sleep 0.1; exit' TERM; echo NAME=$NAME $GCE_METADATA_HOST; {forever}"
    )
    other = f"trap 'echo other asked; exit' TERM; {forever}"
    script = bash(
        f"systemd-run --unit=guard -p KillMode=mixed --setenv='NAME=a b' bash -c {shlex.quote(main)}",
        "systemd-run --unit=guard true || echo refused",
        f"systemd-run --unit=other bash -c {shlex.quote(other)}",
        "echo the script ends",
    )
    gce.run("toy", script)
    until_said(cloud, "toy", "Finished running startup scripts")
    until_said(cloud, "toy", f"NAME=a b 127.0.0.1:{cloud.instance('toy').server.port}\n")
    gce.stop("toy")
    console = cloud.console("toy")
    assert "startup-script: refused" in console and "toy guard[" in console
    assert "main asked" in console and "other asked" in console and "child asked" not in console


def test_the_shutdown_script_runs_first(cloud, gce):
    items = gce.metadata(startup_script=WAIT, shutdown_script=bash("echo closing; pgrep -c sleep"))
    gce.run("toy", metadata=items)
    until_said(cloud, "toy", "startup-script: up")
    gce.stop("toy")
    assert "shutdown-script: closing" in cloud.console("toy")
    assert "shutdown-script: 1" in cloud.console("toy")  # the others are still there


def test_who_does_not_listen_is_cut_off(folder):
    with Cloud(folder, timing=Timing(guest_standard=0.3, guest_stop=60.0)) as cloud:
        gce = Gce(cloud)
        gce.run("toy", bash("trap '' TERM HUP INT", "echo up", "while :; do sleep 0.1; done"))
        until_said(cloud, "toy", "startup-script: up")
        gce.stop("toy")
        assert "Power down" not in cloud.console("toy")
        cloud.meter.check()


def test_a_frozen_machine_is_cut_off(cloud, gce):
    gce.run("toy", bash("trap 'echo asked' TERM", "while :; do echo tick; sleep 0.02; done"))
    until_said(cloud, "toy", "tick")
    cloud.machine("toy").freeze()
    before = cloud.console("toy")
    gce.stop("toy")
    assert cloud.console("toy") == before and cloud.meter.processes("toy") == set()


def test_a_frozen_machine_can_go_on(cloud, gce):
    gce.run("toy", bash("while :; do echo tick; sleep 0.02; done"))
    until_said(cloud, "toy", "tick")
    cloud.machine("toy").freeze()
    seen = cloud.console("toy").count("tick")
    cloud.machine("toy").thaw()
    until_said(cloud, "toy", "tick", seen + 3)


@pytest.mark.parametrize(("action", "end"), [("STOP", "TERMINATED"), ("DELETE", "GONE")])
def test_the_limit_ends_the_processes_too(cloud, gce, action, end):
    gce.run("toy", WAIT, scheduling=gce.scheduling(3600, action))
    until_said(cloud, "toy", "startup-script: up")
    cloud.clock.advance(3601)
    cloud.wait("toy", end)
    assert cloud.meter.processes("toy") == set() and 3600 <= cloud.meter.seconds("toy") < 3660


@pytest.mark.parametrize(("action", "end"), [("STOP", "TERMINATED"), ("DELETE", "GONE")])
def test_a_preemption_is_seen_inside_before_it_happens(cloud, gce, action, end):
    script = bash(
        "trap 'echo asked to end; wait; exit' TERM",
        "url=http://$GCE_METADATA_HOST/computeMetadata/v1/instance/preempted",
        "python3 - $url <<'END' &",
        "import signal, sys, urllib.request",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "headers = {'Metadata-Flavor': 'Google'}",
        "def ask(url): return urllib.request.urlopen(urllib.request.Request(url, headers=headers))",
        "now = ask(sys.argv[1])",
        "print('now', now.read().decode(), flush=True)",
        "later = ask(f\"{sys.argv[1]}?wait_for_change=true&last_etag={now.headers['ETag']}\")",
        "print('then', later.read().decode(), flush=True)",
        "END",
        "while :; do sleep 0.02; done",
    )
    gce.run("toy", script, scheduling=gce.scheduling(model="SPOT", action=action))
    until_said(cloud, "toy", "now FALSE")
    console = cloud.instance("toy").console
    gce.vm("simulate_maintenance_event_unary", "toy")
    cloud.wait("toy", end)
    text = console.read_text()
    assert "then TRUE" in text and "asked to end" in text
    assert cloud.operations.kinds("toy")[-1] == "compute.instances.preempted"
    assert cloud.meter.running() == []


def test_a_lost_host_gives_no_warning(cloud, gce):
    gce.run("toy", bash("trap 'echo asked' TERM", "echo up", "while :; do sleep 0.02; done"))
    until_said(cloud, "toy", "startup-script: up")
    cloud.host_error("toy")
    cloud.wait("toy", "TERMINATED")
    assert "asked" not in cloud.console("toy")
    assert cloud.operations.kinds("toy") == ["insert", "compute.instances.hostError"]


def test_a_lost_host_comes_back_where_that_was_ordered(cloud, gce):
    kept = gce.scheduling()
    kept.automatic_restart = True
    gce.run("toy", bash("echo boot >> /boots; wc -l < /boots", "exec sleep 1000"), scheduling=kept)
    until_said(cloud, "toy", "startup-script: 1")
    cloud.host_error("toy")
    cloud.wait("toy", "REPAIRING")
    assert cloud.meter.running() == []
    cloud.wait("toy", "RUNNING")
    until_said(cloud, "toy", "startup-script: 2")
    assert cloud.operations.kinds("toy")[-1] == "compute.instances.automaticRestart"


def test_an_orphan_is_collected(cloud, gce):
    gce.run(
        "toy",
        bash(
            "(sleep 0.05 & echo $! > /run/orphan)",
            "sleep 0.3",
            "ls -d /proc/$(cat /run/orphan) || echo gone",
            "sleep 1000",
        ),
    )
    until_said(cloud, "toy", "startup-script: gone")


def test_a_machine_whose_kernel_stopped_stays_on_the_bill(cloud, gce):
    gce.run("toy", WAIT)
    until_said(cloud, "toy", "startup-script: up")
    machine = cloud.machine("toy")
    machine.cut()  # not by the provider
    wait_until(lambda: not machine.alive, 10)
    assert cloud.status("toy") == "RUNNING" and cloud.meter.running() == ["toy"]
    gce.stop("toy")
    assert cloud.meter.running() == []


# --- the metadata server


def ask(cloud, name, path, *, data=None, verb="GET", **headers):
    url = f"http://127.0.0.1:{cloud.instance(name).server.port}/computeMetadata/v1/{path}"
    request = urllib.request.Request(url, data, {"Metadata-Flavor": "Google", **headers}, method=verb)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.read().decode()


def refused(cloud, name, path, **options):
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(cloud, name, path, **options)
    with caught.value:
        return caught.value.code


def test_metadata(cloud, gce):
    gce.run("toy", metadata=gce.metadata(startup_script=WAIT, one="1"))
    assert ask(cloud, "toy", "instance/name") == "toy"
    assert ask(cloud, "toy", "instance/id") == str(gce.get("toy").id)
    assert ask(cloud, "toy", "instance/zone").endswith("/zones/us-central1-a")
    assert ask(cloud, "toy", "instance/attributes/") == "startup-script\none\n"
    assert json.loads(ask(cloud, "toy", "instance/attributes/?recursive=true"))["one"] == "1"
    everything = json.loads(ask(cloud, "toy", "?recursive=true&alt=json"))
    assert everything["instance"]["maintenanceEvent"] == "NONE"
    assert everything["project"]["projectId"] == "test-project"
    token = json.loads(ask(cloud, "toy", "instance/service-accounts/default/token"))["access_token"]
    assert cloud.tokens.valid(token).instance == "toy"
    assert ask(cloud, "toy", "instance/service-accounts/default/email") == cloud.project.service_account
    assert refused(cloud, "toy", "instance/name", **{"Metadata-Flavor": ""}) == 403
    assert refused(cloud, "toy", "instance/name", **{"X-Forwarded-For": "1.2.3.4"}) == 403
    assert refused(cloud, "toy", "instance/attributes/two") == 404
    assert refused(cloud, "toy", "instance/name", data=b"x", verb="POST") == 405


def test_metadata_changes_are_waited_for(cloud, gce):
    gce.run("toy", metadata=gce.metadata(one="1"))
    assert ask(cloud, "toy", "instance/attributes/one?wait_for_change=true&timeout_sec=0") == "1"
    assert ask(cloud, "toy", "instance/attributes/one?wait_for_change=true&last_etag=0") == "1"
    new = gce.metadata(one="2")
    new.fingerprint = gce.get("toy").metadata.fingerprint
    cloud.clock.after(
        0.1, lambda: gce.cloud.instance("toy").body.update(metadata={"items": [{"key": "one", "value": "2"}]})
    )
    assert ask(cloud, "toy", "instance/attributes/one?wait_for_change=true") == "2"


def test_a_machine_without_a_service_account_has_no_token(cloud, gce):
    gce.run("toy", service_accounts=[])
    assert refused(cloud, "toy", "instance/service-accounts/default/token") == 404


def test_the_real_google_auth_takes_it_for_the_real_one(cloud, gce):
    gce.run("toy")
    program = (
        "import google.auth, google.auth.transport.requests as r\n"
        "credentials, project = google.auth.default()\n"
        "credentials.refresh(r.Request())\n"
        "print(project, credentials.service_account_email, credentials.token)\n"
    )
    host = f"127.0.0.1:{cloud.instance('toy').server.port}"
    environ = {
        "GCE_METADATA_HOST": host,
        "GCE_METADATA_IP": host,
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
    }
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    project, email, token = done.stdout.split()
    assert (project, email) == ("test-project", cloud.project.service_account) and cloud.tokens.valid(token)


def test_guest_attributes(cloud, gce):
    from google.api_core.exceptions import NotFound

    gce.run("plain")
    assert refused(cloud, "plain", "instance/guest-attributes/ns/key", data=b"x", verb="PUT") == 403
    gce.run("toy", metadata=gce.metadata(enable_guest_attributes="TRUE"))
    with pytest.raises(NotFound):
        gce.vm("get_guest_attributes", "toy", query_path="ns/")
    ask(cloud, "toy", "instance/guest-attributes/ns/key", data=b"value", verb="PUT")
    assert ask(cloud, "toy", "instance/guest-attributes/ns/key") == "value"
    found = gce.vm("get_guest_attributes", "toy", query_path="ns/").query_value.items
    assert [(each.namespace, each.key, each.value) for each in found] == [("ns", "key", "value")]


def test_a_machine_can_lose_its_network(cloud, gce):
    gce.run("toy", WAIT)
    until_said(cloud, "toy", "startup-script: up")
    cloud.faults.offline.add("toy")
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        ask(cloud, "toy", "instance/name")
    cloud.faults.offline.clear()
    assert ask(cloud, "toy", "instance/name") == "toy"


def test_a_machine_without_any_network_never_starts_its_script(cloud, gce):
    cloud.faults.isolated.add("toy")
    gce.run("toy", WAIT)
    until_said(cloud, "toy", "Starting startup scripts")
    cloud.clock.advance(3601)
    cloud.wait("toy", "TERMINATED")
    assert "startup-script: up" not in cloud.console("toy")


# --- nothing stays behind

OWNER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from cloud.compute import Cloud
from gce import Gce
cloud = Cloud(Path(sys.argv[1]))
Gce(cloud).run("toy", "#!/bin/bash\\nsetsid sleep 1000 & sleep 1000\\n")
cloud.machine("toy").processes()
print(cloud.machine("toy").namespace, flush=True)
cloud.wait("toy", "GONE", seconds=600)
"""


def test_killing_the_emulator_leaves_no_process_and_no_mount(folder):
    program = OWNER.format(tests=str(TOP / "tests"))
    owner = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)
    with owner:
        space = owner.stdout.readline().strip()
        inside = wait_until(lambda: len(found := processes_of(space)) >= 4 and found, 20)
        # As long as this is open no other machine gets a namespace of the same number.
        with open(f"/proc/{min(inside)}/ns/pid"):
            owner.send_signal(signal.SIGKILL)
            wait_until(lambda: not processes_of(space), 10)
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()


def test_a_machine_does_not_outlive_what_started_it(cloud, gce):
    gce.run("toy", WAIT)
    until_said(cloud, "toy", "startup-script: up")
    machine = cloud.machine("toy")
    inside = machine.processes()
    parents = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in inside}
    (starter,) = parents - inside
    os.kill(starter, signal.SIGKILL)
    wait_until(lambda: not machine.processes() and not machine.alive, 10)


def test_it_starts_by_hand(folder):
    served = subprocess.Popen(
        [sys.executable, "-m", "tests.cloud", "boot=0.1"], cwd=TOP, stdout=subprocess.PIPE, text=True
    )
    with served:
        first = served.stdout.readline()
        name, _, url = first.removeprefix("export ").strip().partition("=")
        assert name == "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE"
        with urllib.request.urlopen(f"{url}projects/test-project/zones/us-central1-a") as answer:
            assert json.load(answer)["name"] == "us-central1-a"
        served.send_signal(signal.SIGINT)
        assert "violations: []" in served.stdout.read()
    assert served.returncode == 0


def test_ordinary_users_have_machines_too_where_the_kernel_allows_it(tmp_path):
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv to become an ordinary user")
    nobody, python = pwd.getpwnam("nobody"), shutil.which("python3", path=machines.PATH)
    if not python:
        pytest.skip("needs a python3 that everybody can read")
    copy = Path("/var/tmp") / f"cloud-{os.getpid()}"
    try:
        shutil.copytree(TOP / "tests" / "cloud", copy / "cloud", ignore=shutil.ignore_patterns("__pycache__"))
        program = f"import sys; sys.path.insert(0, {str(copy)!r})\n"
        program += "from cloud import machines\nprint(machines.unavailable())\n"
        switch = ["setpriv", "--reuid", str(nobody.pw_uid), "--regid", str(nobody.pw_gid), "--clear-groups"]
        done = subprocess.run([*switch, python, "-c", program], capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stderr
        if done.stdout.strip():
            pytest.skip(done.stdout.strip())
    finally:
        shutil.rmtree(copy, ignore_errors=True)
