"""A long line: TCP to a server of this computer with a round trip and a rate, shared by all connections.

    with Link("127.0.0.1:8080", delay=0.01, rate=500e6) as link: ... link.url ...

Without a link to make it prints what it can carry when nothing slows it. It delays each direction, holds
the first byte of a connection back for the round trip that connecting would take, and has one queue for
each direction; it has neither losses nor a slow start, so that a new connection is as fast as an old one.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import sys
import threading
import time
from typing import Any

WINDOW = 4 << 20  # bytes of a connection that may be on their way, some times what 500 Mbit/s carry in 20 ms
DELAY, RATE = 0.01, 500e6  # seconds each way, bits per second


class Direction:
    """One way of the link: a byte leaves when those before it, of whatever connection, have left."""

    def __init__(self, delay: float, rate: float) -> None:
        self.delay, self._seconds_per_byte, self._free = delay, 8 / rate if rate else 0.0, 0.0

    def due(self, now: float, size: int) -> float:
        self._free = max(self._free, now) + size * self._seconds_per_byte
        return self._free + self.delay


class End(asyncio.Protocol):
    """What reads one end of a connection and writes its other end, later."""

    def __init__(self, way: Direction, born: float = 0.0) -> None:
        self._way, self._born, self._loop = way, born, asyncio.get_running_loop()
        self._underway = 0
        self._blocked = self._closed = False
        self.other: End | None = None
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        with_nothing_held_back(transport)

    def data_received(self, data: bytes) -> None:
        self._underway += len(data)
        self._later(len(data), self._deliver, data)
        self._regulate()

    def connection_lost(self, error: Exception | None) -> None:
        self._closed = True
        self._later(0, self._hang_up)

    def pause_writing(self) -> None:
        if self.other:
            self.other._block(True)

    def resume_writing(self) -> None:
        if self.other:
            self.other._block(False)

    def _later(self, size: int, act: Any, *arguments: Any) -> None:
        now = self._loop.time()
        self._loop.call_at(self._way.due(max(now, self._born), size), act, *arguments)

    def _deliver(self, data: bytes) -> None:
        self._underway -= len(data)
        if self.other and self.other.transport:
            self.other.transport.write(data)
        self._regulate()

    def _hang_up(self) -> None:
        if self.other and self.other.transport:
            self.other.transport.close()

    def _block(self, blocked: bool) -> None:
        self._blocked = blocked
        self._regulate()

    def _regulate(self) -> None:
        if self._closed:
            return
        if self._blocked or self._underway > WINDOW:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()


def with_nothing_held_back(transport: Any) -> None:
    transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    transport.set_write_buffer_limits(high=WINDOW)


async def serve(target: str, delay: float, rate: float, certificate: str) -> None:
    """Prints the port and serves until it is killed."""
    loop = asyncio.get_running_loop()
    there, back = Direction(delay, rate), Direction(delay, rate)
    host, _, port = target.rpartition(":")

    class Near(End):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.pause_reading()
            self._task = loop.create_task(self.connect())

        async def connect(self) -> None:
            far = End(back)
            far.other = self
            await loop.create_connection(lambda: far, host, int(port))
            self.other = far
            self.transport.resume_reading()

    context = None
    if certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
    server = await loop.create_server(
        lambda: Near(there, loop.time() + 2 * delay), "127.0.0.1", 0, ssl=context, backlog=256
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


class Link:
    """In a process of its own, so that it takes no time of those whom it connects.

    `certificate`: a file with key and certificate for those who speak nothing but TLS.
    """

    def __init__(self, target: str, delay: float = DELAY, rate: float = RATE, certificate: str = "") -> None:
        command = [sys.executable, __file__, "serve", target, str(delay), str(rate), certificate]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        self.port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def measure(delay: float, rate: float, size: int = 512 << 20, connections: int = 4) -> tuple[float, float]:
    """(Mbit/s of all connections together, seconds of a round trip with its connection)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        with Link(f"127.0.0.1:{server.getsockname()[1]}", delay, rate) as link:
            began = time.perf_counter()
            push(link.port, 1)
            trip = time.perf_counter() - began
            threads = [
                threading.Thread(target=push, args=(link.port, size // connections))
                for _ in range(connections)
            ]
            began = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return size * 8 / (time.perf_counter() - began) / 1e6, trip


def answer(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # it was closed
            return
        threading.Thread(target=swallow, args=(connection,), daemon=True).start()


def swallow(connection: socket.socket) -> None:
    """Read as many bytes as the first 8 announce, then say that they are here."""
    buffer = bytearray(1 << 20)
    with connection:
        left = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")
        while left > 0:
            left -= connection.recv_into(buffer, min(left, len(buffer)))
        connection.sendall(b".")


def push(port: int, size: int) -> None:
    block = bytes(1 << 20)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(size.to_bytes(8, "big"))
        for at in range(0, size, len(block)):
            connection.sendall(block[: size - at])
        connection.recv(1)


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        target, delay, rate, certificate = sys.argv[2:6]
        asyncio.run(serve(target, float(delay), float(rate), certificate))
        return
    print("{:<44} {:>14} {:>26}".format("the link", "measured", "wanted"))
    speed, trip = measure(0.0, 0.0)
    print("{:<44} {:>14} {:>26}".format("alone, nothing slowed", f"{speed:.0f} Mbit/s", "far above 500"))
    speed, trip = measure(DELAY, RATE, 128 << 20)
    print("{:<44} {:>14} {:>26}".format("with 20 ms and 500 Mbit/s", f"{speed:.0f} Mbit/s", "500 Mbit/s"))
    print("{:<44} {:>14} {:>26}".format("connecting and one round trip", f"{trip * 1000:.0f} ms", "40 ms"))


if __name__ == "__main__":
    main()
