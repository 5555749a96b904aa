"""The shape of the package: who imports whom, how long things are, and where anything may be caught."""

from __future__ import annotations

import ast
import io
import tokenize
from collections import defaultdict
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
PACKAGE = TOP / "cloudrun"

# Each line may import the lines below it, and itself only as far as ITSELF says.
LAYERS = (
    ("cli",),
    ("doctor.vast",),
    ("launch", "doctor.gcp"),
    ("doctor.access", "doctor.bucket", "doctor.machines"),
    ("doctor",),
    ("doctor.google",),
    ("commands", "closing"),
    ("drill", "listing", "offers"),
    ("run", "start", "sweep"),
    ("follow",),
    ("bill",),
    ("late", "handover"),
    ("output", "pull", "send", "runs"),
    ("order", "receipt", "report", "signals", "terminal"),
    ("index",),
    ("backends.local", "backends.gcp", "backends.vast"),
    ("backends.gcp_left", "backends.vast_money"),
    ("backends.vast_console", "backends.vast_jobs", "backends.vast_state"),
    ("backends.gcp_api", "backends.gcp_boot", "backends.gcp_vm", "backends.vast_api", "backends.vast_boot"),
    ("backends.gcp_wire",),
    ("backends",),
    ("zipapp",),
    ("backends.gcp_wanted",),
    ("backends.gcp_prices", "backends.gcp_shapes", "backends.vast_offers"),
    ("project", "config"),
    ("storage.folder", "storage.gcs", "storage.rest", "limits"),
    ("gs",),
    ("storage", "account"),
    ("background", "cache", "formats", "jsonapi", "processes"),
    ("errors",),
    ("guard", ""),
)
ITSELF = {("commands", "closing"), ("agent.", "agent.")}
# A storage or a backend is imported by the one function that opens it; what is typed only is no import.
OPENED = {
    ("storage", "storage.folder"),
    ("storage", "storage.gcs"),
    ("storage", "storage.rest"),
    ("backends", "backends.local"),
    ("backends", "backends.gcp"),
    ("backends", "backends.vast"),
    ("doctor", "doctor.gcp"),
    ("doctor", "doctor.vast"),
}
AGENT_MAY = {"agent", "background", "formats", "errors", "gs", "jsonapi", "processes", "storage"}
SENT = (
    "background",
    "errors",
    "formats",
    "gs",
    "jsonapi",
    "processes",
    "storage",
    "storage.folder",
    "storage.rest",
)

CATCH_ALL = {
    "backends/gcp_wire.py: patiently",  # what the SDK raises is translated, its own errors and others'
    "backends/vast_api.py: _load",  # the same
    "backends/gcp_wire.py: _run",  # an error of a thread is kept for who waits for it
    "agent/main.py: main",  # the machine has to end, whatever it is
    "agent/main.py: work",  # main.py's end is reported, whatever went wrong around it
    "agent/save.py: every_so_often",  # what goes wrong now can go right the next time
    "agent/watch.py: run",  # an error of a thread is kept for who waits for it
    "cli.py: main",  # the error boundary
    "guard.py: be_agent",  # a fork must not go on as a second guard
    "guard.py: main",  # the machine has to end, whatever it is
    "doctor/__init__.py: _work",  # a check that breaks must not hide the others
    "background.py: _run",  # an error of a thread is kept for who waits for it
    "sweep.py: visit",  # one damaged run must not hide the next machine
    "bill.py: see_ended",  # the undo step: nothing may keep it from trying again
}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
CLIENT = [name for name in MODULES if name.partition(".")[0] != "agent"]


