"""Whose program main.py is on a rented machine: a user with a home, and what a login gives him."""

from __future__ import annotations

import grp
import os
import pwd
import re
import shutil
import subprocess
import sys

from cloudrun.errors import CloudrunError

NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}\Z")
GROUPS = ("render", "video")  # who may use a GPU where the driver's files are not for everybody
LOGIN = "printf '\\0\\0'; env -0; printf '\\0\\0'"  # a profile may say something as well
SHELLS_OWN = ("PWD", "OLDPWD", "SHLVL", "_")
KEYS = ("CLOUDRUN_", "CONTAINER_API_KEY", "JUPYTER_TOKEN")  # of the container, and the order of its run


class Account:
    """The user of this name, made if there is none; root without a name. Raises CloudrunError or OSError."""

    def __init__(self, name: str) -> None:
        self.user = _find_or_make(name or "root")
        self.login = [shutil.which("su") or "/bin/su", "-", self.user.pw_name, "-c", LOGIN]

    def home(self, *below: str) -> str:
        """A directory in the user's home that belongs to him, made if there is none."""
        folder = self.user.pw_dir
        for name in ("", *below):
            folder = os.path.join(folder, name)
            if not os.path.isdir(folder):
                os.mkdir(folder, 0o755)
                os.chown(folder, self.user.pw_uid, self.user.pw_gid)
            if os.stat(folder).st_uid != self.user.pw_uid:  # a link may lead to another disk, not anywhere
                raise CloudrunError(f"{folder} does not belong to {self.user.pw_name}: remove it")
        return folder

    def give(self) -> None:
        """All that is in the current directory belongs to the user from now on."""
        owner = f"{self.user.pw_uid}:{self.user.pw_gid}"
        subprocess.run(["chown", "--recursive", "--no-dereference", owner, "."], check=True)

    def command(self, argv: list[str]) -> list[str]:
        """The same as this user, in all his groups; it is one process still, and its signals are its own."""
        if not self.user.pw_uid:
            return argv
        ids = [f"--reuid={self.user.pw_uid}", f"--regid={self.user.pw_gid}", "--init-groups"]
        return [shutil.which("setpriv") or "/usr/bin/setpriv", *ids, *argv]

    def container(self) -> dict[str, str]:
        """What the image sets, without the keys to the container; its Python is the one that runs us."""
        given = os.environ.items()
        environ = {name: value for name, value in given if not name.startswith(KEYS)}
        environ.update({"HOME": self.user.pw_dir, "USER": self.user.pw_name, "LOGNAME": self.user.pw_name})
        environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        return {name: value for name, value in environ.items() if name not in SHELLS_OWN}

    def environment(self, told: bytes) -> dict[str, str]:
        """What a login shell told by LOGIN; of one that did not come so far, what every login has."""
        environ = {"HOME": self.user.pw_dir, "SHELL": self.user.pw_shell, "PATH": os.environ["PATH"]}
        environ.update(dict.fromkeys(("USER", "LOGNAME"), self.user.pw_name))
        parts = os.fsdecode(told).split("\0\0")
        items = parts[1].split("\0") if len(parts) > 2 else []
        environ.update(dict(item.split("=", 1) for item in items if "=" in item))
        return {name: value for name, value in environ.items() if name not in SHELLS_OWN}


def _find_or_make(name: str) -> pwd.struct_passwd:
    if not NAME.match(name):
        raise CloudrunError(f"VM_USER={name}: a user has at most 32 of a-z, 0-9, _ and -")
    try:
        return pwd.getpwnam(name)
    except KeyError:
        groups = [group.gr_name for group in grp.getgrall() if group.gr_name in GROUPS]
    command = ["useradd", "--create-home", "--shell", "/bin/bash", "--groups", ",".join(groups), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return pwd.getpwnam(name)
    except KeyError:  # asked once more, because the guest agent of the image may have been faster
        raise CloudrunError(f"the user {name} cannot be made: {done.stderr.strip()[-300:]}") from None
