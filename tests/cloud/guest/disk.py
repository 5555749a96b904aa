"""The file systems of an emulated machine: this computer's programs, a boot disk of its own over them.

Each top directory of the host gets an overlay of its own, because one overlay over `/` is refused to
ordinary users (mounts below it are locked) and would leave out what is mounted below.
"""

import contextlib
import ctypes
import os
import shutil

LIBC = ctypes.CDLL(None, use_errno=True)
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
APART = {"proc", "sys", "dev", "run", "tmp", "lost+found"}
NODES = ("null", "zero", "full", "random", "urandom", "tty", "fuse")
POWER = ("poweroff", "halt", "reboot", "shutdown")


def mount(source, target, kind=None, flags=0, options=None):
    encoded = [text.encode() if text is not None else None for text in (source, target, kind, options)]
    if LIBC.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]):
        number = ctypes.get_errno()
        raise OSError(number, f"mount {kind or 'bind'} on {target}: {os.strerror(number)}")


def mount_all(config):
    """Build the machine's root below `config["mounts"]`, an empty directory, and change into it."""
    mount("none", "/", None, REC | PRIVATE)  # nothing of this shows outside
    base = config["mounts"]
    mount("machine", base, "tmpfs", NOSUID, "mode=755")
    hardware, skeleton, root = (os.path.join(base, name) for name in ("hardware", "skeleton", "root"))
    for path in (hardware, skeleton, root):
        os.mkdir(path)
    install(hardware, config)
    tops = lay_out(skeleton)
    overlay([skeleton], os.path.join(config["disk"], "@"), root)
    for name in tops:
        lower = [os.path.join(hardware, name)] if os.path.isdir(os.path.join(hardware, name)) else []
        try:
            # What an ordinary user may not read, /root, begins empty on his machines.
            host = f"/{name}" if os.access(f"/{name}", os.R_OK | os.X_OK) else os.path.join(skeleton, name)
            overlay([*lower, host], os.path.join(config["disk"], name), os.path.join(root, name))
        except OSError:
            if name in ("usr", "etc", "var"):  # without these nothing runs
                raise
    mount_devices(root, config)
    os.chdir(root)
    # In place of the old root, which then is detached: pivot_root(2), "pivot_root(".", ".")".
    if LIBC.pivot_root(b".", b".") or LIBC.umount2(b".", 2):
        raise OSError(ctypes.get_errno(), "pivot_root")
    os.chdir("/")


def lay_out(skeleton):
    """Copy the shape of the host's root directory; return the directories that need an overlay."""
    tops = []
    for entry in os.scandir("/"):
        path = os.path.join(skeleton, entry.name)
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), path)
        elif entry.is_dir():
            os.mkdir(path)
            if entry.name not in APART:
                tops.append(entry.name)
    for name in APART - {"lost+found"}:
        os.makedirs(os.path.join(skeleton, name), exist_ok=True)
    return tops


def overlay(lower, folder, target):
    upper, work = os.path.join(folder, "upper"), os.path.join(folder, "work")
    if not os.path.isdir(upper):
        # To an ordinary user's namespace the host's root is nobody, in whose directories nobody may write.
        for inner in ("lib", "cache", "log") if os.path.basename(folder) == "var" else ("",):
            os.makedirs(os.path.join(upper, inner))
        os.makedirs(work)
        # A merged directory shows the owner and mode of its uppermost part.
        seen = os.stat(lower[-1])
        with contextlib.suppress(OSError):
            os.chown(upper, seen.st_uid, seen.st_gid)
        os.chmod(upper, seen.st_mode & 0o7777)
    # What an earlier mount with `volatile` leaves, so that nobody trusts the disk after a crash.
    shutil.rmtree(os.path.join(work, "work", "incompat"), ignore_errors=True)
    options = f"lowerdir={':'.join(lower)},upperdir={upper},workdir={work}"
    # Volatile: the end of a machine must not wait until the host has written all it holds to its disk.
    # User namespaces may not use the attributes that are reserved to root.
    for more in (",volatile", ",volatile,userxattr"):
        with contextlib.suppress(OSError):
            return mount("overlay", target, "overlay", 0, options + more)
    mount("overlay", target, "overlay", 0, options)


