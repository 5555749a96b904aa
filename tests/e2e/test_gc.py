"""What a lost client left behind is found and ended by whoever comes by. The meter is the judge."""

import time

from test_ends import POLITE, UNTIL_STOPPED, hang_when_finished, lose


def gc(machinery, *options):
    """What it says, exit code 0."""
    client = machinery.start("gc", *options)
    assert client.wait(60) == 0 and machinery.out(client) == ""
    return machinery.err(client)


def test_gc_says_what_there_is_to_do_and_does_it_and_is_silent_when_there_is_nothing(machinery):
    client = machinery.main(UNTIL_STOPPED).running("main.py", limit_self_end=0.5, limit_agent_gone=10.0)
    assert gc(machinery) == ""
    lose(client)
    hang_when_finished(machinery)
    time.sleep(1.5)
    assert "would end digits-" in gc(machinery, "--dry-run") and machinery.meter.members
    assert "ended digits-" in gc(machinery)
    assert machinery.ended(3)["layer"] == "sweep"
    assert gc(machinery) == gc(machinery, "--dry-run") == ""


def test_stop_all_ends_every_run(here):
    here.main(POLITE)
    clients = [here.running("main.py") for _ in range(2)]
    assert here.run("stop", "--all") == 0
    assert [client.wait(30) for client in clients] == [130, 130]
    here.meter.wait_gone(5)
    assert not here.place.open_runs()
    assert here.run("stop", "--all") == 0 and here.run("stop", "--all", "digits") == 2
