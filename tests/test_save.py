"""Saves: whole files or none, while main.py runs, when it is killed, and when the disk is full."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from machine import Run, alive, wait_until

from cloudrun.agent.program import Program
from cloudrun.agent.save import Saver
from cloudrun.errors import BucketRefused
from cloudrun.limits import DEFAULTS
from cloudrun.processes import open_for_writing
from cloudrun.receipt import outcome_of
from cloudrun.storage.folder import FolderBucket

PRELUDE = """
import os, signal, sys, time
def wait(path):
    while not os.path.exists(path): time.sleep(0.005)
def write(path, text):
    with open(path, "w") as file: file.write(text)
def saved(path, text):  # another process may still look at the name of what is being written
    write(path + ".tmp", text); os.rename(path + ".tmp", path)
"""


def start(folder, main, **options):
    return Run(folder, PRELUDE + main, **options).start()


def touch(run, name):
    (run.work / name).touch()


def die_while_writing():
    heard = []
    script = "exec 3>torn; echo half >&3; echo $$; exec sleep 9"
    program = Program(["/bin/sh", "-c", script], dict(os.environ), lambda _, said: heard.append(said))
    wait_until(lambda: program.pump(1) or heard)
    torn = os.stat("torn").st_dev, os.stat("torn").st_ino
    program.signal(signal.SIGKILL)
    while torn in open_for_writing([int(heard[0])]):
        pass
    assert not program.is_running()
    wait_until(lambda: program.pump(1) or program.status)


def test_whose_files_were_closed_by_a_kill_is_not_running(tmp_path, monkeypatch):
    """The kernel closes them some time before the process has ended: 1 kill in 100 meets that time."""
    monkeypatch.chdir(tmp_path)
    for _ in range(400):
        die_while_writing()


def test_saves_while_main_py_runs(tmp_path):
    run = start(tmp_path, "write('model/a', '1'); wait('go'); write('model/a', '2'); wait('end')")
    wait_until(lambda: run.outputs() == {"model/a": b"1"})
    first = run.object("outputs.json")
    touch(run, "go")
    wait_until(lambda: run.outputs() == {"model/a": b"2"})
    assert run.object("outputs.json")["sequence"] == first["sequence"] + 1
    touch(run, "end")
    assert run.finish().receipt["files"] == 1


@pytest.mark.parametrize(("attempt", "first"), [(1, 8), (2, 1)])
def test_after_a_reboot_the_saves_of_an_attempt_are_counted_on(tmp_path, attempt, first):
    """Of two saves the one with the larger number is the newer one: what comes late is compared by that."""
    run = Run(tmp_path, PRELUDE + "write('model/a', '1')", attempt=attempt)
    before = {"attempt": 1, "sequence": 7, "time": "2026-11-25T10:11:12.000Z", "files": []}
    run.bucket.create(run.prefix + "/outputs.json", json.dumps(before).encode())
    run.run()
    found = run.object("outputs.json")
    assert (found["attempt"], found["sequence"]) == (attempt, first) and run.outputs() == {"model/a": b"1"}


def test_a_file_that_is_open_for_writing_waits(tmp_path):
    main = """
file = open("model/open", "w"); file.write("half"); file.flush()
write("model/closed", "whole"); wait("go"); file.write(" and half"); file.close(); wait("end")
"""
    run = start(tmp_path, main)
    wait_until(lambda: run.outputs() == {"model/closed": b"whole"})
    time.sleep(0.5)
    assert "model/open" not in run.outputs()
    touch(run, "go")
    wait_until(lambda: run.outputs().get("model/open") == b"half and half")
    touch(run, "end")
    run.finish()


@pytest.mark.parametrize("close", ["", "os.close(fd)"], ids=["descriptor open", "descriptor closed"])
def test_a_file_that_is_mapped_for_writing_waits(tmp_path, close):
    main = f"""
import mmap
fd = os.open("model/map", os.O_RDWR | os.O_CREAT); os.ftruncate(fd, 8192)
memory = mmap.mmap(fd, 8192)
{close}
memory[:4] = b"half"
write("model/closed", "whole"); wait("go")
memory[4096:4100] = b"rest"; memory.close()
if not {bool(close)}: os.close(fd)
wait("end")
"""
    run = start(tmp_path, main)
    wait_until(lambda: run.outputs() == {"model/closed": b"whole"})
    time.sleep(0.5)
    assert "model/map" not in run.outputs()
    touch(run, "go")
    expected = b"half".ljust(4096, b"\0") + b"rest".ljust(4096, b"\0")
    wait_until(lambda: run.outputs().get("model/map") == expected)
    touch(run, "end")
    run.finish()


def test_what_another_process_of_main_py_writes_waits_too(tmp_path):
    main = """
