"""What a stranger's program may do to the user's terminal."""

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudrun.terminal import HELD, Filter

SAFE = re.compile(rb"(?:[\x08-\x0a\x0d\x20-\x7e]|[\x80-\xff]|\x1b\[[0-9;:]*[mKCDG])*")


@pytest.mark.parametrize(
    "text",
    [
        "plain\tand\nmore\r\n",
        "\x1b[1;31mred\x1b[0m \x1b[38:2:1:2:3mtrue colour\x1b[m",
        "\r 50%|#####     | 5/10\x1b[K",
        "back\b\b\x1b[3D\x1b[2C\x1b[1G",
        "ünïcödé, 日本語, 🚀 \u00a0",
    ],
)
def test_colours_and_the_line_itself_pass(text):
    assert Filter()(text.encode()) == text.encode()
    bytewise = Filter()
    assert b"".join(bytewise(bytes([byte])) for byte in text.encode()) == text.encode()


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        (b"a\x1b]0;title\x07b", b"ab"),
        (b"a\x1b]52;c;ZXZpbA==\x1b\\b", b"ab"),  # the clipboard
        (b"a\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\b", b"alinkb"),
        (b"a\x1b[2J\x1b[H\x1b[1;1Hb", b"ab"),
        (b"a\x1b[Ab\x1b[?1049hc\x1b[?25ld", b"abcd"),
        (b"a\x1b[6n\x1b[cb", b"ab"),  # the terminal would answer as if the user had typed
        (b'a\x1bP$q"p\x1b\\b\x1b_x\x1b\\c\x1b^y\x1b\\d', b"abcd"),
        (b"a\x1bcb\x1b7c\x1b(0d", b"abcd"),
        (b"a\x07b\x00c\x0ed\x7fe\x0bf", b"abcdef"),
        ("a\x9b2Jb\x9d0;x\x07c".encode(), b"a2Jb0;xc"),  # C1, as UTF-8
        (b"a\x9b2Jb", b"a2Jb"),  # and raw
        (b"a\xc2\xc2\x80\x9b2Jb", b"a\xc22Jb"),  # what is left must not become another one
        (b"a\xc2\x07\x80\x9b2Jb", b"a\xc22Jb"),
        (b"a\x80\x9b2Jb", b"a2Jb"),
        (b"a\x1b[3\nb", b"a3\nb"),
        (b"a\x1b\x1b]0;t\x07b", b"ab"),
        (b"a\x1b[\x1b[2Jb", b"ab"),
    ],
)
def test_nothing_else_does(sent, shown):
    assert Filter()(sent) == shown
    bytewise = Filter()
    assert b"".join(bytewise(bytes([byte])) for byte in sent) == shown


def test_a_sequence_that_never_ends_hides_nothing_for_ever():
    filtered = Filter()
    shown = b"".join(filtered(b"x" * 100) for _ in range(3 * HELD // 100))
    assert shown == b"x" * (3 * HELD // 100 * 100)
    shown = filtered(b"\x1b]0;") + b"".join(filtered(b"x" * 100) for _ in range(3 * HELD // 100))
    assert len(shown) > 0 and b"\x1b" not in shown


@given(st.lists(st.binary(max_size=40) | st.sampled_from([b"\x1b", b"[", b"]0;", b"\x07", b"\xc2", b"\x9b"])))
def test_whatever_comes_in_whatever_pieces(pieces):
    filtered = Filter()
    shown = b"".join(filtered(piece) for piece in pieces)
    assert SAFE.fullmatch(shown)
    assert b"\xc2\x9b" not in shown


def test_is_quick():
    data = os.urandom(1 << 20)
    assert len(Filter()(data)) > 1 << 19
