"""The guard alone, under every Python at hand, with toy agents in the place of the real one."""

import ast
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from machine import GUARD, VERSIONS, alive, archived, interpreter, wait_until

TOY = """
import os, signal, subprocess, sys, time
pipe = int(os.environ["CLOUDRUN_GUARD"])
os.set_inheritable(pipe, False)
open("pid", "w").write(str(os.getpid()))
def ready():
    open("ready.new", "w").close()
    os.rename("ready.new", "ready")
"""


class Guard:
    def __init__(self, folder, toy="", *, left=30.0, gone=0.5, silence=30.0, **boot):
        self.folder, self.bucket = folder / "machine", folder / "bucket"
        self.folder.mkdir()
        self.bucket.mkdir()
        agent = archived(TOY + toy)
        (self.bucket / "agent").write_bytes(agent)
        self.boot = {
            "backend": "local",
            "bucket": f"file://{self.bucket}",
            "agent": ["agent", hashlib.sha256(agent).hexdigest()],
            "left": left,
            "agent_gone": gone,
            "agent_silence": silence,
            **boot,
        }

    def start(self, python=sys.executable, **options):
        env = {"PATH": "/usr/bin:/bin", "CLOUDRUN_BOOT": json.dumps(self.boot)}
        self.began = time.monotonic()
        with open(self.folder / "console", "wb") as console:
            self.process = subprocess.Popen(
                [python, "-I", "-S", str(GUARD)],
                cwd=self.folder,
                env=env,
                stdout=console,
                stderr=console,
                start_new_session=True,
                **options,
            )
        return self

    def ready(self):
        wait_until((self.folder / "ready").exists, what="the toy agent's start")
        return self

    def agent(self):
        return int((self.folder / "pid").read_text())

    def end(self, seconds=20):
        """Its last word, once it has ended."""
        try:
            assert self.process.wait(seconds) == 0, self.console()
        finally:
            self.kill()
        self.seconds = time.monotonic() - self.began
        lived, _, why = (self.folder / "ended").read_text().partition(" ")
        assert 0 <= self.seconds - float(lived) < 5
        assert why in self.console()
        return why

    def kill(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def console(self):
        return (self.folder / "console").read_text()


@pytest.fixture(params=VERSIONS)
def python(request):
    return interpreter(request.param)


def test_ends_some_seconds_after_the_agent_went_without_a_receipt(tmp_path, python):
    guard = Guard(tmp_path, "sys.exit(0)", gone=0.7).start(python)
    assert guard.end() == "the agent went without a receipt"
    assert guard.seconds > 0.7


def test_ends_at_once_when_the_run_is_finished(tmp_path, python):
    guard = Guard(tmp_path, "os.write(pipe, b'..R')", gone=10.0).start(python)
    assert guard.end() == "the run is finished"
    assert guard.seconds < 9


def test_ends_when_the_agent_is_silent(tmp_path, python):
    toy = "ready()\nwhile True: os.write(pipe, b'.'); time.sleep(0.05)"
    guard = Guard(tmp_path, toy, silence=0.6).start(python).ready()
    time.sleep(0.8)
    assert guard.process.poll() is None, "it beats"
    os.kill(guard.agent(), signal.SIGSTOP)
    assert guard.end() == "the agent was silent for 1 s"
    assert not alive(guard.agent())


def test_an_agent_that_stays_when_the_run_is_finished_is_not_waited_for(tmp_path):
    guard = Guard(tmp_path, "os.write(pipe, b'R')\ntime.sleep(100)", gone=10.0).start()
    assert guard.end() == "the run is finished"
    assert guard.seconds < 9 and not alive(guard.agent())


def test_ends_at_the_deadline_whatever_the_agent_does(tmp_path, python):
    guard = Guard(tmp_path, "while True: os.write(pipe, b'.'); time.sleep(0.05)", left=1.0).start(python)
    assert guard.end() == "the deadline was reached"
    assert guard.seconds >= 1.0


def test_the_agent_can_only_shorten_the_time_that_is_left(tmp_path):
    toy = "os.write(pipe, b'.L0.3\\n.L1000\\n')\ntime.sleep(100)"
    assert Guard(tmp_path, toy, left=60.0).start().end() == "the deadline was reached"


def test_a_child_that_keeps_the_pipe_does_not_hide_that_the_agent_went(tmp_path):
    toy = "os.set_inheritable(pipe, True)\nsubprocess.Popen(['sleep', '100'], close_fds=False)"
    assert Guard(tmp_path, toy, silence=100.0).start().end() == "the agent went without a receipt"


@pytest.mark.parametrize("how", ["damaged", "missing", "not in Python"])
def test_an_agent_that_cannot_be_started_ends_the_machine(tmp_path, how):
    guard = Guard(tmp_path, "ready()")
    if how == "missing":
        (guard.bucket / "agent").unlink()
    elif how == "damaged":
        (guard.bucket / "agent").write_bytes(b"not what the client sent")
    else:
        guard.boot["agent"] = 7
    guard.start()
    assert guard.end().startswith("CLOUDRUN-FATAL")
    assert not (guard.folder / "ready").exists()


def test_sigterm_is_passed_on_and_ends_nothing(tmp_path):
    toy = """
signal.signal(signal.SIGTERM, lambda *_: open("got", "w").close())
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
ready()
while not os.path.exists("got"): time.sleep(0.01)
os.write(pipe, b"R")
"""
    guard = Guard(tmp_path, toy).start().ready()
    guard.process.send_signal(signal.SIGTERM)
    assert guard.end() == "the run is finished"


def test_a_spot_notice_waits_for_an_agent_that_is_not_ready_yet(tmp_path):
    toy = """
ready()
time.sleep(0.5)
signal.signal(signal.SIGTERM, lambda *_: os.write(pipe, b"R"))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
time.sleep(0.2)
"""
    guard = Guard(tmp_path, toy).start().ready()
    guard.process.send_signal(signal.SIGTERM)
    assert guard.end() == "the run is finished"


def test_a_spot_notice_after_the_agents_end_changes_nothing(tmp_path):
    guard = Guard(tmp_path, "ready()", gone=1.0).start().ready()
    wait_until(lambda: not alive(guard.agent()))
    guard.process.send_signal(signal.SIGTERM)
    assert guard.end() == "the agent went without a receipt"


def test_sigint_and_sighup_neither_end_it_nor_stay_ignored_below_it(tmp_path):
    toy = "ready()\nwhile True: os.write(pipe, b'.'); time.sleep(0.05)"
    guard = Guard(tmp_path, toy, left=3.0).start().ready()
    for signum in (signal.SIGINT, signal.SIGHUP):
        guard.process.send_signal(signum)
    with open(f"/proc/{guard.agent()}/status") as status:
        ignored = int(next(line for line in status if line.startswith("SigIgn")).split()[1], 16)
    assert not ignored & (1 << signal.SIGINT - 1 | 1 << signal.SIGHUP - 1)
    assert guard.end() == "the deadline was reached"


def test_a_daemon_that_hides_is_killed(tmp_path):
    daemon = "import os, time; os.chdir('/'); open({path!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    daemon = daemon.format(path=str(tmp_path / "daemon"))
    toy = f"""
if not os.fork():
    os.setsid()
    if os.fork(): os._exit(0)
    os.closerange(0, 100)
    os.execve({sys.executable!r}, ["python", "-c", {daemon!r}], {{}})
os.wait()
while not os.path.exists({str(tmp_path / "daemon")!r}): time.sleep(0.01)
time.sleep(0.1)
"""
    guard = Guard(tmp_path, toy).start()
    guard.end()
    assert not alive(int((tmp_path / "daemon").read_text()))


@pytest.mark.parametrize("group", ["", "os.setpgid(0, 0)"])
def test_a_tree_that_forks_while_it_is_killed_does_not_escape(tmp_path, group):
    toy = f"""
ready()
end = time.time() + 20
def bomb(depth):
    {group or "pass"}
    while time.time() < end:
        if depth < 4 and not os.fork(): bomb(depth + 1)
        time.sleep(0.002)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]: pass
        except OSError: pass
        if len(os.listdir("/proc")) > 250: time.sleep(0.05); depth = 9
    os._exit(0)
bomb(0)
"""
    guard = Guard(tmp_path, toy, left=1.0).start()
    assert guard.end(40) == "the deadline was reached"
    left = [name for name in os.listdir("/proc") if name.isdigit() and in_folder(name, guard.folder)]
    assert not [pid for pid in left if alive(pid)]


def in_folder(pid, folder):
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/cwd") == str(folder)
    return False


def test_a_console_that_nobody_reads_and_a_full_disk_keep_nothing_alive(tmp_path):
    guard = Guard(tmp_path, "ready()\nos.write(pipe, b'R')")
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while os.write(writing, bytes(65536)):
            pass
    os.set_blocking(writing, True)
    env = {"CLOUDRUN_BOOT": json.dumps(guard.boot)}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", GUARD], cwd=guard.folder, env=env, stdout=writing, stderr=writing
    )
    try:
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(reading)
        os.close(writing)


def test_the_work_of_a_local_machine_is_removed_and_its_console_kept(tmp_path):
    guard = Guard(
        tmp_path, "os.makedirs('work/deep')\nopen('work/deep/x', 'w').close()\nos.write(pipe, b'R')"
    )
    guard.start().end()
    assert not (guard.folder / "work").exists()
    assert guard.console()


def test_needs_nothing_but_the_standard_library_and_python_3_8():
    tree = ast.parse(GUARD.read_text(), feature_version=(3, 8))
    imported = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name.split(".")[0] for node in imported for alias in node.names}
    assert not any(isinstance(node, ast.ImportFrom) for node in imported)
    assert names <= sys.stdlib_module_names
