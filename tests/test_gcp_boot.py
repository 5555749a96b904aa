"""The startup script as shells and systemd read it; whole machines boot it in tests/e2e/test_gcp_runs.py."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from cloudrun.backends.gcp_boot import startup_script

PAYLOAD = {"instance": "it's-20261125-101112-00ff-1", "left": 60.0}


def properties() -> list[str]:
    """What the unit of the guard is given, -p NAME=VALUE, as the shell passes it on."""
    script = startup_script(PAYLOAD, {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:1"})
    call = script[script.index("    systemd-run") : script.index(" && exit 0\nfi")]
    words = shlex.split(call.replace("\\\n", " "))
    return [words[n + 1] for n, word in enumerate(words) if word == "-p"]


@pytest.mark.parametrize("shell", ["sh", "bash", "busybox"])
def test_every_shell_can_read_it(shell: str) -> None:
    found = shutil.which(shell)
    if not found:
        pytest.skip(f"there is no {shell} here")
    command = [found, "sh", "-n"] if shell == "busybox" else [found, "-n"]
    done = subprocess.run(command, input=startup_script(PAYLOAD, {}), text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_knows_all_that_the_unit_of_the_guard_says(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze here")
    unit = tmp_path / "cloudrun-guard.service"
    unit.write_text("\n".join(["[Service]", "ExecStart=/bin/true", *properties(), ""]))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], text=True, capture_output=True)
    assert done.returncode == 0 and "cloudrun-guard" not in done.stderr, done.stderr


@pytest.mark.parametrize(("result", "ends"), [("success", False), ("signal", True), ("exit-code", True)])
def test_what_comes_after_the_guard_ends_a_machine_that_it_has_not(result: str, ends: bool) -> None:
    """`poweroff` says here that it was called."""
    (command,) = [each.partition("=")[2] for each in properties() if each.startswith("ExecStopPost=")]
    words = [word.replace("$$", "$") for word in shlex.split(command)]
    words[-1] = "poweroff() { echo off; }; " + words[-1]
    done = subprocess.run(words, env={"SERVICE_RESULT": result}, text=True, capture_output=True)
    assert done.stdout == "off\n" * ends


def test_the_unit_protects_nobody_from_the_memory_killer() -> None:
    """The guard protects itself; what its unit protects is inherited by the agent and by main.py."""
    assert not [each for each in properties() if each.startswith("OOMScoreAdjust")]
