"""Every limit of a run, in one table that travels in its order. Seconds, unless the name says otherwise.

CLOUDRUN_LIMITS (`name=value,…`, for tests) can only make a limit smaller: no layer can be turned off.
"""

from __future__ import annotations

from collections.abc import Mapping

DEFAULTS: dict[str, float] = {
    "boot": 300,  # from the create call to the agent's first word
    "boot_least": 90,  # a machine in a cloud that has less than this, and the reserve, is not started
    "provisioning": 300,  # on vast.ai, from the create call until its host begins
    "pull": 1800,  # until its host has loaded the image
    "away": 180,  # while its host is out of reach, or it is frozen, before the run goes on elsewhere
    "fetch": 7200,  # inputs onto the machine
    "environment": 1800,  # the login shell, and installing what the project requires
    "login": 20,  # the login shell alone
    "save": 900,  # the last save, the log's tail and the receipt, each
    "save_interval": 60,  # between two saves; 10 times the last save's duration if that is more
    "grace_interrupt": 10,  # from SIGINT to SIGTERM
    "grace_terminate": 5,  # from SIGTERM to SIGKILL
    "grace_preempted": 5,  # from SIGTERM to SIGKILL when the machine is being taken away
    "stuck": 60,  # what the kernel cannot kill for so long (a driver, a lost disk) does not keep the save
    "drain": 10,  # for what main.py left behind
    "reserve_grace": 30,  # kept back at the end of the run: this much …
    "reserve_save": 60,  # … and this much, or twice the longest save if that is more …
    "reserve_max": 900,  # … at most so much, and never more than a fifth of the run
    "agent_beat": 5,  # between the agent's signs of life to its guard
    "agent_silence": 300,  # without one the guard ends the machine
    "agent_gone": 10,  # from the agent's death without a receipt to the end of the machine, or from its
    # last word until it ends the machine itself, because the guard hangs
    "state": 10,  # between the agent's signs of life in the bucket
    "client_beat": 10,  # between the client's signs of life in the bucket
    "client_lost": 120,  # without one the run ends, if the user asked for that
    "provider": 60,  # from the deadline to the provider's own limit
    "stop": 60,  # for seeing an instance ended
    "look": 2,  # between two looks at a machine in a cloud
    "appears": 60,  # from a create call in a cloud to the moment when its machine can be found
    "self_end": 30,  # for a machine that has finished to end itself before we end it
    "spool": 256 << 20,  # bytes of output kept on the machine's disk while the bucket is out of reach
}


def limits(environ: Mapping[str, str]) -> dict[str, float]:
    """The table, shrunk by CLOUDRUN_LIMITS. Raises ValueError with a sentence."""
    table = dict(DEFAULTS)
    for item in filter(None, environ.get("CLOUDRUN_LIMITS", "").split(",")):
        name, _, text = item.partition("=")
        if name not in table:
            raise ValueError(f"CLOUDRUN_LIMITS: there is no limit called {name!r}")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 < value <= table[name]:
            raise ValueError(f"CLOUDRUN_LIMITS: {name} must be above 0 and at most {table[name]:g}")
        table[name] = value
    return table
