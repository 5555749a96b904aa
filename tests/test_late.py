"""Archives that came late are a stranger's data: what is right gets its place, what is not gets none."""

import hashlib
import json

import pytest
from fakes import receipt_of

from cloudrun.config import USUAL, Bounds
from cloudrun.errors import BucketError, Conflict
from cloudrun.formats import canonical, frame
from cloudrun.late import collect
from cloudrun.order import Order
from cloudrun.storage.folder import FolderBucket

RUN = "p-20260101-000000-abcd"
TOP = f"p/runs/{RUN}"
LATE = TOP + "/attempts/1/late/"


def order(**fields):
    empty = dict.fromkeys(Order._fields, "")
    empty.update({"run": RUN, "project": "p", "outputs": ["model", "checkpoint"], "stranger": True})
    return Order(**{**empty, **fields})


def archive(*objects, cut=None):
    head = canonical({"objects": [[name, len(data)] for name, data in objects]}) + b"\n"
    return (head + b"".join(data for _, data in objects))[:cut]


def sha(data):
    return hashlib.sha256(data).hexdigest()


def saved(data):
    return f"saved/{sha(data)}", data


def outputs(files, attempt=1, sequence=1):
    lines = [{"path": path, "mode": 0o644, "size": len(data), "sha256": sha(data)} for path, data in files]
    return "outputs.json", canonical({"attempt": attempt, "sequence": sequence, "time": "", "files": lines})


class Late(FolderBucket):
    """A bucket with what came late, and what is told when somebody collects it."""

    def bring(self, name, data):
        self.create(LATE + name, data)
        return self

    def collected(self, bounds=USUAL):
        told = []
        collect(self, order(), told.append, bounds)
        return told

    def all(self):
        """What is there, but for what came late."""
        return {
            name[len(TOP) + 1 :]: self.get(name)[0] for name in self.names(TOP + "/") if "/late/" not in name
        }

    def left(self):
        return [name[len(LATE) :] for name in self.names(LATE)]


@pytest.fixture
def bucket(tmp_path):
    return Late(str(tmp_path))


def test_everything_gets_its_place(bucket):
    first, second = frame(1.0, "out", b"1"), frame(2.0, "err", b"2")
    bucket.bring("log-001", archive(("log/00000001", first), ("log/00000002", second)))
    bucket.bring("save-001", archive(saved(b"old"), outputs([("model/x", b"old")])))
    new = [("model/x", b"new"), ("model/empty", b""), ("model/same", b"old")]
    bucket.bring("save-002", archive(saved(b"new"), saved(b""), outputs(new, sequence=2)))
    receipt = canonical(receipt_of())
    bucket.bring("receipt", receipt)
    assert bucket.collected() == [] and bucket.left() == []
    assert bucket.all() == {
        "attempts/1/log/00000001": first,
        "attempts/1/log/00000002": second,
        **dict(saved(each) for each in (b"old", b"new", b"")),
        "outputs.json": outputs(new, sequence=2)[1],
        "receipt.json": receipt,
    }


def test_the_receipt_is_there_only_when_all_before_it_is(bucket):
    """Whoever sees a receipt believes that nothing more comes: cut off at any call, the rest is there."""
    bucket.bring("log-001", archive(("log/00000001", frame(1.0, "out", b"1"))))
    bucket.bring("save-001", archive(saved(b"x"), outputs([("model/x", b"x")])))
    bucket.bring("receipt", canonical(receipt_of()))
    names = ("get", "size", "chunks", "create", "swap", "put_blob", "delete", "names")
    for count in range(100):
        calls = [0]

        def cut(act, calls=calls, most=count):
            def call(*arguments, **more):
                calls[0] += 1
                if calls[0] > most:
                    raise BucketError("out of reach")
                return act(*arguments, **more)

            return call

        torn = Late(bucket.root)
        for name in names:
            setattr(torn, name, cut(getattr(bucket, name)))
        try:
            torn.collected()
        except BucketError:
            found = bucket.all()
            if "receipt.json" in found:
                assert set(found) == {
                    *("attempts/1/log/00000001", "outputs.json", "receipt.json", saved(b"x")[0])
                }
            continue
        break
    assert count > 8
    assert bucket.left() == [] and len(bucket.all()) == 4


def test_what_is_there_already_stays(bucket):
    bucket.create(TOP + "/receipt.json", b"{}")
    bucket.create(TOP + "/attempts/1/log/00000001", b"first")
    bucket.create(TOP + "/outputs.json", outputs([], attempt=1, sequence=5)[1])
    before = bucket.all()
    bucket.bring("log-001", archive(("log/00000001", b"other")))
    bucket.bring("save-001", archive(outputs([], attempt=1, sequence=5)))
    bucket.bring("receipt", canonical(receipt_of()))
    assert bucket.collected() == [] and bucket.left() == []
    assert bucket.all() == before


