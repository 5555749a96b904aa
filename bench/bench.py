"""What cloudrun costs, beside the obvious alternative on the same machine, in the same run.

    make bench                        every table
    make bench ARGS="help latency"    some of: help first-byte many-files large-file latency throughput quiet

Medians of interleaved repetitions, because machines are noisy. The budget is what the project promises;
a bench never fails. Needs about 5 GB of disk for the two large ones, and rsync for one of them.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
CLOUDRUN = [sys.executable, str(TOP / "bin" / "cloudrun")]
EMPTY_CLICK = "import click\n@click.command()\ndef main(): pass\nmain()"
SEND = """
import gc, os, resource, sys, time
gc.set_threshold(100_000)  # as the command line does
from cloudrun.config import from_env
from cloudrun.report import Report
from cloudrun.start import Wanted, prepare, store
from cloudrun.storage import open_bucket
began = time.perf_counter()
settings = from_env(os.environ, os.getcwd())
bucket = open_bucket(settings.bucket)
report = Report(quiet=True, verbose=False, environ={})
store(prepare(settings, bucket), settings, Wanted(["main.py"], {}), 0.0, (bucket, report))
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

Row = tuple[str, str, str, str, str]


def main(names: list[str]) -> None:
    tables: dict[str, Callable[[Path], list[Row]]] = {
        "help": help_text,
        "first-byte": first_byte,
        "many-files": many_files,
        "large-file": large_file,
        "latency": latency,
        "throughput": throughput,
        "quiet": quiet,
    }
    print(row("what", "cloudrun", "alternative", "ratio", "budget"))
    for name, measure in tables.items():
        if not names or name in names:
            with tempfile.TemporaryDirectory(prefix="cloudrun-bench-") as folder:
                for line in measure(Path(folder)):
                    print(row(*line), flush=True)


def row(*cells: str) -> str:
    return "{:<44} {:>16} {:>26} {:>7}  {}".format(*cells)


def environment(folder: Path) -> dict[str, str]:
    env = {key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ}
    env.update(HOME=str(folder), XDG_DATA_HOME=str(folder / "share"), XDG_CACHE_HOME=str(folder / "cache"))
    return dict(env, CLOUDRUN_BACKEND="local", PYTHONPATH=str(TOP))


def project(folder: Path, program: str) -> Path:
    path = folder / "project"
    for name in ("data", "model", "checkpoint"):
        (path / name).mkdir(parents=True, exist_ok=True)
    (path / "main.py").write_text(program)
    return path


def seconds(command: list[str], **options: object) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    return time.perf_counter() - began


def interleaved(times: int, *measures: Callable[[], float]) -> list[float]:
    """The median of each, measured in turn; one turn before that warms the caches."""
    for measure in measures:
        measure()
    results = [[measure() for measure in measures] for _ in range(times)]
    return [statistics.median(column) for column in zip(*results, strict=True)]


def help_text(folder: Path) -> list[Row]:
    env = environment(folder)
    ours, click = interleaved(
        21,
        lambda: seconds([*CLOUDRUN, "--help"], env=env),
        lambda: seconds([sys.executable, "-c", EMPTY_CLICK], env=env),
    )
    more = f"+{(ours - click) * 1000:.0f} ms"
    return [("cloudrun --help", ms(ours), f"{ms(click)} empty Click", more, "+40 ms")]


def first_byte(folder: Path) -> list[Row]:
    env, path = environment(folder), project(folder, "print('x', flush=True)\n")

    def until_first(command: list[str]) -> float:
        began = time.perf_counter()
        pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
        with subprocess.Popen(command, cwd=path, env=env, stdout=pipe, stderr=quiet) as process:
            assert process.stdout
            process.stdout.read(1)
            return time.perf_counter() - began

    ours, plain = interleaved(
        15, lambda: until_first([*CLOUDRUN, "main.py"]), lambda: until_first(["python", "main.py"])
    )
    more = f"+{(ours - plain) * 1000:.0f} ms"
    return [("Enter to the first byte of output", ms(ours), f"{ms(plain)} python main.py", more, "+250 ms")]


def many_files(folder: Path) -> list[Row]:
    env, path = environment(folder), project(folder, "")
    make_files(path / "data", 100_000)
    rsync = shutil.which("rsync")
    copy = [rsync, "-a"] if rsync else ["cp", "-a"]
    first, again, memory, copied = [], [], [], []
    for turn in range(3):
        target = folder / f"copy{turn}"
        copied.append(seconds([*copy, f"{path}/", f"{target}/"]))
        shutil.rmtree(target)
        forget(folder)
        took, peak = send(path, env)
        first.append(took)
        took, peak_again = send(path, env)
        again.append(took)
        memory.append(max(peak, peak_again))
    ours, theirs = statistics.median(first), statistics.median(copied)
    alternative = f"{theirs:.2f} s {'rsync -a' if rsync else 'cp -a (no rsync)'}"
    return [
        ("100,000 files, 1 GB: first send", f"{ours:.2f} s", alternative, f"{ours / theirs:.2f}", "1.5"),
        ("the same, unchanged", f"{statistics.median(again):.2f} s", "", "", "1.5 s"),
        ("the same, memory", f"{max(memory):.0f} MB", "", "", "200 MB"),
    ]


def forget(folder: Path) -> None:
    """The bucket and the index are empty again; the agent is built once for each version, not each send."""
    for name in ("share", "cache/cloudrun/index"):
        shutil.rmtree(folder / name, ignore_errors=True)


