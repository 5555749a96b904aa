"""README.md says what the program does: its tables are compared with the code, its examples are run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from layers import LAYERS, spelt
from layers import table as table_of_layers

from cloudrun import config, errors
from cloudrun.backends.gcp_prices import disk_per_month
from cloudrun.backends.gcp_wanted import DISK_GB
from cloudrun.backends.vast_offers import DEFAULT_IMAGE, DOWN, EGRESS, RELIABILITY, UP
from cloudrun.cli import cli
from cloudrun.limits import DEFAULTS

TOP = Path(__file__).resolve().parent.parent
README = (TOP / "README.md").read_text(encoding="utf-8")
STOPPING = (TOP / "docs" / "stopping.md").read_text(encoding="utf-8")


def table(first_heading: str) -> dict[str, str]:
    """First cell → second cell of the table whose first heading this is."""
    lines = README.split(f"| {first_heading} |", 1)[1].splitlines()[2:]
    rows = (re.split(r"(?<!\\)\|", line) for line in lines[: next(i for i, x in enumerate(lines) if not x)])
    return {cells[1].strip(): cells[2].strip() for cells in rows}


def example(name: str, text: str = README) -> str:
    return re.split(rf"<!-- test: {name} -->\n```(?:sh)?\n", text)[1].split("```", 1)[0]


def test_every_setting_is_in_the_table_and_nothing_else() -> None:
    read = set()
    for path in (TOP / "cloudrun" / "backends").glob("*_*.py"):
        read |= set(re.findall(r'"((?:VM|VAST)_[A-Z_]+)"', path.read_text()))
    read |= set(re.findall(r'"(VM_[A-Z_]+)"', (TOP / "cloudrun/backends/gcp.py").read_text()))
    for path in (TOP / "cloudrun").glob("*.py"):
        read |= set(re.findall(r'environ(?:\.get\(|\[)"([A-Z_]+)"', path.read_text()))
        read |= set(re.findall(r'number\("([A-Z_]+)"', path.read_text()))
    read |= {name for names in config.NEEDED.values() for name in names}
    machine = {"CLOUDRUN_BOOT", "CLOUDRUN_GUARD", "TERM"}
    assert read - machine - {"CLOUDRUN_LIMITS"} == {
        name for row in table("variable") for name in re.findall(r"[A-Z_]+", row)
    }
    assert "CLOUDRUN_LIMITS" in (TOP / "CONTRIBUTING.md").read_text()


def test_every_option_is_in_the_table_and_nothing_else() -> None:
    documented = {part for row in table("option") for part in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", row)}
    context = cli.make_context("cloudrun", [], resilient_parsing=True)
    known = {name for param in cli.get_params(context) for name in [*param.opts, *param.secondary_opts]}
    assert documented == known


def test_every_command_is_in_the_table_with_its_options() -> None:
    rows = list(table("command"))
    for name, command in cli.commands.items():
        (row,) = (row for row in rows if row.startswith(f"`cloudrun {name} ") or row == f"`cloudrun {name}`")
        for param in command.params:
            if isinstance(param, click.Option) and param.name not in ("quiet",):
                assert any(option in row for option in param.opts), (name, param.opts)
    assert len(rows) == len(cli.commands) + 1


def test_every_exit_code_is_in_the_table() -> None:
    documented = {int(code) for row in table("code") for code in re.findall(r"\d+", row)}
    known = {errors.USAGE, errors.UNKNOWN, errors.STILL_BILLED, errors.LIMIT, errors.FAILED}
    assert documented == known | {0, 255} | {129, 130, 141, 143}


def test_the_seconds_in_the_text_are_those_of_the_limits() -> None:
    text = README.split("## Why it stops", 1)[1].split("## From cron", 1)[0]
    assert f"gone for {DEFAULTS['agent_gone']} s" in text
    assert f"silent for {DEFAULTS['agent_silence'] // 60} minutes" in text
    assert f"after {DEFAULTS['grace_interrupt']} s SIGTERM" in text
    assert f"after {DEFAULTS['grace_terminate']} more SIGKILL" in text
    grace, save = DEFAULTS["reserve_grace"], DEFAULTS["reserve_save"]
    assert f"{grace} s, and {save} s or twice the longest save" in text


def test_the_layers_and_their_bounds_are_those_that_are_tested() -> None:
    section = README.split("## Why it stops", 1)[1].split("\n## ", 1)[0]
    head, line, *rows = table_of_layers({})
    assert f"{head}\n{line}\n" in section and "(docs/stopping.md)" in section
    for layer, row in zip(LAYERS.values(), rows, strict=True):
        assert section.count(layer.row() + " ") == 1, row


def test_what_is_said_of_stopping_is_what_the_limits_say() -> None:
    assert f"ends the machine itself, {DEFAULTS['agent_gone']} s later" in STOPPING
    assert f"{DEFAULTS['agent_gone']} s after the agent's death" in STOPPING
    assert f"silent for {DEFAULTS['agent_silence'] // 60} minutes, and at the deadline" in STOPPING
    assert f"**The provider**, {DEFAULTS['provider']} s after the deadline" in STOPPING
    boot, begin, pull = (f"{DEFAULTS[name] / 60:.0f}" for name in ("boot", "provisioning", "pull"))
    times = f"no sign of life for {boot} minutes (on vast.ai: {begin} until the host begins, {pull} to load"
    assert times in STOPPING.replace("\n   ", " ")
    silent = 1.5 * DEFAULTS["agent_silence"] + 2 * DEFAULTS["state"]
    assert f"silent for {spelt(silent).replace(' min', ' minutes')}," in STOPPING
    assert 2 * DEFAULTS["self_end"] == DEFAULTS["provider"] == 60, "it says a minute for both"
    price = disk_per_month("pd-balanced", DISK_GB)
    assert f"{DISK_GB} GB are about {price:.0f} USD a month" in STOPPING
    assert f"about {price / 730:.3f} USD an hour" in STOPPING


def test_what_is_said_of_vast_is_what_the_code_does() -> None:
    section = README.split("## Runs on vast.ai", 1)[1].split("\n## ", 1)[0]
    for name, words in (("provisioning", "begin within"), ("pull", "image within"), ("boot", "life within")):
        assert f"{words} {DEFAULTS[name] / 60:.0f}" in section
    assert f"out of reach for {DEFAULTS['away'] / 60:.0f} minutes" in section
    assert f"reliability of {RELIABILITY}, {DOWN:.0f} Mbit/s down and {UP:.0f} up" in section
    assert f"{EGRESS} USD per GB" in section and DEFAULT_IMAGE in README


def test_what_a_parked_machine_costs_is_what_the_prices_say() -> None:
    section = README.split("## Google Cloud", 1)[1].split("\n## ", 1)[0]
    price = disk_per_month("pd-balanced", DISK_GB)
    assert f"{DISK_GB} GB are about {price:.0f} USD a month" in section
    for name in ("GCP_ACCOUNT", "GCLOUD_PROJECT", "GCS_DIR", "VM_INSTANCE", "VM_USER"):
        assert f"export {name}=" in section


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """Cron's environment, but for a PATH with our cloudrun on it, and one project."""
    programs, project = tmp_path / "bin", tmp_path / "project"
    programs.mkdir()
    (programs / "cloudrun").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{TOP}/bin/cloudrun" "$@"\n')
    (programs / "cloudrun").chmod(0o755)
    (project / "model").mkdir(parents=True)
    (project / "main.py").write_text(
        "import os\nrate = os.environ.get('RATE', 'none')\nprint('rate', rate)\n"
        "open('model/rate.txt', 'w').write(rate)\n"
    )
    path = f"{programs}:{os.path.dirname(shutil.which('python3') or '')}:/usr/bin:/bin"
    (tmp_path / ".profile").write_text(f"export PATH='{path}'\n")
    return {"HOME": str(tmp_path), "PATH": path, "PROJECT": str(project)}


