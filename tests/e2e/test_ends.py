"""Every end of a run: its processes are gone, its outputs are home, its code is right, its bill agrees."""

import os
import signal
import subprocess
import time

import pytest
from machine import alive, signal_all, wait_until

WORK = """
os.makedirs("model", exist_ok=True)
def write(path, text):
    with open(path + ".tmp", "w") as file: file.write(text)
    os.rename(path + ".tmp", path)
write("model/first", "first")
"""
SLEEP = WORK + "print('up', flush=True)\ntime.sleep(100)\n"
STUBBORN = (
    WORK
    + """
for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(name, signal.SIG_IGN)
print('up', flush=True)
time.sleep(100)
"""
)
POLITE = (
    WORK
    + """
def end(signum, frame):
    write("model/last", signal.Signals(signum).name); sys.exit(5)
signal.signal(signal.SIGINT, end)
print('up', flush=True)
time.sleep(100)
"""
)


# Until the guard, our parent's parent, has been stopped.
UNTIL_STOPPED = (
    WORK
    + """
def field(pid, number): return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[number]
print("up", flush=True)
while field(field(os.getppid(), 1), 0) != "T": time.sleep(0.02)
sys.exit(4)
"""
)


def hours(seconds):
    return f"--max-hours={seconds / 3600:.9f}"


def test_exit(machinery):
    machinery.main(WORK + "print('out'); print('err', file=sys.stderr); sys.exit(3)")
    client = machinery.start("main.py")
    assert client.wait(30) == 3
    assert machinery.out(client) == "out\n" and "err\n" in machinery.err(client)
    bill = machinery.ended(2)
    assert machinery.local("model/first") == "first"
    assert bill["reason"] == "exited" and bill["layer"] in ("agent", "guard")
    assert (bill["cost"] == 0) == machinery.place.free


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGTERM"])
def test_ended_by_a_signal(machinery, name):
    machinery.main(WORK + f"os.kill(os.getpid(), signal.{name})")
    assert machinery.run("main.py") == 128 + getattr(signal, name)
    machinery.ended(2)


def test_what_main_py_leaves_behind_is_gone(machinery):
    machinery.main(WORK + "import subprocess\nsubprocess.Popen(['sleep', '100'], start_new_session=True)")
    assert machinery.run("main.py") == 0
    machinery.ended(2)


def test_deadline(machinery):
    """main.py is asked to end while there is still time to save what it then writes."""
    machinery.main(POLITE)
    client = machinery.start(hours(10), "main.py")
    assert client.wait(30) == 124
    bill = machinery.ended(2)
    assert machinery.local("model/last") == "SIGINT" and bill["reason"] == "deadline", machinery.err(client)
    assert machinery.meter.seconds < 10 and machinery.object("receipt.json")["status"] == 5


def test_deadline_of_a_main_py_that_does_not_listen(machinery):
    machinery.main(STUBBORN)
    graces = {"limit_grace_interrupt": 0.2, "limit_grace_terminate": 0.2, "limit_drain": 0.2}
    assert machinery.run(hours(10), "main.py", **graces) == 124
    machinery.ended(2)
    assert machinery.local("model/first") == "first"
    assert machinery.meter.seconds < 11 and machinery.object("receipt.json")["signal"] == "SIGKILL"


def test_cost_cap(machinery):
    machinery.main(POLITE)
    cost = machinery.start("--max-cost=0.018", "main.py", CLOUDRUN_PRICE="6", limit_provider=1.0)
    assert cost.wait(40) == 124, machinery.err(cost)
    bill = machinery.ended(2)
    assert bill["reason"] == "cost" and machinery.local("model/last") == "SIGINT"
    assert machinery.place.fair(bill, 6) and bill["seconds"] * 6 / 3600 <= 0.018


def test_stopped_by_a_command(machinery):
    machinery.main(POLITE)
    client = machinery.running("main.py")
    assert machinery.run("stop") == 0
    assert client.wait(20) == 130
    bill = machinery.ended(2)
    assert bill["reason"] == "stopped" and machinery.local("model/last") == "SIGINT"


