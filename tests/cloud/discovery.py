"""Holds requests and answers against Google's own description of the Compute Engine API, version v1.

The document comes with the package google-api-python-client; nothing of that package is imported.
"""

from __future__ import annotations

import base64
import json
import re
from collections import defaultdict
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

INT32 = range(-(2**31), 2**31)
UNSIGNED = {"uint64": range(2**64), "int64": range(-(2**63), 2**63)}


class Method(NamedTuple):
    """A method such as `instances.insert`."""

    name: str
    verb: str
    segments: list[str]
    parameters: dict[str, Any]
    request: str | None
    response: str | None


def available() -> bool:
    return find_spec("googleapiclient") is not None


@lru_cache(maxsize=1)
def document() -> Any:
    spec = find_spec("googleapiclient")
    assert spec and spec.origin, "google-api-python-client is not installed"
    path = Path(spec.origin).parent / "discovery_cache" / "documents" / "compute.v1.json"
    return json.loads(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def methods() -> dict[tuple[str, int], list[Method]]:
    """By HTTP verb and number of path segments, fixed segments before variable ones."""
    found: defaultdict[tuple[str, int], list[Method]] = defaultdict(list)
    for resource, described in document()["resources"].items():
        for name, method in described["methods"].items():
            segments = method["flatPath"].split("/")
            request = method.get("request", {}).get("$ref")
            response = method.get("response", {}).get("$ref")
            parameters = method.get("parameters", {})
            full = f"{resource}.{name}"
            found[method["httpMethod"], len(segments)].append(
                Method(full, method["httpMethod"], segments, parameters, request, response)
            )
    for group in found.values():
        group.sort(key=lambda method: [part.startswith("{") for part in method.segments])
    return dict(found)


def route(verb: str, segments: list[str]) -> tuple[Method, dict[str, str]] | None:
    """The method that these path segments below `/compute/v1/` mean, with its path parameters."""
    for method in methods().get((verb, len(segments)), []):
        pairs = list(zip(method.segments, segments, strict=True))
        if all(want == got or want.startswith("{") for want, got in pairs):
            return method, {want[1:-1]: got for want, got in pairs if want.startswith("{")}
    return None


def request_problems(method: Method, path: dict[str, str], query: dict[str, str], body: Any) -> list[str]:
    known = {**document()["parameters"], **method.parameters}
    problems = []
    for name, text in {**path, **query}.items():
        # `$alt` and the like are the system's own parameters, with or without the dollar sign.
        described = known.get(name) or document()["parameters"].get(name.lstrip("$"))
        if described is None:
            problems.append(f"{method.name}: unknown parameter {name!r}")
        elif name in method.parameters:
            problems += _parameter_problems(f"{method.name}: parameter {name}", described, text)
    for name, described in method.parameters.items():
        if described.get("required") and name not in path and name not in query:
            problems.append(f"{method.name}: parameter {name} is missing")
    if method.request is None:
        return problems + ([f"{method.name}: takes no body"] if body not in (None, {}) else [])
    if body is None:
        return [*problems, f"{method.name}: the body is missing"]
    return problems + _problems(f"{method.name}: resource", {"$ref": method.request}, body)


def response_problems(method: Method, body: Any) -> list[str]:
    if method.response is None:
        return []
    return _problems(f"{method.name}: answer", {"$ref": method.response}, body)


def _parameter_problems(where: str, described: dict[str, Any], text: str) -> list[str]:
    """In a URL everything is text."""
    kind = described["type"]
    if kind == "boolean":
        return [] if text in ("true", "false") else [f"{where}: {text!r} is no boolean"]
    if kind in ("integer", "number"):
        return [] if re.fullmatch(r"-?\d+", text) else [f"{where}: {text!r} is no {kind}"]
    return _string_problems(where, described, text)


def _problems(where: str, described: dict[str, Any], value: Any) -> list[str]:
    if "$ref" in described:
        described = document()["schemas"][described["$ref"]]
    kind = described["type"]
    if kind == "object":
        return _object_problems(where, described, value)
    if kind == "array":
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        items = (_problems(f"{where}[{n}]", described["items"], each) for n, each in enumerate(value))
        return [problem for group in items for problem in group]
    if kind == "string":
        return _string_problems(where, described, value)
    return _scalar_problems(where, kind, value)


def _object_problems(where: str, described: dict[str, Any], value: Any) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where}: {value!r} is no object"]
    problems, others = [], described.get("additionalProperties")
    for name, each in value.items():
        field = described.get("properties", {}).get(name) or others
        if field is None:
            problems.append(f"{where}.{name}: unknown field")
        else:
            problems += _problems(f"{where}.{name}", field, each)
    return problems


def _scalar_problems(where: str, kind: str, value: Any) -> list[str]:
    fits = {
        "boolean": isinstance(value, bool),
        "integer": type(value) is int and value in INT32,
        "number": type(value) in (int, float),
        "any": True,
    }[kind]
    return [] if fits else [f"{where}: {value!r} is no {kind}"]


def _string_problems(where: str, described: dict[str, Any], value: Any) -> list[str]:
    if not isinstance(value, str):
        return [f"{where}: {value!r} is no string"]
    form = described.get("format")
    if form in UNSIGNED:
        fits = re.fullmatch(r"-?\d+", value) is not None and int(value) in UNSIGNED[form]
        return [] if fits else [f"{where}: {value!r} is no {form}"]
    if form == "byte":
        return [] if _is_base64(value) else [f"{where}: {value!r} is not base64"]
    if "enum" in described and value not in described["enum"]:
        return [f"{where}: {value!r} is not one of {', '.join(described['enum'])}"]
    if "pattern" in described and not re.fullmatch(described["pattern"], value):
        return [f"{where}: {value!r} does not match {described['pattern']}"]
    return []


def _is_base64(text: str) -> bool:
    try:
        base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except ValueError:
        return False
    return True