import subprocess
writer = "exec 3>model/child; echo half >&3; touch started; while [ ! -e go ]; do sleep 0.02; done"
child = subprocess.Popen(["sh", "-c", writer])
wait("started"); write("model/closed", "whole"); wait("end"); child.wait()
"""
    run = start(tmp_path, main)
    wait_until(lambda: run.outputs() == {"model/closed": b"whole"})
    time.sleep(0.3)
    assert "model/child" not in run.outputs()
    touch(run, "go")
    wait_until(lambda: run.outputs().get("model/child") == b"half\n")
    touch(run, "end")
    run.finish()


def test_a_file_torn_by_a_kill_is_incomplete_and_the_saved_one_stands(tmp_path):
    main = """
write("checkpoint/last", "saved"); wait("go")
file = open("checkpoint/last", "w"); file.write("torn"); file.flush(); write("torn", "")
time.sleep(100)
"""
    run = start(tmp_path, main)
    wait_until(lambda: run.outputs() == {"checkpoint/last": b"saved"})
    touch(run, "go")
    wait_until((run.work / "torn").exists)
    os.kill(pid_of_main(run), signal.SIGKILL)
    run.finish()
    assert run.outputs() == {"checkpoint/last": b"saved", "checkpoint/last.incomplete": b"torn"}
    assert run.receipt["signal"] == "SIGKILL" and run.receipt["save"] == ""


def test_a_torn_file_never_stands_under_its_own_name(tmp_path):
    run = start(
        tmp_path,
        "file = open('model/new', 'w'); file.write('torn'); file.flush(); write('up', ''); time.sleep(100)",
    )
    wait_until((run.work / "up").exists)
    run.process.send_signal(signal.SIGTERM)
    run.finish()
    assert run.outputs() == {"model/new.incomplete": b"torn"}


def test_checkpoints_that_are_renamed_into_place_survive_a_kill(tmp_path):
    main = """
for step in range(100000):
    with open("checkpoint/tmp", "w") as file:
        for part in range(50): file.write(f"{step}\\n"); file.flush()
    os.replace("checkpoint/tmp", "checkpoint/last"); time.sleep(0.15)
"""
    run = start(tmp_path, main)
    wait_until(lambda: run.outputs().get("checkpoint/last"))
    time.sleep(0.5)
    os.kill(pid_of_main(run), signal.SIGKILL)
    run.finish()
    lines = run.outputs()["checkpoint/last"].split()
    assert len(lines) == 50 and len(set(lines)) == 1


def pid_of_main(run):
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    return int(children[0])


def test_outputs_json_names_only_what_is_stored(tmp_path):
    main = """
for step in range(10, 20):
    for name in "abc": saved(f"model/{name}", f"{name} {step}" * 1000)
    time.sleep(0.2)
"""
    run = start(tmp_path, main, limits={"save_interval": 0.05})
    sequences = []
    while run.receipt is None:
        found = run.object("outputs.json")
        if found:
            sequences.append(found["sequence"])
            for file in found["files"]:
                size = run.bucket.size(f"{run.prefix}/saved/{file['sha256']}")
                assert size == file["size"]
        time.sleep(0.01)
    run.finish()
    assert sequences == sorted(sequences) and len(set(sequences)) > 2
    assert {path: data[:4] for path, data in run.outputs().items()} == {
        f"model/{n}": f"{n} 19".encode() for n in "abc"
    }


def test_inputs_are_no_outputs_until_they_change(tmp_path):
    main = "open('model/read').read(); write('model/changed', 'new'); os.utime('model/read')"
    run = Run(tmp_path, PRELUDE + main, {"model/read": "in", "model/changed": "in", "model/gone": "in"}).run()
    assert run.outputs()["model/changed"] == b"new" and "model/gone" not in run.outputs()


def test_deleted_files(tmp_path):
    """Gone at once when main.py ended by itself, after two saves while it runs."""
    main = """
write("model/a", "a"); write("model/b", "b"); wait("go"); os.unlink("model/a")
wait("end"); os.unlink("model/b")
"""
    run = start(tmp_path, main)
    wait_until(lambda: set(run.outputs()) == {"model/a", "model/b"})
    touch(run, "go")
    wait_until(lambda: set(run.outputs()) == {"model/b"})
    touch(run, "end")
    assert run.finish().outputs() == {}


def test_what_is_gone_when_main_py_is_killed_may_have_been_on_its_way_back(tmp_path):
    run = start(
        tmp_path,
        "write('model/a', 'a'); wait('go'); os.unlink('model/a'); write('gone', ''); time.sleep(100)",
    )
    wait_until(lambda: run.outputs() == {"model/a": b"a"})
    run.bucket.put(run.prefix + "/control.json", b'{"level": 0, "by": ""}')
    touch(run, "go")
    wait_until((run.work / "gone").exists)
    os.kill(pid_of_main(run), signal.SIGKILL)
    run.finish()
    assert run.outputs() in ({"model/a": b"a"}, {}), "two saves may have seen it gone"


def test_links_inside_come_back_as_files_and_no_other_link_is_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("secret")
    main = f"""