def test_stopped_now(machinery):
    machinery.main(STUBBORN)
    client = machinery.running("main.py", limit_grace_interrupt=10.0)
    wait_until(lambda: machinery.saved("model/first"))
    assert machinery.run("stop", "--now") == 0
    machinery.meter.wait_gone(5)
    assert client.wait(20) == 130
    machinery.ended(2)
    assert machinery.local("model/first") == "first"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_first_signal_ends_and_saves(machinery, name):
    machinery.main(POLITE)
    client = machinery.running("main.py")
    client.send_signal(getattr(signal, name))
    assert client.wait(20) == 128 + getattr(signal, name)
    bill = machinery.ended(2)
    assert bill["reason"] == "stopped" and machinery.local("model/last") == "SIGINT"


def test_the_second_signal_ends_it_now_and_the_last_complete_save_stands(machinery):
    machinery.main(STUBBORN)
    client = machinery.running("main.py", limit_grace_interrupt=10.0)
    wait_until(lambda: machinery.saved("model/first"))
    for _ in range(2):
        client.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert client.wait(8) == 130
    machinery.ended(2)
    assert machinery.local("model/first") == "first"


def lose(client):
    os.kill(client.pid, signal.SIGKILL)
    client.wait()


def test_a_lost_client_does_not_end_the_run(machinery):
    machinery.main(WORK + "print('up', flush=True)\ntime.sleep(3)\nwrite('model/last', 'last')")
    lose(machinery.running("main.py"))
    assert machinery.wait_for("receipt.json")["status"] == 0
    machinery.meter.wait_gone(3)
    assert machinery.run("pull") == 0 and machinery.local("model/last") == "last"
    assert machinery.ended(2)["reason"] == "exited"
    assert machinery.run("wait") == 0


def test_a_lost_client_ends_the_run_if_that_was_asked_for(machinery):
    machinery.main(POLITE)
    lose(machinery.running("--if-client-lost=stop", "main.py", limit_client_lost=1.0))
    assert machinery.wait_for("receipt.json")["reason"] == "client-lost"
    machinery.meter.wait_gone(3)
    assert machinery.run("wait") == 129
    machinery.ended(2)
    assert machinery.run("pull") == 0 and machinery.local("model/last") == "SIGINT"


@pytest.mark.parametrize("signame", ["SIGKILL", "SIGSTOP"])
def test_the_agent_dies_or_hangs(machinery, signame):
    """The guard ends the machine, nobody knows how main.py ended, and what was saved is there."""
    machinery.main(SLEEP)
    client = machinery.running("main.py", limit_agent_silence=2.0, limit_state=0.2)
    wait_until(lambda: machinery.saved("model/first"))
    signal_all(machinery.role("agent"), getattr(signal, signame))
    assert client.wait(20) == 121
    bill = machinery.ended(3)
    assert machinery.local("model/first") == "first" and bill["layer"] in ("guard", "lease")


def test_the_agent_dies_without_a_client(machinery):
    machinery.main(SLEEP)
    client = machinery.running("main.py")
    wait_until(lambda: machinery.saved("model/first"))
    lose(client)
    signal_all(machinery.role("agent"), signal.SIGKILL)
    machinery.meter.wait_gone(5)
    assert machinery.run("wait") == 121
    assert machinery.ended(2)["layer"] == "guard"
    assert machinery.run("pull") == 0 and machinery.local("model/first") == "first"


def test_the_guard_dies(here):
    """The agent notices at once, and saves."""
    here.main(POLITE)
    client = here.running("main.py")
    signal_all(here.role("guard"), signal.SIGKILL)
    assert client.wait(20) == 121
    assert here.ended(3)["reason"] == "guard-lost"
    assert here.local("model/last") == "SIGINT"


def test_the_guard_dies_without_a_client(here):
    """The agent saves, and ends the machine in its place."""
    here.main(POLITE)
    lose(here.running("main.py"))
    signal_all(here.role("guard"), signal.SIGKILL)
    assert here.wait_for("receipt.json")["reason"] == "guard-lost"
    here.meter.wait_gone(8)
    time.sleep(2)  # it left word of when it ended: when that is seen is of no account
    assert here.run("wait") == 121 and here.run("pull") == 0
    assert here.ended(2)["layer"] == "agent"
    assert here.local("model/last") == "SIGINT"


