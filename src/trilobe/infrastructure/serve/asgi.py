"""The same server as an ASGI application, for those who bring their own front: uvicorn, a larger application, Ray.

Our own front (``http.py``) costs a third of the time of a request; this one exists so that the server can live inside
something else.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from trilobe.errors import TrilobeError
from trilobe.infrastructure.serve.http import Reply, Request
from trilobe.infrastructure.serve.protocol import Refused
from trilobe.infrastructure.serve.server import Server

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Asgi:
    """A :class:`~trilobe.infrastructure.serve.server.Server` as ASGI has it.

    ``make`` is called once, inside the event loop; what is to be served is then applied to the server it gives.
    """

    def __init__(self, make: Callable[[], Awaitable[Server]]) -> None:
        self._make = make
        self._server: asyncio.Task[Server] | None = None

    async def server(self) -> Server:
        """The server, made when first needed."""
        if self._server is None:
            self._server = asyncio.ensure_future(self._make())
        return await self._server

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """One request (or the life of the application). The answer is JSON or tensors, whatever happens."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        server = await self.server()
        try:
            headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
            body = await _body(receive, server.max_body)
            path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1").partition("?")[0]
            answer = server.handle(
                Request(scope["method"], path, headers, body, scope["query_string"].decode("latin-1"))
            )
            reply = answer if isinstance(answer, tuple) else await answer
        except Exception as error:  # noqa: BLE001 (whatever it is, the client gets an answer; explain logs it)
            reply = server.explain(error)
        await _send(send, reply)

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self.server()
                except TrilobeError as error:
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
                await send({"type": "lifespan.startup.complete"})
            else:
                (await self.server()).close()
                await send({"type": "lifespan.shutdown.complete"})
                return


async def _body(receive: Receive, limit: int) -> bytes:
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the client left before its request was whole")
        body += message.get("body", b"")
        if len(body) > limit:
            raise Refused(413, "the body is too large", expected=f"at most {limit} bytes", hint="send smaller batches")
        more = message.get("more_body", False)
    return bytes(body)


async def _send(send: Send, reply: Reply) -> None:
    status, headers, body = reply
    pairs = [
        (k.encode("latin-1"), v.encode("latin-1")) for k, v in {**headers, "content-length": str(len(body))}.items()
    ]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