def imports(name: str, *, typed: bool = False) -> set[str]:
    """Full names of what a module imports, inside functions too; `typed`: for annotations only, too."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not typed:
            skipped.update(child for part in node.body for child in ast.walk(part))
    found = set()
    for node in ast.walk(TREES[name]):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {full for full in names if full.removeprefix("cloudrun.") in MODULES}
            found |= modules or {node.module or ""}
    return found


def ours(name: str, *, typed: bool = False) -> set[str]:
    found = (full for full in imports(name, typed=typed) if full.partition(".")[0] == "cloudrun")
    return {full.removeprefix("cloudrun").removeprefix(".") for full in found}


def test_every_module_has_a_layer() -> None:
    layered = [name for layer in LAYERS for name in layer]
    assert sorted(layered) == sorted(name for name in CLIENT if name != "agent")


def test_imports_point_one_way() -> None:
    layer_of = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    wrong = [
        f"{name} imports {other}"
        for name in CLIENT
        for other in ours(name)
        if layer_of[other] <= layer_of[name]
        and (name, other) not in ITSELF | OPENED
        and not (name == "backends.local" and other == "guard")
    ]
    assert wrong == []


def test_nobody_imports_in_a_circle() -> None:
    graph = {name: ours(name) for name in CLIENT}
    for pair in OPENED:
        graph[pair[0]].discard(pair[1])
    done: set[str] = set()
    while len(done) < len(graph):
        free = {name for name, others in graph.items() if name not in done and others <= done}
        assert free, {name: graph[name] - done for name in graph if name not in done}
        done |= free


def test_only_cli_knows_click() -> None:
    assert [
        name for name in MODULES if any(x.split(".")[0] == "click" for x in imports(name, typed=True))
    ] == ["cli"]


def test_guard_imports_nothing_of_ours_and_nobody_else_is_sent_alone() -> None:
    assert ours("guard", typed=True) == set()
    assert all(node.split(".")[0] in STDLIB for node in imports("guard"))


STDLIB = __import__("sys").stdlib_module_names


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("agent")] + list(SENT))
def test_what_is_sent_imports_the_standard_library_and_what_is_sent(name: str) -> None:
    for full in imports(name, typed=True):
        top, _, rest = full.partition(".")
        if top == "cloudrun":
            assert rest.split(".")[0] in AGENT_MAY, (name, full)
        else:
            assert top in STDLIB, (name, full)


def test_the_client_never_imports_the_agent() -> None:
    assert not [name for name in CLIENT if any(other.startswith("agent") for other in ours(name, typed=True))]


def test_backends_and_storages_know_neither_the_run_nor_each_other() -> None:
    for name in CLIENT:
        family, dot, _ = name.partition(".")
        if family in ("backends", "storage") and dot:
            for other in ours(name, typed=True):
                assert other.split(".")[0] not in ("run", "commands", "cli", "follow", "start", "closing")
                # A backend's own parts carry its name: gcp, gcp_shapes.
                own = name.partition("_")[0] == other.partition("_")[0]
                assert own or not other.startswith(family + "."), f"{name} imports {other}"
                assert other.split(".")[0] != ("storage" if family == "backends" else "backends")


# --- sizes


# What one place needs that machines and buckets can be in; the rest of the client knows none of them.
PLACES = {
    "local": ("backends.local", "storage.folder"),
    "rented": ("agent.account", "agent.earlier", "agent.environment"),
    "vast": ("backends.vast",),
    "gcp": ("backends.gcp", "storage.gcs", "storage.rest", "gs", "jsonapi", "account"),
    "stranger": ("agent.alone", "handover", "late"),
    "doctor": ("doctor",),
    "care": ("commands", "drill", "listing", "offers", "sweep"),
}


def code_lines(path: Path) -> int:
    """Lines that are neither blank, nor comment, nor docstring."""
    source = path.read_text()
    docs: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            docs |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    empty = (
        *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
        *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
    )
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in empty:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


SIZES = {
    "client": 3110,
    "care": 740,  # what is done for runs and machines by other commands than that which started them
    "agent": 950,  # a container ends itself, and may start again
    "local": 450,
    "rented": 250,
    "gcp": 1900,
    "stranger": 450,
    "doctor": 770,
    "vast": 1000,
}


@pytest.mark.parametrize(("part", "most"), SIZES.items())
def test_the_package_stays_small(part: str, most: int) -> None:
    sizes: defaultdict[str, int] = defaultdict(int)
    for name, path in MODULES.items():
        place = next((place for place, names in PLACES.items() if name.startswith(names)), "")
        family = "agent" if name.startswith("agent") else "guard" if name == "guard" else "client"
        sizes[place or family] += code_lines(path)
    assert sizes[part] <= most, dict(sizes)


def test_the_guard_stays_small() -> None:
    assert code_lines(PACKAGE / "guard.py") <= 180  # a way to fetch and a way to end for each kind of place


def test_no_file_is_long() -> None:
    assert {
        str(path): n for path in MODULES.values() if (n := len(path.read_text().splitlines())) > 400
    } == {}


def functions() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (str(path.relative_to(PACKAGE)), node)
        for name, path in MODULES.items()
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_no_function_is_long() -> None:
    long = {f"{path}: {f.name}" for path, f in functions() if (f.end_lineno or 0) - f.lineno >= 50}
    assert long == set()


def test_most_functions_are_short() -> None:
    lengths = sorted((f.end_lineno or 0) - f.lineno + 1 for _, f in functions())
    assert lengths[len(lengths) // 2] <= 10


def test_nobody_takes_many_arguments_by_position() -> None:
    """make_order is the one place where an order is put together."""
    many = {
        f"{path}: {f.name}"
        for path, f in functions()
        if len(f.args.args) - (f.args.args[:1] != [] and f.args.args[0].arg == "self") > 6
    }
    assert many <= {"start.py: make_order"}


def test_everything_is_caught_in_named_places_only() -> None:
    found = set()
    for path, function in functions():
        for node in ast.walk(function):
            if isinstance(node, ast.ExceptHandler):
                kinds = [] if node.type is None else ast.unparse(node.type).strip("()").split(", ")
                again = any(isinstance(x, ast.Raise) and x.exc is None for x in ast.walk(node))
                if (not kinds or set(kinds) & {"Exception", "BaseException"}) and not again:
                    found.add(f"{path}: {function.name}")
    assert found <= CATCH_ALL, found - CATCH_ALL
    # The agent's letters to the client: whatever went wrong with one, the next may arrive.
    assert [name for name, path in MODULES.items() if "suppress(Exception" in path.read_text()] in (
        [],
        ["agent.watch"],
    )


def test_nothing_is_left_to_do_and_nothing_is_hidden() -> None:
    for path in MODULES.values():
        text = path.read_text()
        assert not any(word in text for word in ("TODO", "FIXME", "XXX")), path
        for node in ast.walk(ast.parse(text)):
            assert not isinstance(node, ast.Global), f"{path} keeps state in a module"
    assert not {"utils", "helpers", "common", "manager"} & {path.stem for path in MODULES.values()}


def test_no_secret_switch_turns_a_layer_off() -> None:
    from cloudrun.limits import DEFAULTS, limits

    for name, value in DEFAULTS.items():
        assert value > 0
        for wrong in (0, -1, value * 1.01, float("inf"), float("nan")):
            with pytest.raises(ValueError, match=name):
                limits({"CLOUDRUN_LIMITS": f"{name}={wrong}"})