def test_the_guard_hangs(machinery):
    """The run does not need it; the client ends what the guard should have ended, before the agent does."""
    machinery.main(UNTIL_STOPPED)
    client = machinery.running("main.py", limit_self_end=1.0, limit_agent_gone=10.0)
    signal_all(machinery.role("guard"), signal.SIGSTOP)
    assert client.wait(20) == 4
    assert machinery.ended(3)["layer"] == "lease" and machinery.local("model/first") == "first"


def hang_when_finished(machinery):
    """The guard does, and so does the agent, which would end the machine in its place."""
    signal_all(machinery.role("guard"), signal.SIGSTOP)
    machinery.wait_for("receipt.json")
    signal_all(machinery.role("agent"), signal.SIGSTOP)


def test_the_guard_hangs_without_a_client(machinery):
    machinery.main(UNTIL_STOPPED)
    lose(machinery.running("main.py", limit_self_end=0.5, limit_agent_gone=10.0))
    hang_when_finished(machinery)
    time.sleep(1.5)
    assert machinery.run("ps") == 0
    assert machinery.ended(3)["layer"] == "sweep"
    assert machinery.run("wait") == 4


def test_both_die(here):
    here.main(SLEEP)
    client = here.running("main.py")
    wait_until(lambda: here.saved("model/first"))
    signal_all(here.role("guard") + here.role("agent"), signal.SIGKILL)
    assert client.wait(20) == 121
    assert here.ended(3)["layer"] == "lease" and here.local("model/first") == "first"


def test_both_die_without_a_client(here):
    """Nobody is left who could end main.py: the next command does."""
    here.main(SLEEP)
    client = here.running("main.py")
    wait_until(lambda: here.saved("model/first"))
    lose(client)
    signal_all(here.role("guard") + here.role("agent"), signal.SIGKILL)
    time.sleep(0.5)
    assert here.meter.members, "main.py goes on"
    assert here.run("ps") == 0
    bill = here.ended(3)
    assert bill["layer"] == "sweep" and bill["exit_code"] == 121
    assert here.run("pull") == 0 and here.local("model/first") == "first"


def test_both_hang(machinery):
    """The machine is silent: the client ends it."""
    machinery.main(SLEEP)
    client = machinery.running("main.py", limit_agent_silence=2.0, limit_state=0.2)
    wait_until(lambda: machinery.saved("model/first"))
    signal_all(machinery.role("guard") + machinery.role("agent"), signal.SIGSTOP)
    assert client.wait(20) == 121
    assert machinery.ended(3)["layer"] == "lease" and machinery.local("model/first") == "first"


RESUMED = (
    WORK
    + """
step = int(open("model/step").read()) if os.path.exists("model/step") else 0
print("step", step, flush=True)
if step == 7: sys.exit(0)
write("model/step", "7"); time.sleep(100)
"""
)


def test_a_preempted_run_goes_on_from_what_was_saved(machinery):
    machinery.main(RESUMED)
    client = machinery.running("main.py", text="step 0\n")
    wait_until(lambda: machinery.saved("model/step"))
    machinery.take_away()
    assert client.wait(30) == 0
    assert machinery.out(client) == "step 0\nstep 7\n"
    bill = machinery.ended(2)
    end = machinery.object("attempts/1/end.json")
    assert bill["attempts"] == 2 and (end["reason"] == "preempted" if machinery.place.notice else not end)
    assert machinery.object("receipt.json")["attempt"] == 2


def test_a_preempted_run_without_a_client_ends_preempted(machinery):
    machinery.main(RESUMED)
    lose(machinery.running("main.py", text="step 0\n"))
    wait_until(lambda: machinery.saved("model/step"))
    machinery.taken_away()
    assert machinery.object("receipt.json") is None and machinery.object("bill.json") is None
    assert machinery.run("wait") == 0, "whoever comes later goes on with it"
    assert machinery.object("bill.json")["attempts"] == 2
    machinery.meter.wait_gone(2)