def test_outputs_of_an_earlier_attempt_do_not_come_back(bucket):
    bucket.create(TOP + "/outputs.json", outputs([], attempt=2, sequence=1)[1])
    bucket.bring("save-001", archive(outputs([], attempt=1, sequence=9)))
    assert bucket.collected() == []
    assert json.loads(bucket.get(TOP + "/outputs.json")[0])["attempt"] == 2


def test_somebody_who_replaces_outputs_meanwhile_is_not_undone(bucket):
    bucket.create(TOP + "/outputs.json", outputs([], sequence=1)[1])
    bucket.bring("save-001", archive(outputs([], sequence=2)))
    swap, newer = bucket.swap, outputs([], attempt=2, sequence=1)[1]

    def faster(name, data, version):
        bucket.swap = swap
        bucket.put(name, newer)
        raise Conflict("somebody was faster")

    bucket.swap = faster
    assert bucket.collected() == []
    assert bucket.get(TOP + "/outputs.json")[0] == newer


GOOD = archive(saved(b"x" * 1000), outputs([("model/x", b"x" * 1000)]))
HOSTILE = {
    "torn": ("save-001", GOOD[:-1]),
    "torn in its first line": ("save-001", GOOD[:20]),
    "longer than it says": ("save-001", GOOD + b"x"),
    "empty": ("save-001", b""),
    "no objects": ("save-001", archive()),
    "no JSON": ("save-001", b"{{{\nxxx"),
    "deep JSON": ("save-001", b"[" * 100_000 + b"\n"),
    "another content": ("save-001", archive((saved(b"x")[0], b"y"), outputs([("model/x", b"x")]))),
    "a path that leaves": ("save-001", archive(saved(b"x"), outputs([("model/../../x", b"x")]))),
    "an absolute path": ("save-001", archive(saved(b"x"), outputs([("/etc/x", b"x")]))),
    "code": ("save-001", archive(saved(b"x"), outputs([("main.py", b"x")]))),
    "nothing behind a name": ("save-001", archive(outputs([("model/x", b"never stored")]))),
    "another attempt's": ("save-001", archive(outputs([], attempt=2))),
    "no outputs": ("save-001", archive(saved(b"x"))),
    "an order": ("save-001", archive(("order.json", b"{}"), outputs([]))),
    "a name that leaves": ("save-001", archive(("saved/../../x", b"x"), outputs([]))),
    "a negative size": ("save-001", b'{"objects":[["saved/x",-5],["outputs.json",5]]}\n'),
    "a size that is none": ("save-001", b'{"objects":[["outputs.json",true]]}\nx'),
    "a log that is a bill": ("log-001", archive(("bill.json", b"{}"))),
    "a log of another attempt": ("log-001", archive(("../2/log/00000001", b""))),
    "a receipt that is none": ("receipt", b"[]"),
    "a receipt of another attempt": ("receipt", canonical(receipt_of(attempt=2))),
    "a huge receipt": ("receipt", b" " * (2 << 20)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_wrong_gets_no_place(bucket, what):
    name, data = HOSTILE[what]
    bucket.bring(name, data)
    (told,) = bucket.collected()
    assert LATE + name in told and len(told) < 500
    assert bucket.left() == [name]
    assert [found for found in bucket.all() if not found.startswith("saved/")] == []


def test_one_that_is_wrong_keeps_nobody_from_the_next(bucket):
    bucket.bring("log-001", b"garbage")
    bucket.bring("log-002", archive(("log/00000002", b"")))
    bucket.bring("receipt", canonical(receipt_of()))
    assert len(bucket.collected()) == 1
    assert set(bucket.all()) == {"attempts/1/log/00000002", "receipt.json"}


def test_links_are_refused(bucket):
    line = {"path": "model/x", "link": "secret"}
    data = canonical({"attempt": 1, "sequence": 1, "time": "", "files": [line]})
    bucket.bring("save-001", archive(("outputs.json", data)))
    assert "is no file below model" in bucket.collected()[0]
    assert bucket.all() == {}


def test_a_large_archive_is_believed_only_if_the_user_says_so(bucket):
    small = archive(outputs([]))
    bucket.bring("save-001", small).bring("save-002", GOOD)
    for few, raised in ((Bounds(9, len(small) / 1e9), "FETCH_GB"), (Bounds(2), "FETCH_FILES")):
        (told,) = bucket.collected(few)
        assert f"save-002 is more than is to come home: raise CLOUDRUN_{raised}" in told
        assert bucket.left() == ["save-002"]
        assert json.loads(bucket.get(TOP + "/outputs.json")[0])["files"] == []
        bucket.bring("save-001", small)
    assert bucket.collected() == [] and bucket.left() == []


def test_files_of_other_names_are_left_alone(bucket):
    bucket.bring("save-001x", GOOD).bring("note", b"").bring("save-1000", GOOD)
    assert bucket.collected() == [] and bucket.all() == {}


def test_runs_on_our_own_machines_are_not_even_looked_at(bucket):
    bucket.bring("save-001", GOOD)
    collect(bucket, order(stranger=False))
    assert bucket.all() == {}
