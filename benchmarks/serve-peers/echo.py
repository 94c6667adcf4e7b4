"""What a request costs before any model: our HTTP front with a handler that sends the body back.

``python echo.py PORT``.
"""

import asyncio
import signal
import socket
import sys

from trilobe.infrastructure.serve.http import HttpServer


async def main(port: int) -> None:
    listener = socket.create_server(("127.0.0.1", port), backlog=2048)
    listener.setblocking(False)
    server = HttpServer(lambda request: (200, {"content-type": "application/octet-stream"}, request.body))
    await server.start(listener)
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    await over.wait()
    await server.stop(1.0)


asyncio.run(main(int(sys.argv[1])))