write("data/x", "inside"); os.symlink("../data/x", "model/in")
os.symlink({str(secret / "key")!r}, "model/out"); os.symlink({str(secret)!r}, "model/folder")
os.symlink("nowhere", "model/broken"); os.symlink("loop", "model/loop")
os.rmdir("checkpoint"); os.symlink({str(secret)!r}, "checkpoint"); os.mkfifo("model/fifo")
"""
    run = Run(tmp_path, PRELUDE + main).run()
    assert run.receipt["status"] == 0 and run.outputs() == {"model/in": b"inside"}


def test_odd_names_modes_and_empty_directories(tmp_path):
    names = ["new\nline", "é", "\udcff", "a" * 255, "-", " "]
    main = f"""
for name in {names!r}: write("model/" + name, "x")
os.chmod("model/-", 0o750)
os.makedirs("model/deep/empty"); os.makedirs("model/full"); write("model/full/x", "x")
"""
    run = Run(tmp_path, PRELUDE + main).run()
    assert set(run.outputs()) == {"model/" + name for name in names} | {"model/deep/empty", "model/full/x"}
    modes = {file["path"]: file["mode"] for file in run.object("outputs.json")["files"]}
    assert modes["model/-"] == 0o750
    assert run.receipt["uncopied"] == 2, "names that a bucket cannot hold"


def test_more_directories_come_back_when_asked_for(tmp_path):
    main = """
os.makedirs("results/deep"); write("results/deep/x", "x")
write("data/x", "never"); write("y", "never")
"""
    run = Run(tmp_path, PRELUDE + main, outputs=["checkpoint", "model", "results"]).run()
    assert run.outputs() == {"results/deep/x": b"x"}


def test_the_next_attempt_goes_on_from_what_was_saved(tmp_path):
    main = """
step = int(open("checkpoint/step").read()) if os.path.exists("checkpoint/step") else 0
print(step, open("model/in").read(), os.path.islink("checkpoint/latest"), flush=True)
saved("checkpoint/step", str(step + 1))
if not os.path.lexists("checkpoint/latest"): os.symlink("step", "checkpoint/latest")
write("model/in", "changed")
if step == 0: time.sleep(100)
"""
    run = start(tmp_path, main, files={"model/in": "sent"})
    wait_until(lambda: "checkpoint/latest" in run.outputs())
    run.process.send_signal(signal.SIGTERM)
    run.finish()
    assert run.receipt is None and run.output() == b"0 sent False\n"
    run.attempt, run.folder, run.work = 2, tmp_path / "second", tmp_path / "second/work"
    run.run()
    assert run.output() == b"1 changed False\n" and run.receipt["attempt"] == 2
    assert run.outputs()["checkpoint/step"] == b"2"
    assert run.object("outputs.json")["attempt"] == 2


def test_outputs_take_the_place_of_links_and_of_files_that_may_not_be_written(tmp_path):
    main = """
if os.path.exists("model/first"): sys.exit(0)
write("model/first", "")
os.unlink("model/ro"); write("model/ro", "new"); os.chmod("model/ro", 0o444)
write("data/x", "new"); time.sleep(100)
"""
    from cloudrun.formats import Entry

    run = Run(
        tmp_path,
        PRELUDE + main,
        {"model/link": Entry("model/link", link="../data/x"), "data/x": "old", "model/ro": "old"},
    )
    run.start()
    wait_until(lambda: {"model/first", "model/link", "model/ro"} <= set(run.outputs()))
    run.process.send_signal(signal.SIGTERM)
    run.finish()
    run.attempt, run.folder, run.work = 2, tmp_path / "second", tmp_path / "second/work"
    run.run()
    assert run.receipt["status"] == 0, run.receipt
    assert (run.work / "model/link").read_text() == "new" and not (run.work / "model/link").is_symlink()
    assert (run.work / "data/x").read_text() == "old", "nothing is written through a link"


def test_a_full_bucket_keeps_the_last_complete_set_and_the_receipt_says_so(tmp_path):
    """RLIMIT_FSIZE bounds each file that the agent writes: a small one fits, the large one does not."""
    main = """
