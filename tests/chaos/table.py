"""docs/chaos.md: what a campaign has shown, and by hand below it what its failures led to."""

import subprocess
import time
from collections import Counter

MENDED = "## Found and mended"


def page(results, seed, commit, day):
    """Markdown, up to what people have written."""
    failed = [result for result in results if result["failures"]]
    drawn = Counter(fault["name"] for result in results for fault in result["faults"])
    happened = Counter(
        fault["name"] for result in results for fault in result["faults"] if fault["at"] is not None
    )
    places = Counter(result["backend"] for result in results)
    where = ", ".join(f"{count} on {name}" for name, count in sorted(places.items()))
    lines = [
        "# The fault campaign",
        "",
        f"`make chaos N={len(results)} SEED={seed}`, {day}, commit {commit}: {len(results)} runs, {where};",
        f"**{len(failed)} failed**. Each had one to three of these faults. A fault whose moment did not come",
        "before the run's end did not happen; what waits for a request to a service counts as happened.",
        "",
        "| fault | drawn | happened |",
        "|---|---|---|",
        *(f"| {name} | {count} | {happened[name]} |" for name, count in sorted(drawn.items())),
        "",
        "## Worst cases",
        "",
        *worst(results),
        "",
        "## Failures",
        "",
        *(f"- seed {result['seed']}: {'; '.join(result['failures'])}" for result in failed),
        *(["None."] if not failed else []),
        "",
    ]
    return "\n".join(lines)


def worst(results):
    """A line or two per judge, where it measures anything."""
    billed = [result for result in results if result.get("bill")]
    known = [
        result for result in billed if result["bill"]["seconds"] is not None and not result.get("limited")
    ]
    apart = {}
    for each in known:
        apart.setdefault(each["backend"], []).append(abs(each["bill"]["seconds"] - each["metered"]))
    differ = ", ".join(f"{max(found):.2f} s on {name}" for name, found in sorted(apart.items()))
    unknown = sum(result["bill"]["seconds"] is None for result in billed)
    codes = Counter(str(client["code"]) for result in results for client in result.get("clients", ())[:1])
    exits = ", ".join(f"{code} {count} times" for code, count in sorted(codes.items()))
    late = sum(bool(result.get("late")) for result in results)
    required, saves = (sum(result.get(name, 0) for result in results) for name in ("required", "saves"))
    return [
        f"- Meter: a machine was billed for {max(r.get('longest', 0.0) for r in results):.1f} s at most;",
        f"  {late} were ended by a later command or the provider's limit only, and a fault explains each.",
        f"- Outputs: {required} contents had to be there; {saves} saves were looked at for what is torn.",
        f"- Bill: it differs from the meter by {differ} at most",
        "  (vast.ai never says when a machine ended: its bill ends when that is seen);",
        f"  {unknown} say that the time is unknown.",
        f"- Exit codes of the first client: {exits}.",
        f"- A run took {max(r['took'] for r in results):.0f} s at most, on a computer that was late by "
        f"{max(r['lag'] for r in results):.1f} s at most.",
    ]


def write(path, results, seed):
    """The page; what people have written below MENDED stays."""
    written = path.read_text() if path.exists() else ""
    kept = written[written.index(MENDED) :] if MENDED in written else f"{MENDED}\n"
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    path.parent.mkdir(exist_ok=True)
    path.write_text(page(results, seed, commit, time.strftime("%Y-%m-%d", time.gmtime())) + "\n" + kept)
