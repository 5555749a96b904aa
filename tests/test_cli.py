"""The command line: what it accepts and refuses, what its commands do to runs, what it never shows."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from client import COMMAND, SLEEPER, TOP, Home, ended, open_home, says, wait_until

from cloudrun.cli import cli

ECHO = (
    "import os, sys\nprint(sys.argv, os.environ.get('KEY'))\n"
    "open('model/w', 'w').write('w')\nsys.exit(int(os.environ.get('CODE', 0)))\n"
)
FIELDS = {
    *("schema", "run", "project", "directory", "host", "backend", "attempt", "state", "started", "deadline"),
    *("price_usd_per_hour", "reason", "exit_code", "run_seconds", "billed_seconds", "cost_usd"),
    *("gpu_usd", "disk_usd", "traffic_usd", "ended_by", "proof", "note"),
}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    yield from open_home(tmp_path)


def tree(top: Path) -> dict[str, Any]:
    """Every path below, with its content and times."""
    found: dict[str, Any] = {}
    for path in sorted(top.rglob("*")):
        status = path.stat()
        found[str(path)] = (status.st_mtime_ns, status.st_mode, path.is_file() and path.read_bytes())
    return found


# --- errors


def test_all_problems_at_once(home: Home) -> None:
    arguments = ["--backend", "aws", "--max-hours", "soon", "--max-cost=-1", "-e", "NOPE", "-e", "=x"]
    done = home.run(home.project(ECHO), *arguments, "-o", "/tmp", "--json", "no/where", "nothing.py")
    assert (done.returncode, done.stdout) == (2, "")
    for problem in (
        "there is no file nothing.py in ",
        "CLOUDRUN_BACKEND=aws: not one of gcp, vast, local",
        "CLOUDRUN_MAX_HOURS=soon: not a number above 0",
        "CLOUDRUN_MAX_COST=-1: not a number above 0",
        "-e NOPE: not set here; give a value, -e NOPE=VALUE",
        "-e =x: not set here",
        "--output /tmp: not a directory inside the project",
        "--json no/where: cannot write there",
    ):
        assert f"cloudrun: {problem}" in done.stderr
    assert not (home.top / "data").exists()


@pytest.mark.parametrize(
    ("env", "missing"),
    [
        ({"VM_INSTANCE": "box"}, "the gcp backend also needs GCLOUD_PROJECT, GCS_DIR"),
        ({"VM_INSTANCE": "box", "GCS_DIR": "gs://b/d"}, "the gcp backend also needs GCLOUD_PROJECT"),
        ({"CLOUDRUN_BACKEND": "vast"}, "the vast backend also needs VAST_API_KEY, GCS_DIR"),
        ({"VAST_API_KEY": "k"}, "the vast backend also needs GCS_DIR"),
        ({"GCS_DIR": "s3://bucket"}, "GCS_DIR=s3://bucket: not gs://bucket/directory or file:///directory"),
        ({"CLOUDRUN_LIMITS": "stop=1e9"}, "CLOUDRUN_LIMITS: stop must be above 0 and at most 60"),
    ],
)
def test_half_set_backends_name_every_missing_variable(home: Home, env: dict[str, str], missing: str) -> None:
    del home.env["CLOUDRUN_BACKEND"]
    done = home.run(home.project(ECHO), "main.py", env=env)
    assert done.returncode == 2 and missing in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--colour", "main.py"], "No such option"),
        (["--if-client-lost", "explode", "main.py"], "is not one of"),
        (["-e"], "requires an argument"),
        (["logs", "a", "b"], "unexpected extra argument"),
        (["ps", "--now"], "No such option"),
        (["--detach", "ps"], "--detach before ps: only starting a run takes this option"),
        (["--json", "x", "ps"], "--json before ps"),
        (["--json", "main.py", "main.py"], "that file is there, and is no record of a run"),
        (["--json", "model", "main.py"], "--json model: cannot write there"),
        (["--json", "absent/x", "main.py"], "--json absent/x: cannot write there"),
        (["--max-hours", "1e-5", "main.py"], "allow more with --max-hours"),
        (["completion", "tcsh"], "is not one of"),
        (["logs", "nothing"], "there is no run 'nothing' in file://"),
        (["wait"], "no run was started from this directory"),
        (["../other/main.py"], "is outside the project"),
        (["model"], "there is no file model in"),
        ([], "Usage: cloudrun [OPTIONS] SCRIPT [ARGS]..."),
    ],
)
def test_wrong_usage_is_exit_2(home: Home, arguments: list[str], words: str) -> None:
    done = home.run(home.project(ECHO), *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr


def test_home_and_root_are_no_projects(home: Home) -> None:
    (home.home / "main.py").write_text("")
    for folder in (home.home, Path("/")):
        done = home.run(folder, "main.py")
        assert done.returncode == 2 and "never sends a whole home or disk" in done.stderr
    done = home.run(home.top, "main.py")
    assert done.returncode == 2 and "there is no main.py in" in done.stderr


# --- the script and its arguments


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["-q", "-v"],
        ["--"],
        ["--", "-x", "--"],
        ["--unknown=1", "-e", "A"],
        ["ps", ""],
        ["a b", "ä"],
    ],
)
def test_what_follows_the_script_belongs_to_the_program(home: Home, arguments: list[str]) -> None:
    done = home.run(home.project(ECHO), "main.py", *arguments)
    assert (done.returncode, done.stdout) == (0, f"{['main.py', *arguments]} None\n")


@pytest.mark.parametrize(
    ("script", "given", "argv0"),
    [
        ("ps", ["./ps"], "ps"),
        ("my-train-2.py", ["my-train-2.py"], "my-train-2.py"),
        ("-x.py", ["--", "-x.py"], "./-x.py"),
        ("-x.py", ["./-x.py"], "./-x.py"),
        ("src/deep.py", ["src/../src/deep.py"], "src/deep.py"),
    ],
)
def test_names_of_scripts(home: Home, script: str, given: list[str], argv0: str) -> None:
    project = home.project(ECHO)
    (project / "src").mkdir()
    (project / script).write_text(ECHO)
    done = home.run(project, *given, "one")
    assert (done.returncode, done.stdout) == (0, f"{[argv0, 'one']} None\n"), done.stderr


def test_values_for_the_program(home: Home) -> None:
    project = home.project(ECHO)
    done = home.run(project, "-e", "KEY", "--env", "CODE=4", "main.py", env={"KEY": "from here"})
    assert (done.returncode, done.stdout) == (4, "['main.py'] from here\n")
    assert home.run(project, "-e", "KEY=a=b", "main.py").stdout == "['main.py'] a=b\n"
    assert home.run(project, "-e", "KEY=", "main.py").stdout == "['main.py'] \n"
    assert home.run(project, "main.py", env={"KEY": "not passed on"}).stdout == "['main.py'] None\n"


SECRET = "correct-horse-battery-staple"


def command_lines() -> dict[int, bytes]:
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            found[int(name)] = Path(f"/proc/{name}/cmdline").read_bytes()
    return found


def test_values_are_in_one_object_and_nowhere_else(home: Home) -> None:
    main = "import os\nassert len(os.environ['KEY']) == 28\n" + SLEEPER
    project = home.project(main)
    process = home.start(project, "-v", "-e", "KEY", "main.py", env={"KEY": SECRET})
    says(process)
    run = home.only_run()
    assert not [pid for pid, line in command_lines().items() if SECRET.encode() in line]
    told = home.run(project, "ps", "--json").stdout + home.run(project, "ps").stdout
    holders = [
        path for path in home.top.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()
    ]
    assert holders == [home.object(run, "env.json")]
    assert holders[0].stat().st_mode & 0o077 == 0
    assert home.read(run, "order.json")["env"] == ["KEY"]
    process.send_signal(signal.SIGINT)
    code, out, err = ended(process)
    told += out + err + home.run(project, "wait", "--json").stdout + home.run(project, "logs").stdout
    assert code == 130 and SECRET not in told
    assert not [p for p in home.top.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    home.assert_over()


# --- dry runs


def test_a_dry_run_does_nothing_and_says_everything(home: Home) -> None:
    project = home.project(ECHO, **{".env": "S=1", "data.csv": "1,2\n"})
    time.sleep(2.1)  # younger files are read again, because their times say nothing yet
    assert home.run(project, "main.py").returncode == 0
    (project / "new.py").write_text("x = 1\n")
    before = tree(home.top)
    arguments = [
        "--dry-run",
        "-e",
        f"KEY={SECRET}",
        "-o",
        "plots",
        "--max-hours",
        "2",
        "main.py",
        "--fast",
        "a b",
    ]
    done = home.run(project, *arguments, env={"CLOUDRUN_PRICE": "0.5"})
    assert done.returncode == 0
    assert tree(home.top) == before
    lines = done.stdout.splitlines()
    assert lines[0] == f"to file://{home.bucket}/toy:"
    assert any(line.startswith("  have main.py (") for line in lines)
    assert "  send new.py (6 B)" in lines and "  leave .env (secrets)" in lines
    assert any(line.startswith("  2 of 4 files, 7 B of ") for line in lines)  # model/w is new as well
    assert "run: main.py --fast 'a b', with KEY from -e" in lines
    on = r"on: this computer \(local\), 0.5 USD/h, ends by 20\d\d-\d\d-\d\d \d\d:\d\d UTC, at most 1.01 USD"
    assert any(re.fullmatch(on, line) for line in lines), lines
    assert "bring back: model, checkpoint, plots" in lines
    assert SECRET not in done.stdout + done.stderr


def test_a_dry_run_in_a_new_home_makes_no_directory(home: Home) -> None:
    project = home.project(ECHO)
    before = tree(home.top)
    assert home.run(project, "--dry-run", "main.py").returncode == 0
    assert tree(home.top) == before


# --- runs that outlive their client


def test_detach_ps_logs_wait_stop(home: Home) -> None:
    project = home.project(SLEEPER)
    done = home.run(project, "--detach", "main.py")
    run = done.stdout.strip()
    assert re.fullmatch(r"toy-\d{8}-\d{6}-[0-9a-f]{4}", run) and done.stdout == run + "\n"
    assert home.object(run, "attempts/1/state.json").exists() and len(home.machines()) >= 2
    listing = home.run(project, "ps").stdout.splitlines()
    assert listing[0].split() == ["RUN", "STATE", "BACKEND", "AGE", "USD/H"] and run in listing[1]
    wait_until(lambda: "running" in home.run(project, "logs", run[-4:]).stdout)
    done = home.run(project, "stop")
    assert done.returncode == 0 and "ended by the user (exit 7)" in done.stderr
    assert home.run(project, "wait", run).returncode == 130
    assert home.run(project, "ps").stdout == ""
    assert json.loads(home.run(project, "ps", "--json").stdout) == []
    done = home.run(project, "stop", run)
    assert done.returncode == 0 and f"{run} has ended already" in done.stderr
    done = home.run(project, "pull")
    assert done.returncode == 0 and "1 output fetched (4 B), 0 were here already" in done.stderr
    assert (project / "model/weights").read_text() == "half"
    home.assert_over()


def test_stop_now(home: Home) -> None:
    project = home.project(
        "import time\nopen('model/w', 'w').close()\nprint('running', flush=True)\ntime.sleep(60)"
    )
    run = home.detach(project, "main.py")
    wait_until(home.object(run, "outputs.json").exists)
    done = home.run(project, "stop", "--now", run)
    assert done.returncode == 0 and "ended by the user, at once" in done.stderr
    assert home.run(project, "wait", run).returncode == 130
    assert home.run(project, "pull", run).returncode == 0 and (project / "model/w").exists()
    home.assert_over()


def test_which_run_is_meant(home: Home) -> None:
    """By id, by a unique part, not by an ambiguous one; without one the latest of this directory."""
    (home.top / "a").mkdir()
    first = home.project(ECHO, "a/toy")
    (home.top / "b").mkdir()
    second = home.project("print('the second')\n", "b/toy")
    one = home.detach(first, "main.py", "one")
    two = home.detach(first, "main.py", "two")
    other = home.detach(second, "main.py")
    for run in (one, two, other):
        assert home.run(first, "wait", run).returncode == 0
    assert "two" in home.run(first, "logs").stdout
    assert home.run(second, "logs").stdout == "the second\n"
    assert "one" in home.run(second, "logs", one).stdout
    parts = [one[-k:] for k in range(4, len(one)) if one[-k:] not in two and one[-k:] not in other]
    assert "one" in home.run(second, "logs", parts[0]).stdout
    done = home.run(first, "logs", "toy-2")
    assert done.returncode == 2 and "is part of 3 runs" in done.stderr
    done = home.run(home.top, "wait")
    assert done.returncode == 2 and "no run was started from this directory" in done.stderr


def test_a_run_whose_machine_cannot_be_seen_from_here_is_left_alone(home: Home) -> None:
    """Not to see a machine is no proof that it has ended."""
    project = home.project(SLEEPER)
    run = home.detach(project, "main.py")
    order = home.object(run, "order.json")
    order.write_text(json.dumps({**json.loads(order.read_text()), "place": "elsewhere:/home"}))
    for command in ("wait", "stop"):
        done = home.run(project, command, run)
        assert done.returncode == 2 and "elsewhere:/home" in done.stderr
    assert home.machines() and not home.object(run, "bill.json").exists()


def test_json_has_exactly_the_documented_fields(home: Home) -> None:
    project = home.project(SLEEPER)
    done = home.run(project, "--detach", "main.py", env={"CLOUDRUN_PRICE": "3600"})
    run = done.stdout.strip()
    (record,) = json.loads(home.run(project, "ps", "--json").stdout)
    assert set(record) == FIELDS | {"machine"} and record["schema"] == 1
    assert (record["run"], record["directory"]) == (run, str(project.resolve()))
    assert record["exit_code"] is record["cost_usd"] is record["proof"] is None
    assert (record["machine"], record["note"]) == (f"{run}-1", None)
    assert home.run(project, "stop").returncode == 0
    record = json.loads(home.run(project, "wait", "--json").stdout)
    assert set(record) == FIELDS
    assert (record["state"], record["reason"], record["exit_code"]) == ("ended", "stopped", 130)
    assert record["cost_usd"] == pytest.approx(record["billed_seconds"]) and record["ended_by"] == "agent"
    readme = (TOP / "README.md").read_text()
    table = readme.split("| field | meaning |", 1)[1].split("\n\n")[0]
    documented = {
        word
        for row in table.splitlines()
        for word in re.findall(r"`(\w+)`", row.split("|")[1] if "|" in row else "")
    }
    assert documented == FIELDS | {"fetched", "beside", "machine"}


def test_json_to_a_file(home: Home) -> None:
    project = home.project(ECHO)
    done = home.run(project, "--json", "../out.json", "-e", "CODE=3", "main.py")
    assert done.returncode == 3
    record = json.loads((home.top / "out.json").read_text())
    assert set(record) == FIELDS | {"fetched", "beside"}
    assert (record["exit_code"], record["fetched"], record["beside"]) == (3, ["model/w"], [])


@pytest.mark.parametrize("command", [["wait"], ["logs", "-f"]])
def test_ctrl_c_in_a_follower_does_not_end_the_run(home: Home, command: list[str]) -> None:
    project = home.project(SLEEPER)
    run = home.detach(project, "main.py")
    follower = home.start(project, *command, run, stderr=subprocess.STDOUT)
    if command == ["wait"]:
        time.sleep(0.5)  # it is silent; should it not be there yet, it is interrupted earlier
    else:
        says(follower)
    follower.send_signal(signal.SIGINT)
    assert ended(follower)[0] in (130, -signal.SIGINT)
    assert not home.object(run, "control.json").exists() and home.machines()
    assert home.run(project, "stop", "--now").returncode == 0


def test_a_second_client_follows_a_running_run(home: Home) -> None:
    main = "import time\nprint('running', flush=True)\nfor i in range(8):\n    time.sleep(0.1)\n"
    main += "    print(i)\nexit(9)\n"
    project = home.project(main)
    process = home.start(project, "main.py")
    says(process)
    waiting = home.start(project, "wait")
    following = home.start(project, "logs", "-f")
    assert ended(process)[0] == 9
    code, out, err = ended(waiting)
    assert (code, out) == (9, "") and "cloudrun: exit 9 · ran " in err and "fetched" not in err
    code, out, _ = ended(following)
    assert (code, out) == (0, "running\n" + "".join(f"{i}\n" for i in range(8)))
    home.assert_over()


def test_logs_follow_stops_when_nobody_reads(home: Home) -> None:
    project = home.project(
        "import time\nfor i in range(600):\n    print(i, flush=True)\n    time.sleep(0.1)\n"
    )
    run = home.detach(project, "main.py")
    command = f"'{COMMAND[0]}' '{COMMAND[1]}' logs -f {run} | head -1"
    done = subprocess.run(["sh", "-c", command], cwd=project, env=home.env, capture_output=True, timeout=60)
    assert done.stdout == b"0\n" and not home.object(run, "control.json").exists()
    assert home.run(project, "stop", "--now").returncode == 0


def test_two_runs_at_once_do_not_overwrite_each_other(home: Home) -> None:
    main = "import sys, time\ntime.sleep(0.3)\nopen('model/w', 'w').write(sys.argv[1])\n"
    project = home.project(main)
    clients = [home.start(project, "main.py", word) for word in ("one", "two")]
    ends = [ended(client) for client in clients]
    assert [code for code, _, _ in ends] == [0, 0]
    found = {path.name: path.read_text() for path in (project / "model").iterdir()}
    (beside,) = set(found) - {"w"}
    assert sorted(found.values()) == ["one", "two"] and beside.startswith("w.toy-")
    assert sum(f"stored as model/{beside}: the file here is not what" in err for _, _, err in ends) == 1
    home.assert_over()


def test_a_file_that_changed_here_meanwhile_is_kept(home: Home) -> None:
    project = home.project(ECHO)
    (project / "model/w").write_text("sent")
    run = home.detach(project, "main.py")
    (project / "model/w").write_text("edited")
    assert home.run(project, "wait").returncode == 0
    done = home.run(project, "pull")
    assert (project / "model/w").read_text() == "edited"
    assert (project / f"model/w.{run}").read_text() == "w" and f"stored as model/w.{run}" in done.stderr


# --- help, completion, imports


def test_help_has_every_option_command_and_examples(home: Home) -> None:
    done = home.run(home.project(ECHO), "--help")
    assert done.returncode == 0 and done.stderr == ""
    for param in cli.params:
        assert all(name in done.stdout for name in param.opts if name.startswith("-"))
    for name, command in cli.commands.items():
        assert f"  {name} " in done.stdout and "..." not in (command.get_short_help_str(60))
        own = home.run(home.project(ECHO), name, "--help")
        assert own.returncode == 0
        assert all(
            option in own.stdout for param in command.params for option in param.opts if option[0] == "-"
        )
    assert "Examples:" in done.stdout and "cloudrun -e EPOCHS=20 main.py --fast" in done.stdout
    for code in ("121", "122", "124", "125", "130"):
        assert code in done.stdout
    assert home.run(home.project(ECHO), "-h").stdout == done.stdout
    assert home.run(home.project(ECHO), "--version").stdout.startswith("cloudrun, version ")


IMPORTS = """
import sys
before = set(sys.modules)
sys.path[:0] = {path!r}
sys.argv = ["cloudrun", *{arguments!r}]
import atexit
atexit.register(lambda: open({out!r}, "w").write("\\n".join(set(sys.modules) - before)))
from cloudrun.cli import main
main()
"""


def imported(home: Home, project: Path, *arguments: str) -> set[str]:
    out = home.top / "imports"
    path = [path for path in (str(TOP), *sys.path) if path]
    program = IMPORTS.format(path=path, arguments=list(arguments), out=str(out))
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=project, env=home.env, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(out.read_text().split("\n"))


def test_help_imports_click_and_the_standard_library_only(home: Home) -> None:
    found = imported(home, home.project(ECHO), "--help")
    tops = {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names)
    assert tops <= {"click", "cloudrun", "typing_extensions", "_virtualenv"}
    assert {name for name in found if name.startswith("cloudrun.")} == {"cloudrun.cli", "cloudrun.errors"}
    assert not found & {
        "subprocess",
        "asyncio",
        "socket",
        "ssl",
        "urllib.request",
        "logging",
        "multiprocessing",
    }


@pytest.mark.parametrize("arguments", [["main.py"], ["--dry-run", "main.py"], ["ps"]])
def test_the_run_path_imports_no_plumbum_and_no_sdk(home: Home, arguments: list[str]) -> None:
    found = imported(home, home.project(ECHO), *arguments)
    tops = {name.partition(".")[0] for name in found}
    assert not tops & {"plumbum", "google", "vastai", "pathspec", "requests", "asyncio"}
    assert not {name for name in found if name.startswith("cloudrun.agent")}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(home: Home, shell: str) -> None:
    done = home.run(home.project(ECHO), "completion", shell)
    assert done.returncode == 0 and "_CLOUDRUN_COMPLETE" in done.stdout and shell in done.stdout
    program = shutil.which(shell)
    if program:
        subprocess.run([program, "-n", "/dev/stdin"], input=done.stdout, text=True, check=True)


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["cloudrun", "st"], {"stop"}),
        (["cloudrun", "--max-"], {"--max-hours", "--max-cost"}),
        (["cloudrun", "stop", "--n"], {"--now"}),
        (["cloudrun", "--if-client-lost", ""], {"finish", "stop"}),
        (["cloudrun", "completion", ""], {"bash", "zsh", "fish"}),
    ],
)
def test_bash_really_completes(home: Home, words: list[str], expected: set[str]) -> None:
    bin_ = home.top / "bin"
    bin_.mkdir()
    (bin_ / "cloudrun").write_text(f'#!/bin/sh\nexec "{COMMAND[0]}" "{COMMAND[1]}" "$@"\n')
    (bin_ / "cloudrun").chmod(0o755)
    quoted = " ".join(f"'{word}'" for word in words)
    program = (
        'compopt() { :; }\neval "$(cloudrun completion bash)"\n'
        f"COMP_WORDS=({quoted})\nCOMP_CWORD={len(words) - 1}\n"
        "_cloudrun_completion cloudrun\nprintf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    env = {**home.env, "PATH": f"{bin_}:{home.env['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", program], cwd=home.project(ECHO), env=env, capture_output=True, text=True, timeout=60
    )
    assert set(done.stdout.split()) == expected, done.stderr
