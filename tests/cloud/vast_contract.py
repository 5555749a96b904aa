"""The life of a contract, which vast.ai's API calls an instance, and the container behind it.

Sources: docs.vast.ai, "Instances FAQ", "Docker Execution Environment", "Billing"; where they are silent it
is said. `actual` is what the host reports, `intended` what the user wants, `current` what is paid for.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .machines import Gpu, Hardware, Machine
from .project import erase
from .vast_view import arguments, environ, hostname

if TYPE_CHECKING:
    from .vast_account import Market

KEPT = 48 * 3600.0  # how long the disk stays after the end of the rental (docs.vast.ai, "FAQ")
PAID = ("running", "exited", "frozen", "rebooting")  # with `current` running


class Contract:
    """`order` is the body of the create call. Every method is called under `clock.changed`."""

    def __init__(self, market: Market, number: int, offer: dict[str, Any], order: dict[str, Any]) -> None:
        self.market, self.id, self.offer, self.order = market, number, offer, order
        self.created = market.clock.now()
        self.end_date = self.created + offer["duration"]  # fixed when it is rented
        self.label: str | None = order.get("label") or None
        self.key = secrets.token_hex(32)
        self.price: float = order.get("price") or offer["dph_base"]  # dollars an hour, for the GPU
        self.actual: str | None = None
        self.intended = self.current = self.next = "running"
        self.message: str | None = None  # status_msg
        self.history: list[tuple[float, str | None]] = [(self.created, None)]
        self.started: float | None = None  # when it was last seen running
        self.starts = 0  # of the container
        self.port = 0  # of ssh, once it is known
        self.queued = False  # a start that waits for the GPU
        self.outbid = False
        self.ending = self.gone = False
        self.ssh_keys = list(market.ssh_keys)  # those of the account at this moment
        self.visible_at = self.created + market.faults.delay_of(self.label or "")
        self.machine: Machine | None = None
        self._pulled = self._stopping = False
        self._life = 0  # what was to happen later in an earlier life does not happen
        self._then: Callable[[], None] | None = None  # when the container's processes are gone
        market.meter.opened(self.id, offer, self.price, float(order["disk"]))
        self._bill()

    # --- what it is

    @property
    def bid(self) -> bool:
        return bool(self.order.get("price"))

    @property
    def disk(self) -> Path:
        return self.market.folder / "containers" / str(self.id)

    @property
    def log(self) -> str:
        """All that its starts wrote to /proc/1/fd/1."""
        found = sorted(
            self._folder.parent.glob(f"{self.id}-*/console"), key=lambda path: path.stat().st_mtime
        )
        return "".join(path.read_text(errors="replace") for path in found)

    @property
    def _folder(self) -> Path:
        return self.market.folder / "machines" / f"{self.id}-{self.starts}"

    @property
    def visible(self) -> bool:
        return not self.gone and self.market.clock.now() >= self.visible_at

    @property
    def paid(self) -> bool:
        """Whether the GPU costs money now."""
        return not self.gone and self.current == "running" and self.actual in PAID

    def _show(self, actual: str | None, message: str | None = None) -> None:
        self.actual = actual
        self.message = message if message is not None else self.message
        self.history.append((self.market.clock.now(), actual))
        self._bill()

    def _bill(self) -> None:
        self.market.meter.bills(self.id, gpu=self.paid, disk=not self.gone and self.actual != "offline")
        self.market.watch_credit()
        self.market.clock.changed.notify_all()

    # --- coming up

    def provision(self) -> None:
        half = self.market.timing.provisioning / 2
        self._later(half, lambda: self._show("created"))
        self._later(2 * half, self._load)
        self._plan_end()

    def _plan_end(self) -> None:
        clock = self.market.clock
        clock.at(self.end_date, self._expire)
        clock.at(self.end_date + KEPT, self.destroy)

    def park(self) -> None:
        """Made although it cannot run now: it waits, and its disk is billed."""
        self.intended = self.current = self.next = "stopped"
        self.queued = True
        self._show("created", "")
        self._plan_end()

    def _load(self) -> None:
        if error := self.market.faults.broken.get(self.offer["machine_id"]):
            self.message = error
            self._show("created", error)
            return
        self._show("loading", "f1555660aa88: Pulling fs layer")
        if self.offer["machine_id"] not in self.market.faults.stuck_loading:
            self._later(self.market.timing.pull, self._pull)

    def _pull(self) -> None:
        if not self._pulled:
            self._pulled = True
            self.market.meter.traffic(self.id, down=self.market.image_bytes)
        self._run()

    def _run(self) -> None:
        self.current, self.started = "running", self.market.clock.now()
        self._show("running", f"success, running {self.order.get('image')}/ssh")
        # sshd, its port and onstart come a little after the container.
        self._later(self.market.timing.boot, self._boot)

    def _boot(self) -> None:
        self.port = 33_000 + self.id % 1000
        self.starts += 1
        if not self.market.real_machines:
            return
        self.machine = Machine(self._folder, self.disk, self._hardware(), self._machine_ended)
        self.market.started(self.machine)
        self.market.meter.booted(self.id, self.machine)

    def _hardware(self) -> Hardware:
        name: str = self.offer["gpu_name"]
        maker = "NVIDIA GeForce" if name.startswith("RTX ") and name[4:].isdigit() else "NVIDIA"
        gpu = Gpu(f"{maker} {name}", self.offer["gpu_ram"], self.offer["num_gpus"])
        container = {"onstart": self.order.get("onstart") or "", "args": arguments(self.order)}
        faults = self.market.faults
        network, lacks = self.offer["machine_id"] not in faults.isolated, tuple(faults.lacking)
        return Hardware(hostname(self), gpu, environ(self), 0.0, network, container, lacks)

    # --- going down

    def _down(self, then: Callable[[], None]) -> None:
        """SIGKILL for all its processes, and when they are gone: this."""
        if self.machine:
            self._then = then
            self.machine.cut()
        else:
            then()

    def _machine_ended(self, machine: Machine, how: str) -> None:
        with self.market.clock.changed:
            if machine is not self.machine:
                return
            self.machine, then, self._then = None, self._then, None
            (then or self._exit)()

    def _exit(self) -> None:
        """Process 1 ended by itself. That of `args` is started again; else nobody does anything."""
        self._show("exited")
        if self.order.get("runtype") == "args":
            self._later(self.market.timing.boot, self._run)

    def stop(self) -> None:
        """Of the user, or of the service. The disk goes on costing money."""
        self.queued = self.outbid = False
        if not self.ending:
            self._halt("exited")

    def _halt(self, actual: str) -> None:
        self.intended = self.next = "stopped"
        self._life += 1
        if self.actual == "offline":
            self.current = "stopped"
            return
        self._stopping = True
        self._later(self.market.timing.stop, lambda: self._down(lambda: self._stopped(actual)))

    def _stopped(self, actual: str) -> None:
        self.current, self.port, self._stopping = "stopped", 0, False
        self._show(actual)
        if self.next == "running":  # it was started again in the meantime
            self.start()

    def start(self) -> bool:
        """False if the GPU is somebody else's: then the start waits, without any limit."""
        if self.ending or self.market.clock.now() >= self.end_date:
            return False
        self.intended = self.next = "running"
        if self._stopping:
            return True
        if self.current == "running":
            if self.actual == "frozen":
                self.thaw()
            return True
        if self.offer["machine_id"] in self.market.faults.taken:
            self.queued = True
            return False
        self.resume()
        return True

    def resume(self) -> None:
        """Its turn has come: all of it starts again on the same disk, onstart too."""
        if self.ending:
            return
        self.queued = self.outbid = False
        self.intended = self.next = self.current = "running"
        self._life += 1
        self._stopping = False
        self._load()

    def destroy(self) -> None:
        if self.ending:
            return
        self.ending, self.queued = True, False
        self.intended = self.next = "stopped"
        self._life += 1
        self._later(self.market.timing.destroy, lambda: self._down(self._destroyed))

    def _destroyed(self) -> None:
        if self.offer["machine_id"] in self.market.faults.stuck:
            self._later(0.02, self._destroyed)
            return
        self._life += 1
        self.gone, self.current, self.port = True, "stopped", 0
        self.history.append((self.market.clock.now(), "destroyed"))
        self.market.meter.closed(self.id)
        self.market.watch_credit()
        self.market.let_again(self)
        erase(self.disk)
        self.market.clock.changed.notify_all()

    def rebid(self, price: float) -> None:
        self.price = price
        self.market.meter.accounts[self.id].price = price
        self.market.watch_credit()

    # --- what happens to it

    def lose_bid(self) -> None:
        if self.ending:  # it is being destroyed: nobody needs to bid for its GPU
            return
        self.outbid = True
        self._halt("stopped")

    def _expire(self) -> None:
        """The end that was fixed at its start: stopped, and not deleted for two days."""
        if not self.ending and self.current == "running":
            self._halt("exited")

    def lose_host(self) -> None:
        """Neither billed nor reachable; nothing of it runs."""
        if self.ending:
            return
        self._life += 1
        self._down(lambda: self._show("offline", "Host is offline"))

    def regain_host(self) -> None:
        """The host is there again and goes on with the contract."""
        if self.ending or self.actual != "offline":
            return
        if self.intended == "running":
            self._run()
        else:
            self._show("exited")

    def freeze(self) -> None:
        if self.machine:
            self.machine.freeze()
        self._show("frozen")

    def crash(self) -> None:
        """Process 1 is gone, and nobody wanted that."""
        if self.machine:
            self.machine.cut()
        else:
            self._exit()

    def thaw(self) -> None:
        if self.machine:
            self.machine.thaw()
        self._show("running")

    def reboot(self, *, wipe: bool = False) -> None:
        """The same GPU and, but for `wipe`, the same disk."""
        self._life += 1
        self._show("rebooting")

        def again() -> None:
            if wipe:
                erase(self.disk)
            self._run()

        self._down(again)

    def _later(self, seconds: float, act: Callable[[], Any]) -> None:
        life = self._life

        def due() -> None:
            if life == self._life:
                act()

        self.market.clock.after(seconds, due)
