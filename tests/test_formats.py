"""The formats that client and machine share: what is written comes back, what is damaged is noticed."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudrun.errors import Corrupt
from cloudrun.formats import (
    Entry,
    canonical,
    check_link,
    check_path,
    digest_of,
    entry_line,
    frame,
    parse,
    read_entry,
    read_frames,
    seconds_of,
    shown,
    timestamp,
)
from cloudrun.order import FIELDS, Order, deadline, new_run_id, read_order

SHA = "0123456789abcdef" * 4
names = st.binary(min_size=1, max_size=40).map(
    lambda raw: os.fsdecode(raw.replace(b"\0", b"0").replace(b"/", b"_"))
)
parts_of_paths = names.filter(lambda name: name not in (".", ".."))
paths = st.lists(parts_of_paths, min_size=1, max_size=5).map("/".join)
frames = st.lists(
    st.tuples(
        st.integers(0, 10**13).map(lambda ms: ms / 1000),
        st.sampled_from(["out", "err", "note"]),
        st.binary(max_size=99),
    )
)


@given(frames)
def test_frames_come_back(wanted):
    chunk = b"".join(frame(*item) for item in wanted)
    found = [(when, stream, bytes(data)) for when, stream, data in read_frames(chunk, "log/1")]
    assert [item[1:] for item in found] == [item[1:] for item in wanted]
    assert [item[0] for item in found] == pytest.approx([item[0] for item in wanted], abs=0.001)


@given(frames.filter(bool), st.data())
def test_a_chunk_that_was_cut_off_is_noticed(wanted, data):
    pieces = [frame(*item) for item in wanted]
    ends = [sum(map(len, pieces[:number])) for number in range(len(pieces) + 1)]
    cut = data.draw(st.integers(0, ends[-1]))
    if cut in ends:
        assert len(list(read_frames(b"".join(pieces)[:cut], "log/1"))) == ends.index(cut)
    else:
        with pytest.raises(Corrupt, match="log/1"):
            list(read_frames(b"".join(pieces)[:cut], "log/1"))


@given(st.binary(max_size=200))
def test_any_bytes_are_frames_or_corrupt(chunk):
    try:
        found = list(read_frames(chunk, "log/1"))
    except Corrupt:
        return
    assert sum(len(data) for _, _, data in found) <= len(chunk)


@pytest.mark.parametrize(
    "chunk",
    [
        *(
            b"\n",
            b"x",
            b"1.0 out 5\nabc",
            b"1.0 out -1\n",
            b"1.0 out\nabc",
            b"1.0 in 3\nabc",
            b"x out 3\nabc",
        ),
        *(b"1.0 out 3 4\nabc", b"1.0 out 3", b"1.0 out 3\nabc\n", b"1.0 \xff 3\nabc", b" " * 80 + b"\n"),
    ],
)
def test_damaged_frames(chunk):
    with pytest.raises(Corrupt, match="log/1 is damaged"):
        list(read_frames(chunk, "log/1"))


def back(entry, *, with_parts=True):
    line = entry_line(entry)
    assert "\n" not in line
    return read_entry(json.loads(line.encode("ascii")), "manifest", with_parts=with_parts)


@given(paths, st.integers(0, 0o777), st.lists(st.integers(0, 1 << 40), max_size=4))
def test_files_come_back(path, mode, lengths):
    """Of several parts, each is a whole blob; one part may be anywhere in its blob."""
    parts = tuple((SHA, 0 if len(lengths) > 1 else 7, length) for length in lengths)
    entry = Entry(path, mode, sum(lengths), digest_of(parts) if len(lengths) > 1 else SHA, parts)
    assert back(entry) == entry
    assert back(entry, with_parts=False) == entry._replace(parts=())


@given(paths, st.integers(0, 0o777))
def test_directories_come_back(path, mode):
    assert back(Entry(path, mode)) == Entry(path, mode)


@given(paths, parts_of_paths)
def test_links_come_back(path, target):
    assert back(Entry(path, link=target)) == Entry(path, link=target)


@given(paths)
def test_the_index_finds_a_path_at_its_place_in_the_line(path):
    line = entry_line(Entry(path, 0o644, 1, SHA, ((SHA, 0, 1),)))
    assert json.loads(line[8 : line.index(',"mode":')]) == path


GOOD = {"path": "a/b", "mode": 0o644, "size": 3, "sha256": SHA, "parts": [[SHA, 0, 3]]}


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"path": path}
            for path in ("", "/a", "a/../b", "..", ".", "a//b", "a/", "a\0b", 5, None, ["a"], "x" * 4097)
        ),
        *({"path": path} for path in ("\ud800", "é" * 2049)),
        *({"mode": mode} for mode in (-1, 0o10000, "644", None, 1.5)),
        *({"size": size} for size in (-3, 2, 3.0, "3", None)),
        *({"sha256": sha256} for sha256 in ("", SHA[1:], SHA + "0", SHA.upper(), SHA + "\n", None, 5)),
        *({"parts": parts} for parts in ([], None, [[SHA, 0]], [[SHA, -1, 3]], [[SHA, 0, 4]], [["x", 0, 3]])),
        *(
            {"parts": parts}
            for parts in ([[SHA, 0, 6], [SHA, 0, -3]], [[SHA, 0.5, 3]], "abc", [[SHA, "0", 3]])
        ),
        *({"link": link} for link in ("", "/etc", "../..", "x\0", None, "\udfff" * 3 + "\ud800")),
    ],
)
def test_damaged_entries(change):
    with pytest.raises(Corrupt, match=r"outputs\.json is damaged") as caught:
        read_entry({**GOOD, **change}, "outputs.json", with_parts=True)
    str(caught.value).encode("utf-8")


@pytest.mark.parametrize(
    "value", [None, 5, "text", [], ["path"], {}, {"path": "a"}, {"path": "a", "size": 1}]
)
def test_what_is_no_entry(value):
    with pytest.raises(Corrupt):
        read_entry(value, "outputs.json", with_parts=True)


def test_only_permission_bits_are_taken_over():
    assert read_entry({**GOOD, "mode": 0o6755}, "m", with_parts=True).mode == 0o755


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["path", "mode", "size", "sha256", "parts", "dir", "link"]), inner
            )
        ),
    )
)
def test_any_json_is_an_entry_or_corrupt(value):
    for with_parts in (True, False):
        try:
            entry = read_entry(value, "outputs.json", with_parts=with_parts)
        except Corrupt:
            continue
        check_path(entry.path)


@pytest.mark.parametrize(
    "path", ["a", "a/b", "...", "..a", "a..", "-rf", " ", "\n", "\udcff", ".a", "~", "x" * 4096]
)
def test_paths_inside(path):
    check_path(path)


@pytest.mark.parametrize(
    "path", ["", "/", "/a", "a/", "//", "a//b", ".", "./a", "a/.", "..", "a/..", "../a", "a\0", 1]
)
def test_paths_that_lead_outside_or_nowhere(path):
    with pytest.raises(ValueError):
        check_path(path)


@pytest.mark.parametrize(
    "path, target",
    [
        ("l", "a"),
        ("l", "."),
        ("d/l", "../a"),
        ("d/l", ".."),
        ("l", "a/../b"),
        ("d/e/l", "../../x"),
        ("l", "a//b/"),
    ],
)
def test_links_inside(path, target):
    check_link(path, target)


@pytest.mark.parametrize(
    "path, target",
    [
        ("l", ".."),
        ("l", "/a"),
        ("l", ""),
        ("d/l", "../.."),
        ("l", "a/../../b"),
        ("d/l", "../../d/x"),
        ("l", "../l"),
        ("l", 1),
    ],
)
def test_links_that_leave(path, target):
    with pytest.raises(ValueError):
        check_link(path, target)


@given(st.integers(0, 4_000_000_000_000))
def test_times_come_back(milliseconds):
    text = timestamp(milliseconds / 1000)
    assert seconds_of(text) == pytest.approx(milliseconds / 1000, abs=0.0011)
    assert len(text) == 24


def test_a_time_as_it_is_written():
    assert timestamp(1795598400.5) == "2026-11-25T09:20:00.500Z"
    assert timestamp(0) == "1970-01-01T00:00:00.000Z"


@pytest.mark.parametrize(
    "text", ["", "now", "2026-11-25", "2026-11-25T09:20", "2026-13-25T09:20:00.000Z", None, 5]
)
def test_what_is_no_time(text):
    with pytest.raises(Corrupt):
        seconds_of(text)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"5", b"null", b"\xff", b'{"a":', b"[" * 100_000, b'{"level": "1"}', b"{}"]
)
def test_damaged_objects_are_named(data):
    with pytest.raises(Corrupt, match=r"control\.json is damaged"):
        parse(data, "control.json", level=int)


def test_one_value_has_one_text():
    assert canonical({"b": 1, "a": "é\udcff"}) == b'{"a":"\\u00e9\\udcff","b":1}'


@given(st.text() | paths)
def test_what_is_shown_is_printable(path):
    assert shown(path).isprintable()
    shown(path).encode("utf-8")


def an_order(**changes):
    values = {
        **{"run": "p-20261125-092000-abcd", "project": "p", "backend": "local", "created": timestamp(0)},
        **{
            "deadline": timestamp(1),
            "seconds": 1.5,
            "limited_by": "deadline",
            "price": None,
            "argv": ["main.py"],
        },
        **{"outputs": ["model"], "folders": ["data"], "env": [], "if_client_lost": "finish"},
        **{
            "manifest": {"sha256": SHA, "files": 1, "bytes": 1},
            "agent": ["p/blobs/" + SHA, SHA],
            "limits": {"save": 1},
            "origin": ["here", "/p"],
        },
    }
    return Order(**{**values, **changes})


def test_an_order_comes_back():
    order = an_order(argv=["main.py", "\udcff", "two\nlines"], price=0.71)
    assert read_order(order.content(), "order.json") == order


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_an_order_without_a_field_is_damaged(field):
    value = json.loads(an_order().content())
    del value[field]
    with pytest.raises(Corrupt, match=r"p/order\.json"):
        read_order(canonical(value), "p/order.json")


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_an_order_with_a_field_of_another_type_is_damaged(field):
    value = json.loads(an_order().content())
    value[field] = "text" if FIELDS[field] is not str else 5
    with pytest.raises(Corrupt, match=r"p/order\.json"):
        read_order(canonical(value), "p/order.json")


def test_an_order_of_another_version_or_with_no_deadline_is_damaged():
    value = json.loads(an_order().content())
    for change in ({"new": 1}, {"deadline": "tomorrow"}):
        with pytest.raises(Corrupt):
            read_order(canonical({**value, **change}), "order.json")


def test_run_ids_are_labels_and_differ():
    ids = {new_run_id("p" * 41, 0) for _ in range(50)}
    assert len(ids) > 40
    assert all(len(run) <= 63 and run.startswith("p" * 41 + "-19700101-000000-") for run in ids)


@pytest.mark.parametrize(
    "hours, cost, price, seconds, limited_by",
    [
        (2, None, None, 7200, "deadline"),
        (2, 1.0, 1.0, 3540, "cost"),
        (1, 5.0, 1.0, 3600, "deadline"),
        (None, 1.0, 2.0, 1740, "cost"),
        (2, 1.0, 0, 7200, "deadline"),
        (10_000, None, None, 120 * 24 * 3600, "deadline"),
        (None, 5.0, 0, 24 * 3600, "deadline"),
    ],
)
def test_the_deadline_is_the_earlier_of_two_limits(hours, cost, price, seconds, limited_by):
    assert deadline(hours, cost, price, 1000.0, 60.0) == (timestamp(1000 + seconds), seconds, limited_by)
