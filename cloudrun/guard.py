"""The guard: boot script of an instance and parent of the agent. It ends the machine, whatever happens.

One file, standard library, Python 3.8; cloudrun/formats.py describes CLOUDRUN_BOOT and the pipe's words. The
machine ends with the run, 10 s after the agent's death, after 5 minutes of its silence, at the deadline.
"""

import ctypes
import hashlib
import json
import os
import select
import signal
import sys
import time
import zipimport


def now():  # seconds since boot, time asleep included: no wrong or changed clock moves a deadline
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Late(BaseException):
    """Whoever tries again must not catch it."""


def late(*_):
    raise Late("the agent could not be started in time")


def quietly(act, *arguments):
    try:
        act(*arguments)
    except OSError:
        pass


def write(path, data):
    with open(path, "wb") as file:
        file.write(data)


def say(text):
    quietly(os.set_blocking, 1, False)  # a console that nobody reads must not keep the machine alive
    quietly(os.write, 1, f"cloudrun guard: {text}\n".encode())


def protect(backend):
    """Become the last process that memory pressure can harm, and the parent of every orphan."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    # The limit on locked memory of an ordinary user, or of a container, would make later allocations fail.
    if os.geteuid() == 0 and backend != "vast":
        libc.mlockall(7)  # MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT: pages as they come into use
    quietly(write, "/proc/self/oom_score_adj", b"-1000")  # only root may


def get(url, tries=6, **headers):
    """What is behind a URL; a machine that has just booted may have no network yet."""
    import urllib.request  # not before: it costs every start some milliseconds

    try:
        return urllib.request.urlopen(urllib.request.Request(url, None, headers), timeout=30).read()
    except Exception as error:
        if tries == 1 or getattr(error, "code", 500) < 429:
            raise
        time.sleep(2 ** (6 - tries))
        return get(url, tries - 1, **headers)


def fetch(bucket, name, token=None):
    """An object; from Cloud Storage with a token, that of this machine's service account if we have none."""
    if bucket.startswith("file://"):
        with open(os.path.join(bucket[7:], name), "rb") as file:
            return file.read()
    storage, metadata = map(os.environ.get, ("STORAGE_EMULATOR_HOST", "GCE_METADATA_HOST"))
    bucket, name = f"{bucket[5:]}/{name}".split("/", 1)
    url = f"{storage or 'https://storage.googleapis.com'}/download/storage/v1/b/{bucket}/o/"
    url += "".join(f"%{byte:02X}" for byte in name.encode()) + "?alt=media"
    if storage and not metadata and not token:  # an emulator that asks for none
        return get(url)
    return get(url, Authorization="Bearer " + (token or own_token(metadata)))


def own_token(metadata):
    """That of the service account of this machine."""
    server = f"http://{metadata or 'metadata.google.internal'}/computeMetadata/v1"
    answer = get(f"{server}/instance/service-accounts/default/token", **{"Metadata-Flavor": "Google"})
    return json.loads(answer)["access_token"]


def start_agent(boot, end_at):
    """Return the agent's pid and the pipe that tells how it is; only the agent holds the other end."""
    (name, sha256), (reading, writing) = boot["agent"], os.pipe()
    if os.path.exists("token"):  # a container has started again: the agent left it what was handed over last
        with open("token") as file:
            boot["token"] = file.read()
    data = fetch(boot["bucket"], name, boot.get("token"))
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"the agent in the bucket, {name}, is damaged: delete it and run again")
    write("agent.pyz", data)
    agent = os.fork()  # a second interpreter would have to start first
    if not agent:
        os.close(reading)
        be_agent(dict(boot, left=end_at - now()), writing)
    os.close(writing)
    return agent, reading


def be_agent(boot, pipe):
    """Become the agent, which does not return, and look like a program of its own in lists of processes."""
    try:
        ctypes.CDLL(None).prctl(15, b"cloudrun-agent", 0, 0, 0)  # PR_SET_NAME
        os.environ.update(CLOUDRUN_ROLE="agent", CLOUDRUN_GUARD=str(pipe), CLOUDRUN_BOOT=json.dumps(boot))
        sys.path.insert(0, "agent.pyz")
        exec(zipimport.zipimporter("agent.pyz").get_code("__main__"), {"__name__": "__main__"})
    except Exception as error:  # a Python that is too old, say
        say(f"CLOUDRUN-FATAL {boot.get('instance')} the agent cannot start: {error!r}")
    finally:
        os._exit(1)


