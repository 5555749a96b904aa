"""The agent as it is sent, alone, under every Python at hand; we are its guard."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from machine import VERSIONS, Run, alive, interpreter, wait_until

from cloudrun.formats import Entry, canonical, digest_of
from cloudrun.receipt import FIELDS, outcome_of

STATUSES = [0, 1, 2, 3, 42, 77, 121, 122, 124, 125, 126, 127, 128, 137, 254, 255]
SIGNALS = ["SIGHUP", "SIGQUIT", "SIGABRT", "SIGKILL", "SIGSEGV", "SIGPIPE", "SIGALRM", "SIGTERM", "SIGUSR1"]


@pytest.fixture(params=VERSIONS)
def python(request):
    return interpreter(request.param)


def test_its_whole_story_on_every_python(tmp_path, python):
    main = """
import sys
sys.stdout.write("to out\\n"); sys.stdout.flush(); sys.stderr.write("to err"); sys.stderr.flush()
open("model/weights", "w").write(open("data/in").read() + "%d.%d" % sys.version_info[:2])
sys.exit(3)
"""
    run = Run(tmp_path, main, {"data/in": "from "}).run(python)
    assert run.words.endswith(b"R") and run.console == ""
    assert run.receipt["status"] == 3 and run.receipt["reason"] == "exited"
    assert (run.output("out"), run.output("err")) == (b"to out\n", b"to err")
    version = Path(python).name.replace("python", "")
    assert run.outputs() == {"model/weights": f"from {version}".encode()}
    assert Path(run.bucket.root, run.prefix, "model/weights").read_text() == f"from {version}"
    assert set(FIELDS) <= set(run.receipt)


@pytest.mark.parametrize("status", STATUSES)
def test_exit_status(tmp_path, status):
    run = Run(tmp_path, f"import os; os._exit({status})").run()
    assert (run.receipt["status"], run.receipt["signal"]) == (status, None)
    assert outcome_of(run.receipt).exit_code == status


@pytest.mark.parametrize("name", [*SIGNALS, "SIG40"])
def test_ended_by_a_signal(tmp_path, name):
    number = int(name[3:]) if name[3:].isdigit() else int(getattr(signal, name))
    main = f"import os, signal\nif {number} != 9: signal.signal({number}, signal.SIG_DFL)\n"
    run = Run(tmp_path, main + f"os.kill(os.getpid(), {number})").run()
    assert (run.receipt["status"], run.receipt["signal"]) == (None, name)
    assert outcome_of(run.receipt).exit_code == 128 + number


@pytest.mark.parametrize(
    "data",
    [
        b"no newline at the end",
        b"a\rb\r\nc\x1b[1A",
        bytes(range(256)),
        b"\xff\xfe\xed\xa0\x80\n",
        b"\0" * 70000,
    ],
    ids=["no newline", "returns", "all bytes", "not UTF-8", "zeros"],
)
def test_output_is_copied_byte_for_byte(tmp_path, data):
    run = Run(tmp_path, f"import os\nos.write(1, {data!r}); os.write(2, {data[::-1]!r})").run()
    assert run.output("out") == data
    assert run.output("err") == data[::-1]


def test_each_stream_keeps_its_order(tmp_path):
    main = """
import os
for n in range(3000):
    os.write(1 + n % 2, b"%d\\n" % n)
"""
    run = Run(tmp_path, main).run()
    assert run.output("out").split() == [b"%d" % n for n in range(0, 3000, 2)]
    assert run.output("err").split() == [b"%d" % n for n in range(1, 3000, 2)]


@pytest.mark.parametrize("megabytes", [5, 200])
def test_much_output(tmp_path, megabytes):
    main = f"import os\nfor n in range({megabytes}): os.writev(1, [(b'%06d ' % n) * 142857, b'!'])"
    run = Run(tmp_path, main).run()
    expected = b"".join((b"%06d " % n) * 142857 + b"!" for n in range(megabytes))
    assert run.output() == expected and run.output("note") == b""


def test_what_grandchildren_print_after_the_end_is_kept_and_who_goes_on_is_killed(tmp_path):
    main = """
import os, subprocess, sys
subprocess.Popen(["sh", "-c", "sleep 0.3; echo late"])
stay = "trap '' TERM INT HUP; echo $$ > model/pid; mv model/pid model/stays; while :; do sleep 0.1; done"
subprocess.Popen(["sh", "-c", stay], start_new_session=True)
while not os.path.exists("model/stays"): pass
print("early")
"""
    run = Run(tmp_path, main).run()
    assert run.output() == b"early\nlate\n"
    assert run.receipt["status"] == 0
    assert not alive(int(run.outputs()["model/stays"]))


def test_the_surroundings_of_main_py(tmp_path):
    main = """