def test_the_examples_about_stopping_work_as_written(shell: dict[str, str]) -> None:
    """Where nothing is billed both say nothing."""
    for name in ("look", "crontab"):
        text = re.sub(r"^\*/15( \*){4} ", "", example(name, STOPPING))
        done = subprocess.run(["sh", "-c", text], env=shell, cwd="/", capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), name


def test_the_cron_example_works_as_written(shell: dict[str, str]) -> None:
    subprocess.run(["sh", "-c", example("cron")], env=shell, cwd="/", check=True, stdin=subprocess.DEVNULL)
    project = Path(shell["PROJECT"])
    assert (project / "run.log").read_text() == "rate none\n"
    assert (project / "model" / "rate.txt").read_text() == "none"


def test_the_script_example_works_as_written(shell: dict[str, str]) -> None:
    project = Path(shell["PROJECT"])
    done = subprocess.run(["sh", "-c", example("script")], env=shell, cwd=project, stdin=subprocess.DEVNULL)
    assert done.returncode == 0
    found = {path.name: path.read_text() for path in (project / "model").iterdir()}
    assert found.pop("rate.txt") == "0.1"
    ((name, rate),) = found.items()
    assert name.startswith("rate.txt.") and rate == "0.3"


def test_the_script_example_passes_a_failure_on(shell: dict[str, str]) -> None:
    project = Path(shell["PROJECT"])
    (project / "main.py").write_text("import os, sys\nsys.exit(3 if os.environ['RATE'] == '0.3' else 0)\n")
    assert subprocess.run(["sh", "-c", example("script")], env=shell, cwd=project).returncode == 3
