"""Which files go up, which stay here and why, and what is no project at all."""

import contextlib
import json
import os
import socket
import subprocess

import pytest

from cloudrun.config import project_name
from cloudrun.errors import CloudrunError, UsageError
from cloudrun.project import check_project, returned, scan, summary

RUN = "p-20261125-092000-abcd"
LONG = "x" * 199  # a part of a path; 20 of them and 19 slashes are 3,999 bytes
CREDENTIAL = '{"client_email": "x@y", "type": "service_account"}'


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty directory with a main.py, which is the current one, as it is for the program."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    put("main.py", "print(1)\n")
    return folder


def put(path, content=""):
    """Write a file; the directories above it are made one by one, because the path may be very long."""
    folder = os.path.dirname(path)
    parts = folder.split("/") if folder else []
    for number in range(len(parts)):
        with contextlib.suppress(FileExistsError):
            os.mkdir("/".join(parts[: number + 1]))
    with open(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def found():
    """What goes up, by path; main.py always does."""
    paths = {item.path: item for item in scan(".").found}
    del paths["main.py"]
    return paths


def left_out(why):
    return scan(".").left_out.get(why, [])


def test_code_and_the_three_directories_go_up(project):
    names = ["checkpoint/c", "data/a/b", "model/m", "src/x.py", "requirements.txt", "notes/n", ".hidden"]
    for name in names:
        put(name, name)
    assert sorted(found()) == sorted(names)
    assert scan(".").left_out == {}
    assert found()["src/x.py"].status.st_size == 8


def test_the_order_is_that_of_the_names(project):
    for name in ("data/b/1", "data/b.txt", "data/a", "z", "data/b/0", "b"):
        put(name)
    assert [item.path for item in scan(".").found] == [
        "b",
        "data/a",
        "data/b/0",
        "data/b/1",
        "data/b.txt",
        "main.py",
        "z",
    ]


def test_empty_files_and_directories_are_kept(project):
    put("data/empty")
    os.makedirs("data/nothing/below")
    os.makedirs("model")
    os.makedirs("src/empty")
    assert sorted(found()) == ["data/empty", "data/nothing/below", "model", "src/empty"]


@pytest.mark.parametrize(
    "name",
    [
        *(b"two words", b"line\nbreak", b"-rf", b"--force", b"tab\t", b"\xff\xfe", b"caf\xe9", "é".encode()),
        *(b"quote'\"", b"back\\slash", b"*", b"#x", b"!x", b"x ", b" ", b"n" * 255, b"\x01\x1b[31m", b"~"),
    ],
)
@pytest.mark.parametrize("folder", [b"data", b"src"])
def test_odd_names(project, folder, name):
    path = os.fsdecode(folder + b"/" + name)
    put(path, "x")
    put(".gitignore", "*.log\n/[ab]\n")
    assert path in found()
    os.rename(path, os.fsdecode(folder + b"/" + name[:200] + b".log"))
    summary(scan(".").left_out).encode("utf-8")


def test_a_path_of_4000_bytes(project):
    path = "data/" + "/".join([LONG] * 19 + ["y" * 194])
    assert len(path) == 3999
    put(path, "x")
    put("src/" + path[5:], "x")
    assert sorted(found()) == sorted([path, "src/" + path[5:]])


def test_directories_deeper_than_python_can_call_itself(project):
    try:
        subprocess.run(["mkdir", "-p", "data/" + "d/" * 1900], check=True)
        put("data/" + "d/" * 1900 + "x", "x")
        assert list(found()) == ["data/" + "d/" * 1900 + "x"]
    finally:
        subprocess.run(["rm", "-rf", "data"], check=True)  # too deep for those who clean up after tests


def test_links_in_data_are_followed(project, tmp_path):
    (tmp_path / "elsewhere" / "inner").mkdir(parents=True)
    (tmp_path / "elsewhere" / "inner" / "x").write_text("content")
    os.makedirs("data")
    os.symlink(tmp_path / "elsewhere", "data/set")
    os.symlink(tmp_path / "elsewhere" / "inner" / "x", "data/file")
    items = found()
    assert sorted(items) == ["data/file", "data/set/inner/x"]
    assert not any(item.link for item in items.values())
    assert items["data/file"].status.st_size == 7


def test_data_may_be_a_link_itself(project, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_text("content")
    os.symlink(tmp_path / "elsewhere", "data")
    assert sorted(found()) == ["data/x"]


def test_links_elsewhere_stay_links_if_they_stay_inside(project):
    put("src/x", "")
    os.symlink("x", "src/same")
    os.symlink("src", "code")
    os.makedirs("model")
    os.symlink("../main.py", "model/m")
    assert {path: item.link for path, item in found().items()} == {
        **{"code": "src", "src/same": "x", "src/x": "", "model/m": "../main.py"}
    }


@pytest.mark.parametrize("target", ["../outside", "/etc/passwd", "..", "src/../../x"])
def test_links_that_leave_the_project_are_left_out_and_said(project, target):
    os.symlink(target, "link")
    os.makedirs("model")
    os.symlink("../" + target if target[0] == "." else target, "model/link")
    assert sorted(found()) == ["model"] or target == "src/../../x"
    assert "link" in left_out("links that leave the project")


def test_loops_and_dangling_links_in_data_are_left_out_and_said(project):
    os.makedirs("data/a/b")
    os.symlink("self", "data/self")
    os.symlink("..", "data/a/up")
    os.symlink(".", "data/a/here")
    os.symlink(os.getcwd(), "data/a/project")
    os.symlink("nothing", "data/dangling")
    put("data/a/b/x")
    assert sorted(found()) == ["data/a/b/x"]
    assert sorted(left_out("link loops")) == ["data/a/here", "data/a/project", "data/a/up", "data/self"]
    assert left_out("dangling links") == ["data/dangling"]


def test_a_data_directory_that_is_a_loop_or_dangling(project):
    os.symlink("data", "data")
    os.symlink("nothing", "model")
    assert left_out("link loops") == ["data"]
    assert found().keys() <= {"model"}


def test_sockets_and_pipes_are_left_out_and_said(project):
    os.makedirs("data")
    os.mkfifo("data/pipe")
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        assert sorted(left_out("sockets, pipes and devices")) == ["data/pipe", "pipe", "socket"]
    assert list(found()) == ["data"]


def test_an_ignore_file_that_is_a_pipe_does_not_block(project):
    os.mkfifo(".gitignore")
    assert left_out("sockets, pipes and devices") == [".gitignore"]


def test_ignore_files_hold_for_code_and_not_for_data(project):
    put(".gitignore", "*.log\nbuild/\n/only-here\nmodel/\ndata\n")
    put(".cloudrunignore", "big\n")
    names = ["x.log", "build/x", "only-here", "src/only-here", "src/x.log", "src/big/x", "big"]
    for name in [*names, "data/x.log", "data/build/x", "model/x.log", "checkpoint/big"]:
        put(name)
    kept = ["checkpoint/big", "data/build/x", "data/x.log", "model/x.log", "src/only-here"]
    assert sorted(found()) == [".cloudrunignore", ".gitignore", *kept]
    assert sorted(left_out(".gitignore")) == ["build", "only-here", "src/x.log", "x.log"]
    assert sorted(left_out(".cloudrunignore")) == ["big", "src/big"]


def test_nested_ignore_files_and_negation(project):
    put(".gitignore", "*.log\n")
    put("src/.gitignore", "!keep.log\n/local\n")
    for name in (
        "keep.log",
        "src/keep.log",
        "src/drop.log",
        "src/in/keep.log",
        "src/local",
        "src/in/local",
        "local",
    ):
        put(name)
    expected = ["local", "src/in/keep.log", "src/in/local", "src/keep.log"]
    assert [path for path in found() if ".gitignore" not in path] == expected


def test_nothing_below_an_ignored_directory_comes_back(project):
    put(".gitignore", "build/\n!build/keep\n")
    put("build/keep")
    assert list(found()) == [".gitignore"]


def test_an_ignore_file_in_no_encoding_we_know(project):
    put(".gitignore", b"\xef\xbb\xbf*.log\r\ncaf\xe9\n# \xff\n")
    put("x.log")
    put(os.fsdecode(b"caf\xe9"))
    assert list(found()) == [".gitignore"]


@pytest.mark.parametrize("line", ["!", "a\\", "[z-a]"])
def test_a_line_that_is_no_pattern_is_an_error_that_names_the_file(project, line):
    put("src/.gitignore", f"*.log\n{line}\n")
    put("src/x")
    with pytest.raises(CloudrunError, match=r"src/\.gitignore: .*; correct that line"):
        scan(".")


def test_caches_and_environments_are_left_out(project):
    for name in (
        "__pycache__/x",
        ".git/config",
        ".venv/x",
        "env3/pyvenv.cfg",
        "env3/x",
        "src/node_modules/x",
        "a.pyc",
    ):
        put(name)
    assert sorted(found()) == ["src"]
    assert sorted(scan(".").left_out) == ["caches", "version control", "virtual environments"]


SECRETS = [".env", ".env.local", "key.pem", "id_rsa", "id_ed25519", "id_mine", "sub/id_rsa.pub", "sub/.env"]


def test_secrets_are_left_out_and_named(project):
    for name in SECRETS:
        put(name, "secret")
    put("account.json", CREDENTIAL)
    put("sub/client.json", '{"installed": {"client_secret": "x"}}')
    for name in ("settings.json", "id_map.py", "environment", "pem"):
        put(name, json.dumps({"type": "other"}))
    assert sorted(found()) == ["environment", "id_map.py", "pem", "settings.json", "sub"]
    assert sorted(left_out("secrets")) == sorted([*SECRETS, "account.json", "sub/client.json"])


@pytest.mark.parametrize("name", [*SECRETS, "account.json"])
def test_an_exclamation_mark_brings_a_secret_back(project, name):
    put(name, CREDENTIAL)
    put(".cloudrunignore", f"!{os.path.basename(name)}\n")
    assert name in found()


def test_what_an_earlier_pull_stored_beside_is_never_sent(project):
    for name in (f"model/x.{RUN}", f"data/x.{RUN}", f"x.{RUN}", f"model/.cloudrun-pull-77.{RUN}"):
        put(name)
    put("model/x.p-2026", "")
    assert sorted(found()) == ["data", "model/x.p-2026"]
    assert len(left_out("stored beside by an earlier pull")) == 4


needs_user = pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")


@needs_user
@pytest.mark.parametrize("path", ["data/locked", "src/locked"])
def test_a_directory_that_cannot_be_read_is_an_error_that_names_it(project, path):
    put(path + "/x")
    os.chmod(path, 0)
    try:
        with pytest.raises(CloudrunError, match=f"{path}.*Permission denied; make it readable"):
            scan(".")
    finally:
        os.chmod(path, 0o700)


@needs_user
def test_an_ignore_file_that_cannot_be_read_is_an_error(project):
    put(".gitignore", "*.log")
    os.chmod(".gitignore", 0)
    with pytest.raises(CloudrunError, match=r"\.gitignore: Permission denied"):
        scan(".")


@needs_user
def test_a_link_in_data_to_what_cannot_be_read_is_an_error(project, tmp_path):
    (tmp_path / "locked" / "in").mkdir(parents=True)
    os.makedirs("data")
    os.symlink(tmp_path / "locked" / "in", "data/set")
    os.chmod(tmp_path / "locked", 0)
    try:
        with pytest.raises(CloudrunError, match="data/set: Permission denied"):
            scan(".")
    finally:
        os.chmod(tmp_path / "locked", 0o700)


def test_the_summary_is_one_line_with_a_few_names(project):
    for name in ("a.pem", "b.pem", "c.pem", "new\nline.pem", ".git/x"):
        put(name)
    text = summary(scan(".").left_out)
    assert text == ".git (version control); 4 secrets (a.pem, b.pem, c.pem, …)"
    put("0\n\udcff.pem")
    assert "\n" not in summary(scan(".").left_out)
    assert summary({}) == ""


def test_a_directory_without_main_py_is_no_project(tmp_path):
    with pytest.raises(UsageError, match=r"no main\.py in .*cd to the project"):
        check_project(str(tmp_path), "main.py")


def test_a_script_outside_the_project(project):
    (project.parent / "other.py").write_text("")
    for script in ("../other.py", str(project.parent / "other.py"), "..", "/"):
        with pytest.raises(UsageError):
            check_project(str(project), script)
    with pytest.raises(UsageError, match="outside the project"):
        check_project(str(project), "../other.py")


def test_a_script_that_is_a_link_out_of_the_project(project):
    (project.parent / "other.py").write_text("")
    os.symlink("../other.py", "linked.py")
    with pytest.raises(UsageError, match="link that leaves the project"):
        check_project(str(project), "linked.py")


def test_a_script_that_is_not_there(project):
    os.makedirs("src")
    for script in ("train.py", "src", "src/main.py"):
        with pytest.raises(UsageError, match="there is no file"):
            check_project(str(project), script)


def test_the_script_is_a_path_in_the_project(project):
    put("src/train.py")
    put("-x.py")
    for script, path in {
        "main.py": "main.py",
        "./main.py": "main.py",
        "src/../main.py": "main.py",
        "src/train.py": "src/train.py",
        str(project / "src" / "train.py"): "src/train.py",
        "-x.py": "-x.py",
    }.items():
        assert check_project(str(project), script) == path


def test_home_and_the_whole_disk_are_no_projects(project, monkeypatch, tmp_path):
    (tmp_path / "link").symlink_to(project)
    for home in (project, tmp_path / "link", str(project) + "/"):
        monkeypatch.setenv("HOME", str(home))
        with pytest.raises(UsageError, match="never sends a whole home"):
            check_project(str(project), "main.py")
    with pytest.raises(UsageError, match="never sends a whole home"):
        check_project("/", "main.py")


@pytest.mark.parametrize(
    "name, slug",
    [
        ("digits", "digits"),
        ("My Project", "my-project"),
        ("a.b_c-d", "a-b_c-d"),
        ("--x--", "x"),
        ("Größe", "gr-e"),
        ("x" * 99, "x" * 41),
        ("x" * 40 + "-y", "x" * 40),
    ],
)
def test_project_names(name, slug):
    assert project_name(name) == slug


@pytest.mark.parametrize("name", ["", "日本", "...", "open", "OPEN", "\udcff"])
def test_names_that_cannot_be_used_become_others_that_can(name):
    """`open/` is a directory of the bucket itself."""
    assert project_name(name).startswith("project-")
    assert len(project_name(name)) == 16


@pytest.mark.parametrize(
    "outputs, folders",
    [
        ((), []),
        (("results",), ["results"]),
        (("results/", "./results", "a/../results"), ["results"]),
        (("model", "model/best", "checkpoint/"), []),
        (("a/b", "a"), ["a"]),
        (("a", "a/b"), ["a"]),
        (("a", "ab", "a-"), ["a", "ab", "a-"]),
        (("..results", "database"), ["..results", "database"]),
    ],
)
def test_directories_that_come_back(outputs, folders):
    assert returned(outputs) == ["model", "checkpoint", *folders]


@pytest.mark.parametrize(
    "output", ["", ".", "..", "../x", "/tmp", "a/../../x", "data", "data/x", "./data/", "//x", "x/.."]
)
def test_directories_that_cannot_come_back(output):
    with pytest.raises(UsageError, match="--output"):
        returned((output,))