import json, os, signal, sys
lines = open("/proc/self/status").read().splitlines()
status = dict(line.split(":\\t", 1) for line in lines if ":\\t" in line)
json.dump({
    "stdin": os.readlink("/proc/self/fd/0"), "group": os.getpgrp() == os.getpid(), "env": dict(os.environ),
    "files": sorted(map(int, os.listdir("/proc/self/fd")))[:-1], "cwd": os.getcwd(), "argv": sys.argv,
    "blocked": int(status["SigBlk"], 16), "ignored": int(status["SigIgn"], 16),
    "oom": int(open("/proc/self/oom_score_adj").read()),
}, open("model/facts", "w"))
"""
    run = Run(tmp_path, main, argv=["main.py", "--fast", "", "a b", "ü"])
    run.bucket.create(run.prefix + "/env.json", b'{"EPOCHS": "20", "PATHLESS": "", "ODD": "a=b\\nc"}')
    run.run(SEEN="as ever")
    facts = json.loads(run.outputs()["model/facts"])
    assert facts["stdin"] == "/dev/null" and facts["group"] and facts["files"] == [0, 1, 2]
    assert facts["argv"] == ["main.py", "--fast", "", "a b", "ü"] and facts["cwd"] == str(run.work)
    assert (
        facts["env"]["EPOCHS"] == "20" and facts["env"]["ODD"] == "a=b\nc" and facts["env"]["PATHLESS"] == ""
    )
    assert facts["env"]["SEEN"] == "as ever" and facts["env"]["PYTHONUNBUFFERED"] == "1"
    assert not {"CLOUDRUN_BOOT", "CLOUDRUN_GUARD"} & set(facts["env"])
    asked = sum(1 << signum - 1 for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT))
    assert facts["blocked"] == 0 and not facts["ignored"] & asked
    assert facts["oom"] >= 0


def test_a_second_agent_for_the_same_attempt_ends_itself(tmp_path):
    first = Run(
        tmp_path,
        "import os, time\nopen('model/x', 'w').write('1')\nwhile not os.path.exists('go'): time.sleep(0.01)",
    ).start()
    wait_until(lambda: first.phase() == "run")
    second = Run.__new__(Run)
    second.__dict__.update(first.__dict__, folder=tmp_path / "other", work=tmp_path / "other/work")
    second.start().finish()
    assert second.words == b"R" and not second.work.exists()
    assert first.receipt is None and first.process.poll() is None
    (first.work / "go").touch()
    assert first.finish().receipt["status"] == 0


@pytest.mark.parametrize(
    ("before", "began"),
    [({"phase": "fetch"}, False), ({"phase": "run"}, True), ({"phase": "boot", "began": True}, True)],
)
def test_a_machine_that_is_started_again_still_says_whether_main_py_had_begun(tmp_path, before, began):
    run = Run(tmp_path, "import os, time\nwhile not os.path.exists('go'): time.sleep(0.01)")
    name = f"attempts/{run.attempt}/state.json"
    run.bucket.put(f"{run.prefix}/{name}", canonical(before))
    run.start()
    wait_until(lambda: "beat" in run.object(name) and (run.work / "main.py").exists())
    assert run.object(name).get("began", False) is began
    (run.work / "go").touch()
    assert run.finish().receipt["status"] == 0


def test_an_agent_for_a_finished_run_does_nothing(tmp_path):
    run = Run(tmp_path, "print('once')").run()
    before = run.receipt
    run.attempt = 2
    run.run()
    assert run.words.count(b"R") == 2 and run.receipt == before
    assert run.object("attempts/2/agent.json") is None and run.output() == b""


class Kept(Run):
    """A machine that outlives its runs, and may be started by a person."""

    def boot(self):
        return {**super().boot(), "kept": True}


@pytest.mark.parametrize(
    ("there", "word"),
    [
        (["attempts/2/claim.json"], b"R"),  # nobody ever worked on this attempt: its client came too late
        (["attempts/2/claim.json", "attempts/1/agent.json"], b"H"),
        (["receipt.json"], b"H"),
    ],
)
def test_a_kept_machine_is_left_on_only_for_a_run_that_has_had_its_machine(tmp_path, there, word):
    run = Kept(tmp_path, "open('started', 'w')")
    for name in there:
        run.bucket.create(f"{run.prefix}/{name}", canonical({"closed": True}))
    run.start().finish()
    assert run.words.endswith(word) and not (run.work / "started").exists()


def damage(run, what):
    if what == "order":
        path = Path(run.bucket.root, run.prefix, "order.json")
        path.write_bytes(path.read_bytes().replace(b"main.py", b"evil.py"))
    elif what == "no order":
        Path(run.bucket.root, run.prefix, "order.json").unlink()
    elif what == "manifest":
        path = Path(run.bucket.root, run.prefix, "manifest.jsonl")
        path.write_bytes(path.read_bytes().replace(b"data/in", b"data/on"))
    elif what == "no manifest":
        Path(run.bucket.root, run.prefix, "manifest.jsonl").unlink()
    elif what in ("blob", "no blob", "short blob"):
        path = Path(run.bucket.root, "p/blobs", run.input("data/in", "some data").sha256)
        path.unlink()
        if what != "no blob":
            path.write_bytes(b"other data"[: 9 if what == "blob" else 4])
    else:
        run.bucket.create(run.prefix + "/env.json", b'{"A": 1}' if what == "odd env" else b'{"A"')


@pytest.mark.parametrize(
    "what",
    ["order", "no order", "manifest", "no manifest", "blob", "no blob", "short blob", "env", "odd env"],
)
def test_what_is_damaged_in_the_bucket_is_said_and_main_py_not_started(tmp_path, what):
    run = Run(tmp_path, "open('started', 'w')", {"data/in": "some data"})
    run.boot()
    damage(run, what)
    run.run()
    assert run.words.endswith(b"R") and not (run.work / "started").exists()
    if "order" in what:
        assert run.console.startswith("CLOUDRUN-FATAL") and "order.json" in run.console
        assert run.receipt is None
    else:
        assert run.receipt["reason"] == "failed" and run.receipt["message"]
        assert outcome_of(run.receipt).exit_code == 125


@pytest.mark.parametrize("path", ["../outside", "/etc/x", "a/../../b", ""])
def test_a_path_that_leaves_the_project_is_refused(tmp_path, path):
    entry = Entry(path, 0o644, 1, "0" * 64, (("0" * 64, 0, 1),))
    run = Run(tmp_path, "", {"x": entry}).run()
    assert run.receipt["reason"] == "failed" and "damaged" in run.receipt["message"]


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(tmp_path):
    run = Run(tmp_path, "")
    run.order["manifest"]["bytes"] = 1 << 60
    run.run()
    assert "too small" in run.receipt["message"] and not (run.work / "main.py").exists()


def test_inputs_arrive_with_modes_directories_links_and_parts(tmp_path):
    run = Run(tmp_path, "import os; assert os.readlink('data/link') == 'in'; os.makedirs('model/made')")
    first, second = (run.bucket.put_blob("p/blobs/", [data]) for data in (b"--one", b"two---"))
    parts = ((first, 0, 5), (second, 0, 6))
    entries = [
        Entry("data/parts", 0o440, 11, digest_of(parts), parts),
        Entry("data/tool", 0o755, 3, run.input("", b"one").sha256, ((first, 2, 3),)),
        Entry("data/in", 0o444, 0, run.input("", b"").sha256),
        Entry("data/empty", 0o755),
        Entry("data/link", link="in"),
    ]
    run = Run(
        tmp_path / "again", "import os; assert os.readlink('data/link') == 'in'", {e.path: e for e in entries}
    )
    for data in (b"--one", b"two---"):
        run.input("", data)
    run.run()
    assert run.receipt["status"] == 0, run.receipt
    assert (run.work / "data/parts").read_bytes() == b"--onetwo---"
    assert (run.work / "data/parts").stat().st_mode & 0o777 == 0o440
    assert (run.work / "data/tool").stat().st_mode & 0o777 == 0o755
    assert (run.work / "data/empty").is_dir()


def hide(run):
    """Put a file where the bucket's folder was."""
    root = Path(run.bucket.root)
    root.rename(root.parent / "hidden")
    root.touch()


