"""The campaign: many runs, several at once, each in a process of its own with a watchdog.

python -m tests.chaos [N] [--seed S] [--jobs J] [--backend B] [--fault NAME] [--write docs/chaos.md]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from . import TESTS
from .table import write

WATCHDOG = 240.0  # seconds
LONG = 100  # runs from which on a campaign is written down …
PAGE = TESTS.parent / "docs" / "chaos.md"  # … there


def play_one(arguments: argparse.Namespace) -> int:
    """In this process; the result is the last line of stdout."""
    from .judges import required
    from .play import Play, folders

    began = time.monotonic()
    with folders() as (top, disks):
        print(f"in {top} {disks}", flush=True)
        play = Play(arguments.seed, top, disks, arguments.backend, arguments.fault)
        record, failures = play.play()
        if failures or arguments.verbose:
            play.show()
    apart = ("contents", "told", "versions")
    shown = {name: value for name, value in asdict(record).items() if name not in apart}
    shown.update(failures=failures, took=time.monotonic() - began)
    shown.update(required=len(required(record)), saves=len(record.versions))
    print(json.dumps(shown, default=str))
    return bool(failures)


def command(seed: int, arguments: argparse.Namespace) -> list[str]:
    more = ["--backend", arguments.backend] if arguments.backend else []
    faults = [word for name in arguments.fault for word in ("--fault", name)]
    return [sys.executable, "-m", "tests.chaos", "--one", "--seed", str(seed), *more, *faults]


def play_apart(seed: int, arguments: argparse.Namespace, watchdog: float = WATCHDOG) -> dict:
    """The result of a run that is played in another process, and ended if it does not end."""
    process = subprocess.Popen(
        command(seed, arguments),
        cwd=TESTS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=watchdog)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    lines = out.splitlines() or [""]
    try:
        result = json.loads(lines[-1])
    except ValueError:
        result = {"seed": seed, "backend": "?", "faults": [], "took": watchdog, "lag": 0.0}
        result["failures"] = [f"watchdog: it did not end within {watchdog:.0f} s: {err[-2000:]}"]
        clean_up(lines[0])
    return {**result, "shown": "\n".join(lines[1:-1])}


def clean_up(line: str) -> None:
    """What a play that was killed has left: its processes know its directories."""
    from meter import mentions

    for top in line.split()[1:]:
        for name in filter(str.isdigit, os.listdir("/proc")):
            if int(name) != os.getpid() and mentions(name, os.fsencode(top)):
                with suppress(OSError):
                    os.kill(int(name), signal.SIGKILL)
        for inner in ("share/cloudrun/instances", "disks", "containers"):
            subprocess.run(["umount", "-l", f"{top}/{inner}"], check=False, capture_output=True)
        subprocess.run(["rm", "-rf", top], check=False, capture_output=True)


def campaign(arguments: argparse.Namespace) -> int:
    seeds = range(arguments.seed, arguments.seed + arguments.n)
    results, began = [], time.monotonic()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for result in pool.map(lambda seed: play_apart(seed, arguments), seeds):
            results.append(result)
            say(result)
            if arguments.write or arguments.n >= LONG:  # each time: what is broken off has its page as well
                write(Path(arguments.write or PAGE), results, arguments.seed)
    failed = sum(bool(result["failures"]) for result in results)
    print(f"{len(results)} runs, {failed} failed, {time.monotonic() - began:.0f} s")
    return bool(failed)


def say(result: dict) -> None:
    """A line for each run; of one that failed, all that is known and how to play it again."""
    faults = "; ".join(fault["words"] + " -" * (fault["at"] is None) for fault in result["faults"])
    codes = [client["code"] for client in result.get("clients", ())]
    bad = "FAILED" if result["failures"] else "ok"
    print(result["seed"], bad, result["backend"], f"{result['took']:.1f} s", codes, faults, flush=True)
    if result["failures"]:
        print(result["shown"], *result["failures"], sep="\n    ")
        print(f"    again: make chaos N=1 SEED={result['seed']}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("n", nargs="?", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--backend", choices=("local", "gcp", "vast"))
    parser.add_argument("--fault", action="append", default=[])
    parser.add_argument("--write")
    parser.add_argument("--one", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    return play_one(arguments) if arguments.one else campaign(arguments)


if __name__ == "__main__":
    sys.exit(main())