def make_files(folder: Path, count: int) -> None:
    """Files of 1 kB to 20 kB, a thousand in a directory; the same ones every time."""
    dice = random.Random(1)
    block = dice.randbytes(1 << 20)
    for number in range(count):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.bin"
        path.parent.mkdir(exist_ok=True)
        start = dice.randrange(len(block) - 20_000)
        path.write_bytes(number.to_bytes(4, "big") + block[start : start + dice.randrange(1000, 19_000)])


def send(path: Path, env: dict[str, str]) -> tuple[float, float]:
    """(seconds, peak memory in MB) of scanning and sending a project, without a machine."""
    command = [sys.executable, "-c", SEND]
    text = subprocess.run(command, cwd=path, env=env, check=True, capture_output=True, text=True).stdout
    took, peak = text.split()
    return float(took), float(peak)


def large_file(folder: Path) -> list[Row]:
    env, path = environment(folder), project(folder, "")
    data, block = path / "data" / "large", random.Random(1).randbytes(1 << 20)
    with open(data, "wb") as file:
        for number in range(1000):
            file.write(number.to_bytes(4, "big") + block[4:])

    def ours() -> float:
        forget(folder)
        return send(path, env)[0]

    def theirs() -> float:
        (folder / "copy").unlink(missing_ok=True)
        return seconds(["cp", str(data), str(folder / "copy")])

    def both() -> float:
        return theirs() + seconds(["sha256sum", str(folder / "copy")])

    sent, copied, copied_and_summed = interleaved(5, ours, theirs, both)
    what, took = "1 GB in one file: send and sha256", f"{sent:.2f} s"
    summed = f"{copied_and_summed:.2f} s cp + sha256sum"
    return [
        (what, took, f"{copied:.2f} s cp", f"{sent / copied:.2f}", "1.5"),
        ("the same", took, summed, f"{sent / copied_and_summed:.2f}", ""),
    ]


LINES = """
import random, time
time.sleep(0.5)
for number in range(600):
    print(f"{time.time():.6f}", flush=True)
    time.sleep(random.expovariate(25))
"""


def latency(folder: Path) -> list[Row]:
    env, path = environment(folder), project(folder, LINES)

    def delays(command: list[str]) -> list[float]:
        with subprocess.Popen(
            command, cwd=path, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout
            return sorted(time.time() - float(line) for line in iter(process.stdout.readline, b""))

    ours, plain = delays([*CLOUDRUN, "main.py"]), delays(["python", "main.py"])
    return [
        (
            f"a line to the terminal, {what}",
            ms(at(ours, share)),
            f"{ms(at(plain, share))} python main.py",
            "",
            budget,
        )
        for what, share, budget in (("median", 0.5, ""), ("99th percentile", 0.99, "300 ms"))
    ]


def at(values: list[float], share: float) -> float:
    return values[min(int(len(values) * share), len(values) - 1)]


OUTPUT = "import os\nblock = bytes(range(256)) * 256\nfor _ in range(3200):\n    os.write(1, block)\n"
MEGABYTES = 3200 * 65536 / 1e6


def throughput(folder: Path) -> list[Row]:
    env, path = environment(folder), project(folder, OUTPUT)

    def took(command: list[str]) -> float:
        """From the first byte to the last one."""
        with subprocess.Popen(
            command, cwd=path, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout
            process.stdout.read(1)
            began, last = time.perf_counter(), 0.0
            while process.stdout.read1(1 << 20):  # type: ignore[attr-defined]
                last = time.perf_counter()
            return last - began

    ours, plain = interleaved(5, lambda: took([*CLOUDRUN, "main.py"]), lambda: took(["python", "main.py"]))
    speed, alone = MEGABYTES / ours, MEGABYTES / plain
    return [
        (
            "210 MB of output",
            f"{speed:.0f} MB/s",
            f"{alone:.0f} MB/s python main.py",
            f"{speed / alone:.2f}",
            "50 MB/s",
        )
    ]


def quiet(folder: Path) -> list[Row]:
    """Agent and guard while main.py sleeps."""
    env, path = environment(folder), project(folder, "import time\ntime.sleep(40)\n")
    with subprocess.Popen([*CLOUDRUN, "-q", "main.py"], cwd=path, env=env) as process:
        time.sleep(5)
        pids = [pid for pid in os.listdir("/proc") if pid.isdigit() and is_ours(pid, folder)]
        memory = sum(rss(pid) for pid in pids)
        before, span = sum(map(cpu_seconds, pids)), 20
        time.sleep(span)
        used = sum(map(cpu_seconds, pids)) - before
        process.terminate()
    return [
        ("agent and guard, memory", f"{memory:.0f} MB", "", "", "45 MB"),
        ("agent and guard, main.py quiet", f"{used / span:.2%} of a core", "", "", "1 %"),
    ]


def is_ours(pid: str, folder: Path) -> bool:
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    roles = (b"CLOUDRUN_ROLE=guard", b"CLOUDRUN_ROLE=agent")
    return os.fsencode(str(folder)) in environ and any(role in environ for role in roles)


def rss(pid: str) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def cpu_seconds(pid: str) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ms(value: float) -> str:
    return f"{value * 1000:.0f} ms"


if __name__ == "__main__":
    main(sys.argv[1:])