write("model/a", "first"); wait("go"); write("model/a", "second"); write("model/big", "x" * 90000)
"""
    run = Run(tmp_path, PRELUDE + main)
    run.start()
    wait_until(lambda: run.outputs() == {"model/a": b"first"})
    subprocess.run(["prlimit", f"--pid={run.process.pid}", "--fsize=80000"], check=True)
    touch(run, "go")
    run.finish()
    assert run.receipt["status"] == 0 and "File too large" in run.receipt["save"]
    assert outcome_of(run.receipt).exit_code == 121
    assert run.outputs() == {"model/a": b"first"}


def test_a_failed_save_does_not_change_another_exit_status(tmp_path):
    run = Run(tmp_path, PRELUDE + "wait('go'); write('model/big', 'x' * 90000); sys.exit(7)").start()
    wait_until(lambda: run.phase() == "run")
    subprocess.run(["prlimit", f"--pid={run.process.pid}", "--fsize=80000"], check=True)
    touch(run, "go")
    run.finish()
    assert run.receipt["save"] and outcome_of(run.receipt).exit_code == 7


class FullBucket(FolderBucket):
    """Refuses content as a full one does, from a moment on."""

    full = False

    def put_blob(self, prefix, content, *, durable=False):
        if self.full:
            raise BucketRefused("No space left on device")
        return super().put_blob(prefix, content, durable=durable)


class Clock:
    """Stands in for the agent's Watch: a saver asks it for little."""

    def __init__(self):
        self.prefix, self.limits, self.longest_save = "p/runs/r", dict(DEFAULTS), 0.0
        self.number = 1

    def left(self):
        return 100.0

    def reserve(self):
        return 10.0


@pytest.fixture
def saver(tmp_path, monkeypatch):
    (tmp_path / "work/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    watch = Clock()
    watch.bucket = FullBucket(str(tmp_path / "bucket"))
    saver = Saver(watch, ["model"])
    saver.is_running = lambda: True
    return saver


def paths(saver):
    return {
        file["path"]: file["sha256"]
        for file in json.loads(saver.bucket.get("p/runs/r/outputs.json")[0])["files"]
    }


def test_a_save_that_fails_changes_nothing_and_the_next_one_makes_up_for_it(saver):
    Path("model/a").write_text("1")
    saver.save()
    before = paths(saver)
    Path("model/a").write_text("2 longer")
    Path("model/b").write_text("b")
    saver.bucket.full = True
    with pytest.raises(BucketRefused):
        saver.save()
    assert paths(saver) == before
    saver.bucket.full = False
    saver.save()
    assert set(paths(saver)) == {"model/a", "model/b"} and paths(saver)["model/a"] != before["model/a"]


def test_a_clock_that_is_set_back_hides_no_change(saver):
    Path("model/a").write_text("1")
    future = time.time() + 1e6
    os.utime("model/a", (future, future))
    saver.save(last=False)
    first = paths(saver)
    Path("model/a").write_text("2")
    os.utime("model/a", (1.0, 1.0))
    saver.save(last=False)
    assert paths(saver) != first


def test_a_file_that_goes_while_it_is_read_is_left_out(saver):
    Path("model/a").write_text("a")
    Path("model/b").write_text("b")
    put_blob = saver.bucket.put_blob

    def vanish(prefix, content, *, durable=False):
        Path("model/b").unlink(missing_ok=True)
        return put_blob(prefix, content, durable=durable)

    saver.bucket.put_blob = vanish
    saver.save()
    assert set(paths(saver)) <= {"model/a"}


def test_a_file_that_changes_while_it_is_read_is_not_saved_as_a_mixture(saver):
    Path("model/a").write_text("a" * 5000)
    put_blob = saver.bucket.put_blob

    def change(prefix, content, *, durable=False):
        sha256 = put_blob(prefix, content, durable=durable)
        with open("model/a", "r+") as file:
            file.write("b")
        return sha256

    saver.bucket.put_blob = change
    with pytest.raises(Exception, match="there is no"):
        saver.save()
        paths(saver)


def test_no_process_is_left(tmp_path):
    run = start(tmp_path, "write('model/pid', str(os.getpid()))").finish()
    assert not alive(int(run.outputs()["model/pid"]))
    assert not alive(run.process.pid) and sys.executable


def test_what_a_process_that_is_left_behind_was_writing_is_incomplete(tmp_path):
    main = """
import subprocess
writer = "echo whole >model/closed; exec >model/torn; echo half; touch up; exec sleep 100"
subprocess.Popen(["sh", "-c", writer])
wait("up"); write("model/mine", "mine")
"""
    run = start(tmp_path, main, limits={"drain": 0.3, "save_interval": 60.0}).finish()
    assert run.receipt["status"] == 0
    assert run.outputs() == {
        "model/closed": b"whole\n",
        "model/mine": b"mine",
        "model/torn.incomplete": b"half\n",
    }
