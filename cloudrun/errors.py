"""Everything cloudrun raises on purpose. Each error knows the exit code it ends in.

Sent to the machine with the agent: standard library, Python 3.8.
"""

from __future__ import annotations

import signal

USAGE = 2
UNKNOWN = 121
STILL_BILLED = 122
LIMIT = 124
FAILED = 125


class CloudrunError(Exception):
    """A sentence for the user that names the thing and the next action."""

    exit_code = FAILED


class UsageError(CloudrunError):
    """Wrong settings, options or project; the message holds every problem, a line each."""

    exit_code = USAGE


class Interrupted(BaseException):
    """Signal `signum` came. Like KeyboardInterrupt no Exception: whoever tries again must not catch it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class NoCapacity(CloudrunError):
    """This offer cannot be had now, and nothing was started; another one may be."""


class Refused(CloudrunError):
    """The provider rents nothing to this account now, and nothing was started; no other offer can help."""


class Held(CloudrunError):
    """Another run has the machine that is kept, and nothing was started."""


class StillRunning(CloudrunError):
    """An instance could not be seen ended. Swallowing this error hides a bill."""

    exit_code = STILL_BILLED


class BucketError(CloudrunError):
    """The bucket could not do what was asked."""

    permanent = False


class BucketRefused(BucketError):
    """The bucket said no (full, read-only, forbidden): asking again in a second will not help."""

    permanent = True


class Missing(BucketError):
    """No such object."""

    permanent = True


class Conflict(BucketError):
    """A precondition failed: somebody else created or replaced the object."""

    permanent = True


class Corrupt(BucketError):
    """An object is not what its name or its format promises."""

    permanent = True