def test_a_machine_that_nobody_saw_taken_away_is_billed_as_long_as_it_was_there(here):
    """Its last word says how long that was, and goes with it: who goes on with the run remembers it."""
    here.main(RESUMED)
    lose(here.running("main.py", text="step 0\n"))
    wait_until(lambda: here.saved("model/step"))
    here.taken_away()
    time.sleep(1.5)
    assert here.run("wait") == 0
    assert here.ended(2)["attempts"] == 2


def test_a_client_that_slept_sees_the_machine_through_that_another_client_rented(machinery):
    """It wakes up while the run goes on elsewhere, and makes no machine of its own."""
    machinery.main(RESUMED.replace("sys.exit(0)", "time.sleep(2); sys.exit(6)"))
    sleeper = machinery.running("main.py", text="step 0\n")
    wait_until(lambda: machinery.saved("model/step"))
    sleeper.send_signal(signal.SIGSTOP)
    machinery.taken_away()
    other = machinery.start("wait")
    machinery.wait_for("attempts/2/agent.json")
    guards = machinery.role("guard")
    sleeper.send_signal(signal.SIGCONT)
    assert sleeper.wait(30) == other.wait(30) == 6
    assert machinery.out(sleeper) == "step 0\nstep 7\n"
    assert machinery.object("attempts/3/claim.json") in (None, {"closed": True})
    bill = machinery.object("bill.json")
    machinery.meter.wait_gone(2)
    assert bill["attempts"] == 2 and machinery.object("attempts/2/claim.json")["instance"].endswith("-2")
    assert not any(alive(guard) for guard in guards)


def test_who_waits_for_a_run_ends_a_machine_that_has_outlived_its_deadline(machinery):
    """By the machine's age: the clock of who waits may be anything."""
    machinery.main(SLEEP)
    lose(machinery.running(hours(6), "main.py", limit_provider=0.5))
    hung = machinery.role("guard") + machinery.role("agent")
    waiting = machinery.start("wait")
    wait_until(lambda: machinery.object("attempts/1/state.json"))
    signal_all(hung, signal.SIGSTOP)
    assert waiting.wait(30) == 124, machinery.err(waiting)
    bill = machinery.ended(2)
    assert bill["layer"] == "sweep" and bill["reason"] == "deadline" and 5 < machinery.meter.seconds < 9


def test_a_machine_that_is_overdue_is_ended_though_the_bucket_is_out_of_reach(here):
    here.main(SLEEP)
    lose(here.running("main.py"))
    signal_all(here.role("guard") + here.role("agent"), signal.SIGKILL)
    bucket = here.top / "share/cloudrun/bucket"
    bucket.rename(bucket.with_name("hidden"))
    bucket.touch()
    assert here.meter.members, "main.py goes on"
    assert here.run("ps") == 125
    here.meter.wait_gone(3)


def test_a_spot_notice_while_the_rest_drains_is_written_down_and_the_run_is_complete(machinery):
    if not machinery.place.notice:
        pytest.skip("nobody tells a machine there that it will be taken away")
    main = WORK + "import subprocess\nsubprocess.Popen(['sleep', '100'])\nprint('up', flush=True)"
    machinery.main(main)
    client = machinery.running("main.py", limit_drain=8.0, limit_grace_preempted=0.5)
    program = machinery.role("program")
    wait_until(lambda: len(machinery.role("program")) < 2 or machinery.role("program") != program)
    time.sleep(0.5)  # main.py has ended; what it left behind goes on
    machinery.take_away()
    assert machinery.wait_for("attempts/1/end.json")["reason"] == "preempted"
    assert client.wait(30) == 0
    assert machinery.ended(2)["attempts"] == 1
    assert machinery.object("receipt.json")["status"] == 0 and machinery.local("model/first") == "first"


