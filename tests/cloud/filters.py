"""Filter expressions of list methods, AIP-160 style and the older `eq`/`ne` with regular expressions.

The syntax is that of the parameter `filter` of `instances.list` in the discovery document.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

TOKEN = re.compile(
    r"""\s*(?:(?P<quoted>"(?:[^"\\]|\\.)*"|'[^']*')|(?P<sign>!=|<=|>=|[()=<>:])|(?P<word>[^\s()=<>:!"']+))"""
)
SIGNS = ("=", "!=", "<", "<=", ">", ">=", ":", "eq", "ne")
Test = Callable[[Any], bool]


def compile_filter(text: str) -> Test:
    """Raises ValueError for what is no filter expression."""
    parser = Parser(text)
    test = parser.alternatives()
    if parser.tokens:
        raise ValueError(f"unexpected {parser.tokens[0]!r}")
    return test


class Parser:
    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        position, text = 0, text.strip()
        while position < len(text):
            if not (match := TOKEN.match(text, position)):
                raise ValueError(f"unexpected {text[position:]!r}")
            self.tokens.append(match.group().strip())
            position = match.end()

    def take(self, *wanted: str) -> str:
        """The next token if it is one of these (any, if none is named), else nothing."""
        if self.tokens and (not wanted or self.tokens[0] in wanted):
            return self.tokens.pop(0)
        if not wanted:
            raise ValueError("it ends too soon")
        return ""

    def alternatives(self) -> Test:
        """OR binds tighter than AND (AIP-160): `a OR b AND c` is `(a OR b) AND c`."""
        tests = [self.choice()]
        while self.tokens and self.tokens[0] != ")":
            self.take("AND")
            tests.append(self.choice())
        return lambda item: all(test(item) for test in tests)

    def choice(self) -> Test:
        tests = [self.single()]
        while self.take("OR"):
            tests.append(self.single())
        return lambda item: any(test(item) for test in tests)

    def single(self) -> Test:
        if self.take("NOT"):
            negated = self.single()
            return lambda item: not negated(item)
        if self.take("("):
            inside = self.alternatives()
            if not self.take(")"):
                raise ValueError("a parenthesis is not closed")
            return inside
        field = self.take()
        if not re.fullmatch(r"[A-Za-z_][\w.\-]*|\"[^\"]+\"", field) or not (sign := self.take(*SIGNS)):
            raise ValueError(f"{field!r} is no comparison")
        wanted = self.take()
        while self.tokens[:1] == [":"]:  # an unquoted time: 2026-01-01T00:00:00
            wanted += self.take() + self.take()
        return comparison(field.strip('"').split("."), sign, unquote(wanted))


def unquote(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if text[:1] in ("'", '"') else text


def comparison(path: list[str], sign: str, wanted: str) -> Test:
    def test(item: Any) -> bool:
        values = list(values_at(item, path))
        if sign in ("!=", "ne"):
            return not any(matches(value, "=" if sign == "!=" else "eq", wanted) for value in values)
        return any(matches(value, sign, wanted) for value in values)

    return test


def values_at(item: Any, path: list[str]) -> Any:
    """Every value there; a list means each of its members. A label key may itself contain a dot."""
    if isinstance(item, list):
        for each in item:
            yield from values_at(each, path)
    elif not path:
        yield item
    elif isinstance(item, dict) and path[0] in item:
        yield from values_at(item[path[0]], path[1:])


def matches(value: Any, sign: str, wanted: str) -> bool:
    if sign == ":" and wanted == "*":
        return value not in (None, "", {}, [])
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if sign == "eq":
        return re.fullmatch(wanted, text) is not None
    if sign == ":":
        return wanted.lower() in text.lower()
    if sign == "=":
        pattern = ".*".join(re.escape(part) for part in wanted.split("*"))
        return re.fullmatch(pattern, text, re.IGNORECASE if isinstance(value, bool) else 0) is not None
    left, right = (float(text), float(wanted)) if is_number(text) and is_number(wanted) else (text, wanted)
    return {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[sign]  # type: ignore[operator]


def is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?", text) is not None
