"""What a container of a stranger is given, in whole runs: none of it is good for long, nothing is lost."""

import base64
import json
import signal

import pytest
from given import Judge, of_files, of_processes
from machine import wait_until
from stranger import REFRESH, Google
from test_ends import WORK, lose

SLOW = (
    WORK
    + """
print("up", flush=True)
for _ in range({seconds} * 10):
    time.sleep(0.1)
write("model/late", "late")
print("done", flush=True)
sys.exit(7)
"""
)


@pytest.fixture
def google(vast, tmp_path):
    """The bucket asks for tokens; the client has those of a person, the machine what it is given."""
    found = Google(tmp_path, vast.place.storage)
    yield found
    found.close()


def ended(vast):
    """Nothing is billed; who destroyed itself while nobody looked may have been gone for longer."""
    vast.meter.wait_gone(5)
    bill = vast.object("bill.json")
    assert bill["proof"] and bill["seconds"] > vast.meter.seconds - 1.0
    assert not vast.place.open_runs()


def given_to_container(vast):
    """The create call, and all that a host can see of the container: processes, their environments, files."""
    (create,) = [request for request in vast.place.cloud.requests if request.method == "asks.create"]
    texts, (machine,) = [json.dumps(create.body)], vast.place.cloud.all_machines
    texts.append(base64.b64decode(create.body["env"]["CLOUDRUN_PAYLOAD"]).decode())
    texts += of_processes(machine.processes())
    files = of_files(vast.place.cloud.market.folder / "containers")
    assert any("PASSWORD" not in text and "def write(path, text)" in text for text in files), (
        "main.py is there"
    )
    return texts + files


def test_nothing_that_a_container_has_reads_later_or_changes_anything(vast, google):
    vast.main(SLOW.format(seconds=60))
    client = vast.running("-e", "PASSWORD=of-the-program", "main.py", **google.env)
    wait_until(lambda: vast.object("token.json"), 20, "a fresh token")
    stored = [found.data.decode("utf-8", "replace") for found in google.storage.objects("b").values()]
    judge = Judge(google.storage, google.tokens, [*given_to_container(vast), *stored])
    judge.no_account(vast.place.cloud.key, REFRESH, "client_secret")
    run = vast.object("order.json")["run"]
    judge.narrow("runs/", "digits", run, 1)
    google.tokens.expire()
    made = judge.nothing_later()
    assert all(f"/runs/{run}/attempts/1/late/" in name for name in made), made
    client.send_signal(signal.SIGINT)
    wait_until(lambda: "once more ends the machine at once" in vast.err(client), 20)
    client.send_signal(signal.SIGINT)
    assert client.wait(60) == 130, vast.err(client)
    ended(vast)
    assert google.storage.sessions.open() == 0
    assert not [
        name for name in google.storage.objects("b") if name.endswith(("token.json", "sessions.json"))
    ]


def test_a_run_that_is_alone_delivers_all_and_destroys_itself(vast, google):
    google.logins.narrow_seconds = 6.0
    vast.main(SLOW.format(seconds=12))
    lose(vast.running("main.py", **google.env))
    vast.meter.wait_gone(60)
    assert not vast.object("receipt.json") and not vast.saved("model/late")
    waiting = vast.start("wait", **google.env)
    assert waiting.wait(60) == 7, vast.err(waiting)
    assert vast.object("receipt.json")["status"] == 7 and vast.saved("model/late")
    ended(vast)
    logs = vast.start("logs", **google.env)
    assert logs.wait(30) == 0 and vast.out(logs).endswith("up\ndone\n")
    assert vast.run("pull", **google.env) == 0
    assert vast.local("model/late") == "late"
    assert google.storage.sessions.open() == 0


def test_a_run_that_is_followed_outlives_many_tokens(vast, google):
    google.logins.narrow_seconds = 6.0
    vast.main(SLOW.format(seconds=12))
    client = vast.start("main.py", **google.env)
    assert client.wait(90) == 7, vast.err(client)
    assert vast.out(client).endswith("up\ndone\n") and vast.local("model/late") == "late"
    assert "goes on alone" not in vast.err(client)
    ended(vast)


STEP = (
    WORK + "print('up', os.path.exists('model/step'), flush=True)\n"
    "if os.path.exists('model/step'): sys.exit(9)\n"
    "write('model/step', '1'); time.sleep(100)"
)


def test_a_container_that_starts_again_when_its_first_token_is_over_goes_on(vast, google):
    """With the one that its agent left on its disk: what it was created with is of no use any more."""
    google.logins.narrow_seconds = 8.0
    vast.main(STEP)
    client = vast.start("main.py", **google.env)
    first = wait_until(lambda: [grant for grant in google.tokens.values() if grant.rules], 30)[0]
    google.logins.narrow_seconds = 60.0
    wait_until(lambda: vast.saved("model/step"), 30)
    wait_until(lambda: first.expires < google.tokens._clock.now(), 20)
    (made,) = vast.place.cloud.meter.running()
    vast.place.cloud.restart(made)
    assert client.wait(60) == 9, vast.err(client) + vast.place.cloud.instances[made].log
    assert vast.out(client) == "up False\nup True\n" and "goes on alone" not in vast.err(client)
    ended(vast)
    assert vast.object("bill.json")["attempts"] == 1


def test_a_container_that_starts_again_without_any_token_is_followed_by_another_machine(vast, google):
    """It cannot know whether its run has gone on elsewhere; who sees that it is gone can."""
    google.logins.narrow_seconds = 6.0
    vast.main(STEP)
    lose(vast.running("main.py", text="up False\n", **google.env))
    wait_until(lambda: vast.saved("model/step"))
    (made,) = vast.place.cloud.meter.running()
    wait_until(lambda: (vast.object("attempts/1/state.json") or {}).get("alone"), 30)
    grants = [grant for grant in google.tokens.values() if grant.rules]
    wait_until(lambda: all(grant.expires < google.tokens._clock.now() for grant in grants), 20)
    vast.place.cloud.restart(made)
    wait_until(lambda: "401" in vast.place.cloud.instances[made].log, 30, "that the guard gives up")
    vast.place.cloud.destroy(made)  # as the guard does 20 s later
    vast.meter.wait_gone(10)
    google.logins.narrow_seconds = 3600.0
    waiting = vast.start("wait", **google.env)
    assert waiting.wait(60) == 9, vast.err(waiting)
    ended(vast)
    assert vast.object("bill.json")["attempts"] == 2


def test_stop_ends_a_run_that_is_alone_at_once(vast, google):
    google.logins.narrow_seconds = 6.0
    vast.main(SLOW.format(seconds=100))
    lose(vast.running("main.py", **google.env))
    wait_until(lambda: (vast.object("attempts/1/state.json") or {}).get("alone"), 30)
    stop = vast.start("stop", **google.env)
    assert stop.wait(60) == 0, vast.err(stop)
    assert "it goes on alone" in vast.err(stop)
    ended(vast)