def watch(boot, agent, pipe, end_at):
    """Wait until the machine must end, and return why."""
    silence, gone_after = boot["agent_silence"], boot["agent_gone"]
    heard, gone_at, closed = now(), None, False
    while True:
        limit = min(end_at, gone_at + gone_after if gone_at else heard + silence)
        if select.select([] if closed else [pipe], [], [], max(0, min(1, limit - now())))[0]:
            news = os.read(pipe, 65536)  # all that a pipe can hold, so that no word is cut
            heard, closed = now(), not news
            if b"R" in news:
                return "the run is finished"
            if b"H" in news:  # hands off: a person started this machine, and its run is over
                return ""
            for word in news.split(b"L")[1:]:  # the bucket's clock may shorten a run, never lengthen it
                end_at = min(end_at, now() + float(word.split(b"\n")[0]))
        if not gone_at and (closed or os.waitid(os.P_PID, agent, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
            gone_at = now()
        if now() >= end_at:
            return "the deadline was reached"
        if gone_at and now() >= gone_at + gone_after:
            return "the agent went without a receipt"
        if not gone_at and now() >= heard + silence:
            return f"the agent was silent for {silence:.0f} s"


def descendants():
    """{pid: process group} of all that is below this process; orphans come to us, their subreaper."""
    tree, found, size = {}, {os.getpid()}, 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                state, parent, group = file.read().rpartition(b")")[2].split()[:3]
        except OSError:
            continue  # it has just ended
        if state not in b"ZX":
            tree[int(pid)] = int(parent), int(group)
    while size < len(found):
        size = len(found)
        found |= {pid for pid, (parent, _) in tree.items() if parent in found}
    return {pid: tree[pid][1] for pid in found - {os.getpid()}}


def end_local(why, started):
    """The end of a local machine: no process of it is left, its disk is empty, its last word is written."""
    while left := descendants():
        # Whole groups first: no member can fork while its group is killed, so that no fork bomb escapes.
        groups = set(left.values()) - {0, 1, os.getpgrp()}
        for target in [-group for group in groups] + list(left):
            quietly(os.kill, target, signal.SIGKILL)
        time.sleep(0.005)
    # rm goes down to any depth, and Python's own does not. Our children are collected by the kernel.
    quietly(os.waitpid, os.posix_spawnp("rm", ["rm", "-rf", "work"], os.environ), 0)
    write("ended", f"{now() - started:.3f} {why}".encode())


def end_gcp(why, started):
    """The end of a virtual machine: power off, without waiting for any service or for a disk that hangs."""
    child, until = os.posix_spawnp("sync", ["sync"], os.environ), now() + 5
    try:
        # What went wrong stands on a console that only a machine which is on shows.
        while now() < until and ("FATAL" in why or os.waitpid(child, os.WNOHANG) == (0, 0)):
            time.sleep(0.01)
    except ChildProcessError:
        pass  # synced; the kernel has collected it
    ctypes.CDLL(None).reboot(0x4321FEDC)  # LINUX_REBOOT_CMD_POWER_OFF; it comes back if it may not
    os.posix_spawnp("poweroff", ["poweroff", "-f"], os.environ)
    time.sleep(5)
    raise OSError("it is still on")


def end_vast(why, started):
    """The end of a container: it destroys itself, asked for until this process is gone with it."""
    import urllib.request

    if "FATAL" in why:
        time.sleep(20)  # its console goes with it, and the client has to read that first
    server, number, key = map(os.environ.get, ("VAST_URL", "CONTAINER_ID", "CONTAINER_API_KEY"))
    url = f"{server or 'https://console.vast.ai'}/api/v0/instances/{number}/"
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(url, b"{}", headers, method="DELETE"), timeout=30)
    time.sleep(4)  # success is no proof
    raise OSError("it is still there")


ENDINGS = {"local": end_local, "gcp": end_gcp, "vast": end_vast}


def main():
    started, boot = now(), json.loads(os.environ["CLOUDRUN_BOOT"])
    # Handlers, not SIG_IGN: what is ignored here would be ignored by main.py as well. A spot notice
    # waits until there is an agent, and the agent inherits the mask until it can take the notice.
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, min(boot["left"], 240))  # a network can hang for ever
        agent, pipe = start_agent(boot, started + boot["left"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        protect(boot["backend"])  # ourselves alone: the agent and main.py may be killed for their memory
        signal.signal(signal.SIGTERM, lambda *_: quietly(os.kill, agent, signal.SIGTERM))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        why = watch(boot, agent, pipe, started + boot["left"])
    except (Exception, Late) as error:  # whatever it is, the machine has to end
        why = f"CLOUDRUN-FATAL {boot.get('instance')} {error}"
    if not why:
        return None
    say(why)
    for name in (signal.SIGTERM, signal.SIGCHLD):  # the kernel collects our children from here on
        signal.signal(name, signal.SIG_IGN)
    pause = 1
    while True:
        try:
            return ENDINGS[boot["backend"]](why, started)
        except Exception as error:
            say(f"cannot end this machine, trying again: {error}")
            time.sleep(pause)
            pause = min(2 * pause, 60)


if __name__ == "__main__":
    main()
