"""What must hold of every run, whatever went wrong: pure functions over what was recorded.

Each returns sentences about what does not hold; none is good. Times are the kernel's monotonic seconds.
"""

from dataclasses import dataclass, field
from itertools import pairwise

END_SECONDS = 7.0  # in which a machine ends whose run is over: its own time, then the guard's, then a stop's
BILL_SECONDS = 1.0  # by which a bill and the meter may differ
SAVE_SECONDS = 3.0  # in which what is closed gets into a save, on a machine that has nothing else to do
SIGNALLED = {129, 130, 141, 143}
LATER = "late"  # what a fault may explain: a machine that is billed until a later command …
HAMPERS = "hampers"  # … saves that do not come, from the fault on …
BLINDS = "blinds"  # … a client that cannot see that its machine has ended …
ENDS = "ends"  # … that the user ended the run …
KILLS = "kills"  # … a main.py that ends by a signal …
SLEEPS = "sleeps"  # … a client that looks later than it would, and sees later that its machine has ended …
OVER = "over"  # (no excuse: with it the run is over, and its machine has to end)
JUMPS = "jumps"  # … a local bill that is wrong: there is no clock but the one that was set


@dataclass
class Client:
    """`billed`: whether a machine was still billed a moment after it had ended with `code`."""

    words: str
    kind: str  # main; wait, which exits with the run's code; or another one
    code: int | None = None
    billed: bool = False
    killed: bool = False  # by a fault, or at the end because a fault had stopped it


@dataclass
class Fault:
    """`at`: when it happened; None if its moment did not come."""

    name: str
    words: str
    excuses: tuple[str, ...] = ()
    at: float | None = None


@dataclass
class Record:
    """`contents`: {(where, path): header of the content, or None if it is torn}, of all places.

    `versions`: [(time, attempt, sequence, [[path, header or None], ...])] of outputs.json, as they were seen.
    """

    seed: int = 0
    backend: str = "local"
    status: int = 0  # that of a main.py that nobody disturbs
    faults: list = field(default_factory=list)
    told: list = field(default_factory=list)
    versions: list = field(default_factory=list)
    contents: dict = field(default_factory=dict)
    missing: list = field(default_factory=list)  # contents that outputs.json names, and that are not there
    unlike: list = field(default_factory=list)  # outputs that are not home as outputs.json has them
    clients: list = field(default_factory=list)
    receipt: dict | None = None
    bill: dict | None = None
    metered: float = 0.0  # seconds, of all machines
    known_cost: float | None = None  # what the provider charged; None if it does not say
    longest: float = 0.0  # seconds from the first machine's start to the last one's end
    limit: float = 60.0  # seconds after which the provider's own limit ends everything
    late: bool = False  # a machine was billed until a later command ended it …
    limited: bool = False  # … or the provider, whose clock was moved on for it
    left: list = field(default_factory=list)  # machines that are billed after all
    left_by_provider: list = field(default_factory=list)  # machines that outlived its limit
    over: float | None = None  # when the receipt was there
    billed_until: float = 0.0
    lag: float = 0.0  # by how much this computer was late, at worst
    trouble: str = ""  # a watchdog's, or the emulator's

    def excused(self, *excuses: str) -> bool:
        return any(set(excuses) & set(fault.excuses) for fault in self.faults if fault.at is not None)


def meter(record: Record) -> list[str]:
    """(a) Nothing is billed beyond the provider's limit, nor beyond the run's end if no fault explains it."""
    found = [f"{name} is billed after every layer had its time" for name in record.left]
    found += [f"{name} outlived its provider's limit" for name in record.left_by_provider]
    if record.longest > record.limit and not record.limited:
        found.append(f"billed for {record.longest:.1f} s, and the limit is {record.limit:.1f} s")
    over = min((at for at in (record.over, *_over(record)) if at is not None), default=float("inf"))
    too_late = (
        record.billed_until - over > END_SECONDS + 4.0 * record.excused(BLINDS, HAMPERS) + 30 * record.lag
    )
    if too_late and not record.excused(LATER):
        found.append(f"billed for {record.billed_until - over:.1f} s after the run's end")
    if record.late and not record.excused(LATER):
        found.append("a machine was billed until a later command ended it, and no fault explains that")
    return found


def _over(record: Record) -> list[float | None]:
    return [fault.at for fault in record.faults if OVER in fault.excuses]


def lines(record: Record) -> dict:
    """{life: its ancestors and itself}."""
    parents = {each["life"]: each["parent"] for each in record.told if each["what"] == "start"}
    found = {}
    for life in parents:
        chain, at = [], life
        while at is not None and at not in chain:
            chain.append(at)
            at = parents.get(at)
        found[life] = chain
    return found


