"""The guard: boot script of an instance and parent of the agent. It ends the machine, whatever happens.

One file, standard library, Python 3.8; it never imports the rest of cloudrun. CLOUDRUN_BOOT and the
words that the agent writes into the pipe are described in cloudrun/formats.py. The machine ends 10 s
after the agent went without a receipt, when the agent has been silent for 5 minutes, and at the deadline.
"""

import ctypes
import hashlib
import json
import os
import select
import shutil
import signal
import sys
import time

PR_SET_CHILD_SUBREAPER = 36
MCL_CURRENT_FUTURE_ONFAULT = 7  # lock pages as they come into use, not all that are mapped


def now():
    """Seconds since boot, time asleep included: no wrong or changed clock moves a deadline."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def say(text):
    print("cloudrun guard: " + text, flush=True)


def protect():
    """Become the last process that memory pressure can harm, and the parent of every orphan."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if os.geteuid() == 0:  # an ordinary user's limit on locked memory would make later allocations fail
        libc.mlockall(MCL_CURRENT_FUTURE_ONFAULT)
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("-1000")
    except OSError:
        pass  # only root may


def fetch_agent(boot):
    """Copy the agent out of the bucket and check it; it must be what the client sent."""
    name, sha256 = boot["agent"]
    with open(os.path.join(boot["bucket"][len("file://") :], name), "rb") as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError("the agent in the bucket, " + name + ", is damaged: delete it and run again")
    with open("agent.pyz", "wb") as file:
        file.write(data)


def start_agent(boot):
    """Return the agent's pid and the pipe that tells how it is; only the agent holds the other end."""
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    os.set_blocking(reading, False)
    env = dict(os.environ, CLOUDRUN_ROLE="agent", CLOUDRUN_GUARD=str(writing))
    python = [sys.executable, "-I", "-S", "agent.pyz"]
    agent = os.posix_spawn(sys.executable, python, env)
    os.close(writing)
    return agent, reading


def watch(boot, agent, pipe, end_at):
    """Wait until the machine must end, and return why."""
    silence, gone_after = boot["agent_silence"], boot["agent_gone"]
    heard, finished, gone_at, words = now(), False, None, b""
    while True:
        limits = [end_at, gone_at + gone_after if gone_at else heard + silence]
        ready, _, _ = select.select(
            [] if gone_at else [pipe], [], [], max(0, min([1] + [t - now() for t in limits]))
        )
        if ready:
            news = os.read(pipe, 65536)
            heard, words = now(), (words + news)[-4096:]
            finished = finished or b"R" in words
            for word in words.split(b"\n")[:-1]:  # the bucket's clock may shorten a run, never lengthen it
                end_at = min(end_at, now() + float(word.rpartition(b"L")[2]))
            words = words.rpartition(b"\n")[2]
            gone_at = None if news else now()
        reap()
        if finished:  # nothing is left to do for the agent, not even to hang
            silence = min(silence, gone_after)
            if gone_at:
                return "the run is finished"
        if now() >= end_at:
            return "the deadline was reached"
        if gone_at and now() >= gone_at + gone_after:
            return "the agent went without a receipt"
        if not gone_at and now() >= heard + silence:
            return f"the agent was silent for {silence:.0f} s"


def reap():
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def descendants():
    """Every process below this one; orphans come to us, because we are their subreaper."""
    parents = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        if fields[0] != b"Z":
            parents[int(pid)] = int(fields[1])
    found = {os.getpid()}
    while True:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        if not more:
            return found - {os.getpid()}
        found |= more


def end_local(boot):
    """The end of a local machine: no process of it is left, and its disk is empty."""
    while True:
        left = descendants()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        reap()
        if not left:
            break
        time.sleep(0.005)
    shutil.rmtree("work", ignore_errors=True)


ENDINGS = {"local": end_local}


def main():
    boot = json.loads(os.environ["CLOUDRUN_BOOT"])
    end_at = now() + boot["left"]
    # Handlers, not SIG_IGN: what is ignored here would be ignored by main.py as well.
    for name in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(name, lambda *_: None)
    protect()
    try:
        fetch_agent(boot)
        agent, pipe = start_agent(boot)
        signal.signal(signal.SIGTERM, lambda *_: os.kill(agent, signal.SIGTERM))  # a spot notice
        why = watch(boot, agent, pipe, end_at)
    except Exception as error:  # whatever it is, the machine has to end
        why = f"CLOUDRUN-FATAL {error}"
    say(why)
    with open("ended", "w") as file:
        file.write(why)
    ENDINGS[boot["backend"]](boot)


if __name__ == "__main__":
    main()