def bring_back(run):
    root = Path(run.bucket.root)
    root.unlink()
    (root.parent / "hidden").rename(root)


WAITING = """
import os, sys, time
print("before", flush=True)
while not os.path.exists("print"): time.sleep(0.01)
for n in range(80): os.write(1, b"%06d " % n * 30000)
open("printed", "w").close()
while not os.path.exists("go"): time.sleep(0.01)
print("after")
"""


@pytest.mark.parametrize("spool", [256 << 20, 1 << 20], ids=["roomy spool", "tiny spool"])
def test_the_bucket_goes_away_and_comes_back(tmp_path, spool):
    run = Run(tmp_path, WAITING, limits={"spool": spool}).start()
    wait_until(lambda: run.output() == b"before\n")
    hide(run)
    (run.work / "print").touch()
    wait_until((run.work / "printed").exists, what="main.py going on without the bucket")
    bring_back(run)
    (run.work / "go").touch()
    run.finish()
    numbers = b"".join(b"%06d " % n * 30000 for n in range(80))
    assert run.receipt["status"] == 0
    if spool > len(numbers):
        assert run.output() == b"before\n" + numbers + b"after\n" and not run.output("note")
        return
    note, output = run.output("note"), run.output()
    dropped = int(note.split()[0])
    assert note == b"%d bytes of output dropped here" % dropped
    assert len(output) + dropped == len(numbers) + len(b"before\nafter\n")
    assert output.startswith(b"before\n" + numbers[:100000]) and output.endswith(
        numbers[-100000:] + b"after\n"
    )


