"""Signals: the first one raises or is counted, what was ignored stays ignored, and all is put back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cloudrun.background import side_by_side
from cloudrun.errors import CloudrunError, Interrupted
from cloudrun.signals import HANDLED, Signals


def kill(signum: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", HANDLED)
def test_the_first_signal_raises_and_the_next_are_counted(signum: signal.Signals) -> None:
    with Signals() as signals:
        with pytest.raises(Interrupted) as error:
            kill(signum)
        kill(signum)
        kill(signal.SIGTERM)
    assert error.value.exit_code == 128 + signum
    assert str(error.value) == f"interrupted by {signum.name}"
    assert signals.received == [signum, signum, signal.SIGTERM]


def test_held_signals_are_counted_until_rearmed() -> None:
    with Signals() as signals:
        signals.hold()
        kill()
        kill(signal.SIGHUP)
        assert signals.received == [signal.SIGINT, signal.SIGHUP]
        signals.rearm()
        with pytest.raises(Interrupted):
            kill(signal.SIGTERM)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(signum) for signum in HANDLED]
    with pytest.raises(ZeroDivisionError), Signals():
        raise ZeroDivisionError
    assert [signal.getsignal(signum) for signum in HANDLED] == before


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            kill(signal.SIGHUP)
        assert signals.received == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupt_is_no_error_that_somebody_tries_again_after() -> None:
    assert not issubclass(Interrupted, Exception)
    assert not issubclass(Interrupted, CloudrunError)


RANDOM_MOMENTS = """
import sys
sys.path[:0] = {paths!r}
from cloudrun.errors import Interrupted
from cloudrun.signals import Signals
machines = 0
try:
    with Signals() as signals:
        print("ready", flush=True)
        while True:
            try:
                try:
                    machines += 1
                finally:
                    signals.hold()
            finally:
                machines -= 1
                signals.rearm()
            if signals.received:  # both came while they were held
                sys.exit(machines and 99)
except Interrupted:
    sys.exit(machines and 99)
"""


def test_two_signals_at_random_moments_leave_no_machine() -> None:
    program = RANDOM_MOMENTS.format(paths=[path for path in sys.path if path])
    for number in range(40):
        process = subprocess.Popen([sys.executable, "-S", "-c", program], stdout=subprocess.PIPE)
        assert process.stdout and process.stdout.readline() == b"ready\n"
        time.sleep(0.0003 * number)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.stdout.close()
        assert process.wait(10) in (0, -signal.SIGTERM)  # the second may come when all is put back


def test_a_signal_does_not_wait_for_what_is_done_side_by_side() -> None:
    """As a sweep that tries to end a machine; nothing else is begun."""
    begun, done, released = list[int](), list[int](), threading.Event()

    def act(number: int) -> None:
        begun.append(number)
        kill()
        released.wait(5)
        done.append(number)

    with Signals(), pytest.raises(Interrupted):
        side_by_side(act, range(4), 1)
    assert (begun, done) == ([0], [])
    released.set()
