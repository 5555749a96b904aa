"""The agent as one file, a zipapp of its modules: built once for each state of the sources, then kept."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from importlib.util import MAGIC_NUMBER

from cloudrun.cache import cache_path, keep, read

SHARED = (
    *("background", "errors", "formats", "gs", "jsonapi", "processes"),
    *("storage/__init__", "storage/folder", "storage/rest"),
)
MAIN = b"from cloudrun.agent.main import main\n\nmain()\n"
UNCHECKED = (1).to_bytes(4, "little") + bytes(8)  # the flags of a .pyc and the hash that nobody compares


def agent_archive() -> bytes:
    """The same bytes for the same sources and the same Python; from the user's cache, if there is one."""
    package = os.path.dirname(os.path.abspath(__file__))
    agent = sorted(name[:-3] for name in os.listdir(os.path.join(package, "agent")) if name.endswith(".py"))
    sources = {"__main__.py": MAIN, "cloudrun/__init__.py": b""}
    for module in (*SHARED, *(f"agent/{name}" for name in agent)):
        with open(os.path.join(package, module + ".py"), "rb") as file:
            sources[f"cloudrun/{module}.py"] = file.read()
    digest = hashlib.sha256(MAGIC_NUMBER + repr(sources).encode())
    path = cache_path("agent-" + digest.hexdigest()[:32])
    if path is None:
        return _build(sources)
    with suppress(OSError, ValueError):
        return b"".join(read(path))
    data = _build(sources)
    keep(path, [data])
    return data


def slim(source: str) -> str:
    """A program without what only people read: the call that creates a vast.ai machine holds 4,096 bytes."""
    import ast

    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _build(sources: dict[str, bytes]) -> bytes:
    """With bytecode for a machine with this Python, which starts 20 ms sooner; another one ignores it."""
    import io
    import marshal
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.comment = b"\n"  # what is kept in the cache ends in a newline
        for name, source in sources.items():
            archive.writestr(zipfile.ZipInfo(name), source)
            if name != "__main__.py":
                code = marshal.dumps(compile(source, name, "exec", dont_inherit=True))
                archive.writestr(zipfile.ZipInfo(name + "c"), MAGIC_NUMBER + UNCHECKED + code)
    return buffer.getvalue()