def test_a_bucket_that_stays_away_ends_in_time_without_a_receipt(tmp_path):
    run = Run(tmp_path, WAITING, limits={"save": 1.0}).start()
    wait_until(lambda: run.output() == b"before\n")
    hide(run)
    (run.work / "print").touch()
    (run.work / "go").touch()
    run.finish(30)
    bring_back(run)
    assert run.words.endswith(b"R") and run.receipt is None


def test_the_deadline_asks_terminates_and_kills(tmp_path):
    main = """
import os, signal, time
for name in ("SIGINT", "SIGTERM"):
    signal.signal(getattr(signal, name), lambda n, _: os.write(1, b"%d " % n))
print("up", flush=True)
while True: time.sleep(0.05)
"""
    run = Run(tmp_path, main, left=4.0).start()
    began = time.monotonic()
    run.finish()
    assert run.receipt["reason"] == "deadline" and run.receipt["signal"] == "SIGKILL"
    assert run.output() == b"up\n2 15 " and time.monotonic() - began < 4.0 + 1
    assert outcome_of(run.receipt).exit_code == 124


def test_the_guards_end_is_noticed(tmp_path):
    run = Run(tmp_path, "import time; open('model/x', 'w').write('kept'); time.sleep(100)").start()
    wait_until(lambda: run.phase() == "run" and (run.work / "model/x").exists())
    os.close(run.reading)
    run.process.wait(20)
    assert run.receipt["reason"] == "guard-lost" and run.outputs() == {"model/x": b"kept"}


def test_a_guard_that_is_gone_before_main_py_was_started_is_a_failure(tmp_path):
    run = Run(tmp_path, "open('model/x', 'w')")
    os.mkfifo(
        Path(run.bucket.root) / run.prefix / "env.json"
    )  # the fetch waits for somebody to write into it
    run.start()
    wait_until(lambda: run.phase() == "fetch")
    os.close(run.reading)
    run.process.wait(20)
    assert run.receipt["reason"] == "failed" and "guard-lost" in run.receipt["message"]
    assert outcome_of(run.receipt).exit_code == 125 and run.outputs() == {}


def test_a_path_deeper_than_python_can_call_itself(tmp_path):
    path = "data/" + "d/" * 1500 + "file"
    run = Run(tmp_path, f"import os; print(open('{path}').read())", {path: "deep"})
    run.run()
    subprocess.run(["rm", "-rf", run.work], check=True)  # pytest could not
    assert run.output() == b"deep\n", run.receipt


def test_a_spot_notice_is_written_down_before_main_py_hears_of_it(tmp_path):
    end = tmp_path / "bucket/p/runs/p-20260101-000000-abcd/attempts/1/end.json"
    main = f"""
import os, signal, sys, time
def term(*_):
    print(os.path.exists({str(end)!r}), flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, term)
print("up", flush=True)
time.sleep(100)
"""
    run = Run(tmp_path, main).start()
    wait_until(lambda: run.output() == b"up\n")
    run.process.send_signal(signal.SIGTERM)
    run.finish()
    assert run.output() == b"up\nTrue\n" and run.receipt is None
    assert run.object("attempts/1/end.json")["reason"] == "preempted"


