"""The client as its users meet it: signals, terminals, closed streams, cron, slow readers."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from client import COMMAND, SLEEPER, STUBBORN, TOP, Home, ended, open_home, says, wait_until

LAST_LINE = re.compile(
    r"cloudrun: exit 0 · ran \d+\.\d s · billed \d+\.\d s · 0\.00 USD \(local\) · 1 output fetched \(4 B\) · "
    r"seen ended \d\d:\d\d:\d\d UTC\n\Z"
)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    yield from open_home(tmp_path)


# --- signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_first_signal_asks_saves_and_ends(home: Home, name: str) -> None:
    project = home.project(SLEEPER)
    process = home.start(project, "main.py")
    says(process)
    process.send_signal(getattr(signal, name))
    code, out, err = ended(process)
    assert code == 128 + getattr(signal, name)
    assert "asked by SIGINT" in out
    assert "cloudrun: ending main.py and saving; once more ends the machine at once\n" in err
    assert "ended by the user (exit 7)" in err
    assert (project / "model/weights").read_text() == "half"
    receipt = home.read(home.only_run(), "receipt.json")
    assert (receipt["reason"], receipt["by"], receipt["status"]) == ("stopped", name, 7)
    home.assert_over()


def test_the_second_signal_ends_the_machine_now_and_keeps_the_last_save(home: Home) -> None:
    project = home.project(STUBBORN + "\n", name="toy")
    (project / "main.py").write_text("open('model/w', 'w').write('saved')\n" + STUBBORN)
    process = home.start(project, "main.py")
    says(process)
    run = home.only_run()
    wait_until(home.object(run, "outputs.json").exists)
    process.send_signal(signal.SIGINT)
    wait_until(home.object(run, "control.json").exists)
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == 130 and "ended by the user, at once" in err
    assert (project / "model/w").read_text() == "saved"
    assert home.read(run, "bill.json")["reason"] == "stopped"
    home.assert_over()


def test_ctrl_c_while_it_sends_leaves_nothing(home: Home) -> None:
    project = home.project("print(1)\n")
    with open(project / "big", "wb") as file:
        file.truncate(1 << 31)
    process = home.start(project, "main.py")
    wait_until(lambda: list((home.bucket / ".tmp").glob("*")) if home.bucket.exists() else None)
    process.send_signal(signal.SIGINT)
    code, out, err = ended(process)
    assert (code, out) == (130, "") and err.endswith("cloudrun: interrupted by SIGINT\n")
    assert home.runs() == [] and not list((home.bucket / ".tmp").iterdir())
    assert home.machines() == []


def test_nohup_ignores_sighup_and_the_program_does_not(home: Home) -> None:
    project = home.project(
        "import signal\nprint(signal.getsignal(signal.SIGHUP) == signal.SIG_DFL)\n" + SLEEPER
    )
    process = home.start(project, "main.py", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    says(process, b"True\nrunning")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    code, out, _ = ended(process)
    assert code == 130 and "asked by SIGINT" in out
    assert home.read(home.only_run(), "receipt.json")["by"] == "SIGINT"


def test_a_client_that_is_killed_leaves_a_run_that_finishes(home: Home) -> None:
    project = home.project(
        "import time\nprint('running', flush=True)\ntime.sleep(0.5)\nopen('model/w','w')\n"
    )
    process = home.start(project, "main.py")
    says(process)
    process.kill()
    process.communicate()
    done = home.run(project, "wait")
    assert done.returncode == 0 and "exit 0" in done.stderr
    assert home.run(project, "pull").returncode == 0 and (project / "model/w").exists()
    home.assert_over()


def test_if_client_lost_stop_ends_the_run(tmp_path: Path) -> None:
    for home in open_home(tmp_path, client_lost=1):
        process = home.start(home.project(SLEEPER), "--if-client-lost", "stop", "main.py")
        says(process)
        process.kill()
        process.communicate()
        run = home.only_run()
        wait_until(home.object(run, "receipt.json").exists)
        assert home.read(run, "receipt.json")["reason"] == "client-lost"
        assert home.run(home.top / "toy", "wait").returncode == 129
        home.assert_over()


def test_if_client_lost_stop_does_not_end_the_run_of_a_client_that_is_there(tmp_path: Path) -> None:
    for home in open_home(tmp_path, client_lost=1):
        project = home.project("import time\ntime.sleep(2.5)\n")
        assert home.run(project, "--if-client-lost=stop", "main.py").returncode == 0


# --- streams


PRINTS = "import sys\nfor i in range(20000):\n    print(i, 'x' * 60)\nsys.stdout.flush()\n"


def test_output_is_the_programs_byte_for_byte_and_nothing_else(home: Home) -> None:
    text = bytes(range(256)) * 300 + b"\nno newline at the end"
    main = (
        "import sys\nsys.stdout.buffer.write(bytes(range(256)) * 300 + b'\\nno newline at the end')\n"
        "sys.stdout.flush()\nsys.stderr.write('to stderr\\n')\nopen('model/w', 'w').write('four')\n"
    )
    process = home.start(home.project(main), "main.py")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == text
    words = err.decode()
    assert "\x1b" not in words and "\r" not in words
    assert "to stderr\n" in words and LAST_LINE.search(words)
    assert all(line.startswith("cloudrun: ") for line in words.splitlines() if line != "to stderr")


def test_stdout_is_closed_early(home: Home) -> None:
    main = "import time\nfor i in range(600):\n    print(i, flush=True)\n    time.sleep(0.1)\n"
    project = home.project(main)
    command = f"'{COMMAND[0]}' '{COMMAND[1]}' main.py | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=project, env=home.env, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "0\n141\n", done.stderr
    receipt = home.read(home.only_run(), "receipt.json")
    assert (receipt["reason"], receipt["by"]) == ("stopped", "SIGPIPE")
    home.assert_over()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams(home: Home, closed: str) -> None:
    project = home.project("print('out')\nopen('model/w', 'w').write('four')\n")
    command = f"'{COMMAND[0]}' '{COMMAND[1]}' main.py {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=project, env=home.env, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (project / "model/w").read_text() == "four" and (project / "main.py").read_text()[0] == "p"
    assert done.stdout == (b"" if ">&- 2" in closed or closed == ">&-" else b"out\n")
    home.assert_over()


def test_a_slow_reader_gets_everything(home: Home) -> None:
    process = home.start(home.project(PRINTS), "main.py")
    assert process.stdout
    wait_until(lambda: home.runs() and home.object(home.only_run(), "receipt.json").exists())
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == b"".join(b"%d %s\n" % (i, b"x" * 60) for i in range(20000))


@pytest.mark.parametrize("both", [False, True])
def test_ctrl_c_while_nobody_reads_the_output(home: Home, both: bool) -> None:
    """The pipe is full, with `both` also the one of our own words; two signals end it all the same."""
    process = home.start(
        home.project(PRINTS + SLEEPER), "main.py", stderr=subprocess.STDOUT if both else subprocess.DEVNULL
    )
    run = wait_until(home.runs)[0]
    wait_until(home.object(run, "attempts/1/log/00000001").exists)
    time.sleep(0.3)  # until the pipe is full; when it is not, this test is only easier
    process.send_signal(signal.SIGINT)
    wait_until(home.object(run, "control.json").exists)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    process.communicate()
    home.assert_over()


# --- terminals


def on_terminal(
    slave: int, command: list[str], project: Path, env: dict[str, str]
) -> subprocess.Popen[bytes]:
    """A process whose terminal this is; our own end of it is closed."""
    process = subprocess.Popen(
        command,
        cwd=project,
        env=env,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    return process


class Terminal:
    """cloudrun on a pseudo terminal; `seen` is what came out of it."""

    def __init__(self, home: Home, project: Path, *arguments: str, **env: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 90, 0, 0))
        self.seen = b""
        environ = {**home.env, "TERM": "xterm", **env}
        self.process = on_terminal(slave, [*COMMAND, *arguments], project, environ)

    def read_until(self, word: bytes) -> None:
        while word not in self.seen:
            self.seen += os.read(self.master, 65536)

    def read(self) -> tuple[int, str]:
        try:
            while piece := os.read(self.master, 65536):
                self.seen += piece
        except OSError:  # closed
            pass
        return self.process.wait(60), self.seen.decode().replace("\r\n", "\n")


SLOW = "import time\ntime.sleep(0.8)\nprint('first', flush=True)\ntime.sleep(0.8)\nprint('second')\n"


def test_a_terminal_shows_a_status_line_that_makes_room_for_the_output(home: Home) -> None:
    code, seen = Terminal(home, home.project(SLOW), "main.py", LANG="C.UTF-8").read()
    assert code == 0
    assert re.search(r"\rcloudrun: run · \d\.\d s · ends by \d\d:\d\d UTC\x1b\[K", seen)
    assert "\r\x1b[Kfirst\n" in seen and "\r\x1b[Ksecond\n" in seen
    assert re.search(r"(\n|\r\x1b\[K)cloudrun: exit 0 · ran [^\r\x1b]*\n\Z", seen)


def test_a_terminal_shows_the_progress_of_sending_and_fetching(home: Home) -> None:
    project = home.project("print('done')\n")
    with open(project / "big", "wb") as file:
        file.truncate(1 << 30)
    code, seen = Terminal(home, project, "main.py").read()
    assert code == 0
    bars = re.findall(r"\rcloudrun: sending \[#*-*\] [\d.]+ .?B of 1\.1 GB, \d of 2 files", seen)
    assert len(bars) > 1
    drawn = re.findall(r"\r(cloudrun: [^\x1b\r\n]*)\x1b\[K", seen)
    assert drawn and all(len(line) <= 89 for line in drawn)
    assert "done\n" in seen.replace("\r\x1b[K", "\n")


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_dumb_terminals_and_no_color(home: Home, env: dict[str, str]) -> None:
    code, seen = Terminal(home, home.project(SLOW), "--output", "../x", "main.py", **env).read()
    assert code == 2 and "\x1b" not in seen and "--output ../x" in seen
    code, seen = Terminal(home, home.project(SLOW), "main.py", **env).read()
    assert code == 0 and "first\n" in seen
    assert ("\x1b[K" in seen) == ("NO_COLOR" in env) and "\x1b[3" not in seen


def test_errors_are_coloured_on_a_terminal(home: Home) -> None:
    code, seen = Terminal(home, home.project(SLOW), "nothing.py").read()
    assert code == 2 and "\x1b[31mcloudrun: there is no file nothing.py" in seen


def test_a_terminal_is_safe_from_the_program_and_a_pipe_gets_every_byte(home: Home) -> None:
    text = "\x1b[31mred\x1b[0m\x1b]0;title\x07\x1b[2J\x1b[H 5%\r10%\x1b[Aend\x9b2J\n"
    project = home.project(f"import sys\nsys.stdout.buffer.write({text.encode()!r})\n")
    code, seen = Terminal(home, project, "-q", "main.py").read()
    assert (code, seen) == (0, "\x1b[31mred\x1b[0m 5%\r10%end2J\n")
    done = subprocess.run([*COMMAND, "-q", "main.py"], cwd=project, env=home.env, capture_output=True)
    assert done.stdout == text.encode()


def test_ctrl_c_on_a_terminal_reaches_the_program_through_the_bucket_only(home: Home) -> None:
    terminal = Terminal(home, home.project(SLEEPER), "main.py")
    terminal.read_until(b"running")
    os.write(terminal.master, b"\x03")
    code, seen = terminal.read()
    assert code == 130 and seen.count("asked by SIGINT") == 1
    home.assert_over()


def test_a_closed_terminal_ends_the_run_and_saves(home: Home) -> None:
    project = home.project(SLEEPER)
    terminal = Terminal(home, project, "main.py")
    terminal.read_until(b"running")
    os.close(terminal.master)
    assert terminal.process.wait(60) == 129
    assert (project / "model/weights").read_text() == "half"
    assert home.read(home.only_run(), "receipt.json")["by"] == "SIGHUP"
    home.assert_over()


def test_a_closed_terminal_with_nohup_changes_nothing(home: Home) -> None:
    project = home.project(
        "import time\nprint('running', flush=True)\n"
        "for _ in range(10):\n    time.sleep(0.1)\n    print('more', flush=True)\nopen('model/w', 'w')\n"
    )
    master, slave = pty.openpty()
    process = on_terminal(slave, ["nohup", *COMMAND, "main.py"], project, home.env)
    wait_until(lambda: home.runs() and list(home.object(home.only_run(), "attempts/1/log").glob("*")))
    os.close(master)
    assert process.wait(60) == 0
    assert (project / "model/w").exists() and "running\nmore" in (project / "nohup.out").read_text()


# --- quiet, verbose, cron


def test_quiet_says_only_what_is_wrong(home: Home) -> None:
    project = home.project("import sys\nprint('out')\nsys.exit(int(sys.argv[1]))\n")
    done = home.run(project, "-q", "main.py", "3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "")
    (project / "main.py").write_text("import time\ntime.sleep(60)\n")
    done = home.run(project, "-q", "--max-hours", "0.0008", "main.py")
    assert done.returncode == 124 and "ended at the deadline" in done.stderr
    assert home.run(project, "wait", "-q").stderr == home.run(project, "-q", "wait").stderr == ""


def test_verbose_says_at_least_as_much(home: Home) -> None:
    done = home.run(home.project("print(1)\n"), "-v", "main.py")
    assert done.returncode == 0 and "cloudrun: sending" in done.stderr


def test_crons_empty_environment(home: Home) -> None:
    project = home.project("import sys\nprint(sys.version_info[0] == 3)\n")
    command = ["env", "-i", f"HOME={home.home}", *COMMAND, "main.py"]
    done = subprocess.run(
        command, cwd=project, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "because neither VM_INSTANCE nor VAST_API_KEY is set" in done.stderr
    assert (home.home / ".local/share/cloudrun/bucket/toy/runs").is_dir()


NO_HOME = """
import sys
sys.path[:0] = {path!r}
import cloudrun.cli, cloudrun.closing, cloudrun.config, cloudrun.project, cloudrun.start
import os, platformdirs, platformdirs.unix, pwd
os.setgid(54321)
os.setuid(54321)  # from here on it cannot read root's Python
sys.argv = ["cloudrun", "main.py"]
cloudrun.cli.main()
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user that has no home")
def test_no_home_at_all_is_a_clear_sentence(tmp_path: Path) -> None:
    """A user id without an entry in the password database, as in many containers."""
    project = Path("/") / "tmp" / f"cloudrun-no-home-{os.getpid()}"
    project.mkdir(mode=0o755)
    try:
        (project / "main.py").write_text("print(1)\n")
        program = NO_HOME.format(path=[path for path in (*sys.path, str(TOP)) if path])
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=project, env={}, capture_output=True, text=True, timeout=60)
    finally:
        (project / "main.py").unlink()
        project.rmdir()
    assert done.returncode == 2, done.stderr
    assert done.stderr == "cloudrun: there is no home directory: set HOME or XDG_DATA_HOME\n"
