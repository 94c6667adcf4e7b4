"""A network between client and server, in a process: ``python link.py PORT SERVER_PORT ONE_WAY_MS MBIT``.

What goes in leaves ``ONE_WAY_MS`` later, no faster than ``MBIT`` megabits per second in each direction, shared by all
connections. It knows no loss and no windows: a simulation, kinder than a network.
"""

import asyncio
import socket
import sys


class Pipe(asyncio.Protocol):
    """One end of a connection; what it reads is written by ``other``, later."""

    other: "Pipe | None" = None

    def __init__(self, link: "Link", direction: int) -> None:
        self.link, self.direction = link, direction
        self.waiting: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self.waiting.append(data)
        else:
            self.link.pass_on(data, self.direction, self.other)

    def connection_lost(self, error: Exception | None) -> None:
        if self.other is not None:
            self.other.transport.close()


class Link:
    """Delay and rate, for each of two directions."""

    def __init__(self, server_port: int, delay: float, rate: float) -> None:
        self.server_port, self.delay, self.rate = server_port, delay, rate
        self.loop = asyncio.get_running_loop()
        self.free = [0.0, 0.0]

    def pass_on(self, data: bytes, direction: int, to: Pipe) -> None:
        self.free[direction] = max(self.loop.time(), self.free[direction]) + len(data) / self.rate
        self.loop.call_at(self.free[direction] + self.delay, to.transport.write, data)

    def accept(self) -> Pipe:
        near = Pipe(self, 0)

        async def join() -> None:
            _, far = await self.loop.create_connection(lambda: Pipe(self, 1), "127.0.0.1", self.server_port)
            near.other, far.other = far, near
            for data in near.waiting:
                self.pass_on(data, 0, far)

        near.task = self.loop.create_task(join())
        return near


async def main(port: int, server_port: int, delay_ms: float, mbit: float) -> None:
    link = Link(server_port, delay_ms / 1000, mbit * 1e6 / 8)
    server = await link.loop.create_server(link.accept, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
