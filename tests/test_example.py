"""The example project, run as its users run it: main.py as a program, in a copy of the project."""

import ast
import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits"
SETTINGS = ("EPOCHS", "BATCHSIZE", "PYTHONUNBUFFERED")
PRODUCED = shutil.ignore_patterns("*.json", "*.json.tmp", "__pycache__")
WITH_SMALL_FILES = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
runpy.run_path("main.py", run_name="__main__")
"""
EPOCH_LINE = re.compile(r"epoch (\d+) loss \d+\.\d+ accuracy [01]\.\d+")


def copy_of_example(folder):
    return Path(shutil.copytree(str(EXAMPLE), str(folder / "digits"), ignore=PRODUCED))


def start(project, settings, command=("main.py",)):
    """main.py, started with these settings and no others that the developer may have exported."""
    others = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.Popen(
        [sys.executable, "-B", *command],
        cwd=str(project),
        env={**others, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(project, command=("main.py",), **settings):
    process = start(project, settings, command)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def train(project, **settings):
    """A run that must succeed: its lines on stdout, and what it said on stderr."""
    done = run(project, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def weights(project):
    return json.loads((project / "model/weights.json").read_text())


def metrics(project):
    return json.loads((project / "model/metrics.json").read_text())


def checkpoint(project):
    return json.loads((project / "checkpoint/weights.json").read_text())


@pytest.fixture
def project(tmp_path):
    return copy_of_example(tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A project after four epochs in one go."""
    project = copy_of_example(tmp_path_factory.mktemp("uninterrupted"))
    train(project, EPOCHS="4")
    return project


def test_data_are_the_real_digits():
    """1,797 rows of 64 pixels and a label, with the known number of images per digit."""
    with gzip.open(str(EXAMPLE / "data/digits.csv.gz"), "rt") as lines:
        rows = [[int(value) for value in row] for row in csv.reader(lines)]
    assert len(rows) == 1797
    assert {len(row) for row in rows} == {65}
    assert {pixel for row in rows for pixel in row[:-1]} == set(range(17))
    images = Counter(row[-1] for row in rows)
    known = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
    assert images == dict(enumerate(known))


def test_defaults_are_good_enough(project):
    """With nothing set, at least 93 % of the held-out images are classified correctly."""
    lines, stderr = train(project)
    found = metrics(project)
    assert found["accuracy"] >= 0.93
    assert (found["train_size"], found["test_size"]) == (1438, 359)
    assert (found["epochs"], found["batchsize"]) == (20, 32)
    assert 0 < found["seconds"] < 60
    assert [len(row) for row in weights(project)] == [65] * 10
    assert len(lines) == 20
    assert lines[-1].endswith(f"accuracy {found['accuracy']:.4f}")
    assert stderr == ""


def test_one_line_per_epoch(project):
    lines, _ = train(project, EPOCHS="3", BATCHSIZE="100")
    assert [EPOCH_LINE.fullmatch(line).group(1) for line in lines] == ["1", "2", "3"]
    assert metrics(project)["batchsize"] == 100


def test_a_batch_larger_than_the_data_is_all_of_it(project):
    train(project, EPOCHS="1", BATCHSIZE="1000000")
    assert metrics(project)["epochs"] == 1


def test_missing_directories_are_created(project):
    shutil.rmtree(str(project / "model"))
    shutil.rmtree(str(project / "checkpoint"))
    train(project, EPOCHS="1")
    assert weights(project) == checkpoint(project)["weights"]


def test_resumed_run_ends_with_the_same_weights(project, uninterrupted):
    train(project, EPOCHS="1")
    lines, stderr = train(project, EPOCHS="4")
    assert [line.split()[1] for line in lines] == ["2", "3", "4"]
    assert stderr == "Resuming from checkpoint/weights.json after epoch 1: going on to 4.\n"
    assert weights(project) == weights(uninterrupted)


@pytest.mark.parametrize("epochs", ["1", "2"])
def test_nothing_left_to_train(project, epochs):
    """The model is written again; its metrics tell of the training there was, not the settings."""
    train(project, EPOCHS="2", BATCHSIZE="64")
    before = weights(project), metrics(project)["accuracy"]
    shutil.rmtree(str(project / "model"))
    lines, stderr = train(project, EPOCHS=epochs, BATCHSIZE="16")
    assert lines == []
    assert stderr == "Resuming from checkpoint/weights.json after epoch 2: nothing left to train.\n"
    assert (weights(project), metrics(project)["accuracy"]) == before
    assert (metrics(project)["epochs"], metrics(project)["batchsize"]) == (2, 64)


