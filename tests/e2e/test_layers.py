"""Each layer of the promise alone: all others are out of action, and the billing meter says when it ended.

`make layers` prints what was measured. Everything is done from outside: signals, faults of the emulated
services, the provider's clock moved on. The bounds are those of the limits that the run's own order has.
"""

import signal

import pytest
from layers import LAYERS
from machine import signal_all, wait_until
from test_ends import SLEEP, UNTIL_STOPPED, hours, lose

from cloudrun.formats import seconds_of

# Beyond the bound: 4 s that Google, as emulated, waits for a guest that does not answer, the start of a
# client, and a computer on which much else goes on. What is out of action would not end it in any time.
ALLOWANCE = 30.0


class Stage:
    """A run of which single layers can be put out of action."""

    def __init__(self, machinery):
        self.machinery, self.place = machinery, machinery.place
        self.limits, self.deadline = {}, 0.0
        self.command = None  # the one that comes later

    def alone(self, main, *options, **limits):
        """A run whose client is killed when main.py has begun."""
        self.machinery.main(main)
        client = self.machinery.running(*options, "main.py", **limits)
        self.read_order()
        lose(client)

    def read_order(self):
        (order,) = self.place.orders()
        self.limits, self.deadline = order["limits"], seconds_of(order["deadline"])

    def signal(self, role, name):
        """Send it to all that is guard or agent, and return when that was."""
        pids = self.machinery.role(role)
        assert pids, f"there is no {role}"
        signal_all(pids, getattr(signal, name))
        return self.place.now()

    def freeze(self):
        self.place.freeze()
        return self.place.now()

    def until(self, when):
        """The provider's clock has come so far, and the machine is billed all the same."""
        wait_until(lambda: self.place.now() > when, when - self.place.now() + 1)
        assert self.machinery.meter.members, "somebody has ended it before"


# Each of them returns when the layer that is left had to act.


def agent(stage):
    """It has nobody to tell that the run is over."""
    stage.alone(UNTIL_STOPPED, limit_self_end=30.0)
    stage.signal("guard", "SIGSTOP")
    stage.machinery.wait_for("receipt.json")
    return stage.place.now()


def guard_agent_killed(stage):
    stage.alone(SLEEP)
    return stage.signal("agent", "SIGKILL")


def guard_agent_frozen(stage):
    stage.alone(SLEEP, limit_agent_silence=4.0)
    return stage.signal("agent", "SIGSTOP")


def guard_at_the_deadline(stage):
    stage.alone(SLEEP, hours(12))
    stage.signal("agent", "SIGSTOP")
    stage.place.cut_off()
    return stage.deadline


def provider(stage):
    if not hasattr(stage.place, "reach_limit"):
        pytest.skip("this computer has no provider")
    stage.alone(SLEEP, hours(30))
    stage.freeze()
    stage.place.reach_limit()
    return stage.deadline


def client_machine_never_awake(stage):
    stage.place.have_one_machine()
    stage.machinery.main(SLEEP)
    stage.machinery.start("main.py", limit_boot=4.0, limit_agent_silence=2.0)
    stage.machinery.wait_for("attempts/1/claim.json", 30)
    wait_until(lambda: stage.machinery.meter.members, 30)
    began = stage.place.now()
    stage.freeze()
    stage.read_order()
    return began


def client_machine_frozen(stage):
    stage.place.have_one_machine()
    stage.machinery.main(SLEEP)
    stage.machinery.running("main.py", limit_agent_silence=3.0)
    stage.read_order()
    return stage.freeze()


def next_command(stage):
    """From a computer that knows nothing of it. Until then nobody ends it: all five are out of action."""
    stage.alone(SLEEP, hours(12), limit_provider=0.5, limit_agent_silence=4.0)
    stage.freeze()
    stage.until(stage.deadline + 1.0)
    stage.machinery.project = stage.machinery.top / "elsewhere"
    stage.machinery.project.mkdir()
    stage.command = stage.machinery.start("gc", **stage.place.elsewhere(stage.machinery.project))
    return stage.place.now()


PLAYS = {
    "agent": agent,
    "guard, agent killed": guard_agent_killed,
    "guard, agent frozen": guard_agent_frozen,
    "guard, at the deadline": guard_at_the_deadline,
    "provider": provider,
    "client, machine never awake": client_machine_never_awake,
    "client, machine frozen": client_machine_frozen,
    "next command": next_command,
}
assert PLAYS.keys() == LAYERS.keys()


@pytest.mark.parametrize("name", PLAYS)
def test_one_layer_is_enough(machinery, record_property, name):
    stage = Stage(machinery)
    if name != "provider":
        stage.place.lose_limit()
    since = PLAYS[name](stage)
    bound = LAYERS[name].bound(stage.limits) + (stage.place.limit_late if name == "provider" else 0.0)
    machinery.meter.wait_gone(since + bound + ALLOWANCE - stage.place.now())
    seconds = stage.place.now() - since
    assert not stage.command or stage.command.wait(60) == 0
    record_property("layer", [name, machinery.place.name, f"{seconds:.1f} s, of {bound:g}"])
