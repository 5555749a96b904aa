"""What every backend keeps, whatever rents the machines. Subclass it, and give it a rig."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import pytest

from cloudrun.backends import Backend, Boot
from cloudrun.errors import CloudrunError
from cloudrun.formats import seconds_of

RUNS = ("toy-20261125-101112-00ff", "a_b-c-20261125-101112-00ff", "x" * 41 + "-20261125-101112-00ff")


class Rig(Protocol):
    backend: Backend

    def boot(self, run: str, attempt: int, seconds: float) -> Boot:
        """For a machine that does nothing, and ends by itself after so long: its deadline."""


class BackendContract:
    @pytest.fixture
    def rig(self) -> Rig:
        raise NotImplementedError

    def make(self, rig: Rig, run: str = RUNS[0], attempt: int = 1, seconds: float = 60.0) -> str:
        name = f"{run}-{attempt}"
        rig.backend.create(name, rig.backend.offers()[0], rig.boot(run, attempt, seconds))
        return name

    def until(self, check: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20
        while not check():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self, rig: Rig, name: str) -> None:
        """Stop it and see it ended, as see_ended does."""

        def is_gone() -> bool:
            rig.backend.stop(name)
            found = rig.backend.find(name)
            return found is None or (found.ended is not None and not found.leftover)

        self.until(is_gone)

    def test_offers_are_machines_with_a_price_or_none(self, rig: Rig) -> None:
        assert rig.backend.offers()
        for offer in rig.backend.offers():
            assert offer.what and offer.boot_seconds >= 0 and (offer.price is None or offer.price >= 0)

    def test_what_was_never_created_is_absent_and_can_be_stopped(self, rig: Rig) -> None:
        assert rig.backend.find("nothing-1") is None
        rig.backend.stop("nothing-1")
        assert rig.backend.console("nothing-1") == ""
        assert isinstance(rig.backend.by_hand("nothing-1"), str)

    @pytest.mark.parametrize("run", RUNS)
    def test_a_created_machine_is_found_with_its_labels(self, rig: Rig, run: str) -> None:
        name = self.make(rig, run, 3)
        for found in (rig.backend.find(name), *rig.backend.all()):
            assert found and (found.name, found.run, found.attempt) == (name, run, 3)
            assert found.alive and found.ended is None
            assert abs(seconds_of(found.deadline) - time.time() - 60) < 30
            assert abs(found.started - time.time()) < 60
        assert any(word in rig.backend.by_hand(name) for word in (name, "kill", "gcloud"))

    def test_stop_ends_it_and_may_be_repeated(self, rig: Rig) -> None:
        name = self.make(rig)
        for _ in range(3):
            self.end(rig, name)
            assert not any(found.billed for found in rig.backend.all())

    def test_stop_ends_only_its_own(self, rig: Rig) -> None:
        first, eleventh = self.make(rig, attempt=1), self.make(rig, attempt=11)
        self.end(rig, first)
        assert [found.name for found in rig.backend.all()] == [eleventh]
        self.end(rig, eleventh)

    def test_a_name_is_created_once(self, rig: Rig) -> None:
        name = self.make(rig)
        with pytest.raises(CloudrunError):
            self.make(rig)
        assert [found.name for found in rig.backend.all()] == [name]
        self.end(rig, name)

    def test_a_machine_that_ended_by_itself_says_so_until_it_is_stopped(self, rig: Rig) -> None:
        name = self.make(rig, seconds=0.2)
        self.until(lambda: (found := rig.backend.find(name)) and found.ended)
        found = rig.backend.find(name)
        assert found and found.ended and not found.alive and abs(found.ended - time.time()) < 60
        assert found.leftover == any(found.billed for found in rig.backend.all())
        self.end(rig, name)