def required(record: Record) -> list[tuple[str, str, int]]:
    """(life, name, number): contents that must be there, or newer ones in their place."""
    found = []
    starts = sorted((each["at"], each["life"]) for each in record.told if each["what"] == "start")
    hampered = min(
        (each.at for each in record.faults if HAMPERS in each.excuses and each.at is not None),
        default=float("inf"),
    )
    for _, life in starts:
        told = [each for each in record.told if each["life"] == life]
        last = max(each["at"] for each in told)
        whole = _is_whole(record, life, told)
        slack = SAVE_SECONDS + 20 * record.lag
        closed = [each for each in told if each["what"] == "closed"]
        for each in closed:
            touched = min(
                (
                    other["at"]
                    for other in told
                    if other["what"] in ("opening", "spoiled")
                    and other["name"] == each["name"]
                    and other["at"] > each["at"]
                ),
                default=float("inf"),
            )
            stable = min(touched, last, hampered) - each["at"]
            if stable > slack or (whole and touched == float("inf")):
                found.append((life, each["name"], each["number"]))
    return found


def _is_whole(record: Record, life: str, told: list) -> bool:
    """Whether this main.py ended by itself, and the receipt says that all was saved."""
    by_itself = any(each["what"] == "end" for each in told)
    latest = max((each for each in record.told if each["what"] == "start"), key=lambda each: each["at"])
    receipt = record.receipt
    return bool(by_itself and receipt and not receipt["save"] and latest["life"] == life)


def outputs(record: Record) -> list[str]:
    """(b) What was closed in time is there, or something newer; nothing torn has a name, anywhere."""
    found = [f"{path} in {where} is torn" for (where, path), head in record.contents.items() if not head]
    found += [f"main.py found {each['name']} torn" for each in record.told if each["what"] == "torn"]
    for _, attempt, sequence, files in record.versions:
        found += [f"{path} of save {attempt}.{sequence} is torn" for path, head in files if not head]
    found += [f"outputs.json names {path}, whose content is not there" for path in record.missing]
    chain = lines(record)
    for life, name, number in required(record):
        heads = [head for (_, path), head in record.contents.items() if path == name and head]
        there = any(
            (head["life"] == life and head["number"] >= number)
            or (head["life"] != life and life in chain.get(head["life"], ()))
            for head in heads
        )
        if not there:
            found.append(f"{name} {number} of {life} was closed in time and is nowhere, nor a newer one")
    return found


def bill(record: Record) -> list[str]:
    """(c) The bill agrees with the meter, or says that it does not know."""
    said = record.bill
    if not said or said["seconds"] is None or record.limited:  # clocks that differ give no bill
        return []
    if record.backend == "local" and record.excused(JUMPS):
        return []
    ahead = said["seconds"] - record.metered
    slack = BILL_SECONDS + 2 * record.lag
    # When a container ended is known only from when that was seen.
    blind = record.backend == "vast"
    most = float("inf") if blind else slack + 3.0 * record.excused(SLEEPS)
    found = []
    if not -slack <= ahead <= most:
        found.append(f"the bill says {said['seconds']} s, the meter {record.metered:.3f} s")
    if None not in (record.known_cost, said["cost"]):
        apart = abs(said["cost"] - record.known_cost)
        if apart > 0.002 + 2e-3 * record.lag:
            found.append(f"the bill says {said['cost']} USD, the provider {record.known_cost:.6f} USD")
    return found


def attempts(record: Record) -> list[str]:
    """(d) One set of outputs descends from one line of attempts, and no older one replaces a newer one."""
    found, chain = [], lines(record)
    for _, attempt, sequence, files in record.versions:
        lives = {head["life"] for _, head in files if head}
        if not any(lives <= set(line) for line in chain.values()) and lives:
            found.append(f"save {attempt}.{sequence} mixes the results of {sorted(lives)}")
    order = [(attempt, sequence) for _, attempt, sequence, _ in record.versions]
    found += [f"save {b} replaced save {a}" for a, b in pairwise(order) if b < a]
    return found


def exits(record: Record) -> list[str]:
    """(e) Exit codes are true."""
    found = []
    for client in record.clients:
        if client.kind != "other" and not client.killed and client.code is not None:
            found += [f"{client.words} exited with {client.code}{why}" for why in _untrue(record, client)]
    return found


def _untrue(record: Record, client: Client) -> list[str]:
    code, starts = client.code, [each for each in record.told if each["what"] == "start"]
    ends = [each["status"] for each in record.told if each["what"] == "end"]
    found = []
    if client.kind == "main" and client.billed and code != 122:
        found.append(", and its machine was billed")
    if code == 122 and not record.excused(BLINDS, LATER) and not client.billed:
        found.append(", and nothing was billed or out of sight")
    if code == 0 and 0 not in ends:
        found.append(f", and main.py ended with {ends}")
    if code == 0 and client.kind == "main" and record.unlike:
        found.append(f", and these are not home: {record.unlike}")
    if code == 125 and starts and client.kind == "main":
        found.append(", and main.py was started")
    if code in SIGNALLED and not record.excused(ENDS):
        found.append(", and nobody ended it")
    documented = {0, 121, 122, 124, 125, *SIGNALLED, *ends}
    if record.excused(KILLS):
        documented |= {137}
    if code not in documented:
        found.append(f", which it has from nowhere: main.py ended with {ends}")
    return found


JUDGES = {"meter": meter, "outputs": outputs, "bill": bill, "attempts": attempts, "exits": exits}


def judge(record: Record) -> list[str]:
    found = [record.trouble] if record.trouble else []
    return found + [f"{name}: {words}" for name, check in JUDGES.items() for words in check(record)]