def install(hardware, config):
    """The programs of this machine that the host's own must not stand in for."""
    sbin, usr_bin = (os.path.realpath(path) for path in ("/sbin", "/usr/bin"))
    for path in (sbin, usr_bin):
        os.makedirs(hardware + path, exist_ok=True)
    tools = {f"{sbin}/{name}": "power.sh" for name in POWER}
    tools |= {f"{usr_bin}/systemctl": "power.sh", f"{usr_bin}/systemd-run": "systemd_run.py"}
    if config["container"]:  # nothing in it has power over the machine
        tools = {**dict.fromkeys(tools, ""), f"{sbin}/docker-init": "docker_init.py"}
    tools[f"{usr_bin}/nvidia-smi"] = "nvidia-smi.sh" if config["gpu"] else ""
    for path, tool in tools.items():
        if tool:
            here = os.path.dirname(os.path.abspath(__file__))
            shutil.copyfile(os.path.join(here, tool), hardware + path)
            os.chmod(hardware + path, 0o755)
        elif os.path.lexists(path):
            hide(hardware + path)
    if "python3" in config["lacks"]:
        for folder in {os.path.realpath(folder) for folder in config["path"].split(":")}:
            for name in ("python", "python3"):
                if os.path.exists(f"{folder}/{name}"):
                    os.makedirs(hardware + folder, exist_ok=True)
                    hide(f"{hardware}{folder}/{name}")


def hide(path):
    os.mknod(path, 0o20000)  # device 0:0 is the overlay's word for "not there"


def mount_devices(root, config):
    at = {name: os.path.join(root, name) for name in APART}
    mount("proc", at["proc"], "proc", NOSUID | NODEV | NOEXEC)
    mount("tmp", at["tmp"], "tmpfs", NOSUID | NODEV, "mode=1777")
    mount("run", at["run"], "tmpfs", NOSUID | NODEV, "mode=755")
    mount("dev", at["dev"], "tmpfs", NOSUID, "mode=755")
    for name in filter(os.path.exists, (f"/dev/{name}" for name in NODES)):
        os.close(os.open(root + name, os.O_CREAT | os.O_WRONLY, 0o666))
        mount(name, root + name, None, BIND)
    for name, target in {"fd": "fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}.items():
        os.symlink(f"/proc/self/{target}", os.path.join(at["dev"], name))
    for name in ("shm", "pts"):
        os.mkdir(os.path.join(at["dev"], name))
    mount("shm", os.path.join(at["dev"], "shm"), "tmpfs", NOSUID | NODEV, "mode=1777")
    mount("devpts", os.path.join(at["dev"], "pts"), "devpts", NOSUID, "newinstance,ptmxmode=0666,mode=620")
    os.symlink("pts/ptmx", os.path.join(at["dev"], "ptmx"))
    os.mkfifo(os.path.join(at["dev"], "ttyS0"), 0o600)  # init reads it: the serial console
    if not config["container"] and "systemd" not in config["lacks"]:
        os.makedirs(os.path.join(at["run"], "systemd", "system"))  # what sd_booted(3) looks for
    shared = os.path.join(at["run"], "hardware")
    os.mkdir(shared)
    mount(config["hardware"], shared, None, BIND)
    mount(None, shared, None, BIND | REMOUNT | RDONLY)
    guard_the_host(root)


def guard_the_host(root):
    """Root of the machine must not reach this computer's kernel. Init reads what is put in their place."""
    os.mkfifo(os.path.join(root, "dev", "sysrq"), 0o600)
    with contextlib.suppress(FileNotFoundError):
        mount(os.path.join(root, "dev", "sysrq"), os.path.join(root, "proc", "sysrq-trigger"), None, BIND)
    for name in ("proc/sys", "sys"):
        target = os.path.join(root, name)
        with contextlib.suppress(OSError):
            mount(target if name != "sys" else "/sys", target, None, BIND)
            mount(None, target, None, BIND | REMOUNT | RDONLY | NOSUID | NODEV | NOEXEC)