@pytest.mark.parametrize("level", [1, 2])
def test_control_is_obeyed(tmp_path, level):
    run = Run(
        tmp_path, "import time; open('model/x', 'w').write('x'); print('up', flush=True); time.sleep(100)"
    )
    run.order["limits"]["save_interval"] = 50.0
    run.start()
    wait_until(lambda: run.output() == b"up\n")
    run.bucket.put(run.prefix + "/control.json", json.dumps({"level": level, "by": "SIGINT"}).encode())
    run.finish()
    assert run.receipt["reason"] == "stopped" and outcome_of(run.receipt).exit_code == 130
    assert run.receipt["signal"] == ("SIGINT" if level == 1 else "SIGKILL")
    assert run.outputs() == ({"model/x": b"x"} if level == 1 else {})


def test_damaged_control_does_not_deafen_it(tmp_path):
    run = Run(tmp_path, "import time; print('up', flush=True); time.sleep(100)").start()
    wait_until(lambda: run.output() == b"up\n")
    for control in (b"{", b"[]", b'{"level": "x"}', json.dumps({"level": 1, "by": "stop"}).encode()):
        time.sleep(0.25)
        run.bucket.put(run.prefix + "/control.json", control)
    assert run.finish().receipt["reason"] == "stopped"


def test_a_lost_client_ends_the_run_only_if_that_was_asked_for(tmp_path):
    for choice, reason in (("stop", "client-lost"), ("finish", "exited")):
        main = "import time; time.sleep(2)"
        run = Run(tmp_path / choice, main, if_client_lost=choice, limits={"client_lost": 0.5}).run()
        assert run.receipt["reason"] == reason


def test_memory_and_work_of_a_quiet_machine(tmp_path):
    quiet = {"save_interval": 60.0, "agent_beat": 5.0}
    run = Run(tmp_path, "import time; print('up', flush=True); time.sleep(100)", limits=quiet).start()
    wait_until(lambda: run.phase() == "run" and run.output())
    before, began = cpu_seconds(run.process.pid), time.monotonic()
    time.sleep(3)
    share = (cpu_seconds(run.process.pid) - before) / (time.monotonic() - began)
    with open(f"/proc/{run.process.pid}/status") as status:
        megabytes = int(next(line for line in status if line.startswith("VmRSS")).split()[1]) / 1024
    run.kill()
    assert megabytes < 28 and share < 0.02, (megabytes, share)


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_no_python_at_all_but_our_own(tmp_path):
    run = Run(tmp_path, "import sys; print(sys.executable)")
    run.environ["PATH"] = "/nowhere"
    python = str(tmp_path / "own-python")
    os.symlink(sys.executable, python)
    run.run(python)
    assert run.receipt["status"] == 0 and run.output().strip().decode().startswith("/")


SEIZE, DETACH, TRACE_EXIT = 0x4206, 17, 0x40
PTRACE = ctypes.CDLL(None, use_errno=True).ptrace
PTRACE.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


@contextmanager
def unkillable(pid):
    """Who is traced stops at its own end, SIGKILL or not, as long as its tracer likes (ptrace(2))."""
    if PTRACE(SEIZE, pid, None, TRACE_EXIT):
        pytest.skip("this process may not be traced here")
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0x40000000)  # __WALL
        PTRACE(DETACH, pid, None, None)


@pytest.mark.parametrize("who", ["a child", "main.py"])
def test_what_the_kernel_does_not_kill_keeps_neither_save_nor_receipt(tmp_path, who):
    main = """
import os, subprocess, time
os.makedirs("model", exist_ok=True)
open("model/x", "w").write("x")
open("pid.new", "w").write(str(PID))
os.rename("pid.new", "pid")
while not os.path.exists("go"): time.sleep(0.01)
"""
    child = "subprocess.Popen(['sleep', '100'], stdout=subprocess.DEVNULL).pid"
    main = main.replace("PID", child if who == "a child" else "os.getpid()")
    limits = {"stuck": 1.0, "drain": 0.2, "grace_interrupt": 0.2, "grace_terminate": 0.2}
    run = Run(tmp_path, main, limits=limits).start()
    wait_until((run.work / "pid").exists)
    pid = int((run.work / "pid").read_text())
    with unkillable(pid):
        if who == "a child":
            (run.work / "go").touch()
        else:
            run.bucket.create(f"{run.prefix}/control.json", canonical({"level": 1, "by": "SIGINT"}))
        wait_until(lambda: run.receipt, 30, "the receipt")
        assert alive(pid)
    run.finish()
    assert run.outputs()["model/x"] == b"x"
    assert run.receipt["status"] == (0 if who == "a child" else None)