def test_kill_leaves_a_checkpoint_to_go_on_from(project, tmp_path):
    """Killed at five different moments of an epoch, a run has lost no epoch whose line was seen.

    And lines are seen at once: kept in a buffer, the first would come after 200 epochs or so.
    """
    for delay in (0, 0.02, 0.04, 0.06, 0.08):
        process = start(project, {"EPOCHS": "1000000"})
        seen = int(process.stdout.readline().split()[1])
        time.sleep(delay)
        process.kill()
        process.communicate()
        assert seen <= checkpoint(project)["epoch"] < seen + 100
    epochs = str(checkpoint(project)["epoch"] + 1)
    train(project, EPOCHS=epochs)
    in_one_go = copy_of_example(tmp_path / "in one go")
    train(in_one_go, EPOCHS=epochs)
    assert weights(project) == weights(in_one_go)


def test_failed_write_leaves_the_old_checkpoint(project, uninterrupted):
    """A full disk in the middle of a checkpoint, played by a limit on the size of files."""
    train(project, EPOCHS="1")
    before = checkpoint(project)
    assert run(project, ("-c", WITH_SMALL_FILES), EPOCHS="4").returncode != 0
    assert (project / "checkpoint/weights.json.tmp").stat().st_size == 1000
    assert checkpoint(project) == before
    train(project, EPOCHS="4")
    assert weights(project) == weights(uninterrupted)
    assert not (project / "checkpoint/weights.json.tmp").exists()


def state(epoch=1, batchsize=32, weights=None):
    return json.dumps({"epoch": epoch, "batchsize": batchsize, "weights": weights})


ROW = [0.0] * 65
DAMAGED_CHECKPOINTS = {
    "empty": "",
    "cut off": state(weights=[ROW] * 10)[:-100],
    "not text": "\0\0\0\0",
    "a list": "[]",
    "null": "null",
    "no fields": "{}",
    "no weights": state(),
    "no epoch": state(epoch=0, weights=[ROW] * 10),
    "epoch as text": state(epoch="1", weights=[ROW] * 10),
    "no batch size": state(batchsize=None, weights=[ROW] * 10),
    "nine rows": state(weights=[ROW] * 9),
    "a short row": state(weights=[*[ROW] * 9, ROW[1:]]),
    "a missing weight": state(weights=[*[ROW] * 9, [*ROW[1:], None]]),
    "numbers for rows": state(weights=[1.0] * 10),
}


@pytest.mark.parametrize("damage", DAMAGED_CHECKPOINTS)
def test_damaged_checkpoint_is_refused(project, damage):
    """Starting over would overwrite what may still be repaired, so that is left to the user."""
    path = project / "checkpoint/weights.json"
    path.write_text(DAMAGED_CHECKPOINTS[damage])
    done = run(project, EPOCHS="1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Cannot resume from checkpoint/weights.json (")
    assert done.stderr.endswith("). Delete it to start over.\n")
    assert path.read_text() == DAMAGED_CHECKPOINTS[damage]


@pytest.mark.parametrize("text", ["abc", "0", "-3", "1.5", "", "nan"])
@pytest.mark.parametrize("name", ["EPOCHS", "BATCHSIZE"])
def test_nonsense_settings(project, name, text):
    done = run(project, **{name: text})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"Not a whole number of at least 1: {name}={text}\n"


def test_all_nonsense_is_reported_at_once(project):
    done = run(project, EPOCHS="many", BATCHSIZE="0")
    assert done.returncode == 2
    assert done.stderr == "Not a whole number of at least 1: EPOCHS=many, BATCHSIZE=0\n"


def test_missing_data(project):
    """As in a directory that is no project, where nothing must be left behind."""
    shutil.rmtree(str(project / "data"))
    shutil.rmtree(str(project / "model"))
    assert_data_are_refused(project)
    assert not (project / "model").exists()


DAMAGED_DATA = {
    "cut off": (EXAMPLE / "data/digits.csv.gz").read_bytes()[:1000],
    "empty": b"",
    "not gzip": b"1,2,3\n",
    "short rows": gzip.compress(b"1,2,3\n"),
    "empty rows": gzip.compress(b"\n\n"),
    "a label of 10": gzip.compress(b"0," * 64 + b"10\n"),
}


@pytest.mark.parametrize("damage", DAMAGED_DATA)
def test_damaged_data(project, damage):
    (project / "data/digits.csv.gz").write_bytes(DAMAGED_DATA[damage])
    assert_data_are_refused(project)


def assert_data_are_refused(project):
    done = run(project, EPOCHS="1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Cannot read data/digits.csv.gz (")
    assert done.stderr.endswith("). Is this the project directory?\n")


@pytest.mark.skipif(not hasattr(sys, "stdlib_module_names"), reason="came with Python 3.10")
def test_only_the_standard_library_is_imported():
    """A rented machine has some Python, and nothing can be assumed beyond it."""
    files = [EXAMPLE / "main.py", *(EXAMPLE / "src").rglob("*.py")]
    imported = {name for file in files for name in top_level_imports(file)}
    assert imported - {"src"} <= set(sys.stdlib_module_names)


def top_level_imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            yield node.module.split(".")[0]