def test_a_bucket_that_is_full_at_the_last_save(here):
    waiting = "print('up', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.01)\n"
    here.main(WORK + waiting + "write('model/big', 'x' * 900000)")
    client = here.running("main.py")
    wait_until(lambda: here.saved("model/first"))
    (agent,) = here.role("agent")
    subprocess.run(["prlimit", f"--pid={agent}", "--fsize=500000"], check=True)
    (work,) = (here.top / "share/cloudrun/instances").glob("*/work")
    (work / "go").touch()
    assert client.wait(30) == 121
    assert "File too large" in here.object("receipt.json")["save"]
    here.ended(2)
    assert here.local("model/first") == "first" and here.local("model/big") is None


def test_a_daemon_that_hides_from_everybody_is_gone_with_its_machine(here):
    main = (
        WORK
        + """
if not os.fork():
    os.setsid()
    if os.fork(): os._exit(0)
    os.chdir("/"); os.closerange(0, 100)
    os.execve(sys.executable, ["python", "-c", "import time; time.sleep(100)"], {})
os.wait(); time.sleep(0.3)
def parent(pid):
    try: return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
    except OSError: return 0
found = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and parent(pid) == os.getppid()]
print(*[pid for pid in found if pid != os.getpid()], flush=True)
"""
    )
    client = here.main(main).start("main.py")
    assert client.wait(30) == 0
    daemons = [int(pid) for pid in here.out(client).split()]
    assert daemons and not any(alive(pid) for pid in daemons)
    here.ended(2)


def test_a_machine_that_cannot_start_main_py(machinery):
    """Damage on the way: said, and nothing is left."""
    machinery.main(SLEEP)
    assert machinery.run("main.py", CLOUDRUN_MAX_HOURS="0.0001") in (2, 125)
    machinery.meter.wait_gone(2)


def test_a_program_that_makes_directories_without_end_ends_all_the_same(here):
    here.main(WORK + "for _ in range(3000): os.mkdir('d'); os.chdir('d')")
    assert here.run("main.py", limit_self_end=30.0) == 0  # rm needs a while
    assert here.ended(2)["layer"] in ("agent", "guard")
    assert list((here.top / "share/cloudrun/instances").iterdir()) == []


def test_nothing_of_a_machine_stays_on_the_disk(here):
    here.main(WORK)
    assert here.run("main.py") == 0
    assert list((here.top / "share/cloudrun/instances").iterdir()) == []


def test_guard_and_agent_are_small_and_quiet(here):
    """45 MB at most, together, and less than a hundredth of a core while main.py is quiet."""
    quiet = {"limit_save_interval": 60, "limit_agent_beat": 5, "limit_state": 10, "limit_client_beat": 10}
    here.main(SLEEP)
    client = here.running("main.py", **quiet)
    ours = here.role("guard") + here.role("agent")
    assert len(ours) == 2
    before = sum(ticks(pid) for pid in ours)
    time.sleep(5)
    share = (sum(ticks(pid) for pid in ours) - before) / os.sysconf("SC_CLK_TCK") / 5
    kilobytes = sum(resident(pid) for pid in ours)
    client.send_signal(signal.SIGINT)
    client.wait(20)
    assert kilobytes < 45_000 and share < 0.02, (kilobytes, share)  # the clock ticks in hundredths


def ticks(pid):
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def resident(pid):
    with open(f"/proc/{pid}/status") as file:
        return int(next(line for line in file if line.startswith("VmRSS")).split()[1])


def test_main_py_is_not_protected_from_the_memory_killer(here):
    """Only the guard is, where the kernel lets us do that."""
    may = subprocess.run(
        ["sh", "-c", "echo -1000 >/proc/self/oom_score_adj"], capture_output=True, check=False
    )
    here.main("print(open('/proc/self/oom_score_adj').read().strip())\n" + SLEEP)
    client = here.running("main.py")
    (guard,) = here.role("guard")
    with open(f"/proc/{guard}/oom_score_adj") as file:
        assert int(file.read()) == (-1000 if may.returncode == 0 else 0)
    client.send_signal(signal.SIGINT)
    client.wait(20)
    assert int(here.out(client).split()[0]) >= 0
